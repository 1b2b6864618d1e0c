"""One call of the fused loss: what it reads, in chunks of rows, and what it found.

Letters: N positions of a call, R rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from priority_dsl.vocab_pass.heads import Head, Pair
from priority_dsl.vocab_pass.products import wide_dtype
from priority_dsl.vocab_pass.sweep import block_rows, even_chunks, steady_heap


@dataclass
class FusedCall:
    """What a fused call reads, and, once it has run, what it found.

    `inputs` are the graphs' inputs but the logits, `[N]` or 0-dimensional; `heads` other models that stay
    loaded as hidden states `[N, D]` and head, `dense` those given as logits `[N, V]`; `index` the rows to
    compute, in chunks of `size` (default: what the device likes). Results are `[N]`, 0 in rows that were not
    computed.
    """

    inputs: dict[str, Tensor]
    heads: Mapping[str, tuple[Tensor, Head]]
    dense: Mapping[str, Tensor]
    index: Tensor
    size: int | None = None
    found: list[Tensor] = field(default_factory=list)

    def results(self) -> list[Tensor]:
        """Weights, nll and losses of all positions `[N]`."""
        return self.found

    def put(self, columns: list[Tensor], rows: Tensor, values: Sequence[Tensor]) -> None:
        """Write values of some rows into columns `[N]`, which are made at the first, 0 elsewhere.

        Kept one by one, the small results of many blocks would pin the memory between the large ones.
        """
        if not columns:
            columns += [v.new_zeros(self.inputs["valid"].numel()) for v in values]
        for column, v in zip(columns, values, strict=True):
            column.index_copy_(0, rows, v)

    def bound(self, rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The named inputs for some rows, but the logits."""
        given = ((name, self.inputs[name]) for name in names if name in self.inputs)
        return {name: t[rows] if t.dim() else t for name, t in given}


@dataclass
class Chunk:
    """The logits of some rows: of the trained model in `z [R, V]`, of the others beside it."""

    rows: Tensor
    pairs: list[Pair]
    z: Tensor
    others: dict[str, Tensor]

    def blocks(self, call: FusedCall, names: Sequence[str]) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Blocks that stay in the cache, `start:end` of the chunk, and the named inputs for each.

        One block at least, so that an empty call has its dtypes.
        """
        for start in range(0, max(1, len(self.rows)), size := block_rows(self.z)):
            end = min(start + size, len(self.rows))
            bound = call.bound(self.rows[start:end], names)
            bound |= {f"logits_{name}": z[start:end] for name, z in self.others.items()}
            yield start, end, {**bound, "logits_on": self.z[start:end]}


class Chunks:
    """The rows of a call chunk by chunk, their logits written to one buffer again and again."""

    def __init__(self, call: FusedCall, head: Head, pairs: Sequence[Pair]) -> None:
        self.call, self.head, self.pairs = call, head, list(pairs)
        steady_heap()
        self.buffer: Tensor | None = None

    def __call__(self, index: Tensor) -> Iterator[Chunk]:
        """The chunks of some rows; one at least."""
        vocabulary = self.pairs[0][1].shape[0]
        for rows in even_chunks(index, self.call.size, vocabulary, self.dtype.itemsize):
            yield self.filled(rows)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return wide_dtype(*self.pairs[0])

    def filled(self, rows: Tensor) -> Chunk:
        """The chunk of some rows, with the logits of all models."""
        whole = len(rows) == len(self.pairs[0][0])
        pairs = [(x if whole else x[rows], w) for x, w in self.pairs]
        if self.buffer is None or len(self.buffer) < len(rows):
            self.buffer = None
            self.buffer = self.pairs[0][1].new_empty(len(rows), self.pairs[0][1].shape[0], dtype=self.dtype)
        others = {n: z[rows] for n, z in self.call.dense.items()}
        others |= {n: head.logits(h[rows]) for n, (h, head) in self.call.heads.items()}
        return Chunk(rows, pairs, self.head.fill(pairs, self.buffer[: len(rows)]), others)
