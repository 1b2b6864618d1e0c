"""What the row kernels must do, on any device: as the torch operations do in float64, fused as dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from priority_dsl import compile_rule
from priority_dsl.fused_plan import fused_plan
from priority_dsl.registry import REGISTRY, Choice, RowGradient, Statistic
from priority_dsl.vocab_pass import Head, kernels
from priority_dsl.vocab_pass.gradients import logit_gradient
from priority_dsl.vocabulary.rows import Row, SweptRow, exponentials, total
from tests.test_fused import Case, compare

NEAR = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-6}
ROUNDED = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 2**-8}
IN_A_ROW = [name for name, word in REGISTRY.words.items() if isinstance(word, Statistic) and word.of_row]


@st.composite
def rows_of_logits(draw: st.DrawFn, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits `[R, V]` and targets `[R]`: ties, -inf, large offsets and vocabularies of one token."""
    size, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(list(NEAR)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    z = torch.randn(size, vocabulary, generator=g, dtype=torch.float64) * draw(st.sampled_from([1, 10, 300]))
    z = z.round() if draw(st.booleans()) else z
    z = z + draw(st.sampled_from([0.0, 1000.0]))
    hidden = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    hidden[:, draw(st.integers(0, vocabulary - 1))] = False  # a row without a finite logit has no softmax
    y = torch.randint(0, vocabulary, (size,), generator=g)
    return z.masked_fill(hidden, -math.inf).to(dtype).to(device), y.to(device)


def near(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal up to rounding, NaN and infinities in the same places."""
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def check_sweep(z: Tensor, y: Tensor) -> None:
    """Each number of a row, and each statistic made of them, is what torch makes of the row in float64."""
    got, expected = SweptRow.of(z, y), Row(z.double(), y)
    for name in SweptRow._fields:
        scale = z.shape[-1] if name in ("total", "moment", "upto", "under") else 1
        near(getattr(got, name), getattr(expected, name), NEAR[z.dtype] * scale, name)
    for name in IN_A_ROW:
        word = REGISTRY.statistic(name)
        choices = {n: o.words for n, o in word.options.items() if isinstance(o, Choice)}
        for option in [{n: w} for n, words in choices.items() for w in words] or [{}]:
            models = [z] * word.models
            value = word.of_row(*(SweptRow.of(m, y) for m in models), **option)
            exact = word.body(*(m.double() for m in models), y, **option)
            slack = 1000 if name in ("entropy", "margin") else 100  # differences of large numbers
            near(value, exact, NEAR[z.dtype] * slack, f"{name} {option}")


def check_needs(z: Tensor, y: Tensor, needs: tuple[str, ...]) -> None:
    """What is not needed is not there, and the rest is the same."""
    every, some = kernels.sweep_rows(z, y, SweptRow._fields), kernels.sweep_rows(z, y, needs)
    for name, one, other in zip(SweptRow._fields, every, some, strict=True):
        assert (other is not None) == (name in needs)
        if other is not None:
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def check_gradient(z: Tensor, y: Tensor, data: st.DataObject) -> None:
    """The gradient by parts, scale and cap, of some rows or of all over the logits, in any dtype."""
    names = data.draw(st.sets(st.sampled_from(RowGradient._fields)), label="parts")
    scale, cap = data.draw(st.sampled_from([(1.0, None), (0.3, None), (0.3, 3.0)]), label="scale and cap")
    wide = torch.promote_types(z.dtype, torch.float32)
    z = (z.clamp(-2.9, 2.9) if cap else z).to(wide)
    g = torch.Generator().manual_seed(7)
    sizes = {n: z.shape if n == "added" else z.shape[:1] for n in RowGradient._fields if n in names}
    drawn = {n: torch.randn(size, generator=g, dtype=torch.float64).to(z.device) for n, size in sizes.items()}
    exact = z.double()
    expected = logit_gradient(exact, exponentials(exact), total(exact), y, RowGradient(**drawn))
    head = Head(z.new_zeros(0), scale=scale, cap=cap)
    expected = head.through(expected, exact)
    chosen = (
        data.draw(st.sets(st.integers(0, len(z) - 1)), label="rows") if data.draw(st.booleans()) else None
    )
    rows = None if chosen is None else torch.tensor(sorted(chosen), dtype=torch.long, device=z.device)
    dtype = data.draw(st.sampled_from([wide, torch.bfloat16] if wide == torch.float32 else [wide]))
    row, place = SweptRow.of(z, y), z.data_ptr()
    parts = RowGradient(**{n: t.to(wide) for n, t in drawn.items()})
    got = kernels.write_gradient(z, y, (row.top, row.total, row.target), parts, head, dtype, rows)
    assert got.dtype == dtype
    assert (got.data_ptr() == place) == (rows is None)
    # A row's largest part sets its rounding: p times a log p of hundreds.
    size = 1.0 + expected.abs().amax(-1, keepdim=True)
    near(got.double() / (size if rows is None else size[rows]),
         (expected if rows is None else expected[rows]) / (size if rows is None else size[rows]),
         ROUNDED[dtype])  # fmt: skip


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often each kernel is launched."""
    counts = {"sweep_rows": 0, "write_gradient": 0}
    originals = {name: getattr(kernels, name) for name in counts}

    def counting(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return originals[name](*arguments)

        return call

    for name in counts:
        setattr(kernels, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)


def on_device(case: Case, device: str) -> Case:
    """The case with its tensors on a device."""

    def moved(given: Any) -> Any:
        if isinstance(given, Tensor):
            return given.to(device)
        return {k: moved(v) for k, v in given.items()} if isinstance(given, dict) else given

    head = replace(case.head, weight=moved(case.head.weight), bias=moved(case.head.bias))
    return Case(moved(case.hidden), head, moved(case.targets), moved(case.reads))


def check_rule(text: str, device: str, dtype: torch.dtype, tolerance: float, **head: Any) -> None:
    """The fused loss by kernels is the dense loss without them."""
    rule = compile_rule(text)
    case = on_device(Case.draw(rule, dtype, shape=(2, 5), **head), device)
    with counted() as counts:
        compare(rule, case, None, tolerance)
        losses = rule.fused_loss(case.hidden, case.head, case.targets, **case.reads).losses
    idle = fused_plan(rule.checked).kind == "autograd" or not losses.any()
    assert all(counts.values()) or idle, counts
