"""Reductions over scopes: sums, quantiles, rescalings, the largest and the smallest share.

`over` stands for the groups of a scope (`priority_dsl.groups`). Over nothing a number is 0 and a condition
is false; tokens outside `where` have 0 (false) where a reduction gives each token a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from priority_dsl.kinds import ANY, BOOLEAN, NONNEGATIVE, UNIT, Element, Extent, Range
from priority_dsl.registry import Choice, Verdict, reduction, scope

example = scope(
    "example", "The supervised tokens of one example.", "p_on / max(max(p_on, example), 0.01)",
    extent=Extent.EXAMPLE,
)  # fmt: skip
batch = scope(
    "batch", "The whole optimizer step: all micro-batches of all processes.",
    "H_on / max(mean(H_on, batch), 0.01)", extent=Extent.RUN,
)  # fmt: skip
dataset = scope(
    "dataset", "All training examples that `keep` leaves, after truncation; nothing in it may read `on`.",
    "top(nll_ref, 0.6, dataset)", extent=Extent.RUN,
)  # fmt: skip
chunk = scope(
    "chunk", "k supervised tokens of an example in a row, from position 0; the last chunk is shorter.",
    "mean(p_ref, chunk(8)) >= 0.5", extent=Extent.TOKEN, sized=True,
)  # fmt: skip
window = scope(
    "window", "The token and the k supervised tokens on either side, cut at the ends of the example.",
    "mean(p_ref, window(2)) >= 0.5", extent=Extent.TOKEN, sized=True,
)  # fmt: skip
draws = scope(
    "draws",
    "n evaluations of the chance in x, at most 64, each with draws of its own: a value for each token "
    "or example of x, computed once before training, so x may not read `on` or the run. Only what comes to "
    "one value goes over it, without `where`.",
    "std(nll(perturbed(ref, 5)), draws(4)) <= 0.5", extent=Extent.TOKEN, sized=True, size="n",
)  # fmt: skip


# Numbers ----------------------------------------------------------------------------------------


def _total(x: Range) -> Range:
    """The range of a sum of any number of values."""
    if x.low >= 0:
        return NONNEGATIVE
    return Range(-math.inf, 0.0) if x.high <= 0 else ANY


def _interval(x: Range) -> Range:
    """The range of what lies between values."""
    return x if x.point is not None else Range(x.low, x.high, x.low_open, x.high_open)


def _fsum(xs: Sequence[float]) -> float:
    return math.fsum(xs) if all(map(math.isfinite, xs)) else sum(xs)


def _mean(xs: Sequence[float]) -> float:
    return _fsum(xs) / len(xs)


def _quantile(xs: Sequence[float], q: float) -> float:
    ordered = sorted(xs)
    place = min(max(q, 0.0), 1.0) * (len(xs) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    share = place - math.floor(place)
    return low if low == high or share == 0 else low + (high - low) * share


def _deviation(xs: Sequence[float]) -> float:
    if min(xs) == max(xs):
        return 0.0
    mean = _mean(xs)
    return math.sqrt(_mean([(x - mean) * (x - mean) for x in xs]))


@reduction(
    name="sum", example="sum(p_ref, example) >= 8", range=_total, oracle=_fsum,
    derivative=lambda over, g, x: over.spread(g),
)  # fmt: skip
def sum_(over, x):
    """The sum over a scope."""
    return (over.sum(x),)


@reduction(
    example="p_on >= mean(p_on, example)", range=_interval, oracle=_mean,
    derivative=lambda over, g, x: over.spread(g / over.count().clamp(min=1)),
)  # fmt: skip
def mean(over, x):
    """The mean over a scope."""
    return (over.mean(x),)


@reduction(example="nll_on <= median(nll_on, batch)", range=_interval, oracle=lambda xs: _quantile(xs, 0.5))
def median(over, x):
    """The median over a scope: the mean of the middle two where their number is even."""
    return (over.quantile(x, 0.5),)


def _not_a_share(x: Range, q: Range) -> Verdict:
    if q.low > 1 or q.high < 0:
        return "certain"
    return "possible" if q.low < 0 or q.high > 1 else None


@reduction(
    example="p_on >= quantile(p_on, 0.25, batch)", range=_interval, oracle=_quantile, hazard=_not_a_share,
    danger="a quantile outside [0, 1]",
)  # fmt: skip
def quantile(over, x, q):
    """The quantile q over a scope, interpolated linearly."""
    return (over.quantile(x, q),)


@reduction(
    name="min_over", written="min", example="min(p_ref, chunk(4)) >= 0.1", range=lambda x: x, oracle=min
)
def min_(over, x):
    """The smallest over a scope."""
    return (over.least(x),)


@reduction(
    name="max_over", written="max", example="max(nll_ref, example) <= 8", range=lambda x: x, oracle=max
)
def max_(over, x):
    """The largest over a scope."""
    return (-over.least(-x),)


@reduction(
    example="std(nll_on, window(4)) <= 1", oracle=_deviation,
    range=lambda x: Range.of((0.0,)) if x.point is not None else Range(0.0, (x.high - x.low) / 2),
)  # fmt: skip
def std(over, x):
    """The standard deviation over a scope, divided by the number of values; exactly 0 of equal values."""
    return (over.deviation(x),)


@reduction(
    example="count(p_ref >= 0.5, example) >= 4", condition=True, range=lambda x: NONNEGATIVE, oracle=_fsum
)
def count(over, x):
    """In how many of a scope a condition holds."""
    return (over.sum(x),)


# A value for each token --------------------------------------------------------------------------


def _scaled(xs: Sequence[float], at: int) -> float:
    low, high = min(xs), max(xs)
    return 0.0 if low == high else (xs[at] - low) / (high - low)


@reduction(
    example="minmax(nll_on, example)", rescales=True, numbers=2, range=lambda x: UNIT, oracle=_scaled,
    apply=lambda over, x, low, high: ((x - low) / (high - low)).masked_fill(high == low, 0.0),
)  # fmt: skip
def minmax(over, x):
    """x scaled to [0, 1] over a scope; 0 where all are equal."""
    return over.least(x), -over.least(-x)


def _standard(xs: Sequence[float], at: int) -> float:
    deviation = _deviation(xs)
    return 0.0 if deviation == 0 else (xs[at] - _mean(xs)) / deviation


@reduction(
    example="sigmoid(zscore(nll_on, batch))", rescales=True, numbers=2, range=lambda x: ANY, oracle=_standard,
    apply=lambda over, x, centre, scale: ((x - centre) / scale).masked_fill(scale == 0, 0.0),
)  # fmt: skip
def zscore(over, x):
    """x minus the mean, divided by the standard deviation, over a scope; 0 where all are equal."""
    return over.mean(x), over.deviation(x)


def _kept(share: float, count: int, round: str) -> int:
    exact = Fraction(repr(float(share))) * count
    whole = math.ceil(exact) if round == "ceil" else math.floor(exact)
    return min(max(whole, 0), count)


def _largest(xs: Sequence[float], at: int, f: float, round: str) -> bool:
    order = sorted(range(len(xs)), key=lambda i: (math.inf if math.isnan(xs[i]) else -xs[i], i))
    return order.index(at) < _kept(f, len(xs), round) and not math.isnan(xs[at])


def _reached(over: Any, x: Any, value: Any, example: Any, position: Any, any: Any) -> Any:
    """Whether a token is among those up to the last one that is kept, ties by example and position."""
    earlier = (over.order.example == example) & (over.order.position <= position)
    tied = (x == value) & ((over.order.example < example) | earlier)
    return any & ((x > value) | tied)


_selection = {
    "element": Element.BOOL,
    "rescales": True,
    "numbers": 4,
    "range": lambda x: BOOLEAN,
    "options": {"round": Choice(("ceil", "floor"))},
    "hazard": lambda x, f: _not_a_share(x, f),
    "danger": "a share outside [0, 1]",
}


@reduction(example="top(H_on, 0.2, batch)", apply=_reached, oracle=_largest, **_selection)
def top(over, x, f, round):
    """Whether x is in the largest share f of a scope: ceil(f * n) are, ties by example and position."""
    return over.threshold(x, f, round)


@reduction(
    example="bottom(nll_on, 0.5, example)",
    apply=lambda over, x, *last: _reached(over, -x, *last),
    oracle=lambda xs, at, f, round: _largest([-x for x in xs], at, f, round),
    **_selection,
)
def bottom(over, x, f, round):
    """Whether x is in the smallest share f of a scope: `top(-x, f, scope)`."""
    return over.threshold(-x, f, round)


# Order ------------------------------------------------------------------------------------------


@reduction(
    group="order", example="exp(-0.01 * suffix_sum(nll_on))", scoped=False, rescales=True, range=_total,
    oracle=lambda xs, at: _fsum(xs[at:]), apply=lambda over, x, total: total,
    derivative=lambda over, g, x: over.prefix(g),
)  # fmt: skip
def suffix_sum(over, x):
    """The sum from the token to the end of its example, itself included."""
    return (over.suffix(x),)
