"""The row kernels under Triton's interpreter: `test_kernels.py` runs this file with TRITON_INTERPRET set."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from priority_dsl import compile_rule, list_rules
from priority_dsl.vocab_pass import kernels
from tests.test_fused import HEADS, MORE_RULES, Case
from tests.vocab_pass import kernel_checks as checks
from tests.vocab_pass.kernel_checks import rows_of_logits

assert os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
drawn = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve, in blocks so small that a row of 13 has two, the last of them not full."""
    monkeypatch.setattr("priority_dsl.executor.has_kernels", lambda device: True)
    monkeypatch.setattr(kernels, "LANES", 8)


@drawn
@given(rows_of_logits())
def test_a_sweep(rows) -> None:
    checks.check_sweep(*rows)


@pytest.mark.parametrize("needs", [("total",), ("rival", "top"), ("moment", "above"), ("upto",), ("under",)])
def test_a_sweep_for_some(needs) -> None:
    g = torch.Generator().manual_seed(0)
    checks.check_needs(torch.randn(3, 13, generator=g), torch.tensor([0, 5, 12]), needs)


def test_rows_that_are_no_distribution() -> None:
    """NaN, +inf and nothing but -inf: no number where torch has none."""
    z = torch.tensor([[torch.nan, 1, 2], [torch.inf, 1, 2], [-torch.inf] * 3])
    y = torch.tensor([1, 1, 1])
    for name in ("total", "top"):
        got, expected = getattr(checks.SweptRow.of(z, y), name), getattr(checks.Row(z, y), name)
        torch.testing.assert_close(got, expected, equal_nan=True)
    for name in ("nll", "p", "entropy", "mass", "pmax"):
        word = checks.REGISTRY.statistic(name)
        options = {"ties": "include"} if name == "mass" else {}
        got = word.of_row(checks.SweptRow.of(z, y), **options)
        torch.testing.assert_close(got, word.body(z, y, **options), equal_nan=True)


def test_rows_apart_from_each_other_and_none_at_all() -> None:
    whole = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 6, 2])
    checks.check_sweep(whole[:, :7], y)
    checks.check_sweep(whole.T[:4], y % 4)
    assert checks.SweptRow.of(whole[:0], y[:0]).total.shape == (0,)


@drawn
@given(rows_of_logits(), st.data())
def test_a_gradient(rows, data) -> None:
    checks.check_gradient(*rows, data)


@pytest.mark.parametrize("text", [*list_rules(), *MORE_RULES])
def test_every_rule(text) -> None:
    checks.check_rule(text, "cpu", torch.float64, 1e-10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("text", ["dft", MORE_RULES[0]])
def test_heads(head, text) -> None:
    checks.check_rule(text, "cpu", torch.float32, 1e-5, **HEADS[head])


def test_the_pass_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = compile_rule("mass(ref) * entropy(ref) + rank(ref) * margin(ref) + p_ref * pmax(ref)")
    case = Case.draw(compile_rule("sft"))
    (of,) = rule.plan.passes
    models = {"ref": (case.hidden, case.head)}
    with checks.counted() as counts:
        got = rule.statistics(of, models, case.targets)
    monkeypatch.undo()
    for name, expected in rule.statistics(of, models, case.targets).items():
        torch.testing.assert_close(got[name], expected)
    assert counts["sweep_rows"] == 1
