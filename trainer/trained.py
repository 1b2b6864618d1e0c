"""The model being trained and the rule in one module, whose forward pass ends in the loss of a micro-batch.

The head's weight is used outside the model's own forward pass. Inside this module's it is still seen by what
is wrapped around it: DDP and FSDP2 gather it and reduce its gradient, tied embeddings add to theirs, and
torch.compile takes the body. Letters: B rows, T targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from priority_dsl import PriorityError
from priority_dsl.integrations.heads import hidden_states, plain_figures, read_head
from priority_dsl.step import Step
from trainer.adapters import Base
from trainer.batches import IGNORED, Batch
from trainer.views import Views

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


@dataclass(frozen=True, slots=True)
class Call:
    """What a micro-batch's loss is computed from beside the trained model, on its device.

    `given` are the keyword arguments of the rule, `step` the counts of the whole step. `nll` asks for the
    plain nll of all supervised tokens, `accuracy` for which of them are the likeliest ones. `skipping` makes
    the loss NaN, and does not raise, where a weight is not finite: all processes then skip the step together.
    """

    batch: Batch
    given: Mapping[str, Any]
    step: Step | None = None
    nll: bool = True
    accuracy: bool = False
    skipping: bool = False


class Found(NamedTuple):
    """The loss of a micro-batch, and for the log, detached and like the targets: weights, plain nll, hits.

    A token whose weight is known to be 0 beforehand has nll 0 unless the call asks for its nll. `right` is
    all false unless the call asks for accuracy.
    """

    mean: Tensor
    weights: Tensor
    nll: Tensor
    right: Tensor


class Trained(nn.Module):
    """A causal language model under a rule; this, not the model, is what DDP and FSDP2 wrap.

    `fused` takes the model apart into hidden states and head, so that `[B, T, V]` is never held; else the
    rule reads its logits. `bf16` runs the forward pass under autocast. `views` run the views of the model
    that the rule reads, and what is read inside it. `base` is the model without its adapter, where the rule
    reads it.
    """

    def __init__(
        self,
        model: Any,
        rule: CompiledRule,
        fused: bool,
        bf16: bool,
        views: Views | None = None,
        base: Base | None = None,
    ):
        super().__init__()
        self.model = model
        self.rule = rule
        self.fused = fused
        self.bf16 = bf16
        self.base = base
        self._no_split_modules = model._no_split_modules  # the layers that FSDP2 shards one by one
        plain = views is None or (views.plain("on") and not views.of("on"))
        self.views = None if plain else views

    def forward(self, call: Call, counting: bool = False) -> Found | Step:
        """The loss of a micro-batch; when `counting`, its counts alone, which are added over the step."""
        device = call.batch.input_ids.device
        call = call if self.base is None else self._with_base(call, self.base)
        if counting and not self.rule.observes_on:
            return self.rule.observe(None, call.batch.targets, **call.given)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            said, call = self._seen(call) if self.views is not None else (self._says(call.batch), call)
        return self._counts(said, call) if counting else self._loss(said, call)  # type: ignore[call-arg]

    @staticmethod
    def _with_base(call: Call, base: Base) -> Call:
        """The call with what the base of the adapter says of its batch."""
        said, inside = base.says(call.batch, call.given["epoch"])
        models, stored = {**call.given["models"], **said}, {**call.given["stored"], **inside}
        return replace(call, given={**call.given, "models": models, "stored": stored})

    def _seen(self, call: Call) -> tuple[Tensor, Call]:
        """What the model says, and the call with what its views say and what is read inside it."""
        assert self.views is not None
        batch, epoch, head = call.batch, call.given["epoch"], None
        wanted = self.views.inside
        said, stored = self.views.run("on", self.model, not self.fused, batch, epoch, wanted)
        models = dict(call.given["models"])
        for name in self.views.of("on"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in self.rule.trained_views):
                found, inside = self.views.run(name, self.model, not self.fused, batch, epoch, wanted)
            head = read_head(self.model) if self.fused else None
            models[name] = found if head is None else (found, head)
            stored |= inside
        given = {**call.given, "models": models, "stored": {**call.given["stored"], **stored}}
        return said, replace(call, given=given)

    def _says(self, batch: Batch) -> Tensor:
        """Hidden states, or logits where the model stays whole. Rows are padded on the right."""
        if self.fused:
            return hidden_states(self.model, batch.input_ids, batch.others)
        return self.model(input_ids=batch.input_ids, use_cache=False, **batch.others).logits

    # The rule's own graphs are compiled already, and read sizes from the data.
    @torch.compiler.disable
    def _counts(self, said: Tensor, call: Call) -> Step:
        with torch.autocast(said.device.type, torch.bfloat16, enabled=self.bf16):
            on = (said, read_head(self.model)) if self.fused else said
            try:
                return self.rule.observe(on, call.batch.targets, **call.given)
            except PriorityError as error:
                if not _skips(call, error):
                    raise
                nothing = torch.zeros((), device=said.device)  # the loss of these tokens will be NaN
                return Step(nothing, nothing, nothing, nothing)

    @torch.compiler.disable
    def _loss(self, said: Tensor, call: Call) -> Found:
        with torch.autocast(said.device.type, torch.bfloat16, enabled=self.bf16):
            try:
                return self._fused(said, call) if self.fused else self._dense(said, call)
            except PriorityError as error:
                if not _skips(call, error):
                    raise
                return self._not_finite(said, call)

    def _not_finite(self, said: Tensor, call: Call) -> Found:
        """A loss of NaN through which all parameters get a gradient, as the other processes expect."""
        logits = read_head(self.model).logits(said[:1, :1]) if self.fused else said
        nothing = torch.zeros_like(call.batch.targets, dtype=torch.float32)
        mean = (logits.sum() + said.sum()) * math.nan
        return Found(mean, nothing, nothing, torch.zeros_like(call.batch.response))

    def _dense(self, logits: Tensor, call: Call) -> Found:
        out = self.rule.loss(logits, call.batch.targets, step=call.step, **call.given)
        right = torch.zeros_like(call.batch.response)
        if call.accuracy:
            right = (logits.argmax(-1) == call.batch.targets) & call.batch.response
        return Found(out.mean, out.weights, out.nll, right)

    def _fused(self, hidden: Tensor, call: Call) -> Found:
        targets, head = call.batch.targets, read_head(self.model)
        out = self.rule.fused_loss(hidden, head, targets, step=call.step, **call.given)
        nll, right = out.nll, torch.zeros_like(call.batch.response)
        if call.nll or call.accuracy:
            asked = targets != IGNORED if call.accuracy else skipped(targets, out.weights, out.nll)
            swept, likeliest = plain_figures(hidden.detach(), head, targets, asked)
            nll = torch.where(asked, swept.to(nll.dtype), nll)
            right = likeliest & call.batch.response if call.accuracy else right
        return Found(out.mean, out.weights, nll, right)


def _skips(call: Call, error: PriorityError) -> bool:
    """Whether the error is a weight that is not finite, and the run goes on without its step."""
    return call.skipping and error.diagnostics[0].code == "PD505"


def skipped(targets: Tensor, weights: Tensor, nll: Tensor) -> Tensor:
    """Where `fused_loss` may have left out a target, whose weight is 0 whatever the trained model says."""
    return (targets != IGNORED) & (weights == 0) & (nll == 0)
