"""A causal language model in two parts: its body, up to the last hidden states, and its output head.

With the two apart, statistics and losses are swept over chunks of the vocabulary's logits and `[B, T, V]` is
never held. What a model adds to its loss elsewhere (a mixture of experts' router loss, which it computes only
when asked) is no part of a rule. Letters: B rows, T targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from priority_dsl.vocab_pass import Head, sweep

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
    def __call__(self, input_ids: Tensor, others: Mapping[str, Any] | None = None) -> tuple[Tensor, Head]:
        """Hidden states `[B, T, D]` in the dtype of the head's weight, and the head."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            if isinstance(self.head, WholeLogits):
                inputs = {**(others or {}), "input_ids": input_ids, "use_cache": False}
                return self.model(**inputs).logits, self.head
            hidden = hidden_states(self.model, input_ids, others)
        return hidden.to(self.head.weight.dtype), self.head


def take_apart(model: Any, bf16: bool, say: Callable[[str], None]) -> HeadedModel:
    """Take a frozen causal language model apart, on its device and in eval mode.

    Where `why_whole` has a reason, whole logits are used and `say` is told. Under `bf16` the head's weight is
    cast once.
    """
    if (reason := why_whole(model)) is not None:
        say(f"{reason}; whole logits are used")
        return HeadedModel(model, WholeLogits(torch.empty(0)), bf16)
    return HeadedModel(model, frozen_head(read_head(model), bf16), bf16)


def frozen_head(head: Head, bf16: bool) -> Head:
    """A head without gradient, its parameters in bfloat16 where it is asked for."""
    dtype = torch.bfloat16 if bf16 else head.weight.dtype
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    low = tuple((down.detach().to(dtype), up.detach().to(dtype), by) for down, up, by in head.adapters)
    return replace(head, weight=head.weight.detach().to(dtype), bias=bias, adapters=low)


def hidden_states(model: Any, input_ids: Tensor, others: Mapping[str, Any] | None = None) -> Tensor:
    """The last hidden states `[B, T, D]` of a model's body. Rows padded on the right need no mask.

    `others` are its other inputs by name, such as the positions of packed rows.
    """
    inputs = {**(others or {}), "input_ids": input_ids, "use_cache": False}
    return model.base_model(**inputs).last_hidden_state


def read_head(model: Any) -> Head:
    """The output head of a model that can be taken apart: its own parameters, and its config's scale and cap.

    Read it anew in every forward pass, inside the module that FSDP2 shards as its root: there the weight is
    whole. A weight that FSDP2 still holds in shards is gathered here.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    adapters = ()
    if _is_lora(layer):
        adapters = _low_rank(layer)
        layer = layer.base_layer
    scale = 1.0
    for name, divides in SCALES.items():
        if (factor := getattr(config, name, None)) is not None:
            scale = scale / factor if divides else scale * factor
    bias = None if layer.bias is None else _gathered(layer.bias)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(_gathered(layer.weight), bias, scale, cap, adapters)


def _is_lora(layer: Any) -> bool:
    """Whether an output layer is PEFT's LoRA around a plain linear layer. Unless it is imported, none is."""
    lora: Any = sys.modules.get("peft.tuners.lora")
    return lora is not None and type(layer) is lora.Linear and type(layer.base_layer) is torch.nn.Linear


def _low_rank(layer: Any) -> tuple[tuple[Tensor, Tensor, float], ...]:
    """The adapters of a LoRA layer that are switched on, as (down, up, factor)."""
    if layer.disable_adapters or layer.merged:
        return ()
    return tuple(
        (_gathered(layer.lora_A[name].weight), _gathered(layer.lora_B[name].weight), layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    )


def _more_than_low_rank(layer: Any) -> str | None:
    """What an adapter does beside adding a product of two matrices to the weight; None for nothing."""
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            return f"is a {type(layer.lora_variant[name]).__name__}, not plain LoRA"
        if getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            return "has dropout"
        if layer.lora_B[name].bias is not None:
            return "has a bias"
    return None


def _gathered(parameter: Tensor) -> Tensor:
    """A parameter as a plain tensor; the gradient of a sharded one is averaged over the processes."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda g: g / mesh.size())
    return whole


@torch.no_grad()
def why_whole(model: Any) -> str | None:
    """Why a model cannot be taken apart; None where it can.

    It can where its output layer is a plain linear layer, perhaps with a LoRA adapter beside it, over a body
    of its own, and the two give the model's own logits on a small row but for rounding.
    """
    name, layer = type(model).__name__, model.get_output_embeddings()
    if _is_lora(layer):
        if (reason := _more_than_low_rank(layer)) is not None:
            return f"{name}: the adapter on its output layer {reason}"
    elif type(layer) is not torch.nn.Linear:
        return f"{name}: its output layer is {type(layer).__name__}, not a plain linear layer"
    if model.base_model is model:
        return f"{name}: it has no body apart from its output layer"
    training = model.training
    model.eval()
    try:
        agrees = _agrees(model)
    finally:
        model.train(training)
    return None if agrees else f"{name}: body and head do not give the model's logits"


def _agrees(model: Any) -> bool:
    row = torch.arange(8, device=model.device).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    try:
        hidden, head = hidden_states(model, row), read_head(model)
    except AttributeError:  # a body without `last_hidden_state`
        return False
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    ours, own = head.logits(hidden[0]), model(input_ids=row, use_cache=False).logits[0].float()
    return ours.shape == own.shape and bool((ours - own).abs().max() <= ROUNDING * (1 + own.abs().max()))


def plain_figures(hidden: Tensor, head: Head, targets: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """The plain nll `[B, T]`, and whether the target is the likeliest token, in chunks of the asked rows.

    float32 (float64 for float64 hidden states) and bool, 0 and false elsewhere; detached.
    """

    def evaluate(logits: dict[str, Tensor], targets_N: Tensor) -> tuple[Tensor, Tensor]:
        z = logits["on"]
        return torch.nn.functional.cross_entropy(z, targets_N, reduction="none"), z.argmax(-1) == targets_N

    flat = targets.reshape(-1).masked_fill(~asked.reshape(-1), 0)
    models = {"on": (hidden.reshape(-1, hidden.shape[-1]), head)}
    nll, right = sweep(evaluate, models, flat, asked.reshape(-1))
    return nll.reshape(targets.shape), right.reshape(targets.shape)
