"""A rule against the same method written by hand in torch, on drawn batches.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from hypothesis import given
from torch import Tensor

from priority_dsl import inputs, layout
from priority_dsl.diagnostics import PriorityError
from priority_dsl.nodes import Rule
from priority_dsl.reference import Reference
from priority_dsl.rule import CompiledRule
from priority_dsl.testing.case import Case, cases
from priority_dsl.testing.comparing import compiled_rule, disturbed, drawing, reference

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
Place = tuple[int, int]


def assert_equivalent(
    rule: str | Rule | CompiledRule,
    hand_written: Callable[..., Tensor],
    *,
    of: Literal["weights", "loss"] = "weights",
    tolerance: float | None = None,
    examples: int = 200,
    **values: float,
) -> None:
    """Assert that a rule equals a function that computes the same by hand.

    `hand_written(logits, targets, models, columns, ...)` takes any of these arguments, by these names:
    `logits [B, T, V]`, `targets [B, T]` (-100 is ignored), `models` (a dict of logits), `columns` (a dict:
    tensors `[B, T]` or `[B]`, lists where they hold text), `examples`, `progress`, `epoch`, `seed`. It
    returns weights like the targets, or with `of="loss"` the loss of each token, differentiable in the
    logits, whose gradient is compared too. What it gives at ignored tokens is not looked at.

    `examples` batches are drawn as the rule's declarations say, in float64 and float32: equal logits, -inf
    logits, ignored tokens. Numbers must agree to `tolerance`, relative above 1 and absolute below (default
    1e-8 in float64, 1e-4 in float32); a comparison that rounding decides may fall either way, and a gradient
    is compared where no two logits are equal. `values` are parameter values.
    Raises AssertionError with the token, both numbers and the batch, and what `compile_rule` raises.

    >>> def by_hand(logits, targets):
    ...     return logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    >>> assert_equivalent("sg(p_on)", by_hand)
    """
    compiled = compiled_rule(rule, values)

    @drawing(examples)
    @given(case=cases(compiled, extreme=False))
    def compare(case: Case) -> None:
        _Against(compiled, hand_written, case, tolerance).check(of)

    try:
        compare()
    except AssertionError as error:  # without what hypothesis adds: the message holds the batch
        raise AssertionError(str(error)) from None


class _Against:
    """One batch: what the rule gives, what the function gives, what the oracle excuses."""

    def __init__(
        self, rule: CompiledRule, hand_written: Callable[..., Tensor], case: Case, tolerance: float | None
    ) -> None:
        self.rule, self.case = rule, case.with_data_set(rule)
        self.hand_written = hand_written
        self.tolerance = tolerance or TOLERANCE[case.logits.dtype]

    def check(self, of: Literal["weights", "loss"]) -> None:
        """Compare the weights, or losses and their gradient."""
        leaf = self.case.logits.clone().requires_grad_(of == "loss")
        by_hand = self._by_hand(leaf)
        try:
            if of == "weights":
                weights = self.rule.weights(self.case.logits, self.case.targets, **self.case.settings)
                self._values("weight", weights, by_hand)
            else:
                self._losses(leaf, by_hand)
        except PriorityError as error:  # the rule refuses a weight that is not finite: so must the function
            if error.diagnostics[0].code != "PD505" or by_hand[self.case.valid].isfinite().all():
                raise AssertionError(f"{error}\n{self._told()}") from error

    def _losses(self, leaf: Tensor, by_hand: Tensor) -> None:
        out = self.rule.loss(leaf, self.case.targets, **self.case.settings)
        divisors = self._divisors()
        self._values("loss", out.losses * divisors, by_hand)
        mine = torch.where(self.case.valid, by_hand / divisors, 0.0)
        self._gradients(_gradient(out.total, leaf), _gradient(mine.sum(), leaf))

    def _by_hand(self, logits: Tensor) -> Tensor:
        """What the function returns, for the arguments that it takes."""
        case = self.case
        offered: dict[str, Any] = {"logits": logits, "targets": case.targets, **case.settings}
        taken = inspect.signature(self.hand_written).parameters
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        result = self.hand_written(**{n: v for n, v in offered.items() if everything or n in taken})
        if not isinstance(result, Tensor):
            raise AssertionError(f"the function by hand gives {type(result).__name__}, not a tensor")
        if result.shape != case.targets.shape:
            shapes = f"{tuple(result.shape)}, not like the targets, {tuple(case.targets.shape)}"
            raise AssertionError(f"the function by hand gives the shape {shapes}")
        return result.to(logits.dtype)

    def _divisors(self) -> Tensor:
        """What `normalize = examples` divides the loss of each token by; else 1."""
        if self.rule.checked.normalize != "examples":
            return torch.ones_like(self.case.targets)
        case = self.case
        call = inputs.call_of(self.rule.checked, case.targets, case.examples, columns=case.columns)
        lengths = layout.lengths(call.segments, call.valid).reshape(self.case.targets.shape)
        return (lengths * layout.count_examples(call.segments, call.valid)).clamp(min=1)

    def _values(self, what: str, got: Tensor, wanted: Tensor) -> None:
        for b, t in self.case.valid.nonzero().tolist():
            mine, theirs = got[b, t].item(), wanted[b, t].item()
            if not self._agree(mine, theirs) and not self._rounding_decides(what, (b, t), theirs):
                raise AssertionError(
                    f"the {what} of row {b}, position {t} (target {self.case.targets[b, t].item()}): "
                    f"the rule gives {mine!r}, the function by hand {theirs!r}\n{self._told()}"
                )

    def _agree(self, one: float, other: float) -> bool:
        if one == other or (math.isnan(one) and math.isnan(other)):
            return True
        return abs(one - other) <= self.tolerance * max(1.0, abs(one), abs(other)) < math.inf

    def _rounding_decides(self, what: str, place: Place, theirs: float) -> bool:
        """Whether numbers that differ by some roundings make the rule give what the function gives."""
        b, t = place
        shift = self._divisors()[b, t].item() if what == "loss" else 1

        def seen(answer: Reference) -> float:
            return (answer.weights if what == "weight" else answer.losses)[b][t] * shift

        exact = seen(reference(self.rule, self.case))
        near = [seen(answer) for answer in disturbed(self.rule, self.case)]
        spread = max((abs(x - exact) for x in near if math.isfinite(x)), default=0.0)
        jump = any(self._agree(x, theirs) and not self._agree(x, exact) for x in near)
        return jump or abs(theirs - exact) <= 20 * spread

    def _gradients(self, got: Tensor, wanted: Tensor) -> None:
        for b, t in self.case.valid.nonzero().tolist():
            row = self.case.logits[b, t]
            if not row.isfinite().all() or len(row.unique()) < len(row):
                continue  # at ties and at -inf there is more than one honest derivative
            for v in range(len(row)):
                mine, theirs = got[b, t, v].item(), wanted[b, t, v].item()
                if not self._agree(mine, theirs):
                    raise AssertionError(
                        f"the gradient of the loss in logit {v} of row {b}, position {t}: "
                        f"the rule gives {mine!r}, the function by hand {theirs!r}\n{self._told()}"
                    )

    def _told(self) -> str:
        return f"rule: {self.rule.text.strip()}\nbatch: {self.case!r}"


def _gradient(total: Tensor, leaf: Tensor) -> Tensor:
    found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(leaf) if found is None else found
