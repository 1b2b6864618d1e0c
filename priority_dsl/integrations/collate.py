"""Rows of a data set -> a batch in which all that a rule reads lies where its targets lie.

The trainer's own collator pads or joins the token ids; here everything else is put in the same places, which
are read off the token ids themselves. Letters: B rows, L tokens of a batch, T = L - 1 targets. Element
`[b, t]` of what a rule reads belongs to the token that is predicted there, token `t + 1` of row `b`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from priority_dsl.inputs import IGNORED
from priority_dsl.integrations.reads import EXAMPLE, LENGTHS, POSITIONS, Reads
from priority_dsl.integrations.refusals import IntegrationError

ALIGNED = "priority"  # the key of a batch under which all of this is
Row = Mapping[str, Any]
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Aligned:
    """What a rule reads of a batch. `targets` (-100 where nothing is predicted), `examples`: int64 [B, T].

    `response`: bool [B, T], the targets that the labels supervise. `columns` and `stored` as a rule takes
    them. `named`: `examples` are the rows of the data set, not counted in this batch. `window` is what the
    trainer knows of the optimizer step.
    """

    targets: Tensor
    response: Tensor
    examples: Tensor
    columns: dict[str, Any]
    stored: dict[str, Tensor]
    named: bool
    window: Any = None

    def to(self, device: Any, non_blocking: bool = False) -> Aligned:
        """The same with its tensors on a device."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return replace(
            self,
            targets=moved(self.targets),
            response=moved(self.response),
            examples=moved(self.examples),
            columns={name: moved(values) for name, values in self.columns.items()},
            stored={name: moved(values) for name, values in self.stored.items()},
        )


class RowCollator:
    """Pads token rows on the right: `input_ids`, `labels` (the ids where there are none), `attention_mask`.

    Rows that hold several examples (with `seq_lengths`, as `trl.pack_dataset` makes them, or `position_ids`)
    get `position_ids` instead of the mask, so that no example sees another.
    """

    def __init__(self, pad: int = 0) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of int64 tensors `[B, L]`."""
        ids = [_numbers(row["input_ids"]) for row in rows]
        labels = [_numbers(row.get("labels", row["input_ids"])) for row in rows]
        batch = {"input_ids": _padded(ids, self.pad), "labels": _padded(labels, IGNORED)}
        if any(len(lengths_of(row)) > 1 for row in rows):
            places = [torch.cat([torch.arange(n) for n in lengths_of(row)]) for row in rows]
            return {**batch, "position_ids": _padded(places, 0)}
        return {**batch, "attention_mask": _padded([torch.ones_like(row) for row in ids], 0)}


class AlignedCollator:
    """A collator that adds what a rule reads to the batches of another one."""

    def __init__(self, inner: Collator, reads: Reads, over: Literal["response", "all"]) -> None:
        self.inner = inner
        self.reads = reads
        self.over = over

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of the inner collator with an `Aligned` under the key `priority`.

        Raises `IntegrationError` where it changed the rows, or where a column does not fit its row.
        """
        own = self.reads.names
        batch = dict(self.inner([{k: v for k, v in row.items() if k not in own} for row in rows]))
        if "shift_labels" in batch:
            raise IntegrationError("the collator shifts the labels itself; a rule needs them as they are")
        source = _source(batch["input_ids"], [_numbers(row["input_ids"]) for row in rows])
        batch[ALIGNED] = self._aligned(batch, rows, source)
        return batch

    def _aligned(self, batch: Mapping[str, Any], rows: Sequence[Row], source: Tensor) -> Aligned:
        examples, named = self._examples(rows)
        examples = _laid_out(examples, source, -1)
        inside = (source[:, 1:] >= 0) & (examples[:, 1:] == examples[:, :-1])  # no example predicts the next
        _check_boundaries(batch, source, examples)
        labels = batch.get("labels", batch["input_ids"])
        wrong = (labels != IGNORED) & (labels != batch["input_ids"])
        if bool(wrong.any()):
            raise IntegrationError("the labels are neither the token ids nor -100; they must not be shifted")
        response = (labels[:, 1:] != IGNORED) & inside
        names = [name for name in self.reads.columns if any(name in row for row in rows)]
        stored = {n: column for n, column in self.reads.stored.items() if column in rows[0]}
        return Aligned(
            batch["input_ids"][:, 1:].masked_fill(
                ~(response if self.over == "response" else inside), IGNORED
            ),
            response,
            examples[:, 1:].clamp(min=0),
            {name: _column(name, rows, source) for name in names},
            {name: _column(column, rows, source) for name, column in stored.items()},
            named,
        )

    def _examples(self, rows: Sequence[Row]) -> tuple[Tensor, bool]:
        """The example of each token of all rows `[n]`, and whether these are rows of the data set."""
        found, counted = [], 0
        named = all(EXAMPLE in row for row in rows)
        for row in rows:
            lengths = lengths_of(row)
            given = row.get(EXAMPLE) if named else None
            if given is None or (isinstance(given, int) and len(lengths) > 1):
                if self.reads.draws or self.reads.whole_steps:
                    raise IntegrationError(
                        f"the rule must know the data-set row of each token, which `{EXAMPLE}` tells; call "
                        "with_stored on the data set, before it is packed"
                    )
                named = False
                found += [torch.full((n,), counted + i) for i, n in enumerate(lengths)]
                counted += len(lengths)
            else:
                found.append(_of_row(EXAMPLE, given, row))
        return torch.cat(found).long(), named


def lengths_of(row: Row) -> list[int]:
    """How many tokens each example of a row has; the whole row is one where nothing tells."""
    tokens = len(row["input_ids"])
    if row.get(LENGTHS) is not None:
        return [int(n) for n in row[LENGTHS]]
    if row.get(POSITIONS) is None:
        return [tokens]
    starts = [i for i, place in enumerate(row[POSITIONS]) if place == 0 or i == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]


def _source(input_ids: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Where each token of a batch comes from, counted through the rows `[B, L]`; -1 is padding.

    Rows are found padded on either side, or joined into one row; anything else is refused.
    """
    starts = [0, *accumulate(len(row) for row in rows)]
    width = input_ids.shape[1]
    source = torch.full(input_ids.shape, -1)
    if len(input_ids) == len(rows):
        for line, ids, start in zip(range(len(rows)), rows, starts, strict=False):
            fits = [at for at in (0, width - len(ids)) if at >= 0 and _is_at(input_ids[line], ids, at)]
            if fits:
                source[line, fits[0] : fits[0] + len(ids)] = torch.arange(start, start + len(ids))
                continue
            break
        else:
            return source
    elif len(input_ids) == 1 and _is_at(input_ids[0], torch.cat(list(rows)), 0):
        source[0, : starts[-1]] = torch.arange(starts[-1])
        return source
    raise IntegrationError(
        "the collator changed the token ids of a row (did it cut it off?), so what the rule reads of its "
        "tokens would be out of place; cut rows before with_stored, not in the collator"
    )


def _is_at(line: Tensor, ids: Tensor, at: int) -> bool:
    part = line[at : at + len(ids)]
    return len(part) == len(ids) and bool((part == ids).all())


def _check_boundaries(batch: Mapping[str, Any], source: Tensor, examples: Tensor) -> None:
    """Refuse several examples in a row that would see each other."""
    follows = (source[:, 1:] >= 0) & (source[:, :-1] >= 0) & (examples[:, 1:] != examples[:, :-1])
    if not bool(follows.any()):
        return
    places = batch.get("position_ids")
    if places is None or batch.get("attention_mask") is not None or bool((places[:, 1:][follows] != 0).any()):
        raise IntegrationError(
            "a row holds several examples, and the batch does not tell the model where they begin (position "
            "ids and no attention mask); use padding_free=True, or the collator of PriorityTrainer"
        )


def _column(name: str, rows: Sequence[Row], source: Tensor) -> Any:
    """A column laid out as the targets: a tensor, or nested lists of text."""
    missing = next((i for i, row in enumerate(rows) if row.get(name) is None), None)
    if missing is not None:
        raise IntegrationError(f"the column `{name}` has no value in one of the rows of a batch")
    values = [_spread(name, row[name], row) for row in rows]
    if isinstance(values[0], Tensor):
        return _laid_out(torch.cat([torch.as_tensor(part) for part in values]), source, 0)[:, 1:]
    flat = [value for part in values for value in part]
    return [[flat[max(i, 0)] for i in line] for line in source[:, 1:].tolist()]


def _spread(name: str, value: Any, row: Row) -> Any:
    """The values of a column for each token of a row: a tensor of numbers, or a list of text."""
    if isinstance(value, str):
        return [value] * len(row["input_ids"])
    if isinstance(value, list) and value and isinstance(value[0], str):
        _check_length(name, len(value), row)
        return value
    return _of_row(name, value, row)


def _of_row(name: str, value: Any, row: Row) -> Tensor:
    """Numbers for each token of a row: as given, or one for all."""
    try:
        numbers = _numbers(value)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.dim() > 1:
        raise IntegrationError(
            f"the column `{name}` has neither one value nor one for each token; spans of characters must be "
            "made into a bool a token before"
        )
    if numbers.dim() == 0:
        return numbers.expand(len(row["input_ids"]))
    _check_length(name, len(numbers), row)
    return numbers


def _check_length(name: str, length: int, row: Row) -> None:
    if length != (tokens := len(row["input_ids"])):
        raise IntegrationError(
            f"the column `{name}` has {length} values in a row of {tokens} tokens; cut both in the same way "
            "(TRL cuts only input_ids and labels: set max_length=None and cut rows yourself)"
        )


def _laid_out(flat: Tensor, source: Tensor, filler: int) -> Tensor:
    """Values `[n]` of all rows where the tokens of a batch come from them `[B, L]`."""
    return flat[source.clamp(min=0)].masked_fill(source < 0, filler)


def _numbers(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _padded(rows: Sequence[Tensor], filler: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)
