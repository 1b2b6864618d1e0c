"""Ranges are outward: whatever the arguments are, the result lies in the range that was derived."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priority_dsl import vocabulary  # noqa: F401  (fills the registry)
from priority_dsl.kinds import ANY, Element, Extent, Kind, Range, Stage, compared, hull, join, power, times
from priority_dsl.registry import REGISTRY, Function

ENDS = [-math.inf, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 7.5, math.inf]
FUNCTIONS = [
    w for w in REGISTRY.words.values() if isinstance(w, Function) and w.name not in ("sg", "indicator")
]


@st.composite
def ranges(draw) -> Range:
    """A small set of values, or an interval with open or closed ends."""
    if draw(st.booleans()):
        return Range.of(draw(st.lists(st.sampled_from(ENDS[1:-1]), min_size=1, max_size=4)))
    low, high = sorted((draw(st.sampled_from(ENDS)), draw(st.sampled_from(ENDS))))
    if low == high:
        return Range.of([low if math.isfinite(low) else 0.0])
    return Range(low, high, draw(st.booleans()), draw(st.booleans()))


def point(draw, range: Range) -> float:
    """A value of a range, its ends among the likely ones."""
    if range.values is not None:
        return draw(st.sampled_from(sorted(range.values)))
    low, high = max(range.low, -50.0), min(range.high, 50.0)
    inside = low + (high - low) * draw(st.floats(0.01, 0.99))
    ends = [e for e in (range.low, range.high) if range.contains(e)]
    return draw(st.sampled_from([inside, *ends]))


@pytest.mark.parametrize("word", FUNCTIONS, ids=lambda w: w.name)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_results_lie_in_the_derived_range(word, data):
    condition = [want == "condition" for want in word.wants]
    arguments = [
        Range.of([float(data.draw(st.booleans())) for _ in range(2)]) if c else data.draw(ranges())
        for c in condition
    ]
    values = [point(data.draw, a) for a in arguments]
    if word.name == "power_of_probability":
        arguments[0], values[0] = Range(0.0, math.inf), abs(values[0])
    if word.name == "ramp" and values[1] > values[2]:
        return
    result = float(word.oracle(*values))
    derived = word.range(*arguments)
    if math.isnan(result):
        assert word.hazard is not None or any(math.isinf(v) for v in values)
        return
    slack = 1e-12 * max(1.0, abs(result)) if math.isfinite(result) else 0.0
    inside = derived.contains(result) or derived.contains(result + slack) or derived.contains(result - slack)
    rounds_onto_an_open_end = result in (derived.low, derived.high) and word.name in {
        "exp", "sigmoid", "tanh", "log_sigmoid", "add", "subtract", "multiply", "divide", "power", "sqrt",
        "power_of_both", "power_of_probability",
    }  # fmt: skip
    assert inside or (rounds_onto_an_open_end and not any(v in (0.0, 1.0) for v in values)), (
        f"{word.name}({values}) = {result} is outside {derived} from {arguments}"
    )


@given(a=ranges(), b=ranges(), data=st.data())
@settings(max_examples=500, deadline=None)
def test_comparisons_known_from_ranges_hold(a, b, data):
    x, y = point(data.draw, a), point(data.draw, b)
    outcomes = {"<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y, "==": x == y, "!=": x != y}
    for op, outcome in outcomes.items():
        assert compared(op, a, b).contains(float(outcome)), (op, a, b, x, y)


@given(a=ranges(), b=ranges(), data=st.data())
def test_a_hull_holds_both(a, b, data):
    assert hull(a, b).contains(point(data.draw, a))
    assert hull(a, b).contains(point(data.draw, b))


def test_known_ranges():
    unit = Range(0.0, 1.0)
    assert str(power(unit, Range(0.0, math.inf, low_open=True))) == "[0, 1]"
    assert str(times(unit, Range(0.0, 1.0, high_open=True))) == "[0, 1)"
    assert str(hull(Range.of([-1.0]), Range.of([1.0]))) == "{-1, 1}"
    assert str(Range(-math.inf, 2.5, high_open=True)) == "(-inf, 2.5)"
    assert str(ANY) == "(-inf, inf)"


def test_joins_are_the_larger():
    a = Kind(Extent.EXAMPLE, Element.NUMBER, ANY, Stage.DATA, gradient=True)
    b = Kind(Extent.TOKEN, Element.NUMBER, ANY, Stage.FROZEN)
    joined = join([a, b], Element.NUMBER, ANY)
    assert (joined.extent, joined.stage, joined.gradient) == (Extent.TOKEN, Stage.FROZEN, True)
    assert Extent.CONSTANT < Extent.RUN < Extent.PAIR < Extent.EXAMPLE < Extent.TOKEN
    assert Stage.CONSTANT < Stage.DATA < Stage.FROZEN < Stage.RUN < Stage.ONLINE
