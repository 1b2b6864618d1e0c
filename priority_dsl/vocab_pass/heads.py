"""Output heads as they are in the wild: a weight, perhaps a bias, a scale, a soft cap, low-rank adapters.

Shapes: hidden [N, D], weight [V, D], bias [V], logits [N, V]; an adapter has down [r, D] and up [V, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from priority_dsl.vocab_pass.products import make_logits, wide_dtype

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`.

    `scale` multiplies the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`); `cap` is
    Gemma's `final_logit_softcapping`, None for none. Each of `adapters` (down, up, factor) adds
    `factor * up @ down` to the weight, which may be frozen beside them: LoRA.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()

    @classmethod
    def of(cls, head: Head | nn.Linear | Tensor) -> Head:
        """A head from what users hold: a `Head`, an `nn.Linear` or a bare weight `[V, D]`."""
        if isinstance(head, Head):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        return cls(head.weight, head.bias)

    def pairs(self, hidden: Tensor) -> list[Pair]:
        """The inputs `[N, d]` and weights `[V, d]` whose products make the bare logits, differentiable."""
        low = [(factor * nn.functional.linear(hidden, down), up) for down, up, factor in self.adapters]
        return [(hidden, self.weight), *low]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]`, float64 for float64 products and float32 for all others (law 2)."""
        if not torch.is_grad_enabled():
            pairs = self.pairs(hidden)
            out = hidden.new_empty(
                hidden.shape[:-1].numel(), self.weight.shape[0], dtype=wide_dtype(hidden, self.weight)
            )
            flat = [(x.reshape(-1, x.shape[-1]), w) for x, w in pairs]
            return self.fill(flat, out).view(*hidden.shape[:-1], out.shape[-1])
        z = nn.functional.linear(hidden, self.weight, self.bias)
        z = z if z.element_size() >= 4 else z.float()
        for x, up in self.pairs(hidden)[1:]:
            z = z + nn.functional.linear(x, up)
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else (z / self.cap).tanh() * self.cap

    @torch.no_grad()
    def fill(self, pairs: Sequence[Pair], out: Tensor) -> Tensor:
        """Write the logits of some rows of `pairs` into `out [R, V]`, and return it."""
        for i, (x, weight) in enumerate(pairs):
            make_logits(x, weight, out, add=i > 0)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def through(self, dz: Tensor, z: Tensor) -> Tensor:
        """From the gradient of the logits `[N, V]` to that of the bare product; `z` are the logits."""
        if self.cap is not None:
            dz = dz * (1.0 - (z / self.cap) ** 2)
        return dz if self.scale == 1.0 else dz * self.scale
