"""The numbers of the whole data set, read batch by batch: sums, and exact quantiles and thresholds.

A reduction over `dataset` is summed up before training by the same body as over any other scope, with a
`Survey` in place of groups of a call: each of its methods reads the data a few times and keeps one batch and
a table of counts (where there are few values they are kept instead). An order statistic is found digit by
digit (16 bits a reading), so it is exact, and the same whatever the batches were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from priority_dsl.groups import place_of, share_of

MOST_KEPT = 2**22  # values that are kept in memory rather than read again
DIGIT = 16  # bits of an order statistic that one reading of the data decides


@dataclass(frozen=True)
class Rows:
    """Some rows of the data set before training: targets `[B, T]`, what passes kept, and what else is read.

    `statistics` by name, like the targets; `columns` and `examples` as in a call; `seed` that of chance.
    """

    targets: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    examples: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class Members:
    """What a reduction goes over in one batch: values, and the data-set row and position of each `[n]`."""

    x: Tensor
    example: Tensor
    position: Tensor


class Readings:
    """Readings of the same batches: what is small is kept from the first one, what is large is read anew."""

    def __init__(self, read: Callable[[], Iterable[Members]]) -> None:
        self.read = read
        self.kept: list[Members] = []
        self.whole = False  # all batches are kept

    def __call__(self) -> Iterator[Members]:
        """One more reading of all batches."""
        if self.whole:
            yield from self.kept
            return
        kept, size = [], 0
        for part in self.read():
            size += part.x.numel()
            kept = [*kept, part] if size <= MOST_KEPT else []
            yield part
        self.kept, self.whole = kept, size <= MOST_KEPT


@dataclass(frozen=True)
class Column:
    """The values of the data set: `read` starts a new reading of all batches; `sign` is -1 of `-x`."""

    read: Callable[[], Iterable[Members]]
    sign: int = 1

    def __neg__(self) -> Column:
        """The values turned round."""
        return replace(self, sign=-self.sign)

    def __iter__(self) -> Iterator[Members]:
        return (replace(part, x=part.x * self.sign) for part in self.read())


class Survey:
    """The methods of `groups.Segments` over a whole data set; results are 0-dimensional float64 tensors."""

    def sum(self, x: Column) -> Tensor:
        """The sum of x."""
        return _added(part.x for part in x)

    def count(self, x: Column) -> int:
        """How many x there are."""
        return sum(part.x.numel() for part in x)

    def mean(self, x: Column) -> Tensor:
        """The mean of x; 0 over nothing."""
        return self.sum(x) / max(1, self.count(x))

    def least(self, x: Column) -> Tensor:
        """The smallest x; 0 over nothing."""
        least = min((part.x.min().item() for part in x if part.x.numel()), default=0.0)
        return torch.tensor(least, dtype=torch.float64)

    def deviation(self, x: Column) -> Tensor:
        """The standard deviation of x; exactly 0 where all are equal."""
        if self.least(x) == -self.least(-x):
            return torch.zeros((), dtype=torch.float64)
        mean = self.mean(x)
        squares = _added((part.x.double() - mean).square() for part in x)
        return (squares / max(1, self.count(x))).sqrt()

    def quantile(self, x: Column, q: Tensor | float) -> Tensor:
        """The quantile q of x, interpolated linearly; 0 over nothing."""
        count = self.count(x)
        if not count:
            return torch.zeros((), dtype=torch.float64)
        low, high, share = place_of(q, torch.tensor(count))
        ends = [nth(lambda: (key_of(part.x) for part in x), int(place)) for place in (low, high)]
        first, second = (value_of(key, x) for key in ends)
        return torch.tensor(first if first == second else first + (second - first) * float(share)).double()

    def threshold(self, x: Column, share: Tensor | float, rounding: str) -> tuple[Tensor, ...]:
        """The last element of the largest share of x: value, example, position; and whether there is one."""
        kept = int(share_of(share, torch.tensor(self.count(x)), rounding))
        if not kept:
            nothing = torch.zeros((), dtype=torch.long)
            return nothing.double(), nothing, nothing, torch.tensor(False)
        down = -x
        key = nth(lambda: (key_of(part.x) for part in down), kept - 1)
        before = sum(int((key_of(part.x) < key).sum()) for part in down)

        def tied() -> Iterator[Members]:
            for part in down:
                same = key_of(part.x) == key
                yield Members(part.x[same], part.example[same], part.position[same])

        example = nth(lambda: (part.example for part in tied()), kept - 1 - before)
        earlier = sum(int((part.example < example).sum()) for part in tied())
        position = nth(
            lambda: (part.position[part.example == example] for part in tied()), kept - 1 - before - earlier
        )
        found = torch.tensor(-value_of(key, down), dtype=torch.float64)
        return found, torch.tensor(example), torch.tensor(position), torch.tensor(True)


def _added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of all numbers, rounded once, so that it does not depend on the batches."""
    infinite = 0.0

    def finite() -> Iterator[float]:
        nonlocal infinite
        for part in parts:
            numbers = part.double()
            infinite += numbers[~numbers.isfinite()].sum().item()
            yield from numbers[numbers.isfinite()].tolist()

    return torch.tensor(math.fsum(finite()) + infinite, dtype=torch.float64)


def key_of(x: Tensor) -> Tensor:
    """Integers in the order of some floats: their bits, the negative ones turned round; -0.0 is 0.0."""
    x = (x.double() + 0.0).masked_fill(x.isnan(), torch.inf)  # the last place of `-x` too
    bits = x.view(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


def value_of(key: int, x: Column) -> float:
    """The float whose key this is."""
    bits = torch.tensor(key if key >= 0 else key ^ 0x7FFFFFFFFFFFFFFF, dtype=torch.int64)
    return bits.view(torch.float64).item()


def nth(read: Callable[[], Iterable[Tensor]], place: int) -> int:
    """The integer at a place of the sorted data (from 0), found digit by digit.

    >>> nth(lambda: [torch.tensor([5, -1]), torch.tensor([3, 3])], 1)
    3
    """
    low, width = -(2**63), 64
    while width:
        width -= DIGIT
        counts = torch.zeros(2**DIGIT, dtype=torch.long)
        for keys in read():
            high = low + 2 ** (width + DIGIT) - 1
            inside = keys[(keys >= low) & (keys <= high)]
            digit = (inside >> width) - (low >> width)
            counts += torch.bincount(digit, minlength=2**DIGIT)
        before = counts.cumsum(0)
        digit = int((before > place).long().argmax())
        place -= int(before[digit] - counts[digit])
        low += digit << width
    return low
