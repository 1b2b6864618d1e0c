"""What the log of a trainer shows beside its loss: the plain nll, and what the weights are.

Letters: B rows, T targets of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from priority_dsl.inputs import IGNORED
from priority_dsl.integrations.collate import Aligned

COUNTED = ("tokens", "kept", "weights", "none", "examples", "terms")  # denominators that a sum of rows gives


class StepFigures:
    """Sums over the micro-batches of one optimizer step, on the device until they are shown."""

    NAMES = ("nll", "weight", "nonzero", "negative", "counted", "supervised")

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, batch: Aligned, found: dict[str, Tensor]) -> None:
        """Add a micro-batch and what the rule made of it."""
        weights, counted = found["weights"], batch.targets != IGNORED
        parts = (
            (found["nll"] * batch.response).sum(),
            weights.sum(),
            (weights != 0).sum(),
            (weights < 0).sum(),
            counted.sum(),
            batch.response.sum(),
        )
        sums = torch.stack([part.detach().float() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums

    def shown(self, accelerator: Any) -> dict[str, float]:
        """The figures over all processes: `nll` in nats a supervised token, weights as mean and shares."""
        if self.sums is None:
            return {}
        reduced = accelerator.reduce(self.sums, reduction="sum")
        found = dict(zip(self.NAMES, reduced.tolist(), strict=True))
        supervised, counted = max(found["supervised"], 1), max(found["counted"], 1)
        return {
            "nll": found["nll"] / supervised,
            "weight_mean": found["weight"] / counted,
            "weight_nonzero": found["nonzero"] / counted,
            "weight_negative": found["negative"] / counted,
            "supervised_tokens": found["supervised"],
        }


class HeldOutFigures:
    """Sums for each example of a held-out data set, so that one that two processes saw counts once."""

    NAMES = ("nll", "supervised", "right", "loss", "counted", "kept", "weight")

    def __init__(self, normalize: str | None) -> None:
        self.normalize = normalize  # None: no weighted loss is shown
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.named = True

    def add(self, batch: Aligned, found: dict[str, Tensor]) -> None:
        """Add a batch and what the rule made of it."""
        weights, counted = found["weights"], batch.targets != IGNORED
        examples, place = batch.examples[counted].unique(return_inverse=True)
        # `normalize = examples` has divided by the examples of the batch, which is no step here.
        losses = found["losses"] * (len(examples) if self.normalize == "examples" else 1)
        per_token = torch.stack(
            [
                found["nll"] * batch.response,
                batch.response,
                found["right"] & batch.response,
                losses,
                counted,
                weights != 0,
                weights.abs(),
            ],
            dim=-1,
        ).double()
        sums = per_token.new_zeros(len(examples), len(self.NAMES)).index_add_(0, place, per_token[counted])
        self.parts.append((examples.cpu(), sums.cpu()))
        self.named = self.named and batch.named

    def shown(self, prefix: str) -> dict[str, float]:
        """The figures over all processes, under the names that the trainer gives its own."""
        parts = self._gathered()
        sums = torch.cat([sums for _, sums in parts]) if parts else torch.zeros(0, len(self.NAMES)).double()
        if self.named and parts:
            _, place = torch.cat([examples for examples, _ in parts]).unique(return_inverse=True)
            first = torch.full((int(place.max()) + 1,), len(place))
            first = first.scatter_reduce(0, place, torch.arange(len(place)), "amin")
            sums = sums[first]
        found: dict[str, float] = dict(zip(self.NAMES, sums.sum(0).tolist(), strict=True))
        supervised = max(found["supervised"], 1)
        shown = {
            f"{prefix}_loss": found["nll"] / supervised,
            f"{prefix}_accuracy": found["right"] / supervised,
            f"{prefix}_supervised_tokens": found["supervised"],
        }
        if self.normalize is not None:
            shown[f"{prefix}_weighted_loss"] = self._weighted(found, sums)
        return shown

    def _weighted(self, found: dict[str, float], sums: Tensor) -> float:
        """The rule's loss of all rows as one step."""
        match self.normalize:
            case "tokens":
                size = found["counted"]
            case "kept":
                size = found["kept"]
            case "weights":
                size = found["weight"]
            case "terms" | "examples":
                size = int((sums[:, self.NAMES.index("counted")] > 0).sum())
            case _:
                size = 1
        return found["loss"] / size if size else 0.0

    def _gathered(self) -> list[tuple[Tensor, Tensor]]:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.parts
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, (self.parts, self.named))
        self.named = all(named for _, named in found)
        return [part for parts, _ in found for part in parts]
