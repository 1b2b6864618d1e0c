"""The story of a run, top to bottom: rows, steps, checkpoints, the trained model."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.atomic import partial_of, publish_files, start_folder
from trainer.batches import Batch, micro_batches
from trainer.checkpoints import save_checkpoint, told
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.examples import write_summary
from trainer.faults import ConfigFault, NotFinite, shown_rows
from trainer.folder import Finished, RunFolder
from trainer.keeping import keep_checkpoints
from trainer.objective import Figures, Moment
from trainer.order import StepRows
from trainer.prepare import Run, prepare
from trainer.records.card import write_card
from trainer.records.hub import check_login, push
from trainer.runlog import tell
from trainer.saving import write_model
from trainer.sharding import clip
from trainer.stream import Stream
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

    Raises `PriorityError` for the rule and a `Fault` for everything else that a person can mend, another
    process that is writing into the folder among it. A run that stops keeps its log and its last checkpoint.
    `trackers` are objects of one's own, of accelerate's `GeneralTracker`, beside those that the config
    names; each gets every line of the log.
    """
    if config.push_to_hub is not None:
        check_login(config.push_to_hub)
    if config.dry_run:
        raise ConfigFault("dry_run: `train` trains; trainer.dryrun.dry_run(config) shows what it would do")
    with RunFolder(config).alone() as folder:
        tracking = Tracking(config, trackers)
        try:
            run = prepare(config, folder=folder)
        except Finished as done:
            outcome = finished(config, done)
        else:
            with tracking.of(run):
                outcome = train_steps(run)
        if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
            push(outcome.output, config.push_to_hub, config.hub_private)
    return outcome


def train_steps(run: Run) -> Outcome:
    """The optimizer steps of a run that is ready, and the trained model at the end."""
    config, done = run.config, run.start.step
    planned, order = run.start.planned, run.order.steps(run.start.step)
    settle_checkpoints(run)
    run.log.start(run.start.step, planned)
    for step in range(run.start.step, planned):
        if run.stopping.due:
            break
        began = time.perf_counter()
        now = next(order)
        moment = Moment(step, step / planned, now.epoch)
        done, last = step + 1, step + 1 == planned
        shown = done % config.log_steps == 0 or last
        line = take_step(run, now, moment, shown) | {"seconds": round(time.perf_counter() - began, 4)}
        if shown or "skipped" in line:
            run.log.write(line)
        run.log.advance(line if shown and "nll" in line else None)
        if shown and "nll" in line:
            run.health.follow(done, line["nll"], [row.place for row in now.rows])
        best = False
        if run.held_out and (last or (config.eval_steps and done % config.eval_steps == 0)):
            figures = evaluate(run, replace(moment, step=done))
            best = run.measured.take(done, figures)
            last = run.stopping.take(done, figures.nll) or last
        keep_step(run, done, last, best)
    run.log.close()
    if isinstance(run.order, Stream):
        tell_stream(run, run.order)
    if run.stopping.due:
        run.log.note(str(run.stopping))
    if config.keep_best and run.measured.best_step is not None:
        run.log.note(f"best: {run.measured}")
    save_model(run, done)
    return Outcome(run.folder.path, done, run.measured.figures)


def finished(config: TrainConfig, done: Finished) -> Outcome:
    """What a run that was finished before came to; says so and changes nothing."""
    if not config.quiet and os.environ.get("RANK", "0") == "0":
        tell(str(done))
    evaluation = None if done.evaluation is None else Figures(**done.evaluation)
    return Outcome(Path(config.output), done.step, evaluation)


def tell_stream(run: Run, stream: Stream) -> None:
    """Say and keep what a stream showed, which is known only now."""
    found = stream.summary()
    if not found:  # a run that was resumed when no step was left
        return
    bad = found["dropped"]["bad"]
    run.log.note(f"data: {found['rows']} rows of the stream were read, {bad} bad ones left out")
    if run.accelerator.is_main_process:
        write_summary(run.folder.path, data=found)


def take_step(run: Run, now: StepRows, moment: Moment, shown: bool) -> dict[str, Any]:
    """Take one optimizer step, and return its line of the log; a step that is skipped has another one."""
    rate, figures = run.schedule.get_last_lr()[0], None
    try:
        figures = run.objective.step(batches_of(run, now.rows), moment, shown)
        norm = update(run, moment.step)
    except NotFinite as error:
        reason = error
        if figures is not None:  # the gradient, which is that of all rows together
            rows = shown_rows([row.place for row in now.rows])
            reason = NotFinite(f"{error} (the rows of the step: {rows})")
        if not run.config.skip_non_finite:
            raise reason from error
        return skip(run, moment, reason)
    run.health.passed()
    return step_line(figures, moment, rate, norm)


def skip(run: Run, moment: Moment, reason: NotFinite) -> dict[str, Any]:
    """Leave out a step that is not finite: weights, optimizer and averages stay, the schedule goes on.

    All processes come here together, since they share the figures and the gradient that are not finite.
    """
    run.optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings():  # that the first step of all went without the optimizer
        warnings.simplefilter("ignore")
        run.schedule.step()
    run.health.skip(moment.step + 1, reason)
    run.log.note(f"skipped {reason}")
    return {
        "step": moment.step + 1, "epoch": moment.epoch, "skipped": run.health.skipped, "reason": str(reason),
    }  # fmt: skip


def keep_step(run: Run, done: int, last: bool, best: bool) -> None:
    """Write a checkpoint after step `done` where --save-steps or --keep-best asks for it.

    Not while the nll is above its limit: the checkpoints from before stay the newest ones.
    """
    config = run.config
    regular = bool(config.save_steps) and (last or done % config.save_steps == 0)
    best = best and config.keep_best
    if not (regular or best) or not run.health.well:
        return
    if best and not regular:
        run.measured.extra.append(done)
    save_checkpoint(run, done)
    settle_checkpoints(run)


def settle_checkpoints(run: Run) -> None:
    """Have the main process remove the checkpoints that are not to be kept."""
    if run.accelerator.is_main_process:
        keep_checkpoints(run)


def batches_of(run: Run, rows: list[Example]) -> list[Batch]:
    """This process's micro-batches of some rows, with what the rule reads."""
    return micro_batches(rows, run.spread, run.rule.over, run.rule.requires.columns)


def update(run: Run, step: int) -> float:
    """Clip the gradient, take the optimizer step, and return the gradient's norm before clipping."""
    norm = clip(run.objective.trained, run.accelerator, run.config.clip or math.inf)
    if not math.isfinite(norm):
        raise NotFinite(
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
            **{f"eval_{name}": value for name, value in of_pairs(figures).items()},
        }
    )
    ranked = (
        f", preference accuracy {figures.preference_accuracy:.1%}, margin {figures.preference_margin:.4f}"
        if figures.preference_accuracy is not None
        else ""
    )
    run.log.note(
        f"step {moment.step}: held-out nll {figures.nll:.4f}, weighted loss {figures.loss:.4f}, "
        f"accuracy {figures.accuracy:.1%}{ranked}"
    )
    return figures


def of_pairs(figures: Figures) -> dict[str, float | None]:
    """What a line of the log has more where rows are pairs, under the names of `priority eval`."""
    if figures.preference_accuracy is None:
        return {}
    return {
        "preference_accuracy": figures.preference_accuracy,
        "preference_margin": figures.preference_margin,
    }


def step_line(figures: Figures, moment: Moment, rate: float, norm: float) -> dict[str, Any]:
    """A line of the log: `nll` in nats a token, weights as shares from 0 to 1, tokens as counts.

    `preference_margin` is in nats a response.
    """
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
        **of_pairs(figures),
    }


def save_model(run: Run, step: int) -> None:
    """Write the model, or its adapter, after `step` steps, and its tokenizer into the output folder.

    They are written beside it and moved in when they are whole; while files of an older model are replaced,
    the folder has no config, so that it never loads as a mixture.
    """
    main, folder = run.accelerator.is_main_process, run.folder
    model = folder.path / "model"
    run.accelerator.wait_for_everyone()
    with told(f"the trained model cannot be written into {folder.path}", folder, model, main):
        if main:
            start_folder(model)
        run.accelerator.wait_for_everyone()
        write_model(run, partial_of(model))
        run.accelerator.wait_for_everyone()
        if main:
            until = step if run.stopping.due else run.start.planned
            files = publish_files(model)
            write_card(folder.path)  # over that of an adapter's library
            folder.finish(step, until, files, run.measured.figures)
    what = "model" if run.adapter is None else f"adapter of {run.config.model}"
    run.log.note(f"{what}, rule, config and log are in {folder.path}")
    run.accelerator.wait_for_everyone()
