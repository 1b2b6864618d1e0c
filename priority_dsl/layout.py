"""Which supervised token belongs to which example, in tensors of fixed shapes.

Letters: N tokens (all positions of a micro-batch, flattened row by row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def example_ids(targets: Tensor, examples: Tensor | None) -> Tensor:
    """The example of each token `[N]`: as given, else one example a row of the batch."""
    if examples is not None:
        return examples.reshape(-1)
    if targets.dim() < 2:
        return targets.new_zeros(targets.numel())
    rows = targets.numel() // max(1, targets.shape[-1])
    ones = targets.new_ones(rows, targets.shape[-1])
    return (ones.cumsum(0) - 1).reshape(-1)


def segments(ids: Tensor) -> Tensor:
    """The examples numbered from 0 in the order of their ids `[N]`; at most N of them."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    starts = (ordered != ordered.roll(1, 0)).long()
    numbers = starts.cumsum(0) - starts[:1].sum()  # the first token always starts number 0
    return numbers.new_zeros(ids.shape).scatter(0, order, numbers)


def lengths(segments_N: Tensor, valid_N: Tensor) -> Tensor:
    """The number of supervised tokens of each token's example `[N]`."""
    counts = segments_N.new_zeros(segments_N.shape).scatter_add(0, segments_N, valid_N.long())
    return counts.gather(0, segments_N)


def positions(segments_N: Tensor, valid_N: Tensor) -> Tensor:
    """The number of earlier supervised tokens of the same example `[N]`."""
    order = segments_N.argsort(stable=True)
    flags = valid_N[order].long()
    before = flags.cumsum(0) - flags
    first = before.new_full(before.shape, 0).scatter_reduce(
        0, segments_N[order], before, reduce="amin", include_self=False
    )
    return before.new_zeros(before.shape).scatter(0, order, before - first.gather(0, segments_N[order]))


def count_examples(segments_N: Tensor, valid_N: Tensor) -> Tensor:
    """How many examples have a supervised token, as a 0-dimensional integer tensor."""
    counts = segments_N.new_zeros(segments_N.shape).scatter_add(0, segments_N, valid_N.long())
    return (counts > 0).sum()
