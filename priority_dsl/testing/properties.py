"""What every rule promises, whatever it says: properties that hold on every drawn batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given
from torch import Tensor

from priority_dsl.diagnostics import PriorityError
from priority_dsl.nodes import Rule
from priority_dsl.reference import IGNORED
from priority_dsl.rule import CompiledRule
from priority_dsl.testing.case import Case, cases
from priority_dsl.testing.comparing import Comparison, compiled_rule, drawing

Property = Callable[[CompiledRule, Case], None]


def weights_in_range(rule: CompiledRule, case: Case) -> None:
    """Every weight is finite and one that the checker derived as possible."""
    weights = rule.weights(case.logits, case.targets, **case.settings)
    slack = 1e-9 if weights.dtype == torch.float64 else 1e-5
    for value in weights[case.valid].tolist():
        assert rule.range.covers(value, slack), f"a weight is {value}, outside {rule.range}"


def ignored_tokens_count_nothing(rule: CompiledRule, case: Case) -> None:
    """Ignored tokens weigh 0, and what stands there changes nothing (law 5)."""
    out = rule.loss(case.logits, case.targets, **case.settings)
    assert not out.weights[~case.valid].any(), "an ignored token has a weight"
    changed = case.logits.masked_fill(~case.valid.unsqueeze(-1), 3.0)
    models = {n: z.masked_fill(~case.valid.unsqueeze(-1), torch.nan) for n, z in case.models.items()}
    again = rule.loss(changed, case.targets, **{**case.settings, "models": models})
    assert _same(out.total, again.total), (
        f"the total is {out.total.item()}, and {again.total.item()} with other logits at ignored tokens"
    )
    nothing = rule.loss(case.logits, torch.full_like(case.targets, IGNORED), **case.settings)
    assert nothing.mean == 0, f"a batch of ignored tokens has a loss of {nothing.mean.item()}"


def order_changes_nothing(rule: CompiledRule, case: Case) -> None:
    """The rows of a batch may come in any order."""
    rows = torch.arange(len(case.targets)).unsqueeze(-1).expand_as(case.targets)
    if rule.checked.reads_pairs and case.examples is not None:
        rows = case.examples
    straight = replace(case, examples=rows)  # an example that two rows share is in order only as it is
    turned = replace(
        straight,
        logits=case.logits.flip(0),
        targets=case.targets.flip(0),
        models={name: logits.flip(0) for name, logits in case.models.items()},
        columns={n: v.flip(0) if isinstance(v, Tensor) else v[::-1] for n, v in case.columns.items()},
        examples=rows.flip(0),
        stored={name: values.flip(0) for name, values in case.stored.items()},
    )
    both = (case.with_data_set(rule) for case in (straight, turned))
    one, other = (rule.loss(c.logits, c.targets, **c.settings) for c in both)
    assert _same(one.weights, other.weights.flip(0)), "a weight changes with the order of the rows"
    assert _same(one.mean, other.mean), (
        f"the loss is {one.mean.item()}, and {other.mean.item()} in another order"
    )


def spread_changes_nothing(rule: CompiledRule, case: Case) -> None:
    """A step may come as one batch or row by row (law 8): the same weights, and losses that add up."""
    rows = torch.arange(len(case.targets)).unsqueeze(-1).expand_as(case.targets)
    whole = case if case.examples is not None else replace(case, examples=rows).with_data_set(rule)
    if rule.checked.reads_pairs or not len(rows):
        return  # the two responses of a pair are never apart
    parts = [whole.row(i) for i in range(len(rows))]
    seen = [rule.observe(c.logits, c.targets, **c.settings) for c in parts]
    step = sum(seen[1:], start=seen[0])
    outs = [rule.loss(c.logits, c.targets, step=step, **c.settings) for c in parts]
    one = rule.loss(whole.logits, whole.targets, **whole.settings)
    apart = torch.cat([out.weights for out in outs])
    assert _same(one.weights, apart), "a weight changes with how the step is spread"
    total = sum((out.mean for out in outs[1:]), start=outs[0].mean)
    assert _same(one.mean, total), f"the loss is {one.mean.item()}, row by row {total.item()}"


def gradients_are_finite(rule: CompiledRule, case: Case) -> None:
    """The loss is a number; where it is finite so is its gradient, and 0 at ignored tokens."""
    logits = case.logits.clone().requires_grad_()
    out = rule.loss(logits, case.targets, **case.settings)
    assert not out.mean.isnan(), "the loss is not a number"
    if not out.mean.isfinite():
        return
    (gradient,) = torch.autograd.grad(out.mean, logits)
    assert gradient.isfinite().all(), "a finite loss has a gradient that is not finite"
    assert not gradient[~case.valid].any(), "a gradient flows into an ignored token"


def equals_the_oracle(rule: CompiledRule, case: Case) -> None:
    """Weights and losses are what the slow reference computes token by token."""
    Comparison(rule, case).check()


PROPERTIES: dict[str, Property] = {
    "weights are finite and in their range": weights_in_range,
    "ignored tokens count nothing": ignored_tokens_count_nothing,
    "the order of rows changes nothing": order_changes_nothing,
    "the spread of a step changes nothing": spread_changes_nothing,
    "gradients are finite": gradients_are_finite,
    "equals the reference": equals_the_oracle,
}


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-4
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def counterexample(rule: CompiledRule, holds: Property, examples: int = 200) -> str | None:
    """What goes wrong on the simplest drawn batch for which a property does not hold; None where it holds.

    The text is the failure, then the batch as Python that makes it again.
    """
    last: list[Case] = []

    @drawing(examples)
    @given(case=cases(rule, extreme=False))
    def every(case: Case) -> None:
        last[:] = [case]
        holds(rule, case.with_data_set(rule))

    try:
        every()
    except (AssertionError, PriorityError) as error:
        return f"{str(error).splitlines()[0]}\n{last[0]}"
    return None


def check_properties(rule: str | Rule | CompiledRule, *, examples: int = 200, **values: float) -> list[str]:
    """Assert what every rule promises on drawn batches; returns the names of the properties that hold.

    Weights are finite and in the range that `check` derives, ignored tokens weigh 0 and change nothing,
    neither the order of rows nor the spread of a step changes anything, gradients are finite, all numbers
    equal the reference. `values` are parameter values. Raises AssertionError with the property and the batch,
    and what `compile_rule` raises.

    >>> check_properties("mass(ref) >= tau", tau=0.5, examples=20)[0]
    'weights are finite and in their range'
    """
    compiled = compiled_rule(rule, values)
    for name, holds in PROPERTIES.items():
        found = counterexample(compiled, holds, examples)
        assert found is None, f"{name}: no\n{found}\nrule: {compiled.text.strip()}"
    return list(PROPERTIES)
