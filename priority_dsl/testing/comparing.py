"""A compiled rule against the oracle: values token by token, gradients by finite differences.

Two numbers that differ are not yet a mistake: a comparison can fall either way where its sides are equal
but for rounding. So where they differ, the oracle computes again with every number disturbed by some
roundings; a difference that those explain is excused, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from priority_dsl.api import compile_rule
from priority_dsl.diagnostics import PriorityError
from priority_dsl.nodes import Rule
from priority_dsl.reference import Reference, evaluate
from priority_dsl.registry import REGISTRY, Reduction
from priority_dsl.rule import CompiledRule, LossOutput
from priority_dsl.testing.case import Case
from priority_dsl.values import Value, walk
from priority_dsl.words import PairSide

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative; a thousandth of it absolute
EXACT = frozenset({"rank", "same_top", "position", "length", "epoch", "uniform"})
DISTURBED = 12  # evaluations with numbers off by some roundings
SMALL = 2.0**-16  # the step of finite differences: exact beside logits of ordinary size


def drawing(examples: int) -> settings:
    """The settings of a check that users call: the same draws each time, no file written."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.nested_given],
    )


def compiled_rule(rule: str | Rule | CompiledRule, values: Mapping[str, float]) -> CompiledRule:
    """A rule in any form, compiled with these parameter values."""
    if isinstance(rule, CompiledRule):
        return compile_rule(rule.checked, **values) if values else rule
    return compile_rule(rule, **values)


def close(got: float, wanted: float, tolerance: float) -> bool:
    """Whether two numbers are equal up to a relative tolerance (and a thousandth of it absolute)."""
    if got == wanted or (math.isnan(got) and math.isnan(wanted)):
        return True
    return abs(got - wanted) <= tolerance * max(1e-3, abs(got), abs(wanted)) < math.inf


def reference(rule: CompiledRule, case: Case, **more: Any) -> Reference:
    """What the oracle says of a case."""
    return evaluate(rule.checked, **{**case.lists(), **more})


def disturbed(rule: CompiledRule, case: Case) -> list[Reference]:
    """What the oracle says when every number that a word gives is off by a few roundings.

    The last two answers are for numbers that are equal but for rounding: the numbers have few digits.
    """
    dtype = case.logits.dtype
    unit = 16 * torch.finfo(dtype).eps

    def as_stored(value: Value, number: float) -> float:
        return torch.tensor(number, dtype=dtype).item()

    def coarse(value: Value, number: float) -> float:
        digits = 9 if dtype == torch.float64 else 4
        return round(float(f"{number:.{digits}g}"), digits + 2) if math.isfinite(number) else number

    def rounding(random: Random) -> Callable[[Value, float], float]:
        def disturb(value: Value, number: float) -> float:
            if _is_exact(value, number) or not math.isfinite(number):
                return number
            return number + unit * random.uniform(-1.0, 1.0) * max(abs(number), 0.1)

        return disturb

    ways = [*(rounding(Random(seed)) for seed in range(DISTURBED)), as_stored, coarse]
    return [reference(rule, case, rounding=way) for way in ways]


def _is_exact(value: Value, number: float) -> bool:
    """Whether the language promises a number to the last digit."""
    whole = value.word == "mass" and number == 1.0 and value.option("ties") == "include"
    return whole or value.word in EXACT


class Comparison:
    """One case under a rule: what the compiled rule gives, what the oracle says, what was excused."""

    def __init__(self, rule: CompiledRule, case: Case, tolerance: float | None = None) -> None:
        self.rule, self.case = rule, case.with_data_set(rule)
        self.tolerance = tolerance or TOLERANCE[case.logits.dtype]
        self.wanted = reference(rule, case)
        self.excused: list[tuple[int, int] | None] = []  # the places of what rounding decides
        self._disturbed: list[Reference] | None = None

    def loss(self, logits: Tensor | None = None) -> LossOutput | None:
        """The compiled loss; None where it refuses a weight that is not finite."""
        try:
            given = self.case.logits if logits is None else logits
            return self.rule.loss(given, self.case.targets, **self.case.settings)
        except PriorityError as error:
            if error.diagnostics[0].code != "PD505":
                raise
            return None

    def check(self) -> Comparison:
        """Assert that weights, losses, nll, total and denominator are what the oracle says."""
        out = self.loss()
        finite = all(math.isfinite(w) for row in self.wanted.weights for w in row)
        if out is None or not finite:
            refused = out is None
            if refused == finite and not self._sometimes(lambda r: _finite(r.weights) != finite):
                self._fail(
                    "weights", None, "refused" if refused else out.weights.tolist(), self.wanted.weights
                )  # type: ignore[union-attr]
            return self
        for what in ("weights", "losses", "nll"):
            self._table(what, getattr(out, what).tolist())
        self._number("denominator", out.denominator.item(), 1.0)
        self._number("total", out.total.item(), sum(abs(x) for row in self.wanted.losses for x in row))
        return self

    def _table(self, what: str, got: list[list[float]]) -> None:
        wanted = getattr(self.wanted, what)
        for b, row in enumerate(wanted):
            for t, number in enumerate(row):
                if not close(got[b][t], number, self.tolerance):
                    spread = [getattr(r, what)[b][t] for r in self.disturbed]
                    self._excuse(what, (b, t), got[b][t], number, spread)

    def _number(self, what: str, got: float, scale: float) -> None:
        wanted = getattr(self.wanted, what)
        if (
            not close(got, wanted, self.tolerance)
            and not abs(got - wanted) <= self.tolerance * scale < math.inf
        ):
            self._excuse(what, None, got, wanted, [getattr(r, what) for r in self.disturbed])

    @property
    def disturbed(self) -> list[Reference]:
        """The oracle's answers to disturbed numbers, computed when they are first asked for."""
        if self._disturbed is None:
            self._disturbed = disturbed(self.rule, self.case)
        return self._disturbed

    def _sometimes(self, holds: Callable[[Reference], bool]) -> bool:
        return any(holds(r) for r in self.disturbed)

    def _excuse(
        self, what: str, place: tuple[int, int] | None, got: float, wanted: float, spread: list[float]
    ) -> None:
        """Count a difference that rounding explains; report another.

        It does where a disturbed answer jumps to what was computed, or where the answers spread as far.
        """
        jump = any(close(got, x, 1e-6) and not close(x, wanted, 1e-5) for x in spread)
        near = [abs(x - wanted) for x in spread[:DISTURBED] if math.isfinite(x)]
        if not jump and not abs(got - wanted) <= 20 * max(near, default=0.0):
            self._fail(what, place, got, wanted)
        self.excused.append(place)

    def _fail(self, what: str, place: tuple[int, int] | None, got: Any, wanted: Any) -> None:
        where = "" if place is None else f" of row {place[0]}, position {place[1]}"
        raise AssertionError(
            f"{what}{where}: the compiled rule gives {got}, the oracle {wanted}\n"
            f"rule: {self.rule.text.strip()}\ncase: {self.case!r}"
        )

    # Gradient -----------------------------------------------------------------------------------

    def check_gradient(self, random: Random, coordinates: int = 4) -> int:
        """Assert the gradient of `total` at some logits; returns how many of them could be compared.

        Float64 only. Logits at kinks and steps have no derivative and are passed over; ignored tokens
        and logits of -inf have the derivative 0.
        """
        leaf = self.case.logits.clone().requires_grad_()
        out = self.loss(leaf)
        if out is None:
            return 0
        (gradient,) = torch.autograd.grad(out.total, leaf)
        usable = torch.tensor(self.wanted.losses).isfinite().reshape(self.case.targets.shape)
        if _sums_up(self.rule) and not usable.all():
            return (
                0  # a token's logit moves other tokens' losses, and differences of infinite ones say nothing
            )
        self._zeros(gradient, usable)
        places = (usable & self.case.valid).unsqueeze(-1) & self.case.logits.isfinite()
        chosen = [(b, t, v) for b, t, v in places.nonzero().tolist() if (b, t) not in self.excused]
        compared = 0
        for place in random.sample(chosen, min(coordinates, len(chosen))):
            compared += self._slope(place, gradient[place].item())
        return compared

    def _zeros(self, gradient: Tensor, usable: Tensor) -> None:
        still = ~self.case.valid.unsqueeze(-1) | ((self.case.logits == -math.inf) & usable.unsqueeze(-1))
        wrong = still & (gradient != 0)
        if wrong.any():
            b, t, v = wrong.nonzero()[0].tolist()
            self._fail(f"the gradient of logit {v}", (b, t), gradient[b, t, v].item(), 0.0)

    def _slope(self, place: tuple[int, ...], got: float) -> bool:
        """Whether the derivative at a logit exists; asserts that it is `got`."""
        b, t, v = place
        here = self.wanted

        def change(step: float) -> float:
            moved = self.case.logits.tolist()
            moved[b][t][v] += step
            there = reference(self.rule, self.case, logits=moved, base=self.case.logits.tolist())
            pairs = zip(chain(*there.losses), chain(*here.losses), strict=True)
            return math.fsum(x - y for x, y in pairs if x != y)

        try:
            up, down, up_half, down_half = (change(s) for s in (SMALL, -SMALL, SMALL / 2, -SMALL / 2))
        except ValueError:  # a sum of opposite infinities
            return False
        whole, half = (up - down) / (2 * SMALL), (up_half - down_half) / SMALL
        if not (math.isfinite(whole) and math.isfinite(half)):
            return False
        bend, bend_half = abs(up + down) / SMALL, abs(up_half + down_half) / (SMALL / 2)
        wanted = (4 * half - whole) / 3
        scale = max(1.0, abs(wanted), 1e-3 * abs(here.losses[b][t]))
        if abs(got - wanted) <= 1e-6 * scale + 4 * abs(whole - half):
            return True
        if bend_half > 0.7 * bend + 1e-7 * scale:  # does not shrink with the step: a kink or a jump
            return False
        if self.case.logits[b, t].eq(self.case.logits[b, t, v]).sum() > 1:
            return False  # at a tie ranks differ from what they are on both sides
        self._fail(f"the gradient of logit {v}", (b, t), got, wanted)
        return False


def _sums_up(rule: CompiledRule) -> bool:
    """Whether the loss of a token depends on other tokens."""
    loss = rule.checked.loss
    return loss is not None and any(
        isinstance(REGISTRY.get(v.word), Reduction | PairSide) for v in walk(loss)
    )


def _finite(table: list[list[float]]) -> bool:
    return all(math.isfinite(x) for row in table for x in row)
