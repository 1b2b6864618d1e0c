"""Pairs of responses in a call: which tokens belong to which response, and how a pair sees a value of one.

A data row of a preference set has two responses, so a call holds two examples of it, the chosen and the
rejected one: two rows of the batch, or parts of packed ones. `examples` says which data row a token belongs
to, the column `chosen` of which response it is. Examples are numbered anew: 2 * row for a chosen response,
2 * row + 1 for a rejected one.

Letters: N tokens of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from priority_dsl.registry import leaf

if TYPE_CHECKING:
    from torch import Tensor

COLUMN = "chosen"  # no column of a rule can have this name, which is a word of the language


def is_chosen(examples: Any) -> Any:
    """Which tokens belong to a chosen response, from the numbers of their examples."""
    return examples % 2 == 0


def rows(examples: Any) -> Any:
    """The data row of each token, from the number of its example."""
    return examples // 2


def numbered(rows_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The number of each token's example `[N]`, from its data row and whether its response was chosen."""
    return 2 * rows_N + (~chosen_N).long()


@dataclass(frozen=True)
class Response:
    """One of the two responses of every pair, in a graph.

    `first` [N] marks its first supervised token, `pairs` [N] numbers the pairs from 0, `valid` [N] says which
    tokens are supervised.
    """

    first: Any
    pairs: Any
    valid: Any

    def shown(self, x: Any) -> Any:
        """A value of the response as all tokens of its pair see it `[N]`; 0 (false) where there is none."""
        return seen_by_pair(x, self.first, self.pairs)

    def returned(self, g: Any) -> Any:
        """What flows to the response when `g` flows to the tokens that see it: at its first token `[N]`."""
        return sum_of_pair(g, self.valid, self.pairs).masked_fill(~self.first, 0.0)


@leaf
def seen_by_pair(x: Tensor, first: Tensor, pairs: Tensor) -> Tensor:
    """x `[N]` at the marked token of each pair, for every token of the pair; 0 where none is marked."""
    count = pairs.numel()
    of_pair = x.new_zeros(count + 1)  # the last takes what is not marked, and is read by none
    of_pair = of_pair.scatter(0, pairs.masked_fill(~first, count), x.expand(count))
    return of_pair[pairs]


@leaf
def sum_of_pair(g: Tensor, valid: Tensor, pairs: Tensor) -> Tensor:
    """The sum of g `[N]` over the supervised tokens of each token's pair `[N]`."""
    wide = g if g.device.type == "mps" else g.double()
    sums = wide.new_zeros(pairs.numel() + 1).index_add(
        0, pairs, wide.masked_fill(~valid, 0.0).expand(pairs.shape)
    )
    return sums[pairs].to(g.dtype)
