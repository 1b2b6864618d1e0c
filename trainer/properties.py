"""`priority test`: what every rule promises, on drawn batches, and its equality with a function by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from priority_dsl import PriorityError, compile_rule
from trainer.faults import ConfigFault, first_line
from trainer.functions import load_function

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from priority_dsl.testing import Case

CASES = 200
IGNORED = -100


def run_tests(rules: list[str], values: Mapping[str, float], against: str | None) -> int:
    """Test each rule and print a line a property; 1 if one does not hold, else 0.

    `against` names a function `module:function` that computes the same weights, or losses, by hand.
    """
    by_hand = load_function("--against", against) if against is not None else None
    failed = False
    for argument in rules:
        rule = compile_rule(argument, **values)
        print(f"{argument.strip()}: {rule.regime}, weights in {rule.range}")
        for name, holds in PROPERTIES.items():
            failed |= _tell(name, _counterexample(rule, holds))
        if by_hand is not None:
            failed |= _tell(f"equals {against}", _difference(argument, by_hand, values))
    return 1 if failed else 0


def _tell(name: str, counterexample: str | None) -> bool:
    print(f"  ok    {name}" if counterexample is None else f"  FAIL  {name}\n{_indented(counterexample)}")
    return counterexample is not None


def _indented(text: str) -> str:
    return "\n".join("        " + line for line in text.splitlines())


def weights_in_range(rule: CompiledRule, case: Case) -> None:
    """Every weight is one that the checker derived as possible, and finite."""
    weights = rule.weights(case.logits, case.targets, **case.settings)
    for value in weights[case.valid].tolist():
        assert rule.range.covers(value), f"a weight is {value}, outside {rule.range}"


def ignored_tokens_count_nothing(rule: CompiledRule, case: Case) -> None:
    """Ignored tokens weigh 0, and their logits change nothing."""
    out = rule.loss(case.logits, case.targets, **case.settings)
    assert not out.weights[~case.valid].any(), "an ignored token has a weight"
    changed = case.logits.masked_fill(~case.valid.unsqueeze(-1), 3.0)
    again = rule.loss(changed, case.targets, **case.settings)
    assert _same(out.total, again.total), (
        f"the total is {out.total} and {again.total} with other ignored logits"
    )
    nothing = rule.loss(case.logits, torch.full_like(case.targets, IGNORED), **case.settings)
    assert nothing.total == 0, f"a batch of ignored tokens has a loss of {nothing.total}"


def order_changes_nothing(rule: CompiledRule, case: Case) -> None:
    """The rows of a batch may come in any order."""
    if case.examples is None:  # rows keep their example when they move
        rows = torch.arange(len(case.targets)).unsqueeze(-1).expand_as(case.targets)
        case = replace(case, examples=rows)
    assert case.examples is not None
    turned = replace(
        case,
        logits=case.logits.flip(0),
        targets=case.targets.flip(0),
        models={name: logits.flip(0) for name, logits in case.models.items()},
        columns={
            name: v.flip(0) if isinstance(v, torch.Tensor) else v[::-1] for name, v in case.columns.items()
        },
        examples=case.examples.flip(0),
    )
    one = rule.loss(case.logits, case.targets, **case.settings)
    other = rule.loss(turned.logits, turned.targets, **turned.settings)
    assert _same(one.weights, other.weights.flip(0)), "a weight changes with the order of the rows"
    assert _same(one.mean, other.mean), f"the loss is {one.mean}, and {other.mean} in another order"


def gradients_are_finite(rule: CompiledRule, case: Case) -> None:
    """A finite loss has a finite gradient, and none at ignored tokens."""
    logits = case.logits.clone().requires_grad_()
    out = rule.loss(logits, case.targets, **case.settings)
    if not out.mean.isfinite():
        return
    (gradient,) = torch.autograd.grad(out.mean, logits)
    assert gradient.isfinite().all(), "a finite loss has a gradient that is not finite"
    assert not gradient[~case.valid].any(), "a gradient flows into an ignored token"


PROPERTIES: dict[str, Callable[[CompiledRule, Case], None]] = {
    "weights are finite and in their range": weights_in_range,
    "ignored tokens count nothing": ignored_tokens_count_nothing,
    "the order of rows changes nothing": order_changes_nothing,
    "gradients are finite": gradients_are_finite,
}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-4
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _counterexample(rule: CompiledRule, holds: Callable[[CompiledRule, Case], None]) -> str | None:
    """The smallest drawn case for which a property does not hold, as text; None where all cases pass."""
    try:
        from hypothesis import HealthCheck, given, settings

        from priority_dsl.testing import cases
    except ImportError as error:
        raise ConfigFault("`priority test` needs hypothesis: pip install 'priority_dsl[testing]'") from error
    last: list[Any] = []

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(rule, extreme=False))
    def every(case: Case) -> None:
        last[:] = [case]
        holds(rule, case)

    try:
        every()
    except (AssertionError, PriorityError) as error:
        return f"{first_line(error)}\n{last[0]}"
    return None


def _difference(argument: str, by_hand: Callable[..., Any], values: Mapping[str, float]) -> str | None:
    from priority_dsl.testing import assert_equivalent

    try:
        assert_equivalent(argument, by_hand, **values)
    except AssertionError as error:
        return str(error)
    except PriorityError:
        raise
    except Exception as error:  # the person's own function may raise anything
        return f"the function stopped: {type(error).__name__}: {first_line(error)}"
    return None
