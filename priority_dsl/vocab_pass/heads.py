"""Output heads as they are in the wild: a weight, perhaps a bias, a scale, a soft cap.

Shapes: hidden [N, D], weight [V, D], bias [V], logits [N, V].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`.

    `scale` multiplies the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`); `cap` is
    Gemma's `final_logit_softcapping`, None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, head: Head | nn.Linear | Tensor) -> Head:
        """A head from what users hold: a `Head`, an `nn.Linear` or a bare weight `[V, D]`."""
        if isinstance(head, Head):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        return cls(head.weight, head.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]`, float64 for float64 products and float32 for all others (law 2)."""
        z = nn.functional.linear(hidden, self.weight, self.bias)
        z = z if z.element_size() >= 4 else z.float()
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else (z / self.cap).tanh() * self.cap

    def through(self, dz: Tensor, z: Tensor) -> Tensor:
        """From the gradient of the logits `[N, V]` to that of the bare product; `z` are the logits."""
        if self.cap is not None:
            dz = dz * (1.0 - (z / self.cap) ** 2)
        return dz if self.scale == 1.0 else dz * self.scale
