"""From what flows to the statistics of a row to the gradients of hidden states and head.

Letters: N positions of a call, R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from priority_dsl.registry import RowGradient
from priority_dsl.vocab_pass.heads import Head, Pair
from priority_dsl.vocab_pass.products import add_to_weight, to_hidden
from priority_dsl.vocabulary.rows import at_target, centred, compared, finite


def logit_gradient(
    z: Tensor, e: Tensor, s: Tensor, y: Tensor, parts: RowGradient, out: Tensor | None = None
) -> Tensor:
    """The gradient `[R, V]` of rows of logits z, whose probabilities are `e / s`, by its parts.

    Written into `out`, which may lie on e or z.
    """
    scale: Tensor = s.new_zeros(len(s), 1) if parts.spread is None else (parts.spread / s).unsqueeze(-1)
    if parts.centred is not None:
        log_p = finite(centred(z)).sub_(s.log().unsqueeze(-1))
        scale = log_p.mul_((parts.centred / s).unsqueeze(-1)).add_(scale)
    if parts.below is not None:
        below = compared(z, "<=", at_target(z, y))
        scale = below.mul_((parts.below / s).unsqueeze(-1)).add_(scale)
    out = torch.empty_like(e) if out is None else out
    torch.mul(e, scale, out=out)
    if parts.added is not None:
        out.add_(parts.added)
    if parts.target is not None:
        out.scatter_add_(-1, y.unsqueeze(-1), parts.target.unsqueeze(-1))
    return out


@dataclass
class Gradients:
    """The gradients of the inputs and weights of a head's products, and of its bias, summed over chunks.

    Those of weights and bias in float32 or wider; None for what needs no gradient.
    """

    inputs: list[Tensor | None]
    weights: list[Tensor | None]
    bias: Tensor | None
    fresh: bool = True  # whether the weights' are still unwritten memory

    @classmethod
    def empty(cls, pairs: Sequence[Pair], bias: Tensor | None, needed: Sequence[bool]) -> Gradients:
        """Nothing yet, for what needs a gradient: `needed` for the bias, then each input and weight."""

        def wide(t: Tensor | None, need: bool) -> Tensor | None:
            if t is None or not need:
                return None
            return torch.empty_like(t, dtype=torch.promote_types(t.dtype, torch.float32))

        xs = [torch.zeros_like(x) if need else None for (x, _), need in zip(pairs, needed[1::2], strict=True)]
        ws = [wide(w, need) for (_, w), need in zip(pairs, needed[2::2], strict=True)]
        b = wide(bias, needed[0])
        return cls(xs, ws, None if b is None else b.zero_())

    @property
    def any(self) -> bool:
        """Whether a gradient is needed at all."""
        return any(t is not None for t in (self.bias, *self.inputs, *self.weights))

    def finished(self) -> list[Tensor | None]:
        """The bias's, then each input's and weight's."""
        if self.fresh:
            for w in self.weights:
                _ = None if w is None else w.zero_()
        both = zip(self.inputs, self.weights, strict=True)
        return [self.bias, *(t for pair in both for t in pair)]

    def add(self, rows: Tensor, pairs: Sequence[Pair], dz: Tensor) -> None:
        """Add some rows: their inputs and the gradient `[R, V]` of the bare product."""
        for (x, weight), to_x, to_w in zip(pairs, self.inputs, self.weights, strict=True):
            if to_x is not None:
                to_x.index_copy_(0, rows, to_hidden(dz, weight, to_x))
            if to_w is not None:
                add_to_weight(to_w, dz, x, self.fresh)
        self.fresh = False
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)


@dataclass
class Live:
    """The gradient of a chunk's live rows, moved up to the first rows of its logits, which are read no more.

    `found` are the places of those rows in the chunk.
    """

    z: Tensor
    head: Head
    found: list[Tensor]
    size: int = 0

    def add(
        self, start: int, end: int, live: Tensor, found: Sequence[Tensor], y: Tensor, fields: Sequence[str]
    ) -> None:
        """Add the live rows of the block `start:end`: `found` are e, s and the gradient's `fields`."""
        rows = live.nonzero().squeeze(-1)
        if not rows.numel():
            return
        z = self.z[start:end]
        if rows.numel() < len(z):
            z, y, found = z[rows], y[rows], [t[rows] for t in found]
        e, s, *numbers = found
        out = self.z[self.size : self.size + rows.numel()]
        parts = RowGradient(**dict(zip(fields, numbers, strict=True)))
        if self.head.cap is None:
            logit_gradient(z, e, s, y, parts, out)
            if self.head.scale != 1.0:
                out.mul_(self.head.scale)
        else:  # the cap's slope reads the logits, on which `out` may lie
            out.copy_(self.head.through(logit_gradient(z, e, s, y, parts, e), z))
        self.found.append(rows + start)
        self.size += rows.numel()

    def hand_over(self, chunk: Tensor, pairs: Sequence[Pair], sums: Gradients) -> None:
        """Multiply the gradient out into the sums."""
        if self.size == len(chunk):
            sums.add(chunk, pairs, self.z)
        elif self.size:
            rows = torch.cat(self.found)
            sums.add(chunk[rows], [(x[rows], w) for x, w in pairs], self.z[: self.size])
