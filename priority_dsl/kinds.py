"""What the checker knows of an expression: extent, element, range, stage, gradient, and their joins.

Extents and stages are lattices in the shape of a line, so a join is `max`. A range is a small set of
values or an interval; arithmetic on ranges is outward: the true values always lie inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from functools import cached_property

from priority_dsl import ieee

MOST_VALUES = 16  # a set of more values is kept as the interval around it


class Extent(IntEnum):
    """For how much one value stands; operators take the larger, a smaller one is broadcast."""

    CONSTANT = 0
    RUN = 1
    PAIR = 2
    EXAMPLE = 3
    TOKEN = 4

    def __str__(self) -> str:
        return self.name.lower()


class Element(StrEnum):
    """What a value is."""

    BOOL = "bool"
    NUMBER = "number"
    CATEGORY = "category"
    TEXT = "text"
    MODEL = "model"


class Stage(IntEnum):
    """When a value is known (binding time)."""

    CONSTANT = 0
    DATA = 1
    FROZEN = 2
    RUN = 3
    ONLINE = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Range:
    """The values an expression can take: a small set (`values`), else the interval `low..high`.

    Ends may be open. An open end is a statement about mathematics: in float32 a value can round onto it.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    values: frozenset[float] | None = None

    @staticmethod
    def of(values: Iterable[float]) -> Range:
        """The range of a finite set of values; the interval around them where they are many."""
        known = frozenset(v + 0.0 for v in values)  # -0.0 is 0.0
        if any(math.isnan(v) for v in known):
            return ANY
        return Range(min(known), max(known), values=known if len(known) <= MOST_VALUES else None)

    @cached_property
    def point(self) -> float | None:
        """The value where there is only one."""
        if self.values is not None:
            return next(iter(self.values)) if len(self.values) == 1 else None
        return self.low if self.low == self.high else None

    @property
    def is_boolean(self) -> bool:
        """Whether every value is 0 or 1."""
        return self.values is not None and self.values <= {0.0, 1.0}

    @property
    def is_finite(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def contains(self, value: float) -> bool:
        """Whether `value` is among the possible values."""
        if self.values is not None:
            return value in self.values
        above = value > self.low or (value == self.low and not self.low_open)
        below = value < self.high or (value == self.high and not self.high_open)
        return above and below

    def covers(self, value: float, slack: float = 1e-5) -> bool:
        """Whether a value computed in floating point may be one of the range, ends taken as closed."""
        scale = slack * max(1.0, abs(value)) if math.isfinite(value) else 0.0
        if self.values is not None:
            return any(value == v or abs(value - v) <= scale for v in self.values)
        return self.low - scale <= value <= self.high + scale

    def __str__(self) -> str:
        if self.values is not None:
            return "{" + ", ".join(_text(v) for v in sorted(self.values)) + "}"
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        return f"{left}{_text(self.low)}, {_text(self.high)}{right}"


def _text(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


ANY = Range()
BOOLEAN = Range.of((0.0, 1.0))
UNIT = Range(0.0, 1.0)
NONNEGATIVE = Range(0.0, math.inf)


@dataclass(frozen=True)
class Kind:
    """All that the checker derives for one expression."""

    extent: Extent
    element: Element
    range: Range = ANY
    stage: Stage = Stage.CONSTANT
    gradient: bool = False

    def detached(self) -> Kind:
        """The same without a gradient."""
        return replace(self, gradient=False)


def join(kinds: Iterable[Kind], element: Element, range: Range, gradient: bool = True) -> Kind:
    """The kind of an elementwise operation: largest extent and stage, gradient where any operand has one."""
    known = list(kinds)
    return Kind(
        max((k.extent for k in known), default=Extent.CONSTANT),
        element,
        range,
        max((k.stage for k in known), default=Stage.CONSTANT),
        gradient and any(k.gradient for k in known),
    )


# Arithmetic on ranges ---------------------------------------------------------------------------


def hull(*ranges: Range) -> Range:
    """The smallest range that holds all of the given ones: the values of an `if`."""
    if all(r.values is not None for r in ranges):
        return Range.of(v for r in ranges for v in r.values or ())
    low = min(r.low for r in ranges)
    high = max(r.high for r in ranges)
    low_open = all(r.low_open for r in ranges if r.low == low)
    high_open = all(r.high_open for r in ranges if r.high == high)
    return Range(low, high, low_open, high_open)


def image(function: Callable[..., float], *ranges: Range) -> Range | None:
    """The exact range of a function over finite sets of arguments; None where a set is not finite."""
    sizes = [len(r.values) if r.values is not None else None for r in ranges]
    if None in sizes or math.prod(s for s in sizes if s is not None) > 4 * MOST_VALUES:
        return None
    return Range.of(
        function(*point) for point in itertools.product(*(sorted(r.values or ()) for r in ranges))
    )


def rising(function: Callable[[float], float], argument: Range) -> Range:
    """The range of a function that never falls; openness of the ends is kept where it is strict."""
    exact = image(function, argument)
    if exact is not None:
        return exact
    low, high = function(argument.low), function(argument.high)
    return Range(low, high, argument.low_open and low < high, argument.high_open and low < high)


def negated(a: Range) -> Range:
    """The range of `-a`."""
    if a.values is not None:
        return Range.of(-v for v in a.values)
    return Range(-a.high, -a.low, a.high_open, a.low_open)


def corners(
    function: Callable[[float, float], float],
    a: Range,
    b: Range,
    settles: Callable[[float], bool] = lambda end: False,
) -> Range:
    """The range of a function of two arguments that is monotone in each (`+ * **`).

    An end of the result is open where a corner that gives it is open, unless a closed end `settles` the
    result whatever the other argument is (0 in a product).
    """
    exact = image(function, a, b)
    if exact is not None:
        return exact
    ends = []
    for (x, x_open), (y, y_open) in itertools.product(_ends(a), _ends(b)):
        settled = (settles(x) and not x_open) or (settles(y) and not y_open)
        ends.append((function(x, y), (x_open or y_open) and not settled))
    low, high = min(v for v, _ in ends), max(v for v, _ in ends)
    return Range(
        low,
        high,
        low_open=all(is_open for v, is_open in ends if v == low),
        high_open=all(is_open for v, is_open in ends if v == high),
    )


def _ends(a: Range) -> tuple[tuple[float, bool], tuple[float, bool]]:
    return (a.low, a.low_open), (a.high, a.high_open)


def smaller(a: Range, b: Range) -> Range:
    """The range of `min(a, b)`: it reaches a low end where one does, a high end where both do."""
    exact = image(min, a, b)
    if exact is not None:
        return exact
    low, high = min(a.low, b.low), min(a.high, b.high)
    low_open = all(r.low_open for r in (a, b) if r.low == low)
    high_open = any(r.high_open for r in (a, b) if r.high == high)
    return Range(low, high, low_open, high_open)


def larger(a: Range, b: Range) -> Range:
    """The range of `max(a, b)`."""
    return negated(smaller(negated(a), negated(b)))


def plus(a: Range, b: Range) -> Range:
    """The range of `a + b`; a sum of opposite infinities can be anything."""
    if {a.low, b.high} == {-math.inf, math.inf} or {a.high, b.low} == {-math.inf, math.inf}:
        low = -math.inf if -math.inf in (a.low, b.low) else a.low + b.low
        high = math.inf if math.inf in (a.high, b.high) else a.high + b.high
        return Range(low, high)
    return corners(lambda x, y: x + y, a, b, math.isinf)


def times(a: Range, b: Range) -> Range:
    """The range of `a * b`, with 0 times infinity 0 (law 4)."""
    return corners(ieee.multiply, a, b, lambda end: end == 0 or math.isinf(end))


def reciprocal(b: Range) -> Range:
    """The range of `1 / b`; anything where `b` may be 0 between its ends."""
    if b.values is not None and 0.0 not in b.values:
        return Range.of(1.0 / v for v in b.values)
    if b.low < 0 < b.high or (b.low <= 0 == b.high and not b.high_open):
        return ANY  # a zero has either sign
    if b.low >= 0:  # 1/0 at the closed end is +inf
        low, high = 1.0 / b.high, math.inf if b.low == 0 else 1.0 / b.low
        return Range(low, high, b.high_open and b.high != math.inf, b.low_open)
    low, high = -math.inf if b.high == 0 else 1.0 / b.high, 1.0 / b.low
    return Range(low, high, b.high_open, b.low_open and b.low != -math.inf)


def power(a: Range, b: Range) -> Range:
    """The range of `a ** b`; anything where the base may be negative and the exponent is not 2, 4, ..."""
    exact = image(ieee.power, a, b)
    if exact is not None:
        return exact
    exponent = b.point
    if exponent == 0:
        return Range.of((1.0,))
    if a.low < 0:
        even = exponent is not None and exponent > 0 and exponent % 2 == 0
        odd = exponent is not None and exponent > 0 and exponent % 2 == 1
        if odd:
            return rising(lambda v: ieee.power(v, exponent or 0.0), a)
        return NONNEGATIVE if even else ANY
    return corners(ieee.power, a, b, lambda end: end in (0.0, 1.0) or math.isinf(end))


def compared(op: str, a: Range, b: Range) -> Range:
    """The truth values that a comparison can take: {0}, {1} or {0, 1}."""
    if op in (">", ">="):
        return compared({">": "<", ">=": "<="}[op], b, a)
    if op in ("==", "!="):
        never = a.high < b.low or b.high < a.low or _apart(a, b)
        always = a.point is not None and a.point == b.point
        equal = Range.of((0.0,)) if never else Range.of((1.0,)) if always else BOOLEAN
        return equal if op == "==" else Range.of(1.0 - v for v in equal.values or ())
    touching_open = a.high_open or b.low_open
    if a.high < b.low or (a.high == b.low and (op == "<=" or touching_open)):
        return Range.of((1.0,))
    touching_open = a.low_open or b.high_open
    if a.low > b.high or (a.low == b.high and (op == "<" or touching_open)):
        return Range.of((0.0,))
    return BOOLEAN


def _apart(a: Range, b: Range) -> bool:
    if a.values is not None and b.values is not None:
        return not a.values & b.values
    finite, other = (a, b) if a.values is not None else (b, a)
    return finite.values is not None and not any(other.contains(v) for v in finite.values)
