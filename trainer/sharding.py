"""How a run is spread over processes by accelerate's own config, and what must hold for it to be right.

`accelerate launch --config_file FILE` sets environment variables that `Accelerator` reads, and passes over
some of them in silence (on a CPU it makes DDP of FSDP2). So what runs is compared with what was asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from trainer.faults import ConfigFault, RunFault

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from trainer.config import TrainConfig

ASKED = {
    "ACCELERATE_USE_FSDP": (DistributedType.FSDP, "FSDP"),
    "ACCELERATE_USE_DEEPSPEED": (DistributedType.DEEPSPEED, "DeepSpeed"),
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process; `ConfigFault` where what runs is not what was asked for."""
    if _asked("ACCELERATE_USE_FSDP"):
        # Else only one process would load weights, those of the frozen models of a rule among them.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    _refuse_settings()
    accelerator = Accelerator(cpu=config.device == "cpu")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ConfigFault(
            f"{started} processes were started but {accelerator.num_processes} found each other; "
            "on a CPU start them with torchrun --nproc_per_node"
        )
    for variable, (kind, name) in ASKED.items():
        if _asked(variable) and accelerator.distributed_type != kind:
            raise ConfigFault(
                f"accelerate's config asks for {name}, and {accelerator.distributed_type.value} is what it "
                f"runs here ({name} needs GPUs and several processes); use another config, or torchrun alone"
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_fsdp(accelerator.state.fsdp_plugin)
    if is_deepspeed(accelerator):
        _settle_deepspeed(accelerator.state.deepspeed_plugin, config)
    return accelerator


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _refuse_settings() -> None:
    """Refuse settings of accelerate's config that a flag of this program decides."""
    given = os.environ.get
    if given("ACCELERATE_MIXED_PRECISION", "no").lower() != "no":
        raise ConfigFault(
            f"accelerate's config has mixed_precision {given('ACCELERATE_MIXED_PRECISION')}: set it to no; "
            "--dtype bf16 runs the forward pass in bfloat16"
        )
    if given("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigFault(
            "accelerate's config has a dynamo_backend: leave it out; --compile compiles the model"
        )
    if given("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        raise ConfigFault(
            "accelerate's config has gradient_accumulation_steps: set it to 1; --accumulation says how many "
            "micro-batches a step has"
        )
    for variable in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if _asked(variable):
            raise ConfigFault(
                f"accelerate's config sets {variable.lower().removeprefix('accelerate_use_')}: processes "
                "share rows here, and models by FSDP2; nothing else is supported"
            )


def _refuse_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigFault(
            "accelerate's config asks for FSDP version 1, which flattens the output layer's weight: set "
            "fsdp_version to 2"
        )
    if plugin.activation_checkpointing:
        raise ConfigFault(
            "accelerate's config sets fsdp_activation_checkpointing: set it to false; "
            "--checkpoint-activations does it"
        )


def _settle_deepspeed(plugin: Any, config: TrainConfig) -> None:
    """Give DeepSpeed the settings that flags of this program decide, and refuse others in their place."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    settings = plugin.deepspeed_config
    for name, instead in {
        "optimizer": "leave it out: AdamW with --learning-rate and --weight-decay is the optimizer",
        "scheduler": "leave it out; --schedule and --warmup say it",
    }.items():
        if name in settings:
            raise ConfigFault(f"DeepSpeed's config has `{name}`: {instead}")
    for name in ("bf16", "fp16"):
        if settings.get(name, {}).get("enabled", False) not in (False, "auto"):
            raise ConfigFault(
                f"DeepSpeed's config enables {name}: set it to false; --dtype bf16 runs the forward pass in "
                "bfloat16 over float32 weights"
            )
    if settings.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise ConfigFault(
            "DeepSpeed's config has gradient_accumulation_steps: set it to 1; use --accumulation"
        )
    settings["gradient_accumulation_steps"] = 1
    settings["train_micro_batch_size_per_gpu"] = config.batch_size
    settings["gradient_clipping"] = config.clip
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # else none is saved
    # Else every model would be loaded in parts, the frozen models of a rule among them.
    unset_hf_deepspeed_config()


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the backward pass and the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process may hold only a part of the weights and of the optimizer's state."""
    return is_deepspeed(accelerator) or accelerator.distributed_type == DistributedType.FSDP


def spread_out(trained: Any, optimizer: Any, accelerator: Accelerator) -> tuple[Any, Any]:
    """The model under its rule, and the optimizer, as accelerate wraps and shards them."""
    if is_deepspeed(accelerator):
        zero: Any = importlib.import_module("deepspeed").zero
        # `trained` uses the weight of the head, which another module holds: gather it there too.
        for parameter in trained.model.get_output_embeddings().parameters():
            zero.register_external_parameter(trained, parameter)
    return accelerator.prepare(trained, optimizer)


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer inside what accelerate and DeepSpeed put around it, by whose rates it steps."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def refuse_sharded(rule: CompiledRule, config: TrainConfig, inside: bool, accelerator: Accelerator) -> None:
    """`ConfigFault` for what needs the model whole; `inside`: the rule reads inside its forward pass."""
    if not is_sharded(accelerator):
        return
    average = next((name for name, model in rule.models.items() if model.ema is not None), None)
    if average is not None:
        raise ConfigFault(
            f"the rule reads `{average}`, a moving average: it needs the whole weights, run DDP"
        )
    if inside:
        raise ConfigFault("the rule reads attention inside the model: it needs the whole weights, run DDP")
    if config.quantize is not None:
        raise ConfigFault("--quantize holds the base's weights in a form that is not sharded here; run DDP")
    if not is_deepspeed(accelerator):
        return
    for name in ("save_steps", "keep_best", "resume"):
        if getattr(config, name):
            raise ConfigFault(
                f"--{name.replace('_', '-')}: no checkpoints under DeepSpeed, whose optimizer has its state "
                "in parts of its own; FSDP2 has them"
            )
    if config.skip_non_finite:
        raise ConfigFault(
            "--skip-non-finite: DeepSpeed takes its step before the loss is looked at; use FSDP2"
        )


def optimizer_state(trained: Any, optimizer: Any, accelerator: Accelerator) -> dict[str, Any]:
    """The state of the optimizer, whole in the main process; of shards by the names of the weights.

    Every process calls this.
    """
    if not is_sharded(accelerator):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(trained, optimizer.optimizer, options=_options())


def load_optimizer(trained: Any, optimizer: Any, state: dict[str, Any], accelerator: Accelerator) -> None:
    """Put the state of a checkpoint into the optimizer, spread over the processes as its weights are."""
    by_name = any(isinstance(p, str) for group in state["param_groups"] for p in group["params"])
    if by_name != is_sharded(accelerator):
        held = "sharded" if by_name else "not sharded"
        raise RunFault(f"the optimizer's state is that of a run that was {held}: resume with the same config")
    if not by_name:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(trained, optimizer.optimizer, state, options=_options())


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def clip(trained: Any, accelerator: Accelerator, limit: float) -> float:
    """Clip the gradient of all processes' weights together; its norm before."""
    norm: Any = accelerator.clip_grad_norm_(trained.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
