"""Rows -> examples: token ids with their response mask, who speaks at each token, and the rule's columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from trainer.chat import NO_TEMPLATE, Rendered
from trainer.columns import ColumnReader, Value
from trainer.config import RowConfig
from trainer.examples import Example, Examples, joined
from trainer.faults import BadRows, DataFault, ModelFault, RowFault
from trainer.layouts import Layout, layout_of, read_tokens, render_row
from trainer.pairs import PairLayout, pair_layout, sides_of
from trainer.prompts import PromptReader
from trainer.rows import Read, Row, RowFile, open_rows
from trainer.spans import Offsets, RegexFault, TextTokens, mark_tokens, untrimmed

CHUNK = 512  # rows tokenised together


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
    reshape: Callable[[Read], Read] | None = None  # what is made of a row before its layout is known

    @property
    def responses(self) -> int:
        """Examples of a row."""
        return 2 if self.pairs else 1

    def read(self, sources: Sequence[str]) -> Examples:
        """Read data files into examples, all of them before any is refused.

        Raises `BadRows` with every row that cannot be used, unless the config leaves them out, and
        `DataFault` for a file that cannot be read and where no row is left.
        """
        nothing = Examples([], 0, limit=self.limit, responses=self.responses)
        found = joined(self.parts(sources), nothing)
        self.refuse(found)
        if not found.rows:
            way = "" if found.bad else "; --max-length or --too-long sets this"
            raise DataFault(f"no row is left of {found.total + len(found.bad)}: {found}{way}")
        return found

    def first(self, sources: Sequence[str]) -> Examples:
        """The examples of the first rows of a stream; raises as `read` does."""
        found = next(self.parts(sources, streaming=True))
        self.refuse(found)
        return found

    def refuse(self, found: Examples) -> None:
        """Raise `BadRows` where rows cannot be used and the config does not leave them out."""
        if found.bad and self.config.bad_rows == "refuse":
            raise BadRows(found.bad, found.total + len(found.bad))

    def parts(self, sources: Sequence[str], streaming: bool = False) -> Iterator[Examples]:
        """The examples of data files, so many rows at a time; `streaming` as for `open_rows`.

        The examples are numbered in the order of the rows that can be used, so that they are those of files
        that hold only these.
        """
        number = 0
        for source in sources:
            layout, rows = None, open_rows(source, streaming)
            if self.reshape is not None:
                rows = map(self.reshape, rows)
            while items := list(itertools.islice(rows, CHUNK)):
                if layout is None:
                    layout, items = self._layout(source, items)
                part = self._part(items, layout, number)
                number += part.total
                yield part

    def _layout(self, source: str, items: list[Read]) -> tuple[Layout | PairLayout | None, list[Read]]:
        """How the rows of a file are laid out, from the first that shows it; those before it are bad."""
        for place, item in enumerate(items):
            if isinstance(item, RowFault):
                continue
            try:
                file = RowFile(source, [item])
                layout = pair_layout(file, self.config) if self.pairs else layout_of(file, self.config)
            except DataFault as fault:
                if self.config.bad_rows == "refuse":
                    raise
                items = [*items[:place], RowFault(item.place, str(fault)), *items[place + 1 :]]
                continue
            self._check_template(layout, item.place)
            return layout, items
        return None, items

    def _check_template(self, layout: Layout | PairLayout, place: str) -> None:
        """Refuse a tokenizer without a chat template once for all rows that need one."""
        messages = (
            layout.kind == "messages" if isinstance(layout, PairLayout) else layout.response == "messages"
        )
        if (messages or self.config.chat) and not self.tokenizer.chat_template:
            raise DataFault(f"{place}: {NO_TEMPLATE}")

    def _part(self, items: list[Read], layout: Layout | PairLayout | None, number: int) -> Examples:
        """The examples of some rows that were read, numbered from `number`, and which cannot be used."""
        drafts: list[RowDraft | RowFault] = []
        for item in items:
            if isinstance(item, Row) and layout is not None:
                drafts.append(_tried(item, self._draft, item, layout))
            elif isinstance(item, RowFault):
                drafts.append(item)
        texts = [text for of in drafts if isinstance(of, RowDraft) for text in of.texts if text is not None]
        encoded = iter(encode_texts(texts, self.tokenizer) if texts else [])
        rows: list[list[Example]] = []
        bad: list[RowFault] = []
        for of in drafts:
            if isinstance(of, RowDraft):
                tokens = [None if text is None else next(encoded) for text in of.texts]
                made = _tried(of.row, self._finished, of, tokens, number + len(rows))
                bad.append(made) if isinstance(made, RowFault) else rows.append(made)
            else:
                bad.append(of)
        return replace(self._fit(rows), bad=tuple(bad))

    def _draft(self, row: Row, layout: Layout | PairLayout) -> RowDraft:
        """The responses of a row as texts that are still to be tokenised."""
        if isinstance(layout, PairLayout):
            sides = sides_of(row, layout, self.columns.columns)
            chat, tokens = self.config.chat, layout.kind == "tokens"
            texts = [None if tokens else side.render(self.tokenizer, chat) for side in sides]
            return RowDraft(row, [side.row for side in sides], texts, [side.chosen for side in sides])
        tokens = layout.response == "input_ids"
        text = None if tokens else render_row(row, layout, self.tokenizer, self.config.chat)
        return RowDraft(row, [row], [text], [None], layout)

    def _finished(self, of: RowDraft, tokens: Sequence[Encoded | None], index: int) -> list[Example]:
        """The examples of a row, its texts tokenised."""
        found = []
        for row, text, encoded, chosen in zip(of.responses, of.texts, tokens, of.chosen, strict=True):
            if text is None or encoded is None:
                example = self._tokenised(row, index)
            else:
                example = self._example(row, index, text, *encoded)
            found.append(replace(example, chosen=chosen))
        return found if self.prompts is None else self.prompts.added(found, [of.row], of.layout)

    def _example(self, row: Row, index: int, text: Rendered, ids: list[int], offsets: Offsets) -> Example:
        response, roles = mark_tokens(offsets, text.turns)
        if text.plain:
            ids, response, roles = end_row(ids, response, roles, self.tokenizer.eos_token_id)
        if not any(response[1:]):
            raise DataFault(
                f"{row.place}: a row without a response: none of its {len(ids)} tokens is supervised"
            )
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

    def _fit(self, rows: list[list[Example]]) -> Examples:
        """Cut or drop what is longer than the limit, and drop what then has no response left."""
        limit, cut = self.limit, rows
        found = Examples([], len(rows), limit=limit, responses=self.responses)
        if limit is not None and any(len(e.ids) > limit for row in rows for e in row):
            fits = [row for row in rows if all(len(e.ids) <= limit for e in row)]
            if self.config.too_long == "drop":
                cut, found = fits, replace(found, dropped=len(rows) - len(fits))
            else:
                whole = [[e if len(e.ids) <= limit else _truncated(e, limit) for e in row] for row in rows]
                cut = [row for row in whole if all(any(e.response[1:]) for e in row)]
                emptied = len(whole) - len(cut)
                found = replace(found, truncated=len(rows) - len(fits) - emptied, emptied=emptied)
        return replace(found, rows=[example for row in cut for example in row])


@dataclass(frozen=True, slots=True)
class RowDraft:
    """A row before it is tokenised: a row, a text and a side for each response.

    A text is None where the response is token ids already, `layout` where rows are pairs.
    """

    row: Row
    responses: list[Row]
    texts: list[Rendered | None]
    chosen: list[bool | None]
    layout: Layout | None = None


Made = TypeVar("Made")
Given = ParamSpec("Given")


def _tried(
    row: Row, make: Callable[Given, Made], *given: Given.args, **named: Given.kwargs
) -> Made | RowFault:
    """What is made of a row, or why it cannot be; what is wrong with more than the row is raised."""
    try:
        return make(*given, **named)
    except RegexFault:
        raise
    except DataFault as fault:
        return RowFault(row.place, str(fault))


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


Encoded = tuple[list[int], Offsets]  # token ids, and the characters of each


def encode_texts(rendered: Sequence[Rendered], tokenizer: Any) -> list[Encoded]:
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
