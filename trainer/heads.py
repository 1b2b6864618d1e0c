"""A causal language model in two parts: its body, up to the last hidden states, and its output head.

With the two apart, statistics are swept over chunks of the vocabulary's logits and `[B, T, V]` is never held.
Letters: B rows, T targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from priority_dsl.vocab_pass import Head

# What configs call the number that multiplies the logits, and whether it divides instead.
SCALES = {
    "logit_scale": False,  # Cohere
    "logits_scaling": True,  # Granite
    "lm_head_multiplier": False,  # Falcon-H1
    "output_multiplier": False,
}
ROUNDING = 1e-4  # of the largest logit: two float32 computations of the same logits differ by less


class WholeLogits(Head):
    """The head of a model that cannot be taken apart: its 'hidden states' are its logits already."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits as they came, float32 (float64 stays)."""
        return hidden if hidden.element_size() >= 4 else hidden.float()


@dataclass(frozen=True, slots=True)
class HeadedModel:
    """A frozen model as (hidden states, head): called with token ids `[B, T]`, without gradient.

    `head` is a `WholeLogits` where the model could not be taken apart. `bf16` runs the body under autocast.
    """

    model: Any
    head: Head
    bf16: bool = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Head]:
        """Hidden states `[B, T, D]` in the dtype of the head's weight, and the head."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            if isinstance(self.head, WholeLogits):
                return self.model(input_ids=input_ids, use_cache=False).logits, self.head
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.to(self.head.weight.dtype), self.head


def take_apart(model: Any, bf16: bool, say: Callable[[str], None]) -> HeadedModel:
    """Take a causal language model apart, on its device and in eval mode, and check the parts once.

    The parts must give the model's own logits on a small row, but for rounding; where they do not, or where
    there is no separate head, whole logits are used and `say` is told. Under `bf16` the head's weight is cast
    once. Models with adapters on the head are not taken apart.
    """
    head = _head(model)
    if head is None or not _agrees(HeadedModel(model, head), model):
        say(f"{type(model).__name__}: body and head do not give the model's logits; whole logits are used")
        return HeadedModel(model, WholeLogits(torch.empty(0)), bf16)
    if bf16:
        bias = None if head.bias is None else head.bias.to(torch.bfloat16)
        head = replace(head, weight=head.weight.to(torch.bfloat16), bias=bias)
    return HeadedModel(model, head, bf16)


def _head(model: Any) -> Head | None:
    """The output head as the config describes it; None where it is no linear layer over a body of its own."""
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or model.base_model is model:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for name, divides in SCALES.items():
        if (factor := getattr(config, name, None)) is not None:
            scale = scale / factor if divides else scale * factor
    bias = None if layer.bias is None else layer.bias.detach()
    return Head(layer.weight.detach(), bias, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _agrees(parts: HeadedModel, model: Any) -> bool:
    row = torch.arange(8, device=model.device).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    try:
        hidden, head = parts(row)
    except AttributeError:  # a body without `last_hidden_state`
        return False
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    ours, own = head.logits(hidden[0]), model(input_ids=row, use_cache=False).logits[0].float()
    return ours.shape == own.shape and bool((ours - own).abs().max() <= ROUNDING * (1 + own.abs().max()))
