"""From what flows to the statistics of a row to the gradients of hidden states and head.

Letters: N positions of a call, R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from priority_dsl.registry import RowGradient
from priority_dsl.vocab_pass.heads import Head, Pair
from priority_dsl.vocab_pass.products import add_to_weight, gradient_dtype, to_hidden
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

    `z [R, V]` are the chunk's logits, products of `pairs` by the head; `fields` the parts of a `RowGradient`
    that are given; `found` the places of the live rows in the chunk.
    """

    z: Tensor
    pairs: Sequence[Pair]
    head: Head
    fields: Sequence[str]
    found: list[Tensor] = field(default_factory=list)
    size: int = 0

    def add(self, start: int, end: int, live: Tensor, numbers: Sequence[Tensor], y: Tensor) -> None:
        """Add the live rows of the block `start:end`: `numbers` as in a `RowsGraph`, then the parts."""
        rows = live.nonzero().squeeze(-1)
        if rows.numel():
            self.write(self.z[start:end], y, rows, numbers)
            self.found.append(rows + start)
            self.size += rows.numel()

    def write(self, z: Tensor, y: Tensor, rows: Tensor, numbers: Sequence[Tensor]) -> None:
        """Keep the gradient of the live rows of a block."""
        if rows.numel() < len(z):
            z, y, numbers = z[rows], y[rows], [t[rows] for t in numbers]
        e, s, *given = numbers
        out = self.z[self.size : self.size + rows.numel()]
        if self.head.cap is None:
            logit_gradient(z, e, s, y, self.parts(given), out)
            if self.head.scale != 1.0:
                out.mul_(self.head.scale)
        else:  # the cap's slope reads the logits, on which `out` may lie
            out.copy_(self.head.through(logit_gradient(z, e, s, y, self.parts(given), e), z))

    def parts(self, given: Sequence[Tensor]) -> RowGradient:
        """The parts by name."""
        return RowGradient(**dict(zip(self.fields, given, strict=True)))

    def gradient(self) -> Tensor:
        """The gradient of all live rows."""
        return self.z[: self.size]

    def hand_over(self, chunk: Tensor, sums: Gradients) -> None:
        """Multiply the gradient out into the sums; `chunk` are its rows in the call."""
        if not self.size:
            return
        if self.size == len(chunk):
            sums.add(chunk, self.pairs, self.gradient())
        else:
            rows = torch.cat(self.found)
            sums.add(chunk[rows], [(x[rows], w) for x, w in self.pairs], self.gradient())


@dataclass
class SweptLive(Live):
    """The same by a kernel, in the dtype of the products: over the logits where all rows of a block live."""

    written: list[Tensor] = field(default_factory=list)

    def write(self, z: Tensor, y: Tensor, rows: Tensor, numbers: Sequence[Tensor]) -> None:
        """Keep the gradient of the live rows of a block."""
        from priority_dsl.vocab_pass.kernels import write_gradient

        dtype, some = gradient_dtype(self.pairs, z.dtype), rows if rows.numel() < len(z) else None
        parts = self.parts(numbers[3:])
        self.written.append(write_gradient(z, y, numbers[:3], parts, self.head, dtype, some))

    def gradient(self) -> Tensor:
        """The gradient of all live rows."""
        return self.written[0] if len(self.written) == 1 else torch.cat(self.written)
