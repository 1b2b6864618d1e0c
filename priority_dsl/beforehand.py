"""Before training: the numbers of the data set, and which examples are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from priority_dsl.compiler import compile_keep, compile_members, surveyed
from priority_dsl.emitter import number_names
from priority_dsl.executor import Executor
from priority_dsl.folding import fold
from priority_dsl.graphs import LossGraph
from priority_dsl.kinds import Stage
from priority_dsl.registry import REGISTRY, Reduction
from priority_dsl.survey import Column, Members, Readings, Rows, Survey
from priority_dsl.values import Value

Read = Callable[[], Iterable[Rows]]


class Beforehand:
    """What one rule computes from the statistics of all rows, without any logits."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.checked = executor.checked
        self.graphs: dict[tuple[Value, frozenset[str]], LossGraph] = {}

    def survey(self, read: Read, keep: bool) -> dict[str, Tensor]:
        """The numbers of every reduction over the data set, by name; see `CompiledRule.survey`."""
        of = [c.value for c in self.executor.plan.stored]
        if keep:
            of = [] if self.checked.keep is None else [self.checked.keep]
        numbers: dict[str, Tensor] = {}
        with torch.no_grad():
            for reduction in surveyed(of):
                numbers.update(self._numbers(reduction, read, numbers))
        return numbers

    def _numbers(self, reduction: Value, read: Read, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers in which one reduction sums the data set up, those inside it being known."""
        word = REGISTRY.words[reduction.word]
        assert isinstance(word, Reduction), reduction.word

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for rows in read():
                yield self.executor.over_rows(self._members(reduction, rows), rows, numbers)

        column = Column(Readings(lambda: (_counted(*found[:4]) for found in batches())))
        values = reduction.arguments[1 : 1 + len(word.settings)]
        first = next(batches(), ())[4:] if values else ()
        options = dict(reduction.options)
        settings = [self._setting(v, found) for v, found in zip(values, first, strict=False)]
        results = word.body(Survey(), column, *settings, *(options[name] for name in word.options))
        return dict(zip(number_names(reduction), map(torch.as_tensor, results), strict=True))

    def _members(self, reduction: Value, rows: Rows) -> LossGraph:
        key = (reduction, frozenset(rows.statistics))
        if key not in self.graphs:
            self.graphs[key] = compile_members(self.checked, *key)
        return self.graphs[key]

    def _setting(self, value: Value, found: Tensor) -> Any:
        """A setting of a reduction: a number that was written keeps its decimals (law 7)."""
        return fold(value, self.executor.params) if value.kind.stage == Stage.CONSTANT else found

    def kept(self, rows: Rows, numbers: Mapping[str, Tensor]) -> Tensor:
        """Which examples are kept, like the targets; see `CompiledRule.kept`."""
        if self.checked.keep is None:
            return torch.ones_like(rows.targets, dtype=torch.bool)
        graph = compile_keep(self.checked, self.checked.keep, frozenset(rows.statistics))
        with torch.no_grad():
            return self.executor.over_rows(graph, rows, numbers)[0].reshape(rows.targets.shape)


def _counted(x: Tensor, eligible: Tensor, example: Tensor, position: Tensor) -> Members:
    return Members(x[eligible], example[eligible], position[eligible].long())
