"""The rule inside a model's own forward pass, where DDP, FSDP and PEFT see all that the loss is made of.

`model(**inputs, priority=call)` ends in the loss of a micro-batch; without `priority` the model is what it
was. Letters: B rows, L tokens, T = L - 1 targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from priority_dsl.inputs import IGNORED
from priority_dsl.integrations.collate import Aligned
from priority_dsl.integrations.heads import HeadedModel, hidden_states, plain_figures, read_head
from priority_dsl.step import Step

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule

Inputs = Mapping[str, Any]
SwitchedOff = Callable[[], AbstractContextManager[Any]]
NO_INPUT = ("labels", "num_items_in_batch", "use_cache")  # what the loss reads, not the body


@dataclass(frozen=True)
class Moment:
    """When a step happens: its share of the planned steps that is done, and the epoch from 0."""

    progress: float = 0.0
    epoch: int = 0


@dataclass(frozen=True)
class Speakers:
    """What says something to a rule: the rule, its frozen models, and the trained one as it was.

    `frozen` by name; `switched_off` switches the adapter off, which gives `ref` where no model is bound.
    `whole` holds full logits of the trained model, whose head cannot be taken apart.
    """

    rule: CompiledRule
    frozen: Mapping[str, HeadedModel] = field(default_factory=dict)
    switched_off: SwitchedOff | None = None
    whole: bool = False


@dataclass(frozen=True)
class Call:
    """What `priority=` is: a micro-batch and what is asked of it.

    `counting` asks for its counts alone; `nll` for the plain nll of all supervised tokens; `accuracy` for
    which of them are the likeliest ones; without `weighted` nothing else is computed.
    """

    speakers: Speakers
    batch: Aligned
    seed: int
    moment: Moment = Moment()
    step: Step | None = None
    counting: bool = False
    nll: bool = True
    accuracy: bool = False
    weighted: bool = True

    def __call__(self, model: Any, whole: Callable[..., Any], inputs: Inputs) -> Any:
        """The loss and what the log shows; the counts when `counting`.

        `model` is the causal language model, `whole` its own forward pass. A dict of `loss` (0-dimensional)
        and, detached `[B, T]`, `weights`, `nll`, `losses`, `right`.
        """
        given = self._given(model, whole, inputs)
        if self.counting and not self.speakers.rule.observes_on:
            return self.speakers.rule.observe(None, self.batch.targets, **given)
        if self.speakers.whole:
            said = whole(**inputs, use_cache=False).logits[:, :-1]
        else:
            said = hidden_states(model, inputs["input_ids"], inputs)[:, :-1]
        # The rule's own graphs are compiled already, and read sizes from the data.
        return torch.compiler.disable(self._loss)(model, said, given)  # type: ignore[call-arg]

    def _given(self, model: Any, whole: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
        """What the rule reads beside the trained model; frozen models speak before it does."""
        models = {}
        if self.weighted:
            for name, frozen in self.speakers.frozen.items():
                hidden, head = frozen(inputs["input_ids"], inputs)
                models[name] = (hidden[:, :-1], head)
            if self.speakers.switched_off is not None:
                models["ref"] = self._as_it_was(model, whole, inputs, self.speakers.switched_off)
        return {
            "models": models,
            "columns": self.batch.columns,
            "stored": self.batch.stored,
            "examples": self.batch.examples,
            "progress": self.moment.progress,
            "epoch": self.moment.epoch,
            "seed": self.seed,
        }

    @torch.no_grad()
    def _as_it_was(
        self,
        model: Any,
        whole: Callable[..., Any],
        inputs: Inputs,
        switched_off: SwitchedOff,
    ) -> Any:
        """What the trained model says without its adapter and without dropout."""
        training = {part: part.training for part in model.modules()}
        model.eval()
        with switched_off():
            if self.speakers.whole:
                said: Any = whole(**inputs, use_cache=False).logits[:, :-1]
            else:
                said = (hidden_states(model, inputs["input_ids"], inputs)[:, :-1], read_head(model))
        for part, was in training.items():
            part.training = was
        return said

    def _loss(self, model: Any, said: Tensor, given: dict[str, Any]) -> Any:
        rule, targets = self.speakers.rule, self.batch.targets
        head = None if self.speakers.whole else read_head(model)
        if self.counting:
            return rule.observe(said if head is None else (said, head), targets, **given)
        if not self.weighted:
            return self._plain(said, head)
        if head is None:
            out = rule.loss(said, targets, step=self.step, **given)
        else:
            out = rule.fused_loss(said, head, targets, step=self.step, **given)
        found = {"loss": out.mean, "weights": out.weights, "losses": out.losses, "nll": out.nll}
        if not (self.nll or self.accuracy):
            return {**found, "right": torch.zeros_like(targets, dtype=torch.bool)}
        # The fused loss leaves out a target whose weight is 0 whatever the trained model says.
        left_out = (targets != IGNORED) & (out.weights == 0) & (out.nll == 0)
        asked = targets != IGNORED if self.accuracy else left_out
        nll, right = self._figures(said, head, asked)
        return {**found, "nll": torch.where(asked, nll.to(out.nll.dtype), out.nll), "right": right}

    def _plain(self, said: Tensor, head: Any) -> dict[str, Tensor]:
        nll, right = self._figures(said, head, self.batch.targets != IGNORED)
        nothing = torch.zeros_like(nll)
        return {"loss": nll.sum(), "weights": nothing, "losses": nothing, "nll": nll, "right": right}

    def _figures(self, said: Tensor, head: Any, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The plain nll, and whether the target is the likeliest token, of the asked targets `[B, T]`."""
        if head is not None:
            return plain_figures(said.detach(), head, self.batch.targets, asked)
        targets = self.batch.targets.masked_fill(~asked, 0)
        scores = said.detach() if said.element_size() >= 4 else said.detach().float()
        nll = scores.logsumexp(-1) - scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return nll.masked_fill(~asked, 0), (scores.argmax(-1) == targets) & asked


def open_forward(model: Any) -> None:
    """Give a causal language model's forward pass the extra parameter `priority`, a `Call`.

    Without it the forward pass is the one that was there, whose signature it keeps.
    """
    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, priority: Call | None = None, **inputs: Any) -> Any:
        if priority is None:
            return own(*args, **inputs)
        given = {n: v for n, v in inputs.items() if v is not None and n not in NO_INPUT}
        return priority(self, own, given)

    model.forward = types.MethodType(forward, model)
