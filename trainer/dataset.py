"""Before the first step: which examples a rule keeps, and what it reads over the whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from priority_dsl.survey import Rows
from trainer.batches import collate
from trainer.data import Example, Examples
from trainer.faults import ConfigFault, DataFault
from trainer.precompute import STORED_ROWS, Known, Precompute, laid_out, with_stored

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def refuse_online(rule: CompiledRule) -> None:
    """`ConfigFault` where a rule needs models before training that --online-reference would not run then."""
    if rule.plan.surveys or rule.plan.keep:
        raise ConfigFault(
            "--online-reference: the rule reads the whole data set, or chooses examples by frozen models, "
            "before training; leave the flag out"
        )


def leave_out(data: Examples, precompute: Precompute, seed: int) -> Examples:
    """The examples that the rule's `keep` leaves, the others counted; `DataFault` where none is left."""
    rule = precompute.rule
    if rule.checked.keep is None:
        return data
    known = precompute.run(data.rows, rule.plan.keep)
    numbers = survey(rule, data.rows, known, seed, keep=True)
    parts = zip(_parts(data.rows), _batches(rule, data.rows, known, seed), strict=True)
    kept = [
        row
        for part, rows in parts
        for row, keeps in zip(part, rule.kept(rows, numbers)[:, 0].tolist(), strict=True)
        if keeps
    ]
    if not kept:
        count, what = len(data.rows) // data.responses, "pairs" if data.responses == 2 else "rows"
        raise DataFault(f"`keep` of the rule leaves none of {count} {what}; nothing could be trained on")
    return replace(data, rows=kept, left_out=(len(data.rows) - len(kept)) // data.responses)


def stored(
    rows: Sequence[Example], visited: Iterable[int], precompute: Precompute, seed: int
) -> tuple[list[Example], Mapping[str, Tensor]]:
    """The rows with the stored columns of the plan wherever they are visited, and the data set's numbers.

    All rows are read where the rule needs such numbers, however few of them are visited.
    """
    rule, places = precompute.rule, list(visited)
    known = precompute.run(rows if rule.plan.surveys else [rows[i] for i in places])
    numbers = survey(rule, rows, known, seed) if rule.plan.surveys else {}
    found = list(rows)
    columns = with_stored(rule, [rows[i] for i in places], known, numbers, seed)
    for place, row in zip(places, columns, strict=True):
        found[place] = row
    return found, numbers


def survey(
    rule: CompiledRule, rows: Sequence[Example], known: Known, seed: int, keep: bool = False
) -> dict[str, Tensor]:
    """The numbers of the data set from the statistics of its rows; `keep` for those that `keep` reads."""
    return rule.survey(lambda: _batches(rule, rows, known, seed), keep=keep)


def _parts(rows: Sequence[Example]) -> list[Sequence[Example]]:
    return [rows[start : start + STORED_ROWS] for start in range(0, len(rows), STORED_ROWS)]


def _batches(rule: CompiledRule, rows: Sequence[Example], known: Known, seed: int) -> Iterator[Rows]:
    """The rows in batches, with the statistics that passes kept of them."""
    for part in _parts(rows):
        batch = collate(part, rule.over, rule.requires.columns)
        statistics: dict[str, Tensor] = {
            name: laid_out(rule, part, values, batch) for name, values in known.items()
        }
        yield Rows(batch.targets, statistics, batch.columns, batch.examples, seed)
