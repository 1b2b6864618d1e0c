"""Before the first step: which examples a rule keeps, and what it reads over the whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from priority_dsl.plan import why_whole
from priority_dsl.survey import Rows
from trainer.batches import collate
from trainer.data import Example, Examples
from trainer.faults import ConfigFault, DataFault
from trainer.precompute import STORED_ROWS, Known, Precompute, laid_out, with_stored

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def refuse_streaming(rule: CompiledRule, online: bool) -> None:
    """`ConfigFault` where a rule needs all rows before the first step; `online`: models run at every step."""
    if (reason := why_whole(rule.checked, rule.plan)) is not None:
        raise ConfigFault(f"--streaming: {reason}; leave the flag out")
    if rule.plan.passes and not online:
        names = ", ".join(name for of in rule.plan.passes for name in of.names)
        raise ConfigFault(
            f"--streaming: {names} would be computed for all rows before training; with --online-reference "
            "the frozen models run at every step"
        )


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
    kept = [row for part, rows in parts for row in _chosen(rule, part, rows, numbers)]
    if not kept:
        count, what = len(data.rows) // data.responses, "pairs" if data.responses == 2 else "rows"
        raise DataFault(f"`keep` of the rule leaves none of {count} {what}; nothing could be trained on")
    return replace(data, rows=kept, left_out=(len(data.rows) - len(kept)) // data.responses)


def kept_of(rule: CompiledRule, part: Examples, seed: int) -> Examples:
    """A part of a stream without what `keep` leaves out, where `keep` reads the rows themselves alone."""
    if rule.checked.keep is None or not part.rows:
        return part
    rows = next(_batches(rule, part.rows, {}, seed, len(part.rows)))
    kept = _chosen(rule, part.rows, rows, {})
    return replace(part, rows=kept, left_out=(len(part.rows) - len(kept)) // part.responses)


def _chosen(
    rule: CompiledRule, examples: Sequence[Example], rows: Rows, numbers: Mapping[str, Tensor]
) -> list[Example]:
    keeps = rule.kept(rows, numbers)[:, 0].tolist()
    return [example for example, keep in zip(examples, keeps, strict=True) if keep]


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


def _parts(rows: Sequence[Example], most: int = STORED_ROWS) -> list[Sequence[Example]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]


def _batches(
    rule: CompiledRule, rows: Sequence[Example], known: Known, seed: int, most: int = STORED_ROWS
) -> Iterator[Rows]:
    """The rows in batches, with the statistics that passes kept of them."""
    for part in _parts(rows, most):
        batch = collate(part, rule.over, rule.requires.columns)
        statistics: dict[str, Tensor] = {
            name: laid_out(rule, part, values, batch) for name, values in known.items()
        }
        yield Rows(batch.targets, statistics, batch.columns, batch.examples, seed)
