"""Rows as they come: read, checked, tokenised and shuffled in a buffer, while the model trains on them.

Every process reads the whole stream and takes its share of each step, so a stream gives the same steps on
any layout. A run that is resumed reads the rows again that it was past, up to its step.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trainer.batches import Spread
from trainer.data import Example, Examples, Reader
from trainer.dataset import kept_of
from trainer.examples import SAID, merged
from trainer.faults import ConfigFault, DataFault, listed
from trainer.order import StepRows
from trainer.precompute import with_stored

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from trainer.config import TrainConfig

Item = TypeVar("Item")
BUFFER = 1000  # rows that wait to be drawn from, unless --shuffle-buffer says otherwise


class Stream:
    """The rows of the steps from a stream that begins anew, in another order, when it has ended.

    The order depends on --seed, on --shuffle-buffer and on the number of rows of a step. Of what is stored, a
    rule reads here what needs no frozen model. `say` is told of rows that are left out.
    """

    def __init__(
        self,
        reader: Reader,
        config: TrainConfig,
        rule: CompiledRule,
        spread: Spread,
        say: Callable[[str], None],
    ) -> None:
        self._reader, self._sources, self._rule = reader, config.data, rule
        self._spread, self._seed, self._buffer = spread, config.seed, config.shuffle_buffer or BUFFER
        self._say = say
        self._passed = hashlib.sha256()
        self._expected: str | None = None
        self._found: dict[str, Any] = {}
        self._bad = 0

    def steps(self, start: int) -> Iterator[StepRows]:
        """The rows of step `start` and of all steps after it, as `Order` says.

        Raises `BadRows` and `DataFault` when such rows come, and `ConfigFault` where the rows before step
        `start` are not those that the run began with.
        """
        steps = (StepRows(epoch, rows) for epoch in itertools.count() for rows in self._epoch(epoch))
        for number, step in enumerate(steps):
            if number == start and self._expected not in (None, self._passed.hexdigest()):
                raise ConfigFault(
                    "--resume: the stream is not the one that the run began with (other rows or token ids "
                    f"in the first {start} steps)"
                )
            self._passed.update(repr([(e.index, e.ids, e.response) for e in step.rows]).encode())
            if number >= start:
                yield StepRows(step.epoch, self._with_stored(step.rows))

    def state(self) -> dict[str, Any]:
        """A digest of the rows of all steps so far, which a resumed run must find again."""
        return {"rows": self._passed.hexdigest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; `steps` then holds the rows against it."""
        self._expected = state["rows"]

    def summary(self) -> dict[str, Any]:
        """What the stream has shown so far in its first pass, as `Examples.summary`."""
        return self._found

    def _with_stored(self, rows: list[Example]) -> list[Example]:
        if self._rule.plan.passes:  # which --online-reference computes with the step, as all that reads them
            return rows
        return with_stored(self._rule, rows, {}, {}, self._seed)

    def _epoch(self, epoch: int) -> Iterator[list[Example]]:
        """The rows of each step of an epoch; the last step may have fewer."""
        rows = shuffled(self._rows(epoch), self._buffer, (self._seed * 1_000_003 + epoch) % 2**63)
        while step := list(itertools.islice(rows, self._spread.rows)):
            yield [example for row in step for example in row]

    def _rows(self, epoch: int) -> Iterator[list[Example]]:
        """The examples of each row that can be used, in the order of the files."""
        size, nothing = self._spread.responses, True
        for part in self._reader.parts(self._sources, streaming=True):
            self._reader.refuse(part)
            kept = kept_of(self._rule, part, self._seed)
            if epoch == 0:
                self._tell(kept)
            for start in range(0, len(kept.rows), size):
                nothing = False
                yield kept.rows[start : start + size]
        if nothing:
            raise DataFault(f"no row of the stream is left: {', '.join(self._sources)}")

    def _tell(self, part: Examples) -> None:
        self._found = merged(self._found, part.summary())
        if part.bad and self._bad < SAID:
            self._say("\n".join(["left out:", *(f"  {line}" for line in listed(part.bad, SAID - self._bad))]))
        self._bad += len(part.bad)


def shuffled(rows: Iterator[Item], buffer: int, seed: int) -> Iterator[Item]:
    """The rows in an order that the seed decides: each is drawn from `buffer` rows that wait, the next waits.

    With a buffer of 1 the order is that of the rows; with one of all rows it is any.
    """
    draw = torch.Generator().manual_seed(seed)
    waiting = list(itertools.islice(rows, buffer))
    for row in rows:
        place = int(torch.randint(len(waiting), (1,), generator=draw))
        yield waiting[place]
        waiting[place] = row
    for place in torch.randperm(len(waiting), generator=draw).tolist():
        yield waiting[place]
