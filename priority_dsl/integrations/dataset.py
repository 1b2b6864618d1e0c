"""What frozen models say of a data set, computed once before training and kept in its own columns.

Each column is a list with one value a token, so it travels through `trl.pack_dataset`, `save_to_disk` and
shuffling. Letters: B rows, T targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from priority_dsl.inputs import IGNORED
from priority_dsl.integrations.collate import ALIGNED, Aligned, AlignedCollator, RowCollator
from priority_dsl.integrations.heads import HeadedModel, hidden_states, read_head, take_apart
from priority_dsl.integrations.numbering import columns_of
from priority_dsl.integrations.reads import EXAMPLE, LENGTHS, Reads
from priority_dsl.integrations.refusals import IntegrationError, refuse_rule
from priority_dsl.survey import Rows

if TYPE_CHECKING:
    from datasets import Dataset

    from priority_dsl.plan import Pass
    from priority_dsl.rule import CompiledRule

Known = dict[str, list[np.ndarray]]  # statistic -> for each row its values, one a target


def with_stored(
    dataset: Dataset,
    rule: CompiledRule,
    models: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 42,
) -> Dataset:
    """The data set with all that a rule reads of it, a value a token, and only the rows that `keep` leaves.

    `dataset` has `input_ids`, `labels` (default: the ids) and the rule's columns, unpacked. `models` are
    the frozen causal language models by name, on the device where they are to run; a model of PEFT speaks
    with its adapter switched off. Full logits are never held. `seed` is that of what the rule draws once: the
    trainer's (42 is its default). Bool or float32 values, 0 where a token is no target. Columns that have no
    value a token and that the rule does not read are left out, since packing takes none. Every process of a
    run computes all rows, so save the result and load it where they are many.

    Raises `IntegrationError` where a model or a column is missing, `PriorityError` as `rule.stored_columns`.
    """
    refuse_rule(rule)
    reads = Reads.of(rule, seed)
    names = columns_of(dataset) or set()
    if LENGTHS in names:
        raise IntegrationError("the data set is packed already; call with_stored before pack_dataset")
    reads_but_keep = Reads(reads.columns, reads.stored, None, reads.draws, reads.whole_steps)
    reads_but_keep.check(names, "the data set")
    work = _Work(dataset, rule, reads_but_keep, models or {}, batch_size, seed)
    kept = work.kept()
    if not kept:
        raise IntegrationError(f"`keep` of the rule leaves none of {len(dataset)} rows")
    made = work.columns(kept)
    left = dataset if len(kept) == len(dataset) else dataset.select(kept)
    aligned = _token_columns(dataset)
    left = left.remove_columns([name for name in names if name in made or name not in aligned])
    for name, values in made.items():
        left = left.add_column(name, values)  # type: ignore[call-arg]
    return left if reads.kept is None else left.add_column(reads.kept, _true(left))  # type: ignore[call-arg]


class _Work:
    """The passes of a rule's plan over the rows of a data set."""

    def __init__(
        self,
        data: Dataset,
        rule: CompiledRule,
        reads: Reads,
        models: Mapping[str, Any],
        batch_size: int,
        seed: int,
    ) -> None:
        self.data, self.rule, self.models = data, rule, models
        self.batch_size, self.seed = batch_size, seed
        self.collate = AlignedCollator(RowCollator(), reads, rule.over)
        self.reads = reads
        self.numbers = EXAMPLE in (columns_of(data) or ())
        self.speakers: dict[str, _Speaker] = {}

    def kept(self) -> list[int]:
        """The rows that the rule's `keep` leaves."""
        every = list(range(len(self.data)))
        if self.rule.checked.keep is None:
            return every
        known = self.known(self.rule.plan.keep, every)
        numbers = self.rule.survey(lambda: self._rows(every, known), keep=True)
        found: list[int] = []
        for part, rows in zip(self._parts(every), self._rows(every, known), strict=True):
            found += [
                i
                for i, keeps in zip(part, self.rule.kept(rows, numbers)[:, 0].tolist(), strict=True)
                if keeps
            ]
        return found

    def columns(self, kept: list[int]) -> dict[str, list[np.ndarray]]:
        """The columns that are added: a value a token of what the rule reads, and the numbers of the rows."""
        rule, reads = self.rule, self.reads
        known = self.known(rule.plan.passes, kept)
        numbers = rule.survey(lambda: self._rows(kept, known)) if rule.plan.surveys else {}
        made: dict[str, list[np.ndarray]] = {EXAMPLE: []} | {name: [] for name in reads.stored.values()}
        for part, rows in zip(self._parts(kept), self._rows(kept, known), strict=True):
            stored = rule.stored_columns(
                rows.targets, statistics=rows.statistics, columns=rows.columns, examples=rows.examples,
                seed=self.seed, numbers=numbers,
            )  # fmt: skip
            lengths = [len(self.data[i]["input_ids"]) for i in part]
            for name, values in stored.items():
                made[reads.stored[name]] += [_with_first(v, n) for v, n in zip(values, lengths, strict=True)]
            numbered = [self._number(i) for i in part]
            made[EXAMPLE] += [np.full(n, i, np.int64) for i, n in zip(numbered, lengths, strict=True)]
        return made | self._spread(kept)

    def _spread(self, kept: list[int]) -> dict[str, list[Any]]:
        """The rule's columns that have one value a row, as lists, which packing keeps."""
        made: dict[str, list[Any]] = {}
        for name in self.reads.columns:
            values = [self.data[i][name] for i in kept]
            if not isinstance(values[0], list):
                made[name] = [
                    [value] * len(self.data[i]["input_ids"]) for value, i in zip(values, kept, strict=True)
                ]
        return made

    def known(self, passes: tuple[Pass, ...], rows: list[int]) -> Known:
        """The statistics of some passes for some rows."""
        found: Known = {}
        for of in passes:
            speakers = {name: self._speaker(name) for name in of.models}
            lists: Known = {name: [] for name in of.names}
            for part in self._parts(rows):
                batch = self._batch(part)
                device = next(iter(speakers.values())).device
                ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                aligned = batch[ALIGNED].to(device)
                said = {name: speaker(ids, mask) for name, speaker in speakers.items()}
                values = self.rule.statistics(of, said, aligned.targets)
                live = (aligned.targets != IGNORED).cpu()
                for name, of_name in values.items():
                    lists[name] += [row[mask].numpy() for row, mask in zip(of_name.cpu(), live, strict=True)]
            found |= lists
        self.speakers.clear()
        return found

    def _speaker(self, name: str) -> _Speaker:
        if name not in self.models:
            raise IntegrationError(
                f'the rule reads the frozen model `{name}`: pass models={{"{name}": model}}'
            )
        if name not in self.speakers:
            self.speakers[name] = _Speaker(self.models[name])
        return self.speakers[name]

    def _rows(self, rows: list[int], known: Known) -> Iterator[Rows]:
        done = 0
        for part in self._parts(rows):
            aligned: Aligned = self._batch(part)[ALIGNED]
            statistics = {
                name: _laid_out(values[done : done + len(part)], aligned.targets)
                for name, values in known.items()
            }
            done += len(part)
            yield Rows(aligned.targets, statistics, aligned.columns, aligned.examples, self.seed)

    def _parts(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _batch(self, part: list[int]) -> dict[str, Any]:
        return self.collate([{**self.data[i], EXAMPLE: self._number(i)} for i in part])

    def _number(self, index: int) -> int:
        if not self.numbers:
            return index
        given = self.data[index][EXAMPLE]
        return given[0] if isinstance(given, list) else given


class _Speaker:
    """A frozen model as (hidden states, head) of the targets, an adapter switched off, without dropout."""

    def __init__(self, model: Any) -> None:
        from accelerate.utils import is_peft_model

        self.adapted = model if is_peft_model(model) else None
        self.model = model.get_base_model() if self.adapted is not None else model
        self.device = self.model.device
        self.apart: HeadedModel | None = None
        if self.adapted is None:
            self.apart = take_apart(self.model, False, _refuse_whole)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Hidden states `[B, T, D]` and the head."""
        training, others = self.model.training, {"attention_mask": mask}
        self.model.eval()
        try:
            if self.apart is not None:
                hidden, head = self.apart(input_ids, others)
                return hidden[:, :-1], head
            assert self.adapted is not None
            with self.adapted.disable_adapter():
                return hidden_states(self.model, input_ids, others)[:, :-1], read_head(self.model)
        finally:
            self.model.train(training)


def _refuse_whole(reason: str) -> None:
    raise IntegrationError(f"{reason}, which needs full logits in memory; compute its columns yourself")


def _laid_out(values: list[np.ndarray], targets: Tensor) -> Tensor:
    """Values of rows, one a target, as float32 `[B, T]`, 0 where ignored."""
    flat = torch.from_numpy(np.concatenate(values).astype(np.float32))
    return torch.zeros(targets.shape).masked_scatter(targets != IGNORED, flat)


def _with_first(values: Tensor, tokens: int) -> np.ndarray:
    """The values of a row's targets, `tokens - 1`, with one before them for the first token."""
    row = values[: tokens - 1].numpy()
    return np.concatenate([np.zeros(1, row.dtype), row])


def _token_columns(data: Dataset) -> set[str]:
    """The columns that have a value for each token, by the first row."""
    row = data[0]
    tokens = len(row["input_ids"])
    lists = {name: value for name, value in row.items() if isinstance(value, list) and len(value) == tokens}
    return {name for name, value in lists.items() if not isinstance(value[0], dict | list)}


def _true(data: Dataset) -> list[list[bool]]:
    return [[True] * len(ids) for ids in data["input_ids"]]
