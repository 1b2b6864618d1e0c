"""A run prepared for its first step alone, by the code of a real one, in a folder that is thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from priority_dsl import compile_rule
from trainer.batches import Spread, layouts, micro_batches, step_examples, width
from trainer.examples import Example, Examples
from trainer.faults import ConfigFault, DataFault
from trainer.objective import Moment
from trainer.order import Shuffled
from trainer.prepare import Run, prepare
from trainer.reading import planned_steps

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from trainer.config import TrainConfig

ENDLESS = 10_000  # steps of which the micro-batches are looked at, at the most


@dataclass(frozen=True, slots=True)
class Seen:
    """A row, and at each of its targets what the rule gives it as weight, and its plain nll in nats."""

    row: Example
    weights: list[float]
    nll: list[float]


@dataclass(slots=True)
class FirstRows:
    """Which rows are prepared: all, or those of the first step for a rule that asks models about all rows."""

    config: TrainConfig
    rule: CompiledRule
    whole: Examples | None = None
    held_out: int = 0
    part: bool = False

    def __call__(self, data: Examples, held: Examples) -> tuple[Examples, Examples]:
        """What is prepared of the data; of the held-out rows, which were read and checked, none."""
        config, how = self.config, self.rule.plan
        self.whole, self.held_out = data, len(held.rows)
        held = replace(held, rows=[])
        if config.streaming or not (how.keep or (how.surveys and how.passes)):
            return data, held
        spread = Spread(config.batch_size, config.accumulation, responses=data.responses)
        first = step_examples(len(data.rows), spread, config.seed, epoch=0)[0]
        self.part = len(first) < len(data.rows)
        return replace(data, rows=[data.rows[i] for i in sorted(first)]), held


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The shape of a micro-batch, and how many of its tokens are not padding."""

    lines: int
    width: int
    tokens: int

    @property
    def size(self) -> int:
        """Tokens with padding."""
        return self.lines * self.width


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A run before its first step, and the config that it stands for."""

    config: TrainConfig
    run: Run
    first: FirstRows

    @property
    def part(self) -> bool:
        """Whether what the rule reads of all rows was computed over those of the first step alone."""
        return self.first.part

    @property
    def rows(self) -> Sequence[Example]:
        """The examples of an epoch, where `part` those that `keep` may leave out too; none of a stream."""
        if self.part and self.first.whole is not None:
            return self.first.whole.rows
        return self.run.order.rows if isinstance(self.run.order, Shuffled) else []

    @property
    def what(self) -> str:
        """What the rows of the data are called."""
        return "pairs" if self.run.spread.responses == 2 else "rows"

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch; 0 of a stream, which does not say."""
        return -(-len(self.rows) // (self.run.spread.rows * self.run.spread.responses))

    @property
    def planned(self) -> int:
        """Optimizer steps of the run."""
        return planned_steps(self.config, self.epoch_steps)

    @property
    def fewer(self) -> bool:
        """Whether `keep` may leave fewer rows and steps than are counted here."""
        return self.part and self.run.rule.checked.keep is not None

    @property
    def epochs(self) -> int:
        """Passes over the data, a begun one counted."""
        return max(1, -(-self.planned // max(1, self.epoch_steps)))

    def first_step(self) -> list[Example]:
        """The examples of the first step."""
        return next(self.run.order.steps(0)).rows

    def look(self, step: Sequence[Example], count: int) -> list[Seen]:
        """The first examples of a step, and what the rule makes of them within the whole of it."""
        run, found = self.run, {}
        batches = micro_batches(step, run.spread, run.rule.over, run.rule.requires.columns)
        for batch, made in run.objective.look(batches, Moment(0, 0.0, 0)):
            for row, (line, part) in zip(batch.rows, batch.spans, strict=True):
                at = made.weights[line, part].tolist(), made.nll[line, part].tolist()
                found[id(row)] = Seen(row, *at)
        return [found[id(row)] for row in step[:count]]

    def micro_batches(self) -> list[list[MicroBatch]]:
        """The micro-batches of each step of the first epoch, as far as the run goes; of a stream one step."""
        spread, rows = self.run.spread, self.rows
        steps: list[Sequence[Example]] = [self.first_step()]
        if self.epoch_steps:
            order = step_examples(len(rows), spread, self.config.seed, epoch=0)
            steps = [[rows[i] for i in step] for step in order[: min(self.planned, ENDLESS)]]
        return [
            [
                MicroBatch(len(lines), width(lines, spread), sum(len(r.ids) for line in lines for r in line))
                for lines in layouts(step, spread)
                if lines
            ]
            for step in steps
        ]


@contextmanager
def rehearsal(config: TrainConfig) -> Iterator[Rehearsal]:
    """A run of the config as it is before its first step. Raises as `prepare` does."""
    first = FirstRows(config, compile_rule(config.rule, **config.set))
    with tempfile.TemporaryDirectory(prefix="priority-dry-run-") as scratch:
        try:
            run = prepare(_rehearsed(config, Path(scratch)), first)
        except DataFault as error:
            if not first.part:
                raise
            raise DataFault(f"--dry-run, on the rows of the first step alone: {error}") from error
        if run.accelerator.num_processes > 1:
            raise ConfigFault("--dry-run is for one process: leave torchrun or accelerate launch out")
        yield Rehearsal(config, run, first)


def _rehearsed(config: TrainConfig, scratch: Path) -> TrainConfig:
    """The config of a run of one step, in a folder of its own."""
    return config.model_copy(
        update={
            "output": str(scratch / "run"), "cache": str(scratch / "cache"), "max_steps": 1, "epochs": None,
            "eval_steps": None, "patience": None, "resume": False, "overwrite": False, "tracker": (),
            "save_steps": None, "keep_last": None, "keep_best": False, "dry_run": False, "show": None,
        }
    )  # fmt: skip
