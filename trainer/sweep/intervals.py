"""Means over seeds with their Student t intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `n` seeds; the interval is `value` plus and minus `half`, which is None for one seed."""

    value: float
    half: float | None
    n: int

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.value) > self.half


def mean(values: Sequence[float]) -> Mean:
    """The mean of some values, at least one, with its 95 % interval by Student's t."""
    if len(values) < 2:
        return Mean(fmean(values), None, len(values))
    half = t_quantile(len(values) - 1, CONFIDENCE) * stdev(values) / math.sqrt(len(values))
    return Mean(fmean(values), half, len(values))


def difference(of: Mapping[int, float], to: Mapping[int, float]) -> Mean | None:
    """The mean of the differences seed by seed, over the seeds that both have; None where they share none."""
    shared = sorted(of.keys() & to.keys())
    return mean([of[seed] - to[seed] for seed in shared]) if shared else None


def t_quantile(freedom: int, confidence: float) -> float:
    """Half the width of the interval around 0 that holds a share `confidence` of Student's t."""
    low, high = 0.0, 1.0
    while inside(high, freedom) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if inside(middle, freedom) < confidence else (low, middle)
    return high


def inside(t: float, freedom: int) -> float:
    """The share of Student's t with that many degrees of freedom that lies between -t and t.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
