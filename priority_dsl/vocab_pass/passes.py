"""The plans of the fused loss at work (`priority_dsl.fused_plan` chooses): chunks in, gradients out.

The product of a chunk is made for all of its rows, elementwise work in blocks that stay in the cache.

Letters: N positions of a call, R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from priority_dsl.vocab_pass.call import Chunk, Chunks, FusedCall
from priority_dsl.vocab_pass.gradients import Gradients, Live, SweptLive
from priority_dsl.vocab_pass.heads import Head

if TYPE_CHECKING:
    from priority_dsl.graphs import LossGraph


@dataclass(frozen=True)
class RowsGraph:
    """A graph over rows whose last outputs are: which rows are live, some numbers, the gradient's parts.

    The numbers are e and s of `logit_gradient` or, from `swept` rows, top, total and target's logit; the
    parts are those `fields` of a `RowGradient`.
    """

    graph: LossGraph
    fields: tuple[str, ...]
    swept: bool

    def live(self, chunk: Chunk, head: Head) -> Live:
        """The gradient of a chunk's live rows, of which there is none yet."""
        kind = SweptLive if self.swept else Live
        return kind(chunk.z, chunk.pairs, head, self.fields)


@dataclass(frozen=True)
class OnePass:
    """Weights, losses and gradient of a chunk while its logits are at hand."""

    rows: RowsGraph

    @property
    def graphs(self) -> tuple[LossGraph, ...]:
        """The graphs that read what a caller gives."""
        return (self.rows.graph,)

    def run(self, call: FusedCall, chunks: Chunks, sums: Gradients) -> Tensor:
        """The total loss; the gradients are added to `sums`."""
        total = call.inputs["one"] * 0.0
        for chunk in chunks(call.index):
            live = self.rows.live(chunk, chunks.head)
            for start, end, bound in chunk.blocks(call, self.rows.graph.inputs):
                weights, nll, losses, alive, *found = self.rows.graph(bound)
                call.put(call.found, chunk.rows[start:end], (weights, nll, losses))
                total += losses.sum()
                if sums.any:
                    live.add(start, end, alive, found, bound["targets"])
            live.hand_over(chunk.rows, sums)
        return total


@dataclass(frozen=True)
class TwoPasses:
    """The statistics of all rows, the rule on them, then the logits of the live rows anew.

    `on_tokens` reads statistics `[N]` and gives weights, nll, losses, then what flows to each of `flowing`
    statistics, then their values.
    """

    statistics: LossGraph
    names: tuple[str, ...]
    on_tokens: LossGraph
    flowing: int
    rows: RowsGraph

    @property
    def graphs(self) -> tuple[LossGraph, ...]:
        """The graphs that read what a caller gives."""
        return (self.statistics, self.on_tokens, self.rows.graph)

    def run(self, call: FusedCall, chunks: Chunks, sums: Gradients) -> Tensor:
        """The total loss; the gradients are added to `sums`."""
        statistics = self._statistics(call, chunks)
        weights, nll, losses, *flows = self.on_tokens({**call.inputs, **statistics})
        call.found += [weights, nll, losses]
        flowing = {f"flow_{i}": v for i, v in enumerate(flows[: self.flowing])}
        live_N = torch.stack([(f != 0) & f.isfinite() for f in flowing.values()] or [nll != nll]).any(0)
        index = call.index[live_N[call.index]]
        if sums.any and index.numel():
            values = {f"value_{i}": v for i, v in enumerate(flows[self.flowing :])}
            self._gradients(call, chunks, sums, index, {**flowing, **values})
        return losses.sum()

    def _statistics(self, call: FusedCall, chunks: Chunks) -> dict[str, Tensor]:
        """The statistics of all positions `[N]`, 0 where ignored."""
        values: list[Tensor] = []
        for chunk in chunks(call.index):
            for start, end, bound in chunk.blocks(call, self.statistics.inputs):
                call.put(values, chunk.rows[start:end], self.statistics(bound))
        return dict(zip(self.names, values, strict=True))

    def _gradients(
        self,
        call: FusedCall,
        chunks: Chunks,
        sums: Gradients,
        index: Tensor,
        flows: Mapping[str, Tensor],
    ) -> None:
        for chunk in chunks(index):
            live = self.rows.live(chunk, chunks.head)
            for start, end, bound in chunk.blocks(call, ("targets", *self.rows.graph.inputs)):
                rows = chunk.rows[start:end]
                alive, *found = self.rows.graph({**bound, **{name: f[rows] for name, f in flows.items()}})
                live.add(start, end, alive, found, bound["targets"])
            live.hand_over(chunk.rows, sums)


Plan = OnePass | TwoPasses
