"""Rows -> examples: token ids with their response mask, who speaks at each token, and the rule's columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trainer.chat import Rendered
from trainer.columns import ColumnReader, Value
from trainer.config import RowConfig
from trainer.faults import DataFault, ModelFault
from trainer.layouts import layout_of, read_tokens, render_row
from trainer.pairs import pair_layout, sides_of
from trainer.prompts import PromptReader
from trainer.rows import Row, RowFile, read_rows
from trainer.spans import Offsets, TextTokens, mark_tokens, untrimmed

CHUNK = 512  # rows tokenised together


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised: `ids`, which of them are the `response`, who speaks, and the rule's columns.

    `index` is the row's number in the data, which keys the rule's chance and breaks its ties. `stored` are
    the columns that training reads in place of frozen models, aligned with the targets `ids[1:]`. A row of
    pairs is two examples of the same `index`, one after the other; `chosen` says which one was preferred.
    `prompts` are those that views put in place of the row's own, by column, `anew` is a digest of all that
    views read beside `ids`.
    """

    index: int
    place: str
    ids: list[int]
    response: list[bool]
    roles: list[str | None]
    columns: dict[str, Value | list[Value]]
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    chosen: bool | None = None
    prompts: dict[str, list[int]] = field(default_factory=dict)
    anew: str = ""


def _rows(count: int, what: str = "row") -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a data set, and what was cut or left out to get them."""

    rows: list[Example]
    total: int
    truncated: int = 0
    dropped: int = 0
    emptied: int = 0
    limit: int | None = None
    left_out: int = 0
    responses: int = 1  # examples of a row: two where rows are pairs; the counts are of rows

    def __str__(self) -> str:
        tokens, what = sum(len(row.ids) for row in self.rows), "pair" if self.responses == 2 else "row"
        notes = [f"{_rows(len(self.rows) // self.responses, what)}, {tokens} tokens"]
        if self.truncated:
            notes.append(f"{_rows(self.truncated, what)} over {self.limit} tokens truncated")
        if self.dropped:
            notes.append(f"{_rows(self.dropped, what)} over {self.limit} tokens dropped")
        if self.emptied:
            notes.append(f"{_rows(self.emptied, what)} dropped whose response was beyond token {self.limit}")
        if self.left_out:
            notes.append(f"{_rows(self.left_out, what)} left out by `keep`")
        return "; ".join(notes)

    @property
    def fingerprint(self) -> str:
        """A digest of all token ids and response masks in order: the same data gives the same one."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.index, row.ids, row.response)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Reader:
    """What turns rows into examples: the tokenizer, the longest row, and what the rule reads of a row."""

    config: RowConfig
    tokenizer: Any
    vocabulary: int
    limit: int | None
    columns: ColumnReader
    roles: bool = False
    pairs: bool = False  # rows have two responses, each of which becomes an example
    prompts: PromptReader | None = None

    @property
    def responses(self) -> int:
        """Examples of a row."""
        return 2 if self.pairs else 1

    def read(self, sources: Sequence[str]) -> Examples:
        """Read data files into examples; `DataFault` names the first row that cannot be used."""
        examples: list[Example] = []
        for source in sources:
            file = read_rows(source)
            for start in range(0, len(file.rows), CHUNK):
                part, first = file.rows[start : start + CHUNK], len(examples) // self.responses
                examples += (self._paired if self.pairs else self._encode)(file, part, first)
        self.columns.check_quotes()
        return self._fit(examples)

    def _encode(self, file: RowFile, rows: list[Row], first: int) -> list[Example]:
        layout = layout_of(file, self.config)
        if layout.response == "input_ids":
            found = [self._tokenised(row, first + i) for i, row in enumerate(rows)]
        else:
            rendered = [render_row(row, layout, self.tokenizer, self.config.chat) for row in rows]
            encoded = encode_texts(rendered, self.tokenizer)
            found = [
                self._example(row, first + i, text, ids, offsets)
                for i, (row, text, (ids, offsets)) in enumerate(zip(rows, rendered, encoded, strict=True))
            ]
        return found if self.prompts is None else self.prompts.added(found, rows, layout)

    def _paired(self, file: RowFile, rows: list[Row], first: int) -> list[Example]:
        layout = pair_layout(file, self.config)
        sides = [side for row in rows for side in sides_of(row, layout, self.columns.columns)]
        if layout.kind == "tokens":
            found = [self._tokenised(side.row, first + i // 2) for i, side in enumerate(sides)]
        else:
            rendered = [side.render(self.tokenizer, self.config.chat) for side in sides]
            encoded = encode_texts(rendered, self.tokenizer)
            found = [
                self._example(side.row, first + i // 2, text, ids, offsets)
                for i, (side, text, (ids, offsets)) in enumerate(zip(sides, rendered, encoded, strict=True))
            ]
        found = [replace(example, chosen=side.chosen) for example, side in zip(found, sides, strict=True)]
        return found if self.prompts is None else self.prompts.added(found, rows, None)

    def _example(self, row: Row, index: int, text: Rendered, ids: list[int], offsets: Offsets) -> Example:
        response, roles = mark_tokens(offsets, text.turns)
        if text.plain:
            ids, response, roles = end_row(ids, response, roles, self.tokenizer.eos_token_id)
        if (largest := max(ids)) >= self.vocabulary:
            raise ModelFault(
                f"{row.place}: the tokenizer gives token id {largest}, the model knows {self.vocabulary}: "
                "tokenizer and model do not belong together"
            )
        if self.roles and None in roles:
            raise DataFault(
                f"{row.place}: the rule reads `role`, and the chat template hides who wrote each token"
            )
        tokens = TextTokens(text, offsets, len(ids)) if self.columns.reads_text else None
        return Example(index, row.place, ids, response, roles, self.columns.read(row, None, tokens))

    def _tokenised(self, row: Row, index: int) -> Example:
        found = read_tokens(row, self.vocabulary)
        if self.roles and found.roles is None:
            raise DataFault(f"{row.place}: the rule reads `role`, and the tokenised row has no list `role`")
        roles: list[str | None] = [*found.roles] if found.roles else [None] * len(found.ids)
        return Example(
            index, row.place, found.ids, found.response, roles, self.columns.read(row, len(found.ids))
        )

    def _fit(self, examples: list[Example]) -> Examples:
        """Cut or drop what is longer than the limit, and drop what then has no response left."""
        limit, size = self.limit, self.responses
        rows = [examples[i : i + size] for i in range(0, len(examples), size)]
        long = 0 if limit is None else sum(any(len(e.ids) > limit for e in row) for row in rows)
        if limit is None or not long:
            return Examples(examples, len(rows), responses=size)
        if self.config.too_long == "drop":
            kept = [e for row in rows if all(len(e.ids) <= limit for e in row) for e in row]
            return self._some(Examples(kept, len(rows), dropped=long, limit=limit, responses=size))
        cut = [[e if len(e.ids) <= limit else _truncated(e, limit) for e in row] for row in rows]
        kept = [e for row in cut if all(any(e.response[1:]) for e in row) for e in row]
        emptied = len(cut) - len(kept) // size
        counts = {"truncated": long - emptied, "emptied": emptied}
        return self._some(Examples(kept, len(cut), **counts, limit=limit, responses=size))

    def _some(self, examples: Examples) -> Examples:
        if not examples.rows:
            raise DataFault(
                f"no row is left of {examples.total}: {examples}; --max-length or --too-long sets this"
            )
        return examples


def _truncated(example: Example, limit: int) -> Example:
    cut = [(name, v[:limit] if isinstance(v, list) else v) for name, v in example.columns.items()]
    columns: dict[str, Value | list[Value]] = dict(cut)
    return replace(
        example,
        ids=example.ids[:limit],
        response=example.response[:limit],
        roles=example.roles[:limit],
        columns=columns,
    )


def encode_texts(
    rendered: Sequence[Rendered], tokenizer: Any
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids and character offsets of each text, tokenised once and whole."""
    if not tokenizer.is_fast:
        raise ModelFault("the tokenizer has no character offsets; a folder with tokenizer.json is needed")
    with untrimmed(tokenizer):
        encoded = tokenizer(
            [text.text for text in rendered],
            add_special_tokens=rendered[0].plain,  # the rows of a file are all plain, or all from a template
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def end_row(
    ids: list[int], response: list[bool], roles: list[str | None], end_token: int | None
) -> tuple[list[int], list[bool], list[str | None]]:
    """The row with a supervised end token, added where the tokenizer has not put one."""
    if end_token is None:
        raise ModelFault(
            "the tokenizer has no end token (eos_token in tokenizer_config.json): a response must end"
        )
    if ids[-1:] == [end_token]:
        return ids, [*response[:-1], True], [*roles[:-1], "assistant"]
    return [*ids, end_token], [*response, True], [*roles, "assistant"]
