"""The rule applied to the micro-batches of one optimizer step: its counts, its loss, and what the log shows.

The loss of a step is one sum over one denominator, whatever micro-batches and processes it was spread over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from priority_dsl import PriorityError
from priority_dsl.kinds import Stage
from trainer.batches import IGNORED, Batch
from trainer.faults import RunFault
from trainer.heads import HeadedModel

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


@dataclass(frozen=True, slots=True)
class Moment:
    """When a step happens: completed steps, their share of the planned steps, the epoch from 0."""

    step: int
    progress: float
    epoch: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What a step shows, over all micro-batches and processes.

    `nll`: mean plain negative log-likelihood of the supervised tokens, nats. `loss`: the rule's loss.
    `weight_*`: mean weight, share of weights that are not zero, share below zero, over the rule's tokens.
    `accuracy`: share of supervised tokens that are the most likely one (measured in evaluation only).
    """

    nll: float
    loss: float
    weight_mean: float
    weight_nonzero: float
    weight_negative: float
    accuracy: float
    supervised: int
    tokens: int


class Objective:
    """The loss of a run: the rule, the model being trained and the frozen models that stay loaded.

    A frozen model is a `HeadedModel` where it is only read through statistics that could be stored.
    """

    def __init__(
        self,
        rule: CompiledRule,
        policy: Any,
        frozen: dict[str, Any],
        accelerator: Accelerator,
        seed: int,
        bf16: bool,
    ):
        self.rule = rule
        self.policy = policy
        self.frozen = frozen
        self.accelerator = accelerator
        self._seed = seed
        self._bf16 = bf16

    def step(self, batches: Sequence[Batch], moment: Moment) -> Figures:
        """Accumulate the gradient of the loss over all micro-batches of all processes.

        Raises `RunFault` naming step and rows where the loss is not finite or the rule stops.
        """
        seen = self._observe(batches, moment)
        tally = _Tally(self.accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                logits, out = self._loss(batch, seen, moment)
                # DDP averages gradients over processes; the step's loss is their sum.
                self.accelerator.backward(out.mean * self.accelerator.num_processes)
            tally.add(batch, logits.detach(), out, accuracy=False)
        return self._figures(tally, moment)

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], moment: Moment) -> Figures:
        """The figures of held-out rows, taken as one step, without gradients and in eval mode."""
        self.policy.eval()
        seen = self._observe(batches, moment)
        tally = _Tally(self.accelerator.device)
        for batch in batches:
            logits, out = self._loss(batch, seen, moment)
            tally.add(batch, logits, out, accuracy=True)
        self.policy.train()
        return self._figures(tally, moment)

    def _observe(self, batches: Sequence[Batch], moment: Moment) -> Any:
        """The counts of the whole step; None where the step is a single micro-batch, which counts itself.

        A rule whose denominator depends on model statistics costs one more forward, with the same dropout.
        """
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return None
        seen = None
        with torch.random.fork_rng(), torch.no_grad():
            for batch in batches:
                batch = batch.to(self.accelerator.device)
                logits = self._logits(self.policy, batch) if self._observes_policy else None
                with _telling(batch, moment):
                    found = self.rule.observe(logits, batch.targets, **self._reads(batch, moment))
                seen = found if seen is None else seen + found
        assert seen is not None, "a step has at least one micro-batch"
        return seen.all_reduce()

    @property
    def _observes_policy(self) -> bool:
        """Whether a step's counts need the trained model; weights from stored columns alone do not."""
        return self.rule.observes_model and self.rule.checked.weight.kind.stage == Stage.ONLINE

    def _loss(self, batch: Batch, seen: Any, moment: Moment) -> tuple[torch.Tensor, Any]:
        batch = batch.to(self.accelerator.device)
        logits = self._logits(self.policy, batch)
        with _telling(batch, moment):
            return logits, self.rule.loss(logits, batch.targets, step=seen, **self._reads(batch, moment))

    def _reads(self, batch: Batch, moment: Moment) -> dict[str, Any]:
        with torch.no_grad():
            models = {
                name: model(batch.input_ids) if isinstance(model, HeadedModel) else self._logits(model, batch)
                for name, model in self.frozen.items()
            }
        return {
            "models": models,
            "columns": batch.columns,
            "stored": batch.stored,
            "examples": batch.examples,
            "progress": moment.progress,
            "epoch": moment.epoch,
            "seed": self._seed,
        }

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits [B, T, V]. Rows are padded on the right, so a causal model needs no attention mask."""
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self._bf16):
            return model(input_ids=batch.input_ids, use_cache=False).logits

    def _figures(self, tally: _Tally, moment: Moment) -> Figures:
        reduced: Any = self.accelerator.reduce(tally.sums, reduction="sum")
        sums: list[float] = reduced.tolist()
        found = dict(zip(_Tally.NAMES, sums, strict=True))
        if not all(map(math.isfinite, sums)):
            suspects = sorted(set(gather_object(tally.suspects)))
            raise RunFault(
                f"step {moment.step + 1}: the loss is not finite (loss {found['loss']}, sum of the plain nll "
                f"{found['nll']}) in the rows {_shown(suspects)}; look at them, or lower --learning-rate"
            )
        supervised, counted = max(found["supervised"], 1), max(found["counted"], 1)
        return Figures(
            nll=found["nll"] / supervised,
            loss=found["loss"],
            weight_mean=found["weight"] / counted,
            weight_nonzero=found["nonzero"] / counted,
            weight_negative=found["negative"] / counted,
            accuracy=found["right"] / supervised,
            supervised=int(found["supervised"]),
            tokens=int(found["tokens"]),
        )


class _Tally:
    """Sums over micro-batches, in float64 and on the device until the step is done."""

    NAMES = ("nll", "loss", "weight", "nonzero", "negative", "counted", "supervised", "right", "tokens")

    def __init__(self, device: torch.device):
        kind = torch.float64 if device.type != "mps" else torch.float32
        self.sums = torch.zeros(len(self.NAMES), dtype=kind, device=device)
        self._bad: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def add(self, batch: Batch, logits: torch.Tensor, out: Any, accuracy: bool) -> None:
        """Add a micro-batch: its logits [B, T, V] and what the rule made of them."""
        device = self.sums.device
        targets = batch.targets.to(device)
        counted = targets != IGNORED
        supervised = counted & batch.response.to(device)
        right = (logits.argmax(-1) == targets) & supervised if accuracy else torch.zeros_like(supervised)
        parts = (
            (out.nll * supervised).sum(),
            out.mean.detach(),
            out.weights.sum(),
            (out.weights != 0).sum(),
            (out.weights < 0).sum(),
            counted.sum(),
            supervised.sum(),
            right.sum(),
            torch.tensor(batch.tokens),
        )
        self.sums += torch.stack([part.to(device, self.sums.dtype) for part in parts])
        finite = torch.isfinite(out.nll).all(-1) & torch.isfinite(out.weights).all(-1)
        self._bad.append((finite & torch.isfinite(out.mean.detach()), batch.places))

    @property
    def suspects(self) -> list[str]:
        """The rows whose loss is not finite; all rows of a micro-batch where only their sum is not."""
        found = []
        for finite, places in self._bad:
            found += [place for place, good in zip(places, finite.tolist(), strict=True) if not good]
        return found


@contextmanager
def _telling(batch: Batch, moment: Moment) -> Iterator[None]:
    """Turn what a rule raises while it runs into a `RunFault` that names step and rows."""
    try:
        yield
    except PriorityError as error:
        rows = _shown(batch.places)
        raise RunFault(f"step {moment.step + 1}: the rule stopped in the rows {rows}\n{error}") from error


def _shown(places: Sequence[str], most: int = 8) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")
