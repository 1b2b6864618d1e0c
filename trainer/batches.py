"""Examples -> micro-batches aligned with their targets, in an order that only the seed decides.

Legend: B lines of a micro-batch, one row each or packed ones, T targets of the longest of them. Element
`[b, t]` of everything in a batch belongs to the token that is predicted there, token `t + 1` of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trainer.data import Example
from trainer.packing import Packing, bins_of

IGNORED = -100  # a target that takes no part in the loss


@dataclass(frozen=True, slots=True)
class Spread:
    """How the rows of an optimizer step are spread: `batch_size` rows a micro-batch over processes.

    `responses` are the examples of a row: two where rows are pairs, whose responses are never parted. With
    `packing`, a step has as many micro-batches as its packed rows need. `multiple` divides their width.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0
    responses: int = 1
    packing: Packing | None = None
    multiple: int = 1

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
    """This process's share of a step's rows; all processes get as many micro-batches, some of them blank.

    Rows of similar length share a micro-batch, the longest come first. Which rows are in the step does not
    depend on it, so neither does anything that is computed from the step.
    """
    required = sorted(required)
    shares = layouts(rows, spread)
    smallest = next(lines for lines in reversed(shares) if lines)[-spread.responses :]
    return [
        _laid_out(lines or smallest, spread, over, required, blank=not lines)
        for lines in shares[spread.rank :: spread.processes]
    ]


def layouts(rows: Sequence[Example], spread: Spread) -> list[list[list[Example]]]:
    """The lines of the micro-batches of a step, in turn of each process; a blank one has none."""
    size = spread.responses
    units = [rows[start : start + size] for start in range(0, len(rows), size)]
    return _padded_shares(units, spread) if spread.packing is None else _packed_shares(units, spread)


def width(lines: Sequence[Sequence[Example]], spread: Spread) -> int:
    """The positions that every line of a micro-batch is padded to."""
    return -(-max(map(positions, lines)) // spread.multiple) * spread.multiple


def positions(rows: Sequence[Example]) -> int:
    """The positions that rows take in a packed line: their tokens but the last, which predicts nothing."""
    return sum(len(row.ids) - 1 for row in rows)


def _padded_shares(units: Sequence[Sequence[Example]], spread: Spread) -> list[list[list[Example]]]:
    """One row a line."""
    ordered = sorted(units, key=lambda unit: -max(len(row.ids) for row in unit))
    micro = [ordered[i : i + spread.batch_size] for i in range(0, len(ordered), spread.batch_size)]
    blank = -len(micro) % spread.processes
    return [[[row] for unit in units for row in unit] for units in micro] + [[]] * blank


def _packed_shares(units: Sequence[Sequence[Example]], spread: Spread) -> list[list[list[Example]]]:
    """Several rows a line, and as many lines a micro-batch as come evenly."""
    assert spread.packing is not None
    bins = bins_of([positions(unit) for unit in units], spread.packing.room, spread.processes)
    lines = [[row for i in of for row in units[i]] for of in bins]
    shares = -(-len(lines) // (spread.packing.lines * spread.processes)) * spread.processes
    return [lines[share::shares] for share in range(shares)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a micro-batch in B lines, padded on the right and aligned with their targets.

    `input_ids`, `targets` (-100 where nothing is predicted), `examples` (row of the data set): int64 [B, T].
    `response`: bool [B, T], the supervised tokens in the usual sense. `columns`: what the rule reads, per
    token as nested lists [B, T], per example as a list [B] (per token too where a line holds several rows).
    `stored`: the stored columns, bool or float32 [B, T], 0 where padded. `tokens`: real tokens of the rows.
    `rows`: the rows themselves, which views read, `places` what messages call them, `spans` their lines and
    where in them they are. `others`: what models read beside `input_ids`, nothing unless rows are packed.
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
    spans: tuple[tuple[int, slice], ...] = ()
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """How many pairs the rows are, whose responses follow each other, the chosen one first.

        0 of a blank micro-batch, and where rows are no pairs.
        """
        paired = bool(self.rows) and self.rows[0].chosen is not None and self.tokens > 0
        return len(self.rows) // 2 if paired else 0

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            response=self.response.to(device),
            examples=self.examples.to(device),
            stored={name: values.to(device) for name, values in self.stored.items()},
            others={name: values.to(device) for name, values in self.others.items()},
        )


def collate(rows: Sequence[Example], over: str, required: Iterable[str], blank: bool = False) -> Batch:
    """Pad rows on the right into a batch, a row a line, whose every part is aligned with the targets.

    `over`: which tokens are targets, `response` or `all` (every real token but the first). `required`: the
    columns that the rule reads, `role` and `response` among them. `blank` ignores all targets: a micro-batch
    that only keeps this process in step with the others.
    """
    return _laid_out([[row] for row in rows], Spread(len(rows)), over, required, blank)


def _laid_out(
    lines: Sequence[Sequence[Example]], spread: Spread, over: str, required: Iterable[str], blank: bool
) -> Batch:
    """Lines of rows as a batch, as wide as its longest line and then up to a multiple."""
    lay = _Lines(lines, width(lines, spread))
    rows = tuple(row for line in lines for row in line)
    lengths = [[len(row.ids) - 1 for row in line] for line in lines]
    response = lay.tensor(lambda row: row.response[1:], False)
    return Batch(
        input_ids=lay.tensor(lambda row: row.ids[:-1], 0),
        targets=lay.tensor(lambda row: _targets(row, None if blank else over), IGNORED),
        response=torch.zeros_like(response) if blank else response,
        examples=torch.tensor(lay.repeated(lambda row: [row.index] * len(row.ids))),
        columns={name: _column(lay, name, spread.packing is not None) for name in required},
        stored={name: _stored(lay, name) for name in rows[0].stored},
        places=tuple(row.place for row in rows),
        tokens=0 if blank else sum(len(row.ids) for row in rows),
        rows=rows,
        spans=lay.spans(),
        others={} if spread.packing is None else spread.packing.inputs(lengths, lay.width),
    )


@dataclass(frozen=True, slots=True)
class _Lines:
    """Rows side by side in lines, and the width that all lines are padded to."""

    rows: Sequence[Sequence[Example]]
    width: int

    def padded(self, of: Callable[[Example], list[Any]], filler: Any) -> list[list[Any]]:
        """What each row has of its targets, with `filler` where padded."""
        found = [[value for row in line for value in of(row)] for line in self.rows]
        return [values + [filler] * (self.width - len(values)) for values in found]

    def tensor(self, of: Callable[[Example], list[Any]], filler: Any) -> torch.Tensor:
        """The same as a tensor `[B, T]`."""
        return torch.tensor(self.padded(of, filler))

    def repeated(self, of: Callable[[Example], list[Any]]) -> list[list[Any]]:
        """What each token but a row's first has; the line's last value where padded, which is never counted
        and always of the right kind."""
        found = [[value for row in line for value in of(row)[1:]] for line in self.rows]
        last = [of(line[-1])[-1:] for line in self.rows]
        return [v + end * (self.width - len(v)) for v, end in zip(found, last, strict=True)]

    def spans(self) -> tuple[tuple[int, slice], ...]:
        """The line of each row, and where in it its targets are."""
        found = []
        for number, line in enumerate(self.rows):
            start = 0
            for row in line:
                found.append((number, slice(start, start + len(row.ids) - 1)))
                start += len(row.ids) - 1
        return tuple(found)


def _targets(row: Example, over: str | None) -> list[int]:
    """What is predicted of a row over some of its tokens, or over none."""
    marked = zip(row.ids[1:], row.response[1:], strict=True)
    return [y if over == "all" or (over and marks) else IGNORED for y, marks in marked]


def _column(lay: _Lines, name: str, packed: bool) -> list[Any]:
    """A column per token `[B, T]`; one that has a value a row, as `[B]` where a line is a row."""
    if name == "response":
        return lay.padded(lambda row: row.response[1:], False)

    def of(row: Example) -> Any:
        if name == "chosen":
            return row.chosen
        return row.roles if name == "role" else row.columns[name]

    if isinstance(of(lay.rows[0][0]), list):
        return lay.repeated(of)
    if packed:
        return lay.repeated(lambda row: [of(row)] * len(row.ids))
    return [of(row) for line in lay.rows for row in line]


def _stored(lay: _Lines, name: str) -> torch.Tensor:
    values = np.zeros((len(lay.rows), lay.width), dtype=lay.rows[0][0].stored[name].dtype)
    rows = (row for line in lay.rows for row in line)
    for (line, at), row in zip(lay.spans(), rows, strict=True):
        values[line, at] = row.stored[name]
    return torch.from_numpy(values)
