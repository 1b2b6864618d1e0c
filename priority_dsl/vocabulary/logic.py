"""Conditions: comparisons, `and or not`, `in`, the `if`, and a condition read as a number."""

from __future__ import annotations

from functools import partial

from priority_dsl.kinds import BOOLEAN, Element, Range, compared, hull, image
from priority_dsl.registry import function

_compare = partial(function, group="conditions", element=Element.BOOL)


@_compare(
    name="less", symbol="<", example="p_on < 0.5", range=partial(compared, "<"), oracle=lambda a, b: a < b
)
def less(a, b):
    """Whether a is below b."""
    return a < b


@_compare(
    name="less_equal", symbol="<=", example="p_on <= 0.5", range=partial(compared, "<="),
    oracle=lambda a, b: a <= b,
)  # fmt: skip
def less_equal(a, b):
    """Whether a is at most b."""
    return a <= b


@_compare(
    name="greater", symbol=">", example="p_on > 0.5", range=partial(compared, ">"), oracle=lambda a, b: a > b
)
def greater(a, b):
    """Whether a is above b."""
    return a > b


@_compare(
    name="greater_equal", symbol=">=", example="p_on >= 0.5", range=partial(compared, ">="),
    oracle=lambda a, b: a >= b,
)  # fmt: skip
def greater_equal(a, b):
    """Whether a is at least b."""
    return a >= b


@_compare(
    name="equal", symbol="==", example="rank_on == 1", range=partial(compared, "=="),
    oracle=lambda a, b: a == b,
)  # fmt: skip
def equal(a, b):
    """Whether the two are equal."""
    return a == b


@_compare(
    name="not_equal", symbol="!=", example="rank_on != 1", range=partial(compared, "!="),
    oracle=lambda a, b: a != b,
)  # fmt: skip
def not_equal(a, b):
    """Whether the two differ."""
    return a != b


def _truth(function):
    """The range of a logical function from the truth values its arguments can take."""

    def range(*arguments: Range) -> Range:
        return image(function, *arguments) or BOOLEAN

    return range


@_compare(
    name="both", symbol="and", example="p_on > 0.2 and p_on < 0.8", wants=("condition", "condition"),
    range=_truth(lambda a, b: float(a and b)), oracle=lambda a, b: bool(a and b),
)  # fmt: skip
def both(a, b):
    """Whether both conditions hold."""
    return a & b


@_compare(
    name="either", symbol="or", example="p_on < 0.2 or p_on > 0.8", wants=("condition", "condition"),
    range=_truth(lambda a, b: float(a or b)), oracle=lambda a, b: bool(a or b),
)  # fmt: skip
def either(a, b):
    """Whether one of the conditions holds, or both."""
    return a | b


@_compare(
    name="negation", symbol="not", example="not p_on > 0.5", wants=("condition",),
    range=_truth(lambda a: float(not a)), oracle=lambda a: not a,
)  # fmt: skip
def negation(a):
    """Whether the condition does not hold."""
    return ~a


@function(
    name="indicator", symbol="[x]", group="conditions", example="(p_on > 0.5) + 1", wants=("condition",),
    range=lambda a: a, oracle=lambda a: float(a), derivative=None, scalars=False,
)  # fmt: skip
def indicator(a):
    """A condition read as a number: 1 where it holds, else 0 (the Iverson bracket)."""
    return a


def _branches(then: Range, condition: Range, otherwise: Range) -> Range:
    if condition.point is not None:
        return then if condition.point else otherwise
    return hull(then, otherwise)


@function(
    name="choose", symbol="if", group="conditions", example="1 if p_on > 0.5 else 0.1",
    wants=("branch", "condition", "branch"), range=_branches, scalars=False,
    oracle=lambda then, condition, otherwise: then if condition else otherwise,
    derivative=lambda g, out, then, condition, otherwise: (
        g.masked_fill(~condition, 0.0), None, g.masked_fill(condition, 0.0)
    ),
)  # fmt: skip
def choose(then, condition, otherwise):
    """One of two values; the one not taken adds nothing, no value and no gradient (law 4)."""
    return then.where(condition, otherwise)
