"""The three products of vocabulary size: logits, gradient of the hidden states, that of the head's weight.

Sums are float32 or wider whatever the operands. On a GPU 16-bit operands stay as they are. Elsewhere they are
widened tile by tile, so that no wide copy of the weight is held: 16-bit products on a CPU are slower (by 200
times where it has no instructions for them) and would round the logits.

Letters: R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TILE_BYTES = 4 << 20


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def make_logits(hidden: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> None:
    """Write (or add) `hidden [R, D] @ weight [V, D].T` to `out [R, V]`, which is wide."""
    if _stays_narrow(hidden, weight):
        a, b = _narrow(hidden, weight)
        _multiply(a, b.T, out, add)
        return
    a, beta = hidden.to(out.dtype), 1.0 if add else 0.0
    for tile, part in _tiles(weight, out.dtype):
        torch.addmm(out[:, tile], a, part.T, beta=beta, out=out[:, tile])


def to_hidden(dz: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """`dz [R, V] @ weight [V, D]`: the gradient of hidden states, in the dtype of `like`."""
    if _stays_narrow(like, weight):
        a, b = _narrow(like, weight)
        return (dz.to(a.dtype) @ b).to(like.dtype)
    total = dz.new_zeros(dz.shape[0], weight.shape[1])
    for tile, part in _tiles(weight, dz.dtype):
        total.addmm_(dz[:, tile], part)
    return total.to(like.dtype)


def add_to_weight(total: Tensor, dz: Tensor, hidden: Tensor, fresh: bool = False) -> None:
    """Add `dz [R, V].T @ hidden [R, D]` to the wide `total [V, D]`; write it over a `fresh` one."""
    if _stays_narrow(hidden, hidden):
        (narrow,) = _narrow(hidden)
        _multiply(dz.to(narrow.dtype).T, narrow, total, add=not fresh)
    else:
        total.addmm_(dz.T.to(total.dtype), hidden.to(total.dtype), beta=0.0 if fresh else 1.0)


def gradient_dtype(pairs: Sequence[tuple[Tensor, Tensor]], wide: torch.dtype) -> torch.dtype:
    """The dtype in which the products of a gradient take it: 16 bits where all do, else `wide`."""
    if not all(_stays_narrow(x, weight) for x, weight in pairs):
        return wide
    found = {_narrow(x)[0].dtype for x, _ in pairs}
    return found.pop() if len(found) == 1 else wide


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Write (or add) the product of 16-bit matrices to a wide one."""
    if add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _stays_narrow(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the product runs in 16-bit operands: on a GPU, where they are or autocast is on."""
    if hidden.device.type != "cuda" or hidden.dtype == torch.float64:
        return False
    return torch.promote_types(hidden.dtype, weight.dtype).itemsize == 2 or torch.is_autocast_enabled("cuda")


def _narrow(*operands: Tensor) -> list[Tensor]:
    on = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if on else operands[0].dtype
    return [t.to(dtype) for t in operands]


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in tiles of the wanted dtype; one tile, the weight itself, where it has that dtype."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    rows = max(1, TILE_BYTES // (max(1, weight.shape[1]) * dtype.itemsize))
    buffer = weight.new_empty(min(rows, weight.shape[0]), weight.shape[1], dtype=dtype)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        yield slice(start, start + rows), buffer[: len(part)].copy_(part)
