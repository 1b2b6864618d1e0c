"""The tokens over which a reduction goes, in a graph: sums, quantiles and thresholds of every group.

A group is an example, a part of one (`chunk`) or the whole call; `windows` has the surroundings of a token.
What a method returns is what each token sees of its own group, `[N]`, or one number where the group is
the whole call. Shapes never depend on the data, so that the graph compiles.

Letters: N tokens of a call. `eligible` [N] bool: the tokens that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from priority_dsl import layout
from priority_dsl.registry import leaf

LONGEST_DENOMINATOR = 2**31  # of a share that is counted exactly: ten digits after the point
SLACK = 2.0**-22  # of a share that is known only in the run, where it has been rounded to float32


@dataclass(frozen=True)
class Order:
    """What breaks ties: the data-set row of each token and its place among the supervised tokens, `[N]`."""

    example: Any
    position: Any


@dataclass(frozen=True)
class Segments:
    """Groups of which each token is in one: `ids` [N] numbers them from 0; `whole` says there is only one."""

    ids: Any
    eligible: Any
    valid: Any
    order: Order
    whole: bool = False

    def _seen(self, of_group: Any) -> Any:
        return of_group[0] if self.whole else of_group.gather(0, self.ids)

    def sum(self, x: Any) -> Any:
        """The sum of x over the group; 0 over nothing."""
        return self._seen(segment_sum(x, self.eligible, self.ids))

    def count(self) -> Any:
        """How many count in the group."""
        return self._seen(segment_count(self.eligible, self.ids))

    def mean(self, x: Any) -> Any:
        """The mean of x over the group; 0 over nothing."""
        return self._seen(segment_mean(x, self.eligible, self.ids))

    def least(self, x: Any) -> Any:
        """The smallest x of the group; 0 over nothing."""
        return self._seen(segment_least(x, self.eligible, self.ids))

    def deviation(self, x: Any) -> Any:
        """The standard deviation of x over the group, divided by n; exactly 0 where all are equal."""
        return self._seen(segment_deviation(x, self.eligible, self.ids))

    def quantile(self, x: Any, q: Any) -> Any:
        """The quantile q of x, interpolated linearly; 0 over nothing."""
        return self._seen(segment_quantile(x, q, self.eligible, self.ids))

    def threshold(self, x: Any, share: Any, rounding: str) -> tuple[Any, ...]:
        """The last element of the largest share of x: value, example, position; and whether there is one."""
        order = (self.order.example, self.order.position)
        last = segment_threshold(x, share, rounding, self.eligible, self.ids, *order)
        return tuple(self._seen(last[i]) for i in range(4))

    def suffix(self, x: Any) -> Any:
        """The sum of x from each token to the end of its group, itself included `[N]`."""
        return suffix_sum(x, self.eligible, self.ids, self.order.position)

    def prefix(self, g: Any) -> Any:
        """The sum of g from the start of the group to each token, itself included `[N]`."""
        return suffix_sum(g, self.valid, self.ids, -self.order.position)

    def spread(self, g: Any) -> Any:
        """The sum of what flows to the tokens of the group: the transpose of showing them one number."""
        return self._seen(segment_sum(g, self.valid, self.ids))


# Which tokens are together ------------------------------------------------------------------------


@leaf
def chunk_ids(segments: Tensor, position: Tensor, size: int) -> Tensor:
    """The chunks of `size` supervised tokens of each example, numbered from 0, `[N]`."""
    return layout.segments(segments * (segments.numel() + 1) + position.long() // size)


# Sums -------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """x for sums: float64, so that they hardly depend on how the tokens were split (mps has none)."""
    return x if x.device.type == "mps" else x.double()


def chosen(x: Tensor, eligible: Tensor, filler: float = 0.0) -> Tensor:
    """x for sums where eligible, the filler elsewhere."""
    return torch.where(eligible, _wide(x), filler)


def _added(values: Tensor, ids: Tensor) -> Tensor:
    return values.new_zeros(ids.numel() + 1).index_add(0, ids, values)


def _least(values: Tensor, ids: Tensor) -> Tensor:
    return values.new_full((ids.numel() + 1,), torch.inf).scatter_reduce(0, ids, values, "amin")


@leaf
def spread_out(x: Tensor, like: Tensor) -> Tensor:
    """x for every row of `like`: a single number is repeated, `[N]`."""
    return x.expand(like.shape[0]) if x.dim() == 0 else x


@leaf
def one_for_all(x: Tensor, valid: Tensor) -> Tensor:
    """The one number that all supervised tokens have, 0-dimensional, from `[N]` or as it is."""
    return x[valid.long().argmax()] if x.dim() and x.numel() else x.reshape(-1)[:1].sum().to(x.dtype)


@leaf
def segment_sum(x: Tensor, eligible: Tensor, ids: Tensor) -> Tensor:
    """Sums `[N + 1]` of x `[N]` by group."""
    return _added(chosen(x, eligible), ids).to(x.dtype)


@leaf
def segment_count(eligible: Tensor, ids: Tensor) -> Tensor:
    """How many tokens count, by group `[N + 1]`."""
    return _added(eligible.long(), ids)


@leaf
def segment_mean(x: Tensor, eligible: Tensor, ids: Tensor) -> Tensor:
    """Means `[N + 1]` of x `[N]` by group."""
    count = _added(eligible.long(), ids)
    return (_added(chosen(x, eligible), ids) / count.clamp(min=1)).to(x.dtype)


@leaf
def segment_least(x: Tensor, eligible: Tensor, ids: Tensor) -> Tensor:
    """The smallest of x by group `[N + 1]`."""
    least = _least(chosen(x, eligible, torch.inf), ids)
    return least.masked_fill(_added(eligible.long(), ids) == 0, 0.0).to(x.dtype)


@leaf
def segment_deviation(x: Tensor, eligible: Tensor, ids: Tensor) -> Tensor:
    """Standard deviations of x by group `[N + 1]`."""
    count = _added(eligible.long(), ids)
    mean = _added(chosen(x, eligible), ids) / count.clamp(min=1)
    square = (chosen(x, eligible) - mean[ids]).square()
    deviation = (_added(chosen(square, eligible), ids) / count.clamp(min=1)).sqrt()
    least, largest = (_least(chosen(sign * x, eligible, torch.inf), ids) * sign for sign in (1, -1))
    return deviation.masked_fill((least == largest) | (count == 0), 0.0).to(x.dtype)


@leaf
def suffix_sum(x: Tensor, eligible: Tensor, ids: Tensor, position: Tensor) -> Tensor:
    """For each token the sum of x over the tokens of its group at its position or a later one `[N]`.

    By doubling rather than by differences of running sums: an infinity stays in its group.
    """
    order = _ordered(-position, ids)
    sums, group = chosen(x, eligible)[order], ids[order]
    step = 1
    while step < ids.numel():
        together = group[step:] == group[:-step]
        sums = torch.cat([sums[:step], sums[step:] + sums[:-step].where(together, 0.0)])
        step *= 2
    return sums.new_zeros(ids.shape).scatter(0, order, sums).to(x.dtype)


# Order statistics -------------------------------------------------------------------------------


def _ordered(*keys: Tensor) -> Tensor:
    """The order `[N]` by several keys, the last the most important; ties stay as they are."""
    order = torch.arange(keys[0].numel(), device=keys[0].device)
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    return order


def _starts(ids: Tensor) -> Tensor:
    """Where each group begins among the tokens sorted by group `[N + 1]`."""
    sizes = _added(torch.ones_like(ids), ids)
    return sizes.cumsum(0) - sizes


def between(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """low + share * (high - low), where equal ends may be infinite."""
    return low + ((high - low) * share).masked_fill((high == low) | (share == 0), 0.0)


def place_of(q: Tensor | float, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the quantile q of `count` numbers: the two places around it, and how far it is between them."""
    q = q.double() if isinstance(q, Tensor) else torch.full_like(count, q, dtype=torch.float64)
    place = q.clamp(0.0, 1.0) * (count - 1).clamp(min=0)
    low = place.floor()
    return low.long(), place.ceil().long(), place - low


def share_of(share: Tensor | float, count: Tensor, rounding: str) -> Tensor:
    """How many of `count` a share is (law 7): exact for the decimal that was written, 0.07 of 100 is 7."""
    if isinstance(share, Tensor):
        exact = share.double() * count
        slack = SLACK * exact.abs()
        chosen = (exact - slack).ceil() if rounding == "ceil" else (exact + slack).floor()
    else:
        written = Fraction(repr(float(share)))
        if written.denominator <= LONGEST_DENOMINATOR:
            up = written.denominator - 1 if rounding == "ceil" else 0
            chosen = (count * written.numerator + up) // written.denominator
        else:
            exact = count.double() * float(share)
            chosen = exact.ceil() if rounding == "ceil" else exact.floor()
    return torch.minimum(chosen.long().clamp(min=0), count)


def lowest_where_nan(x: Tensor) -> Tensor:
    """x with NaN (a difference of two infinite surprises) in the last place, where nothing is kept."""
    return x.masked_fill(x.isnan(), -torch.inf)


@leaf
def segment_quantile(x: Tensor, q: Tensor | float, eligible: Tensor, ids: Tensor) -> Tensor:
    """The quantiles of x by group `[N + 1]`."""
    count = _added(eligible.long(), ids)
    values = chosen(x, eligible, torch.inf)
    values = torch.cat([values[_ordered(values, ids)], values.new_zeros(1)])
    if isinstance(q, Tensor) and q.dim():
        q = torch.cat([q, q.new_zeros(1)])
    low, high, share = place_of(q, count)
    start, last = _starts(ids), values.numel() - 1
    found = between(values[(start + low).clamp(max=last)], values[(start + high).clamp(max=last)], share)
    return found.masked_fill(count == 0, 0.0).to(x.dtype)


@leaf
def segment_threshold(
    x: Tensor,
    share: Tensor | float,
    rounding: str,
    eligible: Tensor,
    ids: Tensor,
    example: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By group `[N + 1]` the last of the largest share of x: value, example, position, whether it exists."""
    x = lowest_where_nan(spread_out(x, ids))
    kept = share_of(share, _added(eligible.long(), ids), rounding)
    order = _ordered(position, example, -x, (~eligible).long(), ids)
    last = torch.cat([order, order.new_zeros(1)])[(_starts(ids) + kept - 1).clamp(0, ids.numel())]
    columns = [torch.cat([t, t.new_zeros(1)])[last] for t in (x, example, position)]
    return columns[0], columns[1], columns[2], kept > 0
