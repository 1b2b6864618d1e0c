"""What a call gives back: the counts and numbers of a step, and a loss with its denominator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from priority_dsl.diagnostics import failure


@dataclass(frozen=True)
class Gathered:
    """What the numbers of a step are made of, for the tokens of some of its micro-batches.

    `inputs` are those of the graph of the numbers by name, `[N]` or 0-dimensional; `stored` names the values
    that came from outside; `named` says that every micro-batch told its data-set rows (`examples=`). The
    numbers are kept in `settled` once they are known.
    """

    inputs: dict[str, Tensor]
    stored: frozenset[str]
    named: bool
    parts: int = 1
    settled: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __add__(self, other: Gathered) -> Gathered:
        offset = self.inputs["segments"].numel()
        numbered = {"segments", "pairs"} & self.inputs.keys()
        theirs = {**other.inputs, **{name: other.inputs[name] + offset for name in numbered}}
        together = {n: torch.cat([t, theirs[n]]) if t.dim() else t for n, t in self.inputs.items()}
        return Gathered(together, self.stored, self.named and other.named, self.parts + other.parts)

    def in_order(self) -> dict[str, Tensor]:
        """The inputs with the tokens in the order of the data set, whatever batches they came in."""
        if self.parts > 1 and not self.named:
            raise failure(
                "PD508", "the micro-batches of a step do not say which data-set rows they hold",
                help="pass `examples=`, the data-set row of each token, to `observe` and `loss`",
            )  # fmt: skip
        order = self.inputs["position"].argsort(stable=True)
        order = order[self.inputs["example_ids"][order].argsort(stable=True)]
        return {name: t[order] if t.dim() else t for name, t in self.inputs.items()}

    def all_gather(self) -> Gathered:
        """Those of all processes together, on this process's device."""
        distributed = torch.distributed
        mine = {name: t.cpu() for name, t in self.inputs.items()}
        found: list[Gathered | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, replace(self, inputs=mine))
        parts = [part for part in found if part is not None]
        device = self.inputs["valid"].device
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return replace(whole, inputs={name: t.to(device) for name, t in whole.inputs.items()})


@dataclass(frozen=True)
class Step:
    """What an optimizer step comes to, added over its micro-batches and processes.

    `tokens` supervised tokens, `examples` examples that have any (pairs, for a loss per pair), `kept` tokens
    with weight ≠ 0, `weights` the sum of abs(weight); 0-dimensional tensors, detached. `kept` and `weights`
    are None where they were not asked for. `gathered` is what the values of the batch are made of, where the
    rule has any.
    """

    tokens: Tensor
    examples: Tensor
    kept: Tensor | None = None
    weights: Tensor | None = None
    gathered: Gathered | None = None

    def __add__(self, other: Step) -> Step:
        def both(a: Any, b: Any) -> Any:
            return None if a is None or b is None else a + b

        return Step(
            self.tokens + other.tokens,
            self.examples + other.examples,
            both(self.kept, other.kept),
            both(self.weights, other.weights),
            both(self.gathered, other.gathered),
        )

    def all_reduce(self) -> Step:
        """The step over all processes; the same where there is one."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        counts = [self.tokens, self.examples, self.kept, self.weights]
        together = torch.stack([c.double() for c in counts if c is not None])
        distributed.all_reduce(together)
        sums = iter(together.unbind())
        reduced = [None if c is None else next(sums).to(c.dtype) for c in counts]
        gathered = None if self.gathered is None else self.gathered.all_gather()
        return Step(*reduced, gathered=gathered)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossOutput:
    """The loss of a call.

    `total` is the differentiable sum of the loss of all tokens, `denominator` what the whole step divides
    it by (1 where the division is inside), `weights`, `nll` and `losses` are detached, like the targets,
    and 0 where ignored. Weights are float32, float64 for float64 logits. A loss per example stands at the
    first supervised token of its example, one per pair at that of the chosen response.
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
