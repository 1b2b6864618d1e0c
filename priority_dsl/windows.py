"""The surroundings of each token as groups, in a graph: the same methods as `groups.Segments`.

Letters: N tokens of a call, W = 2k + 1 tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from priority_dsl.groups import (
    Order,
    between,
    chosen,
    lowest_where_nan,
    place_of,
    share_of,
    spread_out,
)
from priority_dsl.registry import leaf


@leaf
def window_index(segments: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each supervised token the `size` on either side in its example: index `[N, W]`, which exist."""
    n = segments.numel()
    order = (2 * segments + (~valid).long()).argsort(stable=True)  # supervised tokens of an example together
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))
    around = rank.unsqueeze(-1) + torch.arange(-size, size + 1, device=order.device)
    index = order[around.clamp(0, max(n - 1, 0))]
    inside = (around >= 0) & (around < n) & valid[index] & (segments[index] == segments.unsqueeze(-1))
    return index, inside


@dataclass(frozen=True)
class Windows:
    """Groups around each token: `index` [N, W] the tokens around it, `inside` [N, W] which of them exist."""

    index: Any
    inside: Any
    eligible: Any
    order: Order

    def _rows(self, x: Any) -> Any:
        return spread_out(x, self.inside)[self.index]

    @property
    def _counted(self) -> Any:
        return self.inside & self.eligible[self.index]

    def sum(self, x: Any) -> Any:
        """As of `Segments`."""
        return window_sum(self._rows(x), self._counted)

    def count(self) -> Any:
        """As of `Segments`."""
        return self._counted.sum(-1)

    def mean(self, x: Any) -> Any:
        """As of `Segments`."""
        return window_mean(self._rows(x), self._counted)

    def least(self, x: Any) -> Any:
        """As of `Segments`."""
        return window_least(self._rows(x), self._counted)

    def deviation(self, x: Any) -> Any:
        """As of `Segments`."""
        return window_deviation(self._rows(x), self._counted)

    def quantile(self, x: Any, q: Any) -> Any:
        """As of `Segments`."""
        return window_quantile(self._rows(x), q, self._counted)

    def threshold(self, x: Any, share: Any, rounding: str) -> tuple[Any, ...]:
        """As of `Segments`."""
        order = (self.order.example[self.index], self.order.position[self.index])
        last = window_threshold(self._rows(x), share, rounding, self._counted, *order)
        return tuple(last[i] for i in range(4))

    def spread(self, g: Any) -> Any:
        """As of `Segments`; a token is around those that are around it."""
        return window_sum(self._rows(g), self.inside)


@leaf
def window_sum(rows: Tensor, counted: Tensor) -> Tensor:
    """The sum of each window `[N, W]`."""
    return chosen(rows, counted).sum(-1).to(rows.dtype)


@leaf
def window_mean(rows: Tensor, counted: Tensor) -> Tensor:
    """The mean of each window `[N, W]`."""
    return (chosen(rows, counted).sum(-1) / counted.sum(-1).clamp(min=1)).to(rows.dtype)


@leaf
def window_least(rows: Tensor, counted: Tensor) -> Tensor:
    """The smallest of each window `[N, W]`."""
    return rows.where(counted, torch.inf).amin(-1).masked_fill(~counted.any(-1), 0.0)


@leaf
def window_deviation(rows: Tensor, counted: Tensor) -> Tensor:
    """The standard deviation of each window `[N, W]`."""
    count = counted.sum(-1, keepdim=True).clamp(min=1)
    mean = chosen(rows, counted).sum(-1, keepdim=True) / count
    square = (chosen(rows, counted) - mean).square().where(counted, 0.0)
    deviation = (square.sum(-1, keepdim=True) / count).sqrt().squeeze(-1)
    least, largest = rows.where(counted, torch.inf).amin(-1), rows.where(counted, -torch.inf).amax(-1)
    return deviation.masked_fill((least == largest) | ~counted.any(-1), 0.0).to(rows.dtype)


@leaf
def window_quantile(rows: Tensor, q: Tensor | float, counted: Tensor) -> Tensor:
    """The quantile of each window `[N, W]`."""
    count = counted.sum(-1)
    values = chosen(rows, counted, torch.inf).sort(-1).values
    low, high, share = place_of(q, count)
    ends = [values.gather(-1, place.unsqueeze(-1)).squeeze(-1) for place in (low, high)]
    return between(ends[0], ends[1], share).masked_fill(count == 0, 0.0).to(rows.dtype)


@leaf
def window_threshold(
    rows: Tensor,
    share: Tensor | float,
    rounding: str,
    counted: Tensor,
    example: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each window `[N, W]` the last of the largest share: as of segments, each `[N]`."""
    kept = share_of(share, counted.sum(-1), rounding)
    rows = lowest_where_nan(rows)
    order = (-rows).argsort(dim=-1, stable=True)  # a window is in order of position
    order = order.gather(-1, (~counted).long().gather(-1, order).argsort(dim=-1, stable=True))
    last = order.gather(-1, (kept - 1).clamp(min=0).unsqueeze(-1))
    value, of, at = (t.gather(-1, last).squeeze(-1) for t in (rows, example, position))
    return value, of, at, kept > 0
