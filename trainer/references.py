"""The models without gradient that stay loaded while a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from priority_dsl.integrations.heads import HeadedModel, WholeLogits, take_apart
from trainer.config import TrainConfig
from trainer.models import load_frozen
from trainer.opening import Opened
from trainer.views import Speaker, Views, frozen_names

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def kept_names(rule: CompiledRule, config: TrainConfig, views: Views) -> set[str]:
    """The frozen models that training runs, by bound name: all under --online-reference, else those of which
    it reads whole distributions, and views that draw."""
    swept = swept_names(rule) if config.online_reference else set()
    frozen = frozen_names(rule)
    return {name for name in swept | set(rule.plan.kept) if views.base(name) in frozen}


def swept_names(rule: CompiledRule) -> set[str]:
    """The bound names that the passes before training read."""
    return {name for of in rule.plan.passes for name in of.models}


def load_kept(run: Opened, needed: set[str], views: Views) -> dict[str, Speaker]:
    """The `needed` frozen models by bound name; under --loss dense those that no pass reads give logits."""
    config, rule = run.config, run.rule
    swept = swept_names(rule) if config.online_reference else set()
    loaded = load_frozen(
        {views.base(name) for name in needed}, config.model, config.bind, run.tokenizer,
        trust=config.trust_remote_code,
    )  # fmt: skip
    bf16 = config.dtype == "bf16"
    apart, whole = {}, {}
    for name, model in loaded.items():
        model.to(run.accelerator.device)
        whole[name] = HeadedModel(model, WholeLogits(torch.empty(0)), bf16)
        if config.loss != "dense" or name in map(views.base, swept):
            apart[name] = take_apart(model, bf16, run.log.note)
    kinds = {name: apart if name in swept or config.loss != "dense" else whole for name in needed}
    return {name: kinds[name][views.base(name)] for name in needed}
