"""The story of a run, top to bottom: rows, steps, checkpoints, the trained model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.batches import Batch, micro_batches
from trainer.checkpoints import save_checkpoint
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.faults import RunFault
from trainer.objective import Figures, Moment
from trainer.prepare import Run, prepare
from trainer.tracking import Tracking

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: its folder, its last step, and the held-out figures where there are any."""

    output: Path
    step: int
    evaluation: Figures | None


def train(config: TrainConfig, trackers: Sequence[GeneralTracker] = ()) -> Outcome:
    """Train a model under a rule; leave the model, rule, config and log in the output folder.

    Raises `PriorityError` for the rule and a `Fault` for everything else that a person can mend. A run
    that stops keeps its log and its last checkpoint. `trackers` are objects of one's own, of accelerate's
    `GeneralTracker`, beside those that the config names; each gets every line of the log.
    """
    tracking = Tracking(config, trackers)
    run = prepare(config)
    with tracking.of(run):
        return train_steps(run)


def train_steps(run: Run) -> Outcome:
    """The optimizer steps of a run that is ready, and the trained model at the end."""
    config = run.config
    planned = run.start.planned
    evaluation, order = None, run.order.steps(run.start.step)
    run.log.start(run.start.step, planned)
    for step in range(run.start.step, planned):
        began = time.perf_counter()
        now = next(order)
        moment = Moment(step, step / planned, now.epoch)
        rate = run.schedule.get_last_lr()[0]
        done, last = step + 1, step + 1 == planned
        shown = done % config.log_steps == 0 or last
        figures = run.objective.step(batches_of(run, now.rows), moment, shown)
        norm = update(run, step)

        line = step_line(figures, moment, rate, norm, time.perf_counter() - began)
        if shown:
            run.log.write(line)
        run.log.advance(line if shown else None)
        if run.held_out and (last or (config.eval_steps and done % config.eval_steps == 0)):
            evaluation = evaluate(run, replace(moment, step=done))
        if config.save_steps and (last or done % config.save_steps == 0):
            save_checkpoint(run, done)
    run.log.close()
    save_model(run)
    return Outcome(run.folder.path, planned, evaluation)


def batches_of(run: Run, rows: list[Example]) -> list[Batch]:
    """This process's micro-batches of some rows, with what the rule reads."""
    return micro_batches(rows, run.spread, run.rule.over, run.rule.requires.columns)


def update(run: Run, step: int) -> float:
    """Clip the gradient, take the optimizer step, and return the gradient's norm before clipping."""
    limit = run.config.clip or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), limit))
    if not math.isfinite(norm):
        raise RunFault(
            f"step {step + 1}: the gradient is not finite although the loss is; "
            "lower --learning-rate, or use --dtype fp32"
        )
    run.optimizer.step()
    run.moving.update()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def evaluate(run: Run, moment: Moment) -> Figures:
    """Measure the held-out rows as if they were one step, log the figures and say them."""
    figures = run.objective.measure(batches_of(run, run.held_out), moment)
    run.log.write(
        {
            "step": moment.step,
            "eval_nll": figures.nll,
            "eval_loss": figures.loss,
            "eval_accuracy": figures.accuracy,
            "eval_supervised_tokens": figures.supervised,
        }
    )
    run.log.note(
        f"step {moment.step}: held-out nll {figures.nll:.4f}, weighted loss {figures.loss:.4f}, "
        f"accuracy {figures.accuracy:.1%}"
    )
    return figures


def step_line(figures: Figures, moment: Moment, rate: float, norm: float, seconds: float) -> dict[str, Any]:
    """A line of the log: `nll` in nats a token, weights as shares from 0 to 1, tokens as counts."""
    return {
        "step": moment.step + 1,
        "epoch": moment.epoch,
        "nll": figures.nll,
        "loss": figures.loss,
        "weight_mean": figures.weight_mean,
        "weight_nonzero": figures.weight_nonzero,
        "weight_negative": figures.weight_negative,
        "learning_rate": rate,
        "grad_norm": norm,
        "supervised_tokens": figures.supervised,
        "tokens": figures.tokens,
        "seconds": round(seconds, 4),
    }


def save_model(run: Run) -> None:
    """Write the trained model and its tokenizer into the output folder."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run.accelerator.unwrap_model(run.policy).save_pretrained(run.folder.path)
        run.tokenizer.save_pretrained(run.folder.path)
        run.log.note(f"model, rule, config and log are in {run.folder.path}")
    run.accelerator.wait_for_everyone()
