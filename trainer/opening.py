"""The opening of a run: what can be refused before a row is read, then tokenizer and model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from priority_dsl import compile_rule
from trainer.adapters import is_adapter
from trainer.checkpoints import check_whole
from trainer.config import TrainConfig
from trainer.dataset import refuse_online, refuse_streaming
from trainer.faults import ConfigFault
from trainer.folder import RunFolder
from trainer.models import Quantize, check_bindings, load_model, load_tokenizer, quieten
from trainer.runlog import RunLog
from trainer.sharding import make_accelerator
from trainer.strict import refuse_warnings
from trainer.views import frozen_names

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


@dataclass(frozen=True, slots=True)
class Opened:
    """A run whose rule, folder and model are there; `checkpoint` is the one that it goes on from."""

    config: TrainConfig
    rule: CompiledRule
    folder: RunFolder
    checkpoint: Path | None
    accelerator: Accelerator
    log: RunLog
    tokenizer: Any
    policy: Any


def open_run(config: TrainConfig, folder: RunFolder) -> Opened:
    """Open a run; nothing is written. `PriorityError` for the rule, a `Fault` for everything else."""
    quieten()
    rule = compile_rule(config.rule, **config.set)
    if config.strict:
        refuse_warnings(rule.checked)
    if config.online_reference:
        refuse_online(rule)
    if config.streaming:
        refuse_streaming(rule, config.online_reference)
    check_bindings(frozen_names(rule), config.bind)
    folder.check()
    checkpoint = folder.newest() if config.resume else None
    if checkpoint is not None:
        check_whole(checkpoint)
    accelerator = make_accelerator(config)
    log = RunLog(folder.path, accelerator.is_main_process, config.quiet)
    for warning in rule.checked.warnings:
        log.note(f"{warning}\n")
    tokenizer = load_tokenizer(config.model, config.chat_template, config.trust_remote_code)
    policy = load_policy(config, checkpoint)
    return Opened(config, rule, folder, checkpoint, accelerator, log, tokenizer, policy)


def load_policy(config: TrainConfig, checkpoint: Path | None) -> Any:
    """The model that is trained, as the run begins or as a checkpoint left it; of an adapter its base.

    Raises `ConfigFault` for an adapter, which is no model to begin from: what would `ref` be?
    """
    if is_adapter(config.model):
        raise ConfigFault(
            f"--model {config.model}: is an adapter, and a run begins from a whole model: make one with "
            f"`priority merge --model {config.model} --output FOLDER`; --resume continues a run"
        )
    if config.lora is None:
        return load_model(str(checkpoint or config.model), trust=config.trust_remote_code)
    return load_model(config.model, quantize=Quantize.of(config), trust=config.trust_remote_code)
