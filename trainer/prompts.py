"""The prompts that `reading(m, COLUMN)` puts in place of a row's own, as token ids; what else views read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from priority_dsl.binding import bindings, views
from trainer.cache import digest
from trainer.chat import render_opening
from trainer.config import RowConfig
from trainer.faults import ConfigFault, DataFault
from trainer.layouts import Layout
from trainer.rows import Row

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from trainer.data import Example


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of the text columns that views put in place of the row's own.

    `drawn` says that a view draws before training, so that what it says depends on the row's number too.
    """

    config: RowConfig
    tokenizer: Any
    columns: tuple[str, ...]
    drawn: bool
    limit: int | None

    @classmethod
    def of(
        cls, rule: CompiledRule, config: RowConfig, tokenizer: Any, limit: int | None
    ) -> PromptReader | None:
        """The reader that a rule needs; None where its models read the rows as they are."""
        seen = [view for value in bindings(*rule.checked.everything).values() for view in views(value)]
        columns = {str(v.arguments[1].option("name")) for v in seen if v.word == "reading"}
        drawn = any(v.word == "perturbed" for v in seen)
        if columns and rule.checked.reads_pairs:
            raise ConfigFault("the rule compares two responses; `reading` is for rows with one response")
        return cls(config, tokenizer, tuple(sorted(columns)), drawn, limit) if columns or drawn else None

    def added(self, examples: Sequence[Example], rows: Sequence[Row], layout: Layout | None) -> list[Example]:
        """The examples with their prompts; `layout` is that of the rows, None for pairs."""
        if layout is None or not self.columns:
            return [replace(e, anew=self._anew(e, {})) for e in examples]
        found = []
        for example, row in zip(examples, rows, strict=True):
            prompts = {name: self._prompt(row, layout, str(example.columns[name])) for name in self.columns}
            longest = max(prompts, key=lambda name: len(prompts[name]))
            tokens = len(prompts[longest]) + sum(example.response)
            if self.limit is not None and tokens > self.limit:
                raise DataFault(
                    f"{row.place}: the prompt in column `{longest}` and the response have {tokens} tokens, "
                    f"over the model's context of {self.limit}"
                )
            found.append(replace(example, prompts=prompts, anew=self._anew(example, prompts)))
        return found

    def _anew(self, example: Example, prompts: dict[str, list[int]]) -> str:
        """A digest of what views read of a row beside its token ids."""
        number = [example.index, example.chosen] if self.drawn else None
        return digest([prompts, number])

    def _prompt(self, row: Row, layout: Layout, text: str) -> list[int]:
        """Another prompt as token ids, written as the row's own is."""
        if layout.response == "messages":
            return self._ids(render_opening(self._opening(row, text), self.tokenizer, row.place), plain=False)
        if self.config.chat:
            opening = [{"role": "user", "content": text}]
            return self._ids(render_opening(opening, self.tokenizer, row.place), plain=False)
        return self._ids(text + (layout.separator if layout.prompt is not None else ""), plain=True)

    def _opening(self, row: Row, text: str) -> list[dict[str, Any]]:
        """The messages before the response, the user's text replaced."""
        messages: Any = row.fields["messages"]
        roles = [message["role"] for message in messages]
        if roles.count("assistant") > 1 or roles[-2:] != ["user", "assistant"]:
            raise DataFault(
                f"{row.place}: `reading` puts another text in place of the user's message before the "
                "response; this conversation has several responses, or no such message"
            )
        return [*messages[:-2], {**messages[-2], "content": text}]

    def _ids(self, text: str, plain: bool) -> list[int]:
        """Token ids; a plain text takes the tokenizer's special tokens, but no end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=plain, truncation=False)["input_ids"]
        if plain and ids[-1:] == [self.tokenizer.eos_token_id]:
            ids = ids[:-1]
        return ids or [self.tokenizer.eos_token_id]
