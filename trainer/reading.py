"""The rows of a run before its first step: read, laid out in steps, with what frozen models say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.batches import Spread, step_examples
from trainer.cache import cache_folder
from trainer.checkpoints import Position, read_position
from trainer.columns import ColumnReader, check_categories
from trainer.config import TrainConfig
from trainer.data import Example, Examples, Reader
from trainer.dataset import leave_out, stored
from trainer.faults import ConfigFault, DataFault
from trainer.models import Quantize, context_of, vocabulary_of
from trainer.opening import Opened
from trainer.order import Shuffled
from trainer.precompute import Precompute, Source, store_columns
from trainer.prompts import PromptReader
from trainer.runlog import RunLog
from trainer.spreading import make_spread

Part = Callable[[Examples, Examples], tuple[Examples, Examples]]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run: `data` and `held` as they were read, `trained` and `held_out` with stored columns.

    Of a stream `data` are its first rows. `start` is the step at which the run begins or goes on.
    """

    reader: Reader
    data: Examples
    held: Examples
    trained: list[Example]
    held_out: list[Example]
    precompute: Precompute
    spread: Spread
    start: Position


def read_rows(run: Opened, part: Part | None) -> Rows:
    """Read the rows of a run, leave out what its rule does not keep, and run the passes of frozen models.

    `part` says which of the rows that were read are prepared. Raises `Finished` where no step is left.
    """
    config, rule, log = run.config, run.rule, run.log
    reader = make_reader(run)
    data, held = read_data(run, reader)
    if part is not None:
        data, held = part(data, held)
    source = Source(
        config.model, config.bind, run.tokenizer, cache_folder(config.cache), config.dtype == "bf16",
        config.batch_size, config.seed, Quantize.of(config), config.trust_remote_code,
    )  # fmt: skip
    # The base of an adapter stays as it is: the passes of `ref` need no model of their own.
    base = None if config.lora is None else run.policy
    precompute = Precompute(rule, source, run.accelerator, log, base)
    if not config.streaming:
        data = leave_out(data, precompute, config.seed)
        log.note(f"data: {data}")
    trained, held_out = data.rows, held.rows
    spread = make_spread(config, run.accelerator, data, held_out, run.policy, log)
    epoch_steps = Shuffled(trained, spread, config.seed).epoch_steps
    start = Position(0, planned_steps(config, epoch_steps), spread.rows, data.fingerprint)
    run.folder.check_finished(start.planned)
    if run.checkpoint is not None:
        start = continued(run.checkpoint, start, log)
    elif config.resume:
        log.note(f"no checkpoint in {run.folder.path}: starting at step 0")
    if not config.online_reference:
        visited = [] if config.streaming else visited_rows(len(trained), start.planned, spread, config.seed)
        trained, numbers = stored(trained, visited, precompute, config.seed)
        held_out = store_columns(held_out, precompute, numbers, config.seed)
    return Rows(reader, data, held, trained, held_out, precompute, spread, start)


def make_reader(run: Opened) -> Reader:
    """What reads rows with the columns that the rule reads."""
    config, rule, tokenizer, context = run.config, run.rule, run.tokenizer, context_of(run.policy)
    limits = [n for n in (context, config.max_length) if n is not None]
    return Reader(
        config,
        tokenizer,
        vocabulary_of(run.policy),
        min(limits, default=None),
        ColumnReader(rule.columns, rule.checked.source.name),
        roles="role" in rule.requires.columns,
        pairs=rule.checked.reads_pairs,
        prompts=PromptReader.of(rule, config, tokenizer, context),
    )


def read_data(run: Opened, reader: Reader) -> tuple[Examples, Examples]:
    """The training and the held-out examples; of a stream, its first rows, to see that they can be read."""
    config, rule, log = run.config, run.rule, run.log
    data = reader.first(config.data) if config.streaming else reader.read(config.data)
    try:
        check_categories(rule.columns, [row.columns for row in data.rows])
    except DataFault as fault:
        if not config.streaming:
            raise
        log.note(f"warning: in the first rows of the stream {fault}")
    if config.streaming:
        log.note(f"data: a stream, whose first rows are: {data}")
    held = reader.read(config.eval_data) if config.eval_data else Examples([], 0)
    if held.rows:
        log.note(f"held-out data: {held}")
    return data, held


def visited_rows(count: int, planned: int, spread: Spread, seed: int) -> list[int]:
    """The rows, of `count`, that one of the planned steps visits: all of them after an epoch."""
    steps = step_examples(count, spread, seed, epoch=0)
    return sorted({row for step in steps[:planned] for row in step})


def planned_steps(config: TrainConfig, epoch_steps: int) -> int:
    """The optimizer steps of the run: --max-steps, the epochs, or what ends first where both are given."""
    by_epochs = epoch_steps * (config.epochs or 1)
    if config.max_steps is None:
        return by_epochs
    return config.max_steps if config.epochs is None else min(config.max_steps, by_epochs)


def continued(checkpoint: Path, start: Position, log: RunLog) -> Position:
    """Where a run goes on, or `ConfigFault` where the step or the data are not those of the checkpoint."""
    saved = read_position(checkpoint)
    if saved.rows != start.rows:
        raise ConfigFault(
            f"--resume: a step had {saved.rows} rows and has {start.rows} now; keep the product of "
            "--batch-size, --accumulation and the number of processes"
        )
    if saved.data != start.data:
        raise ConfigFault(
            "--resume: the data are not those that the run began with (other rows or token ids)"
        )
    if saved.planned != start.planned:
        log.note(
            f"the plan was {saved.planned} steps and is {start.planned} now: schedule and progress follow it"
        )
    log.note(f"continuing at step {saved.step} of {start.planned} from {checkpoint}")
    return Position(saved.step, start.planned, start.rows, start.data)
