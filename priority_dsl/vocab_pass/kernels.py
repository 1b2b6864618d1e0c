# pyright: reportMissingImports=false, reportIndexIssue=false
"""Two kernels in Triton over rows of logits on a GPU: what a sweep tells of them, their gradient in place.

One program a row. Sums are float32, float64 for float64 logits. Each lane of a program keeps a maximum and
sums of its own, which come together at the end, so that the loop over the row waits for nobody. Ties and
infinite logits come out as in `vocabulary.rows.Row` and `gradients.logit_gradient`, the reference, which
serve wherever there is no Triton (`sweep.has_kernels`).

Letters: R rows, L live rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from priority_dsl.registry import RowGradient
from priority_dsl.vocab_pass.heads import Head
from priority_dsl.vocabulary.rows import SweptRow

LANES = 2048  # of a program; with WARPS an estimate, both to be measured
WARPS = 8


def sweep_rows(z: Tensor, y: Tensor, needs: Sequence[str]) -> tuple[Tensor | None, ...]:
    """The fields of a `SweptRow` for logits `[R, V]` and targets `[R]`, `[R]` each, None where not needed."""
    z, wide = _in_rows(z), _wide(z)
    out = z.new_empty(len(SweptRow._fields), len(z), dtype=wide)
    flags = {name.upper(): name in needs for name in SweptRow._fields[3:]}
    if len(z):
        lanes = _lanes(z)
        with torch.cuda.device_of(z):
            _sweep[(len(z),)](
                z, y, out, z.stride(0), len(z), z.shape[-1],
                **flags, WIDE=_TYPES[wide], LANES=lanes, num_warps=_warps(lanes),
            )  # fmt: skip
    return tuple(out[i] if name in needs else None for i, name in enumerate(SweptRow._fields))


def write_gradient(
    z: Tensor,
    y: Tensor,
    row: Sequence[Tensor],
    parts: RowGradient,
    head: Head,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """The gradient `[R, V]` of the bare products of rows of logits z, in `dtype`, written over them.

    `row` has top, total and target of each row, `parts` what flows to its logits. Given the live `rows [L]`,
    the gradient of those alone, `[L, V]`, in new memory. Over wider logits the result is a strided view.
    """
    found = _room(z, dtype, rows)
    if not len(found):
        return found
    top, total, target = row
    numbers = [top if part is None else part for part in parts[:4]]
    added = z if parts.added is None else _in_rows(parts.added)
    lanes = _lanes(z)
    flags = {name.upper(): part is not None for name, part in parts._asdict().items()}
    with torch.cuda.device_of(z):
        _gradient[(len(found),)](
            z, y, top if rows is None else rows, found, top, total, target, *numbers, added,
            z.stride(0), found.stride(0), added.stride(0), z.shape[-1],
            **flags, CHOSEN=rows is not None, NARROWER=rows is None and dtype != z.dtype,
            SCALE=float(head.scale), CAP=float(head.cap or 0.0),
            WIDE=_TYPES[_wide(z)], LANES=lanes, num_warps=_warps(lanes),
        )  # fmt: skip
    return found


def _room(z: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """Where the gradient goes: over the logits, each row from where its logits start, or in new memory."""
    if rows is not None:
        return z.new_empty(len(rows), z.shape[-1], dtype=dtype)
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[-1]]


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _in_rows(z: Tensor) -> Tensor:
    """The same rows, each in one piece."""
    return z if z.stride(-1) == 1 else z.contiguous()


def _lanes(z: Tensor) -> int:
    return min(LANES, triton.next_power_of_2(z.shape[-1]))


def _warps(lanes: int) -> int:
    return max(1, WARPS * lanes // LANES)


@triton.jit
def _sweep(
    z_ptr, y_ptr, out_ptr, stride, rows, size,
    MOMENT: tl.constexpr, UPTO: tl.constexpr, UNDER: tl.constexpr, ABOVE: tl.constexpr, RIVAL: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    y = tl.load(y_ptr + row)
    target = tl.load(z_ptr + y).to(WIDE)
    lane = tl.arange(0, LANES)
    top = tl.full([LANES], float("-inf"), WIDE)
    rival = tl.full([LANES], float("-inf"), WIDE)
    total = tl.zeros([LANES], WIDE)
    moment = tl.zeros([LANES], WIDE)
    upto = tl.zeros([LANES], WIDE)
    under = tl.zeros([LANES], WIDE)
    above = tl.zeros([LANES], WIDE)
    for start in range(0, size, LANES):
        place = start + lane
        z = tl.load(z_ptr + place, mask=place < size, other=float("-inf")).to(WIDE)
        higher = tl.maximum(top, z)
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a lane of -inf so far has sums of 0
        faded = tl.exp(top - level)
        e = tl.exp(z - level)
        if MOMENT:
            fallen = tl.where(top == float("-inf"), 0.0, top - level)
            moment = faded * (moment + fallen * total) + tl.where(e > 0, e * (z - level), 0.0)
        if UPTO:
            upto = faded * upto + tl.where(z <= target, e, 0.0)
        if UNDER:
            under = faded * under + tl.where(z < target, e, 0.0)
        if ABOVE:
            above += tl.where(z > target, 1.0, 0.0)
        if RIVAL:
            rival = tl.where(place == y, rival, tl.maximum(rival, z))
        total = faded * total + e
        top = higher
    highest = tl.max(top, 0)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    faded = tl.exp(top - level)
    all_total = tl.sum(faded * total, 0)
    # Without a finite maximum the reference has no number, and with NaN none for what is compared with it.
    broken = float("nan")
    all_total = tl.where(highest == float("-inf"), broken, all_total)
    lost = (all_total != all_total) & (tl.abs(highest) != float("inf"))
    tl.store(out_ptr + row, tl.where(lost, broken, highest))
    tl.store(out_ptr + rows + row, all_total)
    tl.store(out_ptr + 2 * rows + row, target)
    if MOMENT:
        fallen = tl.where(top == float("-inf"), 0.0, top - level)
        tl.store(out_ptr + 3 * rows + row, tl.sum(faded * (moment + fallen * total), 0))
    if UPTO:
        tl.store(out_ptr + 4 * rows + row, tl.sum(faded * upto, 0))
    if UNDER:
        tl.store(out_ptr + 5 * rows + row, tl.sum(faded * under, 0))
    if ABOVE:
        tl.store(out_ptr + 6 * rows + row, tl.sum(above, 0))
    if RIVAL:
        tl.store(out_ptr + 7 * rows + row, tl.where(lost, broken, tl.max(rival, 0)))


@triton.jit
def _gradient(
    z_ptr, y_ptr, rows_ptr, out_ptr, top_ptr, total_ptr, logit_ptr,
    spread_ptr, target_ptr, centred_ptr, below_ptr, added_ptr,
    stride, out_stride, added_stride, size,
    CHOSEN: tl.constexpr,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, CENTRED: tl.constexpr, BELOW: tl.constexpr,
    ADDED: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, NARROWER: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i) if CHOSEN else i
    z_ptr += row.to(tl.int64) * stride
    out_ptr += i.to(tl.int64) * out_stride
    added_ptr += row.to(tl.int64) * added_stride
    y = tl.load(y_ptr + row)
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    logit = tl.load(logit_ptr + row)
    spread = tl.load(spread_ptr + row) if SPREAD else 0.0
    target = tl.load(target_ptr + row) if TARGET else 0.0
    centred = tl.load(centred_ptr + row) if CENTRED else 0.0
    below = tl.load(below_ptr + row) if BELOW else 0.0
    log_total = tl.log(total)
    lane = tl.arange(0, LANES)
    for start in range(0, size, LANES):
        place = start + lane
        inside = place < size
        z = tl.load(z_ptr + place, mask=inside, other=0.0).to(WIDE)
        d = z - top
        dz = tl.zeros([LANES], WIDE) + spread
        if CENTRED:  # where p is 0, log p is held finite, so that 0 times it is 0
            dz += centred * (tl.maximum(d, -1000.0) - log_total)
        if BELOW:
            dz += tl.where(z <= logit, below, 0.0)
        dz = dz * (tl.exp(d) / total)
        if ADDED:
            dz += tl.load(added_ptr + place, mask=inside, other=0.0).to(WIDE)
        if TARGET:
            dz += tl.where(place == y, target, 0.0)
        if CAP != 0.0:
            dz = dz * (1.0 - (z / CAP) * (z / CAP))
        if SCALE != 1.0:
            dz = dz * SCALE
        if NARROWER:  # the first half of a row's bytes is written while the second is still to be read:
            tl.debug_barrier()  # what any thread writes here, all have read
        tl.store(out_ptr + place, dz, mask=inside)
