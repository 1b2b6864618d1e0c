"""Before the first step: which examples a rule keeps, and what it reads over the whole data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from priority_dsl.survey import Rows
from trainer.batches import collate
from trainer.data import Example, Examples
from trainer.faults import ConfigFault, DataFault
from trainer.precompute import STORED_ROWS, Known, Precompute, laid_out

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def refuse_online(rule: CompiledRule) -> None:
    """`ConfigFault` where a rule needs models before training that --online-reference would not run then."""
    if rule.plan.surveys or rule.plan.keep:
        raise ConfigFault(
            "--online-reference: the rule reads the whole data set or chooses examples before training, and "
            "needs its frozen models then; leave the flag out"
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
        raise DataFault(
            f"`keep` of the rule leaves none of {len(data.rows)} rows; nothing could be trained on"
        )
    return replace(data, rows=kept, left_out=(len(data.rows) - len(kept)) // data.responses)


def numbers_of(rows: Sequence[Example], precompute: Precompute, seed: int) -> Mapping[str, Tensor]:
    """The numbers of the data set that the rule's stored columns need; nothing where they need none."""
    rule = precompute.rule
    if not rule.plan.surveys:
        return {}
    return survey(rule, rows, precompute.run(rows), seed)


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
        statistics: dict[str, torch.Tensor] = {
            name: laid_out(rule, part, values, batch) for name, values in known.items()
        }
        yield Rows(batch.targets, statistics, batch.columns, batch.examples, seed)
