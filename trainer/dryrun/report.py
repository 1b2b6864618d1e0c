"""`priority train --dry-run`: everything up to the first step, and what a run would do from there.

What is shown are the rows of the first step with the weights that the rule gives them, from the real models.
What a rule computes over the whole data set by frozen models (`keep`, values of the data set) is computed
over these rows alone, which is said. Nothing is trained, no run and no cache is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from priority_dsl import explain
from trainer.cache import cache_folder
from trainer.dryrun.memory import in_units, step_memory
from trainer.dryrun.rehearsal import Rehearsal, Seen, rehearsal
from trainer.dryrun.rowview import LEGEND, cells_of, encodable, pieces, show
from trainer.figures import as_text, figures_of
from trainer.folder import RunFolder
from trainer.models import shape_of
from trainer.optimizing import rate_share, warmup_steps
from trainer.tracking import check_installed
from trainer.views import frozen_names

if TYPE_CHECKING:
    from trainer.config import TrainConfig

SHOWN = 2  # examples, unless --show says otherwise
CHECKPOINT = 3  # times the trained weights: themselves and AdamW's two averages


def dry_run(config: TrainConfig) -> None:
    """Print what `priority train` would do; nothing is left of it. Raises as `train` does up to its steps."""
    console = Console(highlight=False)
    RunFolder(config).check()
    check_installed(config.tracker)
    with rehearsal(config) as made:
        for section in (show_rows, show_plan, show_steps, show_memory, show_files):
            section(console, made)
            console.print()
    say(console, "dry run: nothing was trained, nothing was written")


def show_rows(console: Console, made: Rehearsal) -> None:
    """Some rows of the first step, token by token with their weights."""
    step, size = made.first_step(), made.run.spread.responses
    rows = min(made.config.show or max(1, SHOWN // size), len(step) // size)
    title(console, f"the first {rows} of {len(step) // size} {made.what} of the first step")
    for line in scopes(made, len(step) // size):
        say(console, line)
    say(console, LEGEND, "dim")
    for seen in made.look(step, rows * size):
        console.print()
        say(console, about(seen, made.run.rule.over), "bold")
        live = _live(seen, made.run.rule.over)
        weights = [None, *(w if here else None for w, here in zip(seen.weights, live, strict=True))]
        show(console, cells_of(pieces(made.run.tokenizer, seen.row.ids), weights))


def scopes(made: Rehearsal, rows: int) -> Iterator[str]:
    """Over which rows the weights were computed, where that is more than the row itself."""
    rule, whole = made.run.rule, made.first.whole
    if rule.checked.batches:
        yield f"values of the batch: over all {rows} {made.what} of the first step, as in training"
    read = ["`keep`"] * (rule.checked.keep is not None) + ["values of the data set"] * bool(rule.plan.surveys)
    if read and made.part and whole is not None:
        yield (
            f"{' and '.join(read)}: over {made.run.spread.rows} of {len(whole.rows) // whole.responses} "
            f"{made.what} here, and over all of them in training, where they come out differently"
        )
    elif read:
        yield f"{' and '.join(read)}: over all {made.what}, as in training"
    if rule.checked.loss is not None:
        yield "the rule has a `loss` of its own, which decides what a token counts; shown is `weight` alone"


def about(seen: Seen, over: str) -> str:
    """A line about a row: its place, how many tokens count, and how much."""
    row, live = seen.row, _live(seen, over)
    counted = [w for w, here in zip(seen.weights, live, strict=True) if here]
    plain = [n for n, marked in zip(seen.nll, row.response[1:], strict=True) if marked]
    zero, negative = sum(w == 0 for w in counted), sum(w < 0 for w in counted)
    facts = [
        row.place,
        f"{len(row.ids)} tokens",
        f"{len(counted)} with a weight, {sum(counted) / max(1, len(counted)):.3f} on average",
        *([f"{zero} of weight 0"] if zero else []),
        *([f"{negative} below 0"] if negative else []),
        f"plain nll {sum(plain) / max(1, len(plain)):.3f} of {len(plain)} response tokens",
    ]
    return ", ".join(facts)


def show_plan(console: Console, made: Rehearsal) -> None:
    """What is derived of the rule, and what it costs on this data."""
    title(console, "rule and plan")
    rule, config = made.run.rule, made.config
    say(console, explain(rule.checked).rstrip())
    if not made.rows:
        return
    sizes = {"on": sum(p.numel() for p in made.run.policy.parameters())}
    for name in sorted(frozen_names(rule)):
        shape = shape_of(config.bind[name], f"--bind {name}=") if name in config.bind else None
        sizes[name] = sum(p.numel() for p in shape.parameters()) if shape is not None else sizes["on"]
    console.print()
    data = replace(made.first.whole, rows=list(made.rows)) if made.first.whole is not None else None
    if data is not None:
        say(console, as_text(figures_of(rule, sizes, data, made.epochs)))


def show_steps(console: Console, made: Rehearsal) -> None:
    """How many steps of how many tokens, and the learning rate over them."""
    title(console, "steps")
    config, spread, planned = made.config, made.run.spread, made.planned
    least = "at most " if made.fewer else ""
    epoch = f", {least}{made.epoch_steps:,} an epoch" if made.epoch_steps else ""
    say(
        console,
        f"{least if config.max_steps is None else ''}{planned:,} steps of {spread.rows} {made.what} "
        f"(--batch-size {spread.batch_size} x --accumulation {spread.accumulation} x 1 process){epoch}",
    )
    steps = made.micro_batches()
    every = [batch for step in steps for batch in step]
    tokens, padded = sum(batch.tokens for batch in every), sum(batch.size for batch in every)
    largest = max(every, key=lambda batch: batch.size)
    say(
        console,
        f"{tokens / len(steps):,.0f} tokens a step on average, {max(0.0, 1 - tokens / padded):.0%} of its "
        f"micro-batches is padding; the largest is {largest.lines} x {largest.width}",
    )
    say(console, rates(config, planned))
    if config.eval_data:
        often = f"every {config.eval_steps} steps and at the end" if config.eval_steps else "at the end"
        say(console, f"{made.first.held_out // spread.responses:,} held-out {made.what} are measured {often}")
    if config.patience is not None:
        say(console, f"ends early after {config.patience} such measurements without a lower plain nll")


def rates(config: TrainConfig, planned: int) -> str:
    """The learning rate where it begins, is highest first, and ends."""
    share, rise = rate_share(config, planned), min(warmup_steps(config, planned), planned - 1)
    at = {step: config.learning_rate * share(step - 1) for step in (1, rise + 1, planned)}
    told = ", ".join(f"{rate:.3g} at step {step:,}" for step, rate in at.items())
    return f"learning rate ({config.schedule}, warm-up {rise:,}): {told}"


def show_memory(console: Console, made: Rehearsal) -> None:
    """The parts of the memory of a step on its largest micro-batch, and their sum."""
    run = made.run
    largest = max((b for step in made.micro_batches() for b in step), key=lambda batch: batch.size)
    title(console, f"memory of a step on {run.accelerator.device.type}, in the largest micro-batch")
    parts = step_memory(run, largest.lines, largest.width)
    for part in parts:
        say(console, f"{part.what:<36}{in_units(part.size):>14}{'' if part.counted else '  estimate'}")
    say(console, f"{'together':<36}{in_units(sum(part.size for part in parts)):>14}  estimate", "bold")
    passes = sorted({name for of in run.rule.plan.passes for name in of.models})
    if passes and not made.config.online_reference:
        say(console, f"before the first step {', '.join(passes)} beside the model, and not after it")


def show_files(console: Console, made: Rehearsal) -> None:
    """What a run would write, and where."""
    title(console, "files")
    config, run, folder = made.config, made.run, RunFolder(made.config)
    if config.resume:
        newest = folder.newest()
        say(console, f"goes on from {newest}" if newest else f"no checkpoint in {folder.path}: begins anew")
    if config.overwrite and folder.path.exists():
        say(console, f"{folder.path}: the run in it is removed (--overwrite)")
    saved = [p for p in run.policy.parameters() if p.requires_grad or run.adapter is None]
    size = sum(p.numel() * p.element_size() for p in saved)
    what = "model" if run.adapter is None else "adapter"
    say(console, f"{folder.path}: {what} ({in_units(size)}), tokenizer, config.yaml, rule.rule, log.jsonl")
    if config.save_steps:
        each = in_units(CHECKPOINT * size)
        say(console, f"{folder.checkpoints}: every {config.save_steps} steps and at the end, {each} each")
    if run.rule.plan.passes and not config.online_reference:
        say(console, f"{cache_folder(config.cache)}: what frozen models say of the rows")
    for name in config.tracker:
        say(console, f"{name}: every line of the log")


def title(console: Console, text: str) -> None:
    """A heading."""
    say(console, f"== {text}", "bold cyan")


def say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is, whatever brackets are in it, as far as the terminal has its characters."""
    console.print(encodable(text, console.encoding), style=style, markup=False, soft_wrap=True)


def _live(seen: Seen, over: str) -> list[bool]:
    return [over == "all" or marked for marked in seen.row.response[1:]]
