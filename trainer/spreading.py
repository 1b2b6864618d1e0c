"""How the rows of a run's steps are spread: as its config asks, packed where every model of it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.batches import Spread, layouts, positions, step_examples, width
from trainer.packing import Packing, mask_for, room_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer.config import TrainConfig
    from trainer.data import Example, Examples
    from trainer.runlog import RunLog

SHOWN_STEPS = 256  # steps that the share of padding is measured on


def make_spread(
    config: TrainConfig,
    accelerator: Accelerator,
    data: Examples,
    held_out: Sequence[Example],
    policy: Any,
    log: RunLog,
) -> Spread:
    """The spread of a run; says what packing saves.

    Raises `ConfigFault` where rows cannot be packed: too long a row, a model in which rows would see others.
    """
    padded = Spread(
        config.batch_size, config.accumulation, accelerator.num_processes, accelerator.process_index,
        data.responses, multiple=config.pad_to_multiple,
    )  # fmt: skip
    if not config.packing:
        return padded
    size = data.responses
    sizes = [
        positions(rows[i : i + size]) for rows in (data.rows, held_out) for i in range(0, len(rows), size)
    ]
    room = room_of(config.packing_length, sizes, config.pad_to_multiple)
    packed = replace(padded, packing=Packing(room, config.batch_size, mask_for(policy)))
    with_it, without = (padding(data.rows, spread, config.seed) for spread in (packed, padded))
    log.note(f"packing: lines of {room} tokens, of which {with_it:.0%} are padding ({without:.0%} without)")
    return packed


def padding(rows: Sequence[Example], spread: Spread, seed: int) -> float:
    """The share of padding in what the first steps of an epoch compute, from 0 to below 1."""
    real = computed = 0
    for step in step_examples(len(rows), spread, seed, epoch=0)[:SHOWN_STEPS]:
        for lines in layouts([rows[i] for i in step], spread):
            real += sum(map(positions, lines))
            computed += len(lines) * width(lines, spread) if lines else 0
    return 1 - real / max(computed, 1)
