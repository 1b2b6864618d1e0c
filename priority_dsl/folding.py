"""Constant folding: what an expression of parameters and numbers is worth, in float64 (law 14)."""

from __future__ import annotations

from collections.abc import Mapping

from priority_dsl.kinds import Range, Stage
from priority_dsl.registry import REGISTRY
from priority_dsl.values import Value, walk


def fold(value: Value, params: Mapping[str, float]) -> float:
    """The number (a condition is 0.0 or 1.0) that a value of stage `constant` has for given parameters."""
    known: dict[Value, float] = {}
    for part in walk(value):
        if part.word == "constant":
            known[part] = float(part.option("value"))  # type: ignore[arg-type]
        elif part.word == "param":
            known[part] = params[str(part.option("name"))]
        elif part.word == "weight":
            known[part] = known[part.arguments[0]]
        else:
            arguments = [known[argument] for argument in part.arguments]
            known[part] = float(REGISTRY.function(part.word).oracle(*arguments))
    return known[value]


def known_range(value: Value, params: Mapping[str, float]) -> Range:
    """The range with the values in force: for judging what is safe, never for deriving the regime."""
    if value.kind.stage == Stage.CONSTANT:
        return Range.of((fold(value, params),))
    return value.kind.range
