"""What a token pays to the prompt: the attention of a model's last layer, read in its forward pass.

Whatever attention the model runs with (fused kernels give no maps), the inputs of its last attention module
are caught as they come by, and that module alone is run once more with maps and without gradient. No other
map is ever made. Letters: B rows, L tokens of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.faults import ModelFault, first_line

ROUNDING = 1e-3  # of the largest output: two attentions on the same input differ by less


class LastAttention:
    """The last attention module of a causal language model.

    Raises `ModelFault` with the reason where maps cannot be had from it. The first object of a model runs a
    small row through it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.module: Any = _last_attention(model)
        self.config: Any = copy.copy(self.module.config)
        self.config._attn_implementation = "eager"
        self.window = _window(self.module.config)
        self._check()

    @contextmanager
    def watched(self) -> Iterator[Caught]:
        """What comes by the module in a forward pass of the model inside this context."""
        caught = Caught(self)
        handle = self.module.register_forward_pre_hook(caught.see, with_kwargs=True)
        try:
            yield caught
        finally:
            handle.remove()

    @torch.no_grad()
    def run(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Output `[B, L, D]` and maps `[B, H, L, L]` of the module on caught inputs, without dropout."""
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        given = {**named, "attention_mask": self._mask(hidden)}
        given.update({name: None for name in ("past_key_values", "past_key_value") if name in named})
        before, training = self.module.config, self.module.training
        self.module.config = self.config
        self.module.eval()
        try:
            output, maps = self.module(*arguments, **given)[:2]
        finally:
            self.module.config = before
            self.module.train(training)
        return output, maps

    def _mask(self, hidden: Tensor) -> Tensor:
        """What is added to the scores: 0 for the token itself and for what it sees before it."""
        place = torch.arange(hidden.shape[1], device=hidden.device)
        behind = place.unsqueeze(-1) - place
        seen = (behind >= 0) & (behind < (self.window or hidden.shape[1]))
        mask = hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return mask.expand(hidden.shape[0], 1, -1, -1)

    def _check(self) -> None:
        """Refuse a module whose own output the maps do not explain."""
        name = type(self.model).__name__
        size = self.model.get_input_embeddings().weight.shape[0]
        row = torch.arange(8, device=self.model.device).unsqueeze(0) % size
        own: list[Tensor] = []
        handle = self.module.register_forward_hook(lambda module, given, found: own.append(found[0]))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(row.device.type, enabled=False), self.watched() as caught:
                self.model(input_ids=row, use_cache=False)
                output, maps = caught.again()
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ModelFault(f"{name}: attention(...) cannot be read: {why}") from error
        finally:
            handle.remove()
            self.model.train(training)
        given = maps is not None and maps.shape[-2:] == (8, 8)
        if not given or (output - own[0]).abs().max() > ROUNDING * (1 + own[0].abs().max()):
            raise ModelFault(
                f"{name}: attention(...) cannot be read: its last layer does not attend as its maps say"
            )


@dataclass
class Caught:
    """The inputs of the last attention module in a forward pass."""

    of: LastAttention
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def see(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Catch a call."""
        self.calls = [(arguments, named)]

    def again(self) -> tuple[Tensor, Tensor]:
        """Output and maps of the last call."""
        return self.of.run(*self.calls[0])

    @torch.no_grad()
    def paid(self, outside: Tensor) -> Tensor:
        """The attention `[B, L]` that each token pays to the earlier ones that `outside` `[B, L]` marks.

        float32, the mean over the heads; detached.
        """
        _, maps = self.again()
        mean = maps.float().mean(1)
        earlier = torch.ones_like(mean[0]).tril(-1)
        return (mean * (earlier * outside.unsqueeze(1))).sum(-1).clamp(0.0, 1.0)


def _last_attention(model: Any) -> nn.Module:
    """The last module of those that the model names as its attention; `ModelFault` where it names none."""
    named = getattr(type(model.base_model), "_can_record_outputs", None) or {}  # as transformers finds them
    recorded = named.get("attentions")
    for one in [recorded] if not isinstance(recorded, list) else recorded:
        target = getattr(one, "target_class", one)
        part = getattr(one, "layer_name", None) or ""
        if isinstance(target, type):
            modules = model.base_model.named_modules()
            found = [m for name, m in modules if isinstance(m, target) and part in f".{name}"]
            if found:
                return found[-1]
    raise ModelFault(
        f"{type(model).__name__}: attention(...) cannot be read: transformers names no module of it that "
        "gives attention maps"
    )


def _window(config: Any) -> int | None:
    """How many tokens the last layer sees back, itself included; None where it sees all."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = kinds is None or kinds[-1] == "sliding_attention"
    return window if slides and getattr(config, "use_sliding_window", True) else None
