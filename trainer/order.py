"""The rows of each optimizer step, in an order that the seed decides and no layout of the step changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer.batches import Spread, step_examples
from trainer.data import Example


@dataclass(frozen=True, slots=True)
class StepRows:
    """The examples of one optimizer step, over all processes, and the epoch (from 0) that they belong to."""

    epoch: int
    rows: list[Example]


class Order(Protocol):
    """Where the rows of the steps come from."""

    def steps(self, start: int) -> Iterator[StepRows]:
        """The rows of step `start`, counted from 0, and of all steps after it, without end.

        They depend on the data, the seed and the number of rows of a step alone, so a run that goes on at a
        step gets what it would have got.
        """
        ...


@dataclass(frozen=True, slots=True)
class Shuffled:
    """All rows in memory, shuffled anew in each epoch."""

    rows: Sequence[Example]
    spread: Spread
    seed: int

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer rows."""
        return math.ceil(len(self.rows) / (self.spread.rows * self.spread.responses))

    def steps(self, start: int) -> Iterator[StepRows]:
        """The rows of step `start` and of all steps after it, as `Order` says."""
        first, place = divmod(start, self.epoch_steps)
        for epoch in itertools.count(first):
            for part in step_examples(len(self.rows), self.spread, self.seed, epoch)[place:]:
                yield StepRows(epoch, [self.rows[i] for i in part])
            place = 0
