"""Examples -> micro-batches aligned with their targets, in an order that only the seed decides.

Legend: B rows of a micro-batch, T targets of the longest of them. Element `[b, t]` of everything in a
batch belongs to the token that is predicted there, which is token `t + 1` of row `b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.data import Example

IGNORED = -100  # a target that takes no part in the loss


@dataclass(frozen=True, slots=True)
class Spread:
    """How the rows of an optimizer step are spread: `batch_size` rows a micro-batch over processes.

    `responses` are the examples of a row: two where rows are pairs, whose responses are never parted.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0
    responses: int = 1

    @property
    def rows(self) -> int:
        """Rows of a full optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.accumulation * self.processes


def step_rows(count: int, rows: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each optimizer step of an epoch: a shuffle of `range(count)` cut into parts of `rows`.

    The order depends on seed and epoch alone, never on batch size, accumulation or processes. The last
    part may be shorter.
    """
    shuffle = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=shuffle).tolist()
    return [order[start : start + rows] for start in range(0, count, rows)]


def step_examples(count: int, spread: Spread, seed: int, epoch: int) -> list[list[int]]:
    """The examples, out of `count`, of each optimizer step of an epoch: those of its rows."""
    size = spread.responses
    steps = step_rows(count // size, spread.rows, seed, epoch)
    return [[size * row + i for row in step for i in range(size)] for step in steps]


def micro_batches(rows: Sequence[Example], spread: Spread, over: str, required: Iterable[str]) -> list[Batch]:
    """This process's share of a step's rows; all processes get as many micro-batches, some of them blank."""
    required = sorted(required)
    most = spread.batch_size * spread.responses
    batches = []
    for start in range(0, len(rows), most * spread.processes):
        first = start + spread.rank * most
        mine = rows[first : first + most]
        batches.append(collate(mine or rows[: spread.responses], over, required, blank=not mine))
    return batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a micro-batch, padded on the right and aligned with their targets.

    `input_ids`, `targets` (-100 where nothing is predicted), `examples` (row of the data set): int64 [B, T].
    `response`: bool [B, T], the supervised tokens in the usual sense. `columns`: what the rule reads, per
    token as nested lists [B, T], per example as a list [B]. `stored`: the stored columns, bool or float32
    [B, T], 0 where padded. `tokens`: real tokens of the rows. `rows`: the rows themselves, which views read.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    response: torch.Tensor
    examples: torch.Tensor
    columns: dict[str, list[Any]]
    stored: dict[str, torch.Tensor]
    places: tuple[str, ...]
    tokens: int
    rows: tuple[Example, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            response=self.response.to(device),
            examples=self.examples.to(device),
            stored={name: values.to(device) for name, values in self.stored.items()},
        )


def collate(rows: Sequence[Example], over: str, required: Iterable[str], blank: bool = False) -> Batch:
    """Pad rows on the right into a batch whose every part is aligned with the targets.

    `over`: which tokens are targets, `response` or `all` (every real token but the first). `required`: the
    columns that the rule reads, `role` and `response` among them. `blank` ignores all targets: a micro-batch
    that only keeps this process in step with the others.
    """
    width = max(len(row.ids) for row in rows) - 1
    targets = [
        [
            y if (over == "all" or marked) and not blank else IGNORED
            for y, marked in zip(row.ids[1:], row.response[1:], strict=True)
        ]
        for row in rows
    ]
    response = torch.tensor(_padded([row.response[1:] for row in rows], width, False))
    return Batch(
        input_ids=torch.tensor(_padded([row.ids[:-1] for row in rows], width, 0)),
        targets=torch.tensor(_padded(targets, width, IGNORED)),
        response=torch.zeros_like(response) if blank else response,
        examples=torch.tensor([[row.index] * width for row in rows]),
        columns={name: _column(rows, name, width) for name in required},
        stored={name: _stored(rows, name, width) for name in rows[0].stored},
        places=tuple(row.place for row in rows),
        tokens=0 if blank else sum(len(row.ids) for row in rows),
        rows=tuple(rows),
    )


def _padded(values: list[list[Any]], width: int, filler: Any) -> list[list[Any]]:
    return [value + [filler] * (width - len(value)) for value in values]


def _column(rows: Sequence[Example], name: str, width: int) -> list[Any]:
    if name == "response":
        return _padded([row.response[1:] for row in rows], width, False)
    if name == "chosen":
        return [row.chosen for row in rows]
    found: list[Any] = [row.roles if name == "role" else row.columns[name] for row in rows]
    if not isinstance(found[0], list):
        return found
    # Padding repeats the row's own last value: it is never counted, and it is always of the right kind.
    return [values[1:] + values[-1:] * (width - len(values) + 1) for values in found]


def _stored(rows: Sequence[Example], name: str, width: int) -> torch.Tensor:
    first = rows[0].stored[name]
    values = np.zeros((len(rows), width), dtype=first.dtype)
    for line, row in zip(values, rows, strict=True):
        line[: len(row.ids) - 1] = row.stored[name]
    return torch.from_numpy(values)
