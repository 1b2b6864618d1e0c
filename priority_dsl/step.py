"""What a call gives back: the counts of a step, and a loss with its denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Counts of an optimizer step, added over its micro-batches and processes.

    `tokens` supervised tokens, `examples` examples that have any, `kept` tokens with weight ≠ 0, `weights`
    the sum of abs(weight); 0-dimensional tensors, detached. `kept` and `weights` are None where they
    were not asked for.
    """

    tokens: Tensor
    examples: Tensor
    kept: Tensor | None = None
    weights: Tensor | None = None

    def __add__(self, other: Step) -> Step:
        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        return Step(
            self.tokens + other.tokens,
            self.examples + other.examples,
            both(self.kept, other.kept),
            both(self.weights, other.weights),
        )

    def all_reduce(self) -> Step:
        """The counts of all processes; the same where there is one."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        counts = [self.tokens, self.examples, self.kept, self.weights]
        together = torch.stack([c.double() for c in counts if c is not None])
        distributed.all_reduce(together)
        sums = iter(together.unbind())
        return Step(*(None if c is None else next(sums).to(c.dtype) for c in counts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossOutput:
    """The loss of a call.

    `total` is the differentiable sum of the loss of all tokens, `denominator` what the whole step divides
    it by (1 where the division is inside), `weights`, `nll` and `losses` are detached, like the targets,
    and 0 where ignored. Weights are float32, float64 for float64 logits.
    """

    total: Tensor
    denominator: Tensor
    weights: Tensor
    nll: Tensor
    losses: Tensor

    @property
    def mean(self) -> Tensor:
        """total / denominator; 0 with a graph where the denominator is 0 (law 6)."""
        empty = self.denominator == 0
        return (self.total / self.denominator.masked_fill(empty, 1)).masked_fill(empty, 0.0)
