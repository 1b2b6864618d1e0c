"""How a run is spread over processes by accelerate's own config, and what must hold for it to be right.

`accelerate launch --config_file FILE` sets environment variables that `Accelerator` reads, and passes over
some of them in silence (on a CPU it makes DDP of FSDP2). So what runs is compared with what was asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
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
    _refuse_plugin(accelerator)
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


def _refuse_plugin(accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
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


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def refuse_sharded(rule: CompiledRule, config: TrainConfig, inside: bool) -> None:
    """`ConfigFault` for what needs the model whole; `inside`: the rule reads inside its forward pass."""
    average = next((name for name, model in rule.models.items() if model.ema is not None), None)
    if average is not None:
        raise ConfigFault(
            f"the rule reads `{average}`, a moving average: it needs the whole weights, run DDP"
        )
    if inside:
        raise ConfigFault("the rule reads attention inside the model: it needs the whole weights, run DDP")
    if config.quantize is not None:
        raise ConfigFault("--quantize holds the base's weights in a form that is not sharded here; run DDP")


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
