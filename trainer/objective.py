"""The rule applied to the micro-batches of one optimizer step: its counts, its loss, and what the log shows.

The loss of a step is one sum over one denominator, whatever micro-batches and processes it was spread over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from priority_dsl import PriorityError
from trainer.batches import IGNORED, Batch
from trainer.faults import NotFinite, RunFault, shown_rows
from trainer.preferences import ranking
from trainer.trained import Call, Found
from trainer.views import Speaker, Views

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

    `nll`: mean plain negative log-likelihood of the supervised tokens, nats; NaN where it was not asked for.
    `loss`: the rule's loss. `weight_*`: mean weight, share of weights that are not zero, share below zero,
    over the rule's tokens.
    `accuracy`: share of supervised tokens that are the most likely one (measured in evaluation only).
    `preference_*`: share of pairs whose chosen response is the likelier one, and their mean margin in nats,
    as `ranking` has them; None where rows are no pairs, or it was not asked for.
    """

    nll: float
    loss: float
    weight_mean: float
    weight_nonzero: float
    weight_negative: float
    accuracy: float
    supervised: int
    tokens: int
    preference_accuracy: float | None = None
    preference_margin: float | None = None


class Objective:
    """The loss of a run: the model being trained with its rule, and the frozen models that stay loaded.

    `trained` is a `Trained`, perhaps wrapped; `frozen` are the models without gradient by bound name, which
    `views` runs. `skipping` lets a weight that is not finite make the step not finite, in place of stopping.
    """

    def __init__(
        self,
        rule: CompiledRule,
        trained: Any,
        frozen: Mapping[str, Speaker],
        views: Views,
        accelerator: Accelerator,
        seed: int,
        skipping: bool = False,
    ):
        self.rule = rule
        self.trained = trained
        self.frozen = frozen
        self.views = views
        self.accelerator = accelerator
        self._seed = seed
        self._skipping = skipping

    def step(self, batches: Sequence[Batch], moment: Moment, shown: bool = True) -> Figures:
        """Accumulate the gradient of the loss over all micro-batches of all processes.

        Unless the figures are `shown`, the plain nll is not computed where it is not needed, and is NaN in
        them, and pairs are not ranked. Raises `RunFault` naming step and rows where the loss is not finite
        or the rule stops.
        """
        batches = [batch.to(self.accelerator.device) for batch in batches]
        seen = self._observe(batches, moment)
        tally = _Tally(self.accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.accelerator.sync_gradients = last  # DeepSpeed takes its step in the last backward pass
            with nullcontext() if last else self.accelerator.no_sync(self.trained):
                call = Call(batch, self._reads(batch, moment), seen, nll=shown, skipping=self._skipping)
                found = self._loss(call, moment)
                # DDP averages gradients over processes; the step's loss is their sum.
                self.accelerator.backward(found.mean * self.accelerator.num_processes)
            tally.add(batch, found)
        figures = self._figures(tally, moment)
        if shown:
            return figures
        return replace(figures, nll=math.nan, preference_accuracy=None, preference_margin=None)

    def measure(self, batches: Sequence[Batch], moment: Moment) -> Figures:
        """The figures of held-out rows, taken as one step, without gradients and in eval mode."""
        tally = _Tally(self.accelerator.device)
        for batch, found in self.look(batches, moment):
            tally.add(batch, found)
        return self._figures(tally, moment)

    @torch.no_grad()
    def look(self, batches: Sequence[Batch], moment: Moment) -> Iterator[tuple[Batch, Found]]:
        """Each micro-batch of a step and what the rule makes of it, without gradients and in eval mode."""
        self.trained.eval()
        batches = [batch.to(self.accelerator.device) for batch in batches]
        seen = self._observe(batches, moment)
        for batch in batches:
            call = Call(batch, self._reads(batch, moment), seen, accuracy=True)
            yield batch, self._loss(call, moment)
        self.trained.train()

    def _observe(self, batches: Sequence[Batch], moment: Moment) -> Any:
        """The counts of the whole step; None where the step is a single micro-batch, which counts itself.

        A rule whose denominator depends on model statistics costs one more forward, with the same dropout.
        """
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return None
        seen = None
        with torch.random.fork_rng(), torch.no_grad():
            for batch in batches:
                found = self._count(batch, moment)
                seen = found if seen is None else seen + found
        assert seen is not None, "a step has at least one micro-batch"
        return seen.all_reduce()

    def _count(self, batch: Batch, moment: Moment) -> Any:
        """The counts of a micro-batch; only weights that read the trained model need its forward pass."""
        with _telling(batch, moment):
            if not self.rule.observes_model:
                return self.rule.observe(None, batch.targets, **self._reads(batch, moment, models=False))
            call = Call(batch, self._reads(batch, moment), skipping=self._skipping)
            return self.trained(call, counting=True)

    def _loss(self, call: Call, moment: Moment) -> Found:
        with _telling(call.batch, moment):
            return self.trained(call)

    def _reads(self, batch: Batch, moment: Moment, models: bool = True) -> dict[str, Any]:
        """What the rule reads of a micro-batch, what frozen models say among it, without gradient."""
        frozen = self.frozen if models else {}
        said, inside = self.views.frozen(frozen, batch, moment.epoch, self.views.inside)
        return {
            "models": said,
            "columns": batch.columns,
            "stored": {**batch.stored, **inside},
            "examples": batch.examples,
            "progress": moment.progress,
            "epoch": moment.epoch,
            "seed": self._seed,
        }

    def _figures(self, tally: _Tally, moment: Moment) -> Figures:
        reduced: Any = self.accelerator.reduce(tally.sums, reduction="sum")
        sums: list[float] = reduced.tolist()
        found = dict(zip(_Tally.NAMES, sums, strict=True))
        if not all(map(math.isfinite, sums)):
            suspects = sorted(set(gather_object(tally.suspects)))
            raise NotFinite(
                f"step {moment.step + 1}: the loss is not finite (loss {found['loss']}, sum of the plain nll "
                f"{found['nll']}) in the rows {shown_rows(suspects)}; look at them, or lower --learning-rate"
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
            preference_accuracy=found["preferred"] / found["pairs"] if found["pairs"] else None,
            preference_margin=found["margin"] / found["pairs"] if found["pairs"] else None,
        )


class _Tally:
    """Sums over micro-batches, in float64 and on the device until the step is done."""

    NAMES = (
        "nll", "loss", "weight", "nonzero", "negative", "counted", "supervised", "right", "tokens",
        "pairs", "preferred", "margin",
    )  # fmt: skip

    def __init__(self, device: torch.device):
        kind = torch.float64 if device.type != "mps" else torch.float32
        self.sums = torch.zeros(len(self.NAMES), dtype=kind, device=device)
        self._good: list[tuple[torch.Tensor, Batch]] = []

    def add(self, batch: Batch, found: Found) -> None:
        """Add a micro-batch and what the rule made of it."""
        device, mean = self.sums.device, found.mean.detach()
        counted = batch.targets != IGNORED
        supervised = counted & batch.response
        nll = found.nll * supervised
        preferred, margins = self._ranking(batch, nll)
        parts = (
            nll.sum(),
            mean,
            found.weights.sum(),
            (found.weights != 0).sum(),
            (found.weights < 0).sum(),
            counted.sum(),
            supervised.sum(),
            (found.right & supervised).sum(),
            torch.tensor(batch.tokens),
            torch.tensor(batch.pairs),
            preferred.sum(),
            margins.sum(),
        )
        self.sums += torch.stack([part.to(device, self.sums.dtype) for part in parts])
        finite = torch.isfinite(found.nll) & torch.isfinite(found.weights)
        self._good.append((finite & torch.isfinite(mean), batch))

    def _ranking(self, batch: Batch, nll: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How the pairs of a micro-batch are ranked; of none where its rows are no pairs."""
        if not batch.pairs:
            return ranking(self.sums[:0])
        nll = nll.to(self.sums.dtype)
        return ranking(torch.stack([nll[where].sum() for where in batch.spans]))

    @property
    def suspects(self) -> list[str]:
        """The rows whose loss is not finite; all rows of a micro-batch where only their sum is not."""
        found = []
        for good, batch in self._good:
            rows = zip(batch.places, batch.spans, strict=True)
            found += [place for place, where in rows if not bool(good[where].all())]
        return found


@contextmanager
def _telling(batch: Batch, moment: Moment) -> Iterator[None]:
    """Turn what a rule raises while it runs into a `RunFault` that names step and rows."""
    try:
        yield
    except PriorityError as error:
        rows = shown_rows(batch.places)
        raise RunFault(f"step {moment.step + 1}: the rule stopped in the rows {rows}\n{error}") from error
