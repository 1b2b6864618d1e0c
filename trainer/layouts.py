"""Which fields of a row hold what: prompt and response, a conversation, plain text, or token ids."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import Any

from trainer.chat import Rendered, Response, Turn, render_chat, render_opening
from trainer.config import RowConfig
from trainer.faults import ConfigFault, DataFault
from trainer.rows import Row, RowFile, json_kind, whole_text


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay out a row: the fields of response and prompt, and what joins them.

    `response` alone, without a prompt, is a text, a conversation (`messages`) or token ids (`input_ids`).
    """

    response: str
    prompt: str | None = None
    optional: str | None = None  # a part of the prompt that may be missing or empty
    separator: str = "\n"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields without which a row has not this layout."""
        return (self.response,) if self.prompt is None else (self.prompt, self.response)

    def __str__(self) -> str:
        return "/".join(self.fields)


# In this order: a row that fits several is read as the first.
LAYOUTS = (
    Layout("input_ids"),
    Layout("messages"),
    Layout("completion", "prompt", separator=""),
    Layout("answer", "question"),
    Layout("output", "instruction", optional="input"),
    Layout("text"),
)


def layout_of(file: RowFile, config: RowConfig) -> Layout:
    """The layout of a file, from config or first row; `DataFault` names its fields where none fits.

    Raises `ConfigFault` for a flag that would mean nothing for such rows.
    """
    if config.chosen is not None:
        raise ConfigFault("--chosen: the rule compares no two responses; name one with --completion FIELD")
    layout = _recognised(file, config)
    if config.separator is not None and (layout.prompt is None or config.chat):
        raise ConfigFault(
            f"--separator: {file.name} has nothing to separate (rows of {layout}, chat {config.chat})"
        )
    if config.chat and layout.prompt is None and layout.response != "messages":
        raise ConfigFault(
            f"--chat: the rows of {file.name} have no prompt for a chat template (they have {layout})"
        )
    return layout if config.separator is None else replace(layout, separator=config.separator)


def _recognised(file: RowFile, config: RowConfig) -> Layout:
    if config.prompt is not None and config.completion is not None:
        standard = (config.prompt, config.completion) == ("prompt", "completion")
        return Layout(config.completion, config.prompt, separator="" if standard else "\n")
    first = file.rows[0]
    for layout in LAYOUTS:
        if all(name in first.fields for name in layout.fields):
            return layout
    if {"chosen", "rejected"} <= first.fields.keys():
        raise DataFault(
            f"{first.place}: a row with two responses, `chosen` and `rejected`, and the rule compares none: "
            "take a rule that reads `chosen(...)`, such as dpo, or train on the chosen ones alone with "
            "--prompt FIELD --completion chosen"
        )
    for layout in LAYOUTS:
        if layout.prompt in first.fields:
            raise DataFault(
                f"{first.place}: a row without a response: it has `{layout.prompt}` but no "
                f"`{layout.response}`; the fields are {', '.join(first.fields)} "
                "(--prompt FIELD --completion FIELD names others)"
            )
    known = ", ".join(map(str, LAYOUTS))
    raise DataFault(
        f"{first.place}: the fields {', '.join(first.fields) or '(none)'} are not a known layout ({known}); "
        "name them with --prompt FIELD --completion FIELD"
    )


def render_row(row: Row, layout: Layout, tokenizer: Any, chat: bool) -> Rendered:
    """A row of text with its turns; `chat` puts prompt and response through the chat template."""
    if layout.response == "messages":
        return render_chat(row.fields.get("messages"), tokenizer, row.place)
    if row.fields.get(layout.response, "") in ("", None):
        state = "is empty" if layout.response in row.fields else "is missing"
        raise DataFault(f"{row.place}: a row without a response: `{layout.response}` {state}")
    response = _text(row, layout.response)
    if layout.prompt is None:
        return _plain("", response)
    prompt = prompt_of(row, layout)
    if chat:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return render_chat(turns, tokenizer, row.place)
    return _plain(prompt + layout.separator, response)


def _plain(prompt: str, response: str) -> Rendered:
    """A text without a template: all of the response is the row's own."""
    start, end = len(prompt), len(prompt) + len(response)
    asked = (Turn(0, start, "user"),) if prompt else ()
    return Rendered(
        prompt + response, asked, (Response(start, start, end, end, start, len(response)),), plain=True
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked, and the response that the row has; `plain` as in `Rendered`."""

    text: str
    reference: str
    plain: bool


def render_prompt(row: Row, layout: Layout, tokenizer: Any, chat: bool) -> Prompt:
    """The prompt of a row as training shows it: in a conversation, all before the last assistant message."""
    if layout.response == "messages":
        messages = row.fields["messages"]
        assert isinstance(messages, list), "rows are checked when they are read as examples"
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return Prompt(
            render_opening(messages[:last], tokenizer, row.place), messages[last]["content"] or "", False
        )
    if layout.prompt is None:
        raise DataFault(
            f"{row.place}: rows of `{layout}` have no prompt, so no responses can be drawn to them"
        )
    prompt, reference = prompt_of(row, layout), _text(row, layout.response)
    if chat:
        return Prompt(
            render_opening([{"role": "user", "content": prompt}], tokenizer, row.place), reference, False
        )
    return Prompt(prompt + layout.separator, reference, True)


def prompt_of(row: Row, layout: Layout) -> str:
    """The prompt of a row without the separator; an optional part with text follows after a blank line."""
    prompt = _text(row, layout.prompt) if layout.prompt is not None else ""
    if layout.optional is not None and row.fields.get(layout.optional):
        prompt += "\n\n" + _text(row, layout.optional)
    return prompt


def _text(row: Row, name: str) -> str:
    if name not in row.fields or row.fields[name] is None:
        given = ", ".join(row.fields) or "(none)"
        raise DataFault(
            f"{row.place}: no field `{name}`, which the rows of this file need; the fields are {given}"
        )
    value = row.fields[name]
    if isinstance(value, list):
        raise DataFault(
            f"{row.place}: `{name}` is a list; a conversation belongs whole into the field `messages`"
        )
    if not isinstance(value, str):
        raise DataFault(f"{row.place}: `{name}` must be text, this is {json_kind(value)}")
    return whole_text(value, f"{row.place}: `{name}`")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that came tokenised: its ids, and which of them are supervised."""

    ids: list[int]
    response: list[bool]
    roles: list[str] | None


def read_tokens(row: Row, vocabulary: int) -> TokenRow:
    """The ids of a tokenised row; `labels`, if given, are the ids with -100 where nothing is supervised."""
    ids = _integers(row, "input_ids", row.fields.get("input_ids"))
    outside = next((i for i in ids if not 0 <= i < vocabulary), None)
    if outside is not None:
        raise DataFault(f"{row.place}: token id {outside} is outside the model's vocabulary of {vocabulary}")
    if row.fields.get("attention_mask") is not None and not all(
        _integers(row, "attention_mask", row.fields["attention_mask"])
    ):
        raise DataFault(f"{row.place}: the row is padded (`attention_mask` has zeros); remove the padding")
    response = [True] * len(ids)
    if row.fields.get("labels") is not None:
        labels = _integers(row, "labels", row.fields["labels"])
        if len(labels) != len(ids):
            raise DataFault(f"{row.place}: {len(labels)} labels for {len(ids)} input ids")
        wrong = next(
            (t for t, (i, y) in enumerate(zip(ids, labels, strict=True)) if y not in (i, -100)), None
        )
        if wrong is not None:
            raise DataFault(
                f"{row.place}: label {labels[wrong]} at token {wrong} is neither its id {ids[wrong]} "
                "nor -100 (labels are not shifted)"
            )
        response = [label != -100 for label in labels]
    if not any(response[1:]):
        raise DataFault(f"{row.place}: a row without a response: no token after the first is supervised")
    return TokenRow(ids, response, _roles(row, len(ids)))


def _roles(row: Row, tokens: int) -> list[str] | None:
    roles = row.fields.get("role")
    if not isinstance(roles, list):
        return None
    if len(roles) != tokens or not all(isinstance(role, str) for role in roles):
        raise DataFault(f"{row.place}: `role` must be a list of {tokens} texts, one for each input id")
    return roles


def _integers(row: Row, name: str, value: object) -> list[int]:
    if not isinstance(value, list) or not value:
        raise DataFault(f"{row.place}: `{name}` must be a list of integers, this is {json_kind(value)}")
    wrong = next((v for v in value if isinstance(v, bool) or not isinstance(v, int)), None)
    if wrong is not None:
        raise DataFault(
            f"{row.place}: `{name}` must be a list of integers, "
            f"it holds {json_kind(wrong)} ({reprlib.repr(wrong)})"
        )
    return value
