"""The optimizer of a run, and its learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainer.sharding import bare

if TYPE_CHECKING:
    from trainer.config import TrainConfig

WARMUP = 0.03  # share of the steps, unless --warmup or --warmup-steps says otherwise
DECAY = 0.2  # share of the steps in which the schedule wsd falls, unless --decay says otherwise


def make_optimizer(policy: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay is for matrices, not for norms and biases."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)


def make_schedule(optimizer: Any, config: TrainConfig, planned: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over the steps: a linear rise over the warm-up, then as the schedule says."""
    # The schedule counts this program's steps, so it takes the bare optimizer and not accelerate's wrapper.
    return torch.optim.lr_scheduler.LambdaLR(bare(optimizer), rate_share(config, planned))


def warmup_steps(config: TrainConfig, planned: int) -> int:
    """The steps in which the learning rate rises."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil((WARMUP if config.warmup is None else config.warmup) * planned)


def rate_share(config: TrainConfig, planned: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0, as a share of the highest one, in (0, 1].

    No step of the plan has rate 0, the first and the last included, so that a run of a single step trains
    too. `--min-rate` is where a falling rate would arrive one step after the last.
    """
    rise, least = warmup_steps(config, planned), config.min_rate
    fall = math.ceil((DECAY if config.decay is None else config.decay) * planned)

    def fallen(step: int) -> float:
        left = max(planned - step, 0)  # of the steps, 1 at the last
        part = min(left / max(planned - rise, 1), 1.0)
        match config.schedule:
            case "cosine":
                return (1 - math.cos(math.pi * part)) / 2
            case "linear":
                return part
            case "wsd":
                return min(left / (fall + 1), 1.0)
            case "inverse_sqrt":
                return math.sqrt((rise + 1) / (step + 1))
            case "constant":
                return 1.0

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return least + (1 - least) * fallen(step)

    return share
