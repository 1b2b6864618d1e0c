"""Moving averages of the trained weights: `model slow = ema(R)`, kept beside the model, saved with the run.

An average starts as the model and follows it after each optimizer step, over the trained parameters; what is
not trained is shared with the model. It runs in eval mode and without gradient, in one more forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.faults import RunFault, first_line
from trainer.views import Living


class Moving:
    """The averages of a run by the name of their model; none costs nothing."""

    def __init__(self, model: Any, rates: Mapping[str, float], apart: bool, bf16: bool) -> None:
        """`model` is the trained one as the run starts, on its device, `rates` the R of each average."""
        self.rates = dict(rates)
        self._trained = _trained(model)
        self.models = {name: Living(_beside(model), apart, bf16) for name in rates}
        self._average = {name: _named(average.model, self._trained) for name, average in self.models.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the trained model after an optimizer step: R times the average + (1 - R) times the model."""
        for name, rate in self.rates.items():
            for key, value in self._average[name].items():
                value.mul_(rate).add_(self._trained[key].detach(), alpha=1.0 - rate)

    def save(self, folder: Path) -> None:
        """Write the weights of each average into a checkpoint."""
        for name, weights in self._average.items():
            save_file({key: w.detach().cpu().contiguous() for key, w in weights.items()}, _file(folder, name))

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Take the weights of each average from a checkpoint; `RunFault` where it is damaged."""
        for name, weights in self._average.items():
            try:
                saved = load_file(_file(folder, name))
                for key, value in weights.items():
                    value.copy_(saved[key])
            except Exception as error:  # a damaged file raises what its format raises
                raise RunFault(
                    f"{folder}: the average `{name}` of the checkpoint is damaged ({first_line(error)}); "
                    "remove the checkpoint to continue from the one before it"
                ) from error


def _file(folder: Path, name: str) -> Path:
    """Not `*.safetensors`, which a loader of the folder would take for weights of the model."""
    return folder / f"average-{name}.weights"


def _trained(model: Any) -> dict[str, Tensor]:
    """The trained parameters by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _beside(model: Any) -> Any:
    """A copy of a model in eval mode that shares with it what is not trained."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    made = copy.deepcopy(model, shared).eval()
    for parameter in made.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return made


def _named(model: Any, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names}
