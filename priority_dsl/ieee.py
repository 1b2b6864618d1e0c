"""Real functions in float64 as IEEE 754 has them: overflow is infinite, no result raises.

The compiler folds constants with these, the checker bounds ranges with them, the oracle computes with
them; tensors never pass through here.
"""

from __future__ import annotations

import math

inf, nan = math.inf, math.nan


def exp(x: float) -> float:
    """e to the power x; inf above 709.78."""
    try:
        return math.exp(x)
    except OverflowError:
        return inf


def log(x: float) -> float:
    """Natural logarithm; -inf at 0, NaN below."""
    return math.log(x) if x > 0 else -inf if x == 0 else nan


def log2(x: float) -> float:
    """Logarithm to base 2; -inf at 0, NaN below."""
    return math.log2(x) if x > 0 else -inf if x == 0 else nan


def sqrt(x: float) -> float:
    """Square root; NaN below 0."""
    return math.sqrt(x) if x >= 0 else nan


def sign(x: float) -> float:
    """-1, 0 or 1; 0 of NaN, as torch has it."""
    return float((x > 0) - (x < 0))


def smaller(a: float, b: float) -> float:
    """The smaller of two; NaN where one is NaN (Python's `min` would drop it)."""
    return nan if math.isnan(a) or math.isnan(b) else min(a, b)


def larger(a: float, b: float) -> float:
    """The larger of two; NaN where one is NaN."""
    return nan if math.isnan(a) or math.isnan(b) else max(a, b)


def divide(a: float, b: float) -> float:
    """a / b; a signed infinity where only b is 0, NaN for 0/0."""
    if b != 0:
        return a / b
    return nan if a == 0 or math.isnan(a) else math.copysign(inf, a) * math.copysign(1.0, b)


def multiply(a: float, b: float) -> float:
    """a * b, with 0 times infinity 0 (law 4 of the language, where the 0 has no gradient)."""
    return 0.0 if a == 0 or b == 0 else a * b


def power(base: float, exponent: float) -> float:
    """Real power: 1 for exponent 0, inf for 0 to a negative power, NaN where there is no real value."""
    if base < 0 and math.isfinite(exponent) and not float(exponent).is_integer():
        return nan
    try:
        return float(base**exponent)
    except ZeroDivisionError:
        return inf
    except OverflowError:
        return -inf if base < 0 and exponent % 2 == 1 else inf


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def log_sigmoid(x: float) -> float:
    """log of the sigmoid, exact for very negative x."""
    return min(x, 0.0) - math.log1p(exp(-abs(x)))
