"""Arithmetic: operators and elementwise functions of numbers, with their ranges and derivatives.

Letters: `g` what flows back to the result, `out` the result, `x a b ...` the arguments.
"""

from __future__ import annotations

import math
from typing import Any

from priority_dsl import ieee
from priority_dsl.kinds import (
    ANY,
    NONNEGATIVE,
    UNIT,
    Range,
    image,
    larger,
    negated,
    plus,
    power,
    reciprocal,
    rising,
    smaller,
    times,
)
from priority_dsl.registry import Verdict, function


def through(g: Any, slope: Any) -> Any:
    """`g * slope`, exactly 0 where nothing flows, even where the slope is infinite (law 4)."""
    if isinstance(slope, (int, float)):
        return g * slope
    return (g * slope).masked_fill(g == 0, 0.0)


# Operators --------------------------------------------------------------------------------------


@function(
    name="add", symbol="+", example="p_on + p_ref", range=plus, oracle=lambda a, b: a + b,
    derivative=lambda g, out, a, b: (g, g),
)  # fmt: skip
def add(a, b):
    """The sum."""
    return a + b


@function(
    name="subtract", symbol="-", example="nll_on - nll_ref", oracle=lambda a, b: a - b,
    range=lambda a, b: plus(a, negated(b)), derivative=lambda g, out, a, b: (g, -g),
)  # fmt: skip
def subtract(a, b):
    """The difference."""
    return a - b


@function(
    name="negate", symbol="-x", example="-p_on", range=negated, oracle=lambda x: -x,
    derivative=lambda g, out, x: (-g,),
)  # fmt: skip
def negate(x):
    """The number with its sign turned round."""
    return -x


@function(
    name="multiply", symbol="*", example="p_on * p_ref", range=times, oracle=ieee.multiply,
    derivative=lambda g, out, a, b: (through(g, b), through(g, a)),
)  # fmt: skip
def multiply(a, b):
    """The product; exactly 0 where a factor without gradient is 0 (law 4)."""
    return a * b


def _zero_divisor(a: Range, b: Range) -> Verdict:
    return "certain" if b.point == 0 else "possible" if b.contains(0.0) else None


@function(
    name="divide", symbol="/", example="p_on / 2", oracle=ieee.divide, danger="division by zero",
    range=lambda a, b: image(ieee.divide, a, b) or times(a, reciprocal(b)), hazard=_zero_divisor,
    derivative=lambda g, out, a, b: (through(g, 1.0 / b), through(g, -(out / b))),
)  # fmt: skip
def divide(a, b):
    """The quotient."""
    return a / b


def _unreal_power(a: Range, b: Range) -> Verdict:
    exponent = b.point
    whole = exponent is not None and math.isfinite(exponent) and exponent.is_integer()
    may_be_zero, may_be_negative = a.contains(0.0) and b.low < 0, a.low < 0 and not whole
    if not (may_be_zero or may_be_negative):
        return None
    zero_to_negative = a.point == 0 and b.high < 0
    negative_root = a.high < 0 and exponent is not None and not whole
    return "certain" if zero_to_negative or negative_root else "possible"


@function(
    name="power", symbol="**", example="p_on ** 0.5", range=power, oracle=ieee.power,
    hazard=_unreal_power, danger="power without a real, finite value",
    derivative=lambda g, out, a, b: (through(g, b * a ** (b - 1.0)), None),
)  # fmt: skip
def power_(a, b):
    """The power; of a probability it is computed as `exp(-b * nll)` and 1 where nll or b is 0 (law 2)."""
    return a**b


@function(
    name="power_of_both", symbol="**x", example="nll_on ** nll_on", range=power, oracle=ieee.power,
    scalars=False, derived=True, hazard=_unreal_power, danger="power without a real, finite value",
    derivative=lambda g, out, a, b: (through(g, b * a ** (b - 1.0)), through(g, out * a.log())),
)  # fmt: skip
def power_of_both(a, b):
    """The power whose exponent carries gradient too."""
    return a**b


def _power_of_probability(nll: float, a: float) -> float:
    return ieee.exp(-ieee.multiply(nll, a))


@function(
    name="power_of_probability", symbol="p**", oracle=_power_of_probability, scalars=False,
    derived=True, example="p_on ** nll_on", range=lambda nll, a: power(UNIT, a),
    derivative=lambda g, out, nll, a: (
        through(g, -(out * a)), through(g, -(out * nll).masked_fill(out == 0, 0.0))
    ),
)  # fmt: skip
def power_of_probability(nll, a):
    """`p ** a` from the nll of p: `exp(-a * nll)`, and 1 where nll or a is 0 (law 2)."""
    return (-(nll * a).masked_fill((nll == 0) | (a == 0), 0.0)).exp()


# Functions --------------------------------------------------------------------------------------


@function(
    range=lambda x: rising(ieee.exp, x), oracle=ieee.exp, scalars=False,
    derivative=lambda g, out, x: (through(g, out),), example="exp(-nll_on)",
)  # fmt: skip
def exp(x):
    """e to the power x."""
    return x.exp()


def _not_positive(x: Range) -> Verdict:
    if x.high < 0 or x.point == 0:
        return "certain"
    return "possible" if x.low < 0 or x.contains(0.0) else None


def _not_nonnegative(x: Range) -> Verdict:
    return "certain" if x.high < 0 else "possible" if x.low < 0 else None


def _logarithm(f):
    return lambda x: rising(f, x) if x.low >= 0 else ANY


@function(
    range=_logarithm(ieee.log), oracle=ieee.log, scalars=False, hazard=_not_positive,
    danger="logarithm of 0 or less", derivative=lambda g, out, x: (through(g, 1.0 / x),),
    example="log(nll_on + 1)",
)  # fmt: skip
def log(x):
    """The natural logarithm; of a probability it is `-nll` (law 2)."""
    return x.log()


@function(
    range=_logarithm(ieee.log2), oracle=ieee.log2, scalars=False, hazard=_not_positive,
    danger="logarithm of 0 or less", derivative=lambda g, out, x: (through(g, 1.0 / (x * math.log(2.0))),),
    example="1 / log2(rank_on + 1)",
)  # fmt: skip
def log2(x):
    """The logarithm to base 2."""
    return x.log2()


@function(
    range=lambda x: rising(ieee.sqrt, x) if x.low >= 0 else NONNEGATIVE, oracle=ieee.sqrt, scalars=False,
    hazard=_not_nonnegative, danger="square root of less than 0",
    derivative=lambda g, out, x: (through(g, 0.5 / out),),
)  # fmt: skip
def sqrt(x):
    """The square root."""
    return x.sqrt()


def _absolute(x: Range) -> Range:
    exact = image(lambda v: abs(v), x)
    if exact is not None:
        return exact
    if x.low >= 0:
        return x
    if x.high <= 0:
        return negated(x)
    flipped = negated(x)
    larger = x if x.high > flipped.high or (x.high == flipped.high and not x.high_open) else flipped
    return Range(0.0, larger.high, high_open=larger.high_open)


@function(
    name="abs", range=_absolute, oracle=abs, scalars=False, derivative=lambda g, out, x: (g * x.sign(),),
    example="abs(H_on - H_ref)",
)  # fmt: skip
def abs_(x):
    """The absolute value; its derivative at 0 is 0."""
    return x.abs()


def _signs(x: Range) -> Range:
    signs = {ieee.sign(x.low), ieee.sign(x.high)} | ({0.0} if x.contains(0.0) else set())
    signs -= {0.0} if not x.contains(0.0) else set()
    return Range.of(signs or {0.0})


@function(
    range=_signs, oracle=ieee.sign, scalars=False, derivative=lambda g, out, x: (None,),
    example="sign(nll_ref - nll_on)",
)  # fmt: skip
def sign(x):
    """-1, 0 or 1."""
    return x.sign()


def _shared(g: Any, chosen: Any, other: Any) -> Any:
    """What flows to one of two arguments of min or max: half of it where they are equal."""
    return g * (chosen + 0.5 * other)


@function(
    name="min", range=smaller, oracle=ieee.smaller, scalars=False,
    variadic=True, example="min(p_on, 0.5)",
    derivative=lambda g, out, a, b: (
        _shared(g, (a < b).to(g.dtype), (a == b).to(g.dtype)),
        _shared(g, (b < a).to(g.dtype), (a == b).to(g.dtype)),
    ),
)  # fmt: skip
def min_(a, b):
    """The smaller; equal arguments share the derivative."""
    return a.minimum(b)


@function(
    name="max", range=larger, oracle=ieee.larger, scalars=False,
    variadic=True, example="max(p_on, 0.01)",
    derivative=lambda g, out, a, b: (
        _shared(g, (a > b).to(g.dtype), (a == b).to(g.dtype)),
        _shared(g, (b > a).to(g.dtype), (a == b).to(g.dtype)),
    ),
)  # fmt: skip
def max_(a, b):
    """The larger; equal arguments share the derivative."""
    return a.maximum(b)


@function(
    range=lambda x, low, high: smaller(larger(x, low), high),
    oracle=lambda x, low, high: ieee.smaller(ieee.larger(x, low), high), scalars=False,
    example="clip(p_on, 0.1, 0.9)",
    derivative=lambda g, out, x, low, high: (
        g * ((x >= low) & (x <= high)).to(g.dtype),
        g * ((x < low) & (low <= high)).to(g.dtype),
        g * ((x > high) | (low > high)).to(g.dtype),
    ),
)  # fmt: skip
def clip(x, low, high):
    """x held between low and high; the derivative is 1 inside, ends included."""
    return x.maximum(low).minimum(high)


@function(
    range=lambda x: rising(ieee.sigmoid, x), oracle=ieee.sigmoid, scalars=False,
    derivative=lambda g, out, x: (g * out * (1.0 - out),), example="sigmoid(p_on - p_ref)",
)  # fmt: skip
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return x.sigmoid()


@function(
    range=lambda x: rising(ieee.log_sigmoid, x), oracle=ieee.log_sigmoid, scalars=False,
    derivative=lambda g, out, x: (g * (-x).sigmoid(),), example="log_sigmoid(margin_on)",
)  # fmt: skip
def log_sigmoid(x):
    """The logarithm of the sigmoid, exact for very negative x."""
    return x.clamp(max=0.0) - (-x.abs()).exp().log1p()


@function(
    range=lambda x: rising(math.tanh, x), oracle=math.tanh, scalars=False,
    derivative=lambda g, out, x: (g * (1.0 - out * out),), example="tanh(nll_on)",
)  # fmt: skip
def tanh(x):
    """The hyperbolic tangent."""
    return x.tanh()


@function(
    range=lambda x: x, oracle=lambda x: x, group="gradient", derivative=lambda g, out, x: (None,),
    example="sg(p_on) ** 0.5",
)  # fmt: skip
def sg(x):
    """The same value (or model) without its gradient: stop-gradient."""
    return x
