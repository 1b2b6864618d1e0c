"""LoRA adapters: the trained model is its frozen base with small layers beside, which can be switched off.

Switched off, the layers give what the base gives, bit for bit: `ref` needs no second model. An adapter folder
has adapter_config.json and adapter_model.safetensors, as peft writes and reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.faults import ConfigFault, ModelFault, RunFault, first_line
from trainer.views import Living, Views

if TYPE_CHECKING:
    from priority_dsl.vocab_pass import Head
    from trainer.batches import Batch
    from trainer.config import TrainConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # what peft puts before the names of the base's weights


class Adapter:
    """A LoRA adapter in a causal language model: `model`, whose layers it is in, and peft's handle of it."""

    def __init__(self, handle: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.handle = handle
        self.model = handle.get_base_model()
        self._layers: list[Any] = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model as its base, without dropout, inside this context.

        peft's own switch also takes the gradient from the parameters for a while, which FSDP2 would keep.
        """
        training = self.model.training
        self.model.eval()
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)
            self.model.train(training)

    def _switch(self, off: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = off

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter into a folder; `weights` are those of the model where it holds only shards."""
        named = None if weights is None else {ROOT + name: value for name, value in weights.items()}
        self.handle.create_or_update_model_card = _no_card
        # The vocabulary is never resized, so the base's embeddings are no part of the adapter.
        self.handle.save_pretrained(str(folder), save_embedding_layers=False, state_dict=named)

    def restore(self, folder: Path) -> None:
        """Take the weights of a checkpoint; `RunFault` where they are damaged or of another adapter."""
        try:
            _fill(self.handle, folder)
        except Exception as error:  # a damaged file raises what its format raises
            raise RunFault(
                f"{folder}: the adapter of the checkpoint is damaged ({first_line(error)}); "
                "remove the checkpoint to continue from the one before it"
            ) from error


@dataclass(frozen=True)
class Base:
    """The base of an adapter as the frozen models of a rule that it is: `ref`, and views of it, by name."""

    adapter: Adapter
    speakers: Mapping[str, Living]
    views: Views

    @classmethod
    def of(
        cls, adapter: Adapter, needed: Iterable[str], views: Views, config: TrainConfig, apart: bool
    ) -> Base | None:
        """Of the `needed` frozen models those that the base is, None for none; `apart` as the trained one."""
        own = {name for name in needed if views.base(name) == "ref" and "ref" not in config.bind}
        if not own:
            return None
        said = Living(adapter.model, apart, config.dtype == "bf16")
        return cls(adapter, dict.fromkeys(sorted(own), said), views)

    @property
    def names(self) -> set[str]:
        """The bound names that it stands for."""
        return set(self.speakers)

    def says(self, batch: Batch, epoch: int) -> tuple[dict[str, tuple[Tensor, Head]], dict[str, Tensor]]:
        """What it says of a batch and what is read inside it, as `Views.frozen` gives them."""
        with self.adapter.switched_off():
            return self.views.frozen(self.speakers, batch, epoch, self.views.inside)


def _no_card(folder: str) -> None:
    """In place of peft's model card, which is a form to fill in."""


def add_adapter(model: Any, config: TrainConfig) -> Adapter:
    """Put a new adapter into a model, whose own weights are frozen; the same on every process.

    Raises `ConfigFault` for targets that the model does not have, or that are no linear layers.
    """
    peft = require_peft("--lora")
    assert config.lora is not None
    _check_targets(model, config.lora_targets)
    settings = peft.LoraConfig(
        r=config.lora,
        lora_alpha=2 * config.lora if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=_absolute(config.model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return Adapter(peft.get_peft_model(model, settings))
        except ValueError as error:  # peft finds nothing to put an adapter on
            raise ConfigFault(f"--lora: {first_line(error)}") from error


def _absolute(source: str) -> str:
    """A folder as it is found from anywhere, a name on the hub as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Refuse targets that no layer has, and such that are no linear layers: embeddings, norms, blocks."""
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    for target in targets:
        found = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found or not set(found) <= linear:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            what = "no layer has this name" if not found else "is no linear layer"
            raise ConfigFault(f"--lora-targets {target}: {what}; the model's linear layers are {known}")


def is_adapter(source: str) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    folder = Path(source)
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(source: str, flag: str) -> str:
    """The base model of a LoRA adapter's folder; `ModelFault` where it is not here, or not LoRA."""
    place = f"{flag} {source}".replace("= ", "=")
    try:
        settings = json.loads((Path(source) / CONFIG).read_text(encoding="utf-8"))
        kind, base = str(settings["peft_type"]), settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFault(f"{place}: {CONFIG} cannot be read: {first_line(error)}") from error
    if kind != "LORA":
        raise ModelFault(f"{place}: is a {kind} adapter; of adapters, LoRA is read")
    away = base and (Path(base).is_absolute() or base.startswith(".")) and not Path(base).is_dir()
    if not base or away:
        named = f"the model {base}, which is not here" if base else "a model that it does not name"
        raise ModelFault(
            f"{place}: is an adapter of {named}; put the folder of its base model into "
            f"`base_model_name_or_path` of {Path(source) / CONFIG}"
        )
    return base


def put_on(model: Any, source: str, flag: str) -> Adapter:
    """The adapter of a folder on its loaded base; `ModelFault` where the two do not fit."""
    peft = require_peft(f"{flag} {source}, an adapter,")
    try:
        settings = peft.PeftConfig.from_pretrained(source)
        made = peft.get_peft_model(model, settings)
        _fill(made, Path(source))
    except Exception as error:  # every part of it raises its own
        raise ModelFault(f"{flag} {source}: the adapter does not load: {first_line(error)}") from error
    return Adapter(made)


def _fill(handle: Any, folder: Path) -> None:
    """Put the weights of a folder into an adapter; ValueError where one lacks or is too many."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(folder / WEIGHTS)
    known = get_peft_model_state_dict(handle, save_embedding_layers=False)
    if wrong := sorted(saved.keys() ^ known.keys()):
        raise ValueError(f"{len(wrong)} weights differ, such as {wrong[0]}")
    set_peft_model_state_dict(handle, saved)


def require_peft(what: str) -> Any:
    """The module peft; `ConfigFault` where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigFault(f"{what} needs peft: pip install 'priority_dsl[peft]'") from error
    return peft
