"""Both plans of the fused loss are the dense loss: for drawn rules, the library, and every statistic."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from priority_dsl import compile_rule
from priority_dsl.diagnostics import PriorityError
from priority_dsl.fused_plan import fused_plan
from priority_dsl.registry import REGISTRY, Statistic, View
from priority_dsl.rule import CompiledRule
from priority_dsl.testing import Case, cases, checked_rules
from tests.vocab_pass.whole import in_two_passes, losses

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
PLANS = {"as planned": lambda rule: rule, "two passes": in_two_passes}


def compare(rule: CompiledRule, case: Case, rows: int | None, **given: Any) -> None:
    """Dense and fused: total, weights, losses, and the gradient where the dense one is a number."""
    given = {**case.settings, **given}
    try:
        dense, fused, by_dense, by_fused = losses(rule, case.logits, case.targets, rows, **given)
    except PriorityError as error:
        if error.diagnostics[0].code != "PD505":  # a weight that is not finite
            raise
        return
    near = {"rtol": TOLERANCE[case.logits.dtype], "atol": TOLERANCE[case.logits.dtype], "equal_nan": True}
    torch.testing.assert_close(fused.weights, dense.weights, **near)
    torch.testing.assert_close(fused.losses, dense.losses, **near)
    torch.testing.assert_close(fused.denominator, dense.denominator, **near)
    torch.testing.assert_close(fused.total, dense.total, **near)
    known = by_dense.isfinite()  # autograd through an infinite logit has no number; the closed form has
    torch.testing.assert_close(by_fused[known], by_dense[known], **near)
    assert by_fused.isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
def test_drawn_rules(plan: str) -> None:
    kinds = set()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        checked = data.draw(checked_rules())
        rule = CompiledRule(checked)
        kinds.add(fused_plan(checked).kind)
        if fused_plan(checked).kind == "autograd":
            return
        compare(PLANS[plan](rule), data.draw(cases(checked)), data.draw(st.sampled_from([None, 1, 2])))

    check()
    assert {"one pass", "two passes"} <= kinds


def texts() -> list[str]:
    """A loss through every statistic, of the trained model in each place and of views of it."""
    found = []
    for name in sorted(REGISTRY.words):
        word = REGISTRY.words[name]
        if not isinstance(word, Statistic) or not word.differentiable or word.inside:
            continue
        places = ["on"] if word.models == 1 else ["ref, on", "on, ref", "on, on", "sg(on), on"]
        options = [""] if name != "mass" else ["", ", ties=exclude"]
        options = [", k=2", ", 9"] if name == "topk_entropy" else options
        found += [f"loss = {name}({p}{o})" for p in places for o in options]
        views = ["tempered(on, 0.7)", "contrast(on, ref)", "tempered(contrast(ref, on), 2)"]
        found += [f"loss = {name}({re.sub(r'on$', v, places[0])}{o})" for v in views for o in options]
    return found


@pytest.mark.parametrize("text", texts())
@pytest.mark.parametrize("plan", PLANS)
def test_every_statistic(text: str, plan: str) -> None:
    rule = PLANS[plan](compile_rule(text))
    assert fused_plan(rule.checked).kind == "one pass"

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(rule), st.sampled_from([None, 1]))
    def check(case: Case, rows: int | None) -> None:
        compare(rule, case, rows)

    check()


def test_every_statistic_and_view_has_a_closed_gradient() -> None:
    for word in REGISTRY.words.values():
        if isinstance(word, Statistic) and word.differentiable and not word.inside:
            assert word.row_gradient is not None, word.name
        if isinstance(word, View) and not word.reads_anew:
            assert word.row_gradient is not None, word.name


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("dft", "one pass", "with the logits"),
        ("column k: bool per token; weight = k", "one pass", "before any logits"),
        ("top(nll(on), 0.5, batch)", "two passes", "top(nll(on), 0.5, batch)"),
        ("loss = nll_on * sg(mean(H_on, example))", "two passes", "mean(entropy(on), example)"),
        ("column k: number; weight = top(k, 0.5, batch)", "one pass", "before any logits"),
    ],
)
def test_the_plan_says_why(text: str, kind: str, why: str) -> None:
    how = fused_plan(compile_rule(text).checked)
    assert how.kind == kind
    assert why in how.why


def test_what_is_stored_decides_the_plan() -> None:
    rule = compile_rule("mass(ref) >= 0.5")
    assert "with the logits" in fused_plan(rule.checked).why
    assert "before any logits" in fused_plan(rule.checked, frozenset({"mass(ref) >= 0.5"})).why
