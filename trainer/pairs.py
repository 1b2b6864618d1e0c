"""Preference rows: a prompt with two responses, of which one was chosen; each response becomes an example.

Rows have a prompt and the texts `chosen` and `rejected`, or messages in their place: the answers alone, or
both conversations whole. Tokenised rows have `input_ids_chosen` and `input_ids_rejected`. A column per
example is in the fields NAME_chosen and NAME_rejected, a column per pair in the field NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from trainer.chat import Rendered
from trainer.config import RowConfig
from trainer.faults import ConfigFault, DataFault
from trainer.layouts import Layout, render_row
from trainer.rows import Row, RowFile, json_kind

if TYPE_CHECKING:
    from priority_dsl.checked import Column

SIDES = ("chosen", "rejected")
TOKENS = ("input_ids", "labels", "attention_mask", "role")  # of a tokenised response
OPENINGS = ("prompt", "messages", "conversations")  # fields that may hold what comes before two messages
ROLES = {"human": "user", "gpt": "assistant"}  # as some files call them

# In this order: a row that fits several is read as the first.
PROMPTS = (
    Layout("", "prompt", separator=""),
    Layout("", "question"),
    Layout("", "instruction", optional="input"),
)


@dataclass(frozen=True, slots=True)
class PairLayout:
    """How the rows of a file hold two responses.

    `kind` is `text`, `messages` or `tokens`; `sides` are the fields of the responses, the chosen one first,
    `text` says where the prompt of a text is, `opening` names the field of a conversation before the two
    responses (None: each response is a whole conversation).
    """

    kind: str
    sides: tuple[str, str]
    text: Layout | None = None
    opening: str | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One response of a preference row, as a row of its own with its layout.

    `answers` is how many of the assistant's messages are the response; None where all of them are.
    """

    row: Row
    layout: Layout
    chosen: bool
    answers: int | None = None

    def render(self, tokenizer: Any, chat: bool) -> Rendered:
        """The text of the response after its prompt, and which of it is supervised."""
        rendered = render_row(self.row, self.layout, tokenizer, chat)
        if self.answers is None:
            return rendered
        return replace(rendered, responses=rendered.responses[-self.answers :])


def pair_layout(file: RowFile, config: RowConfig) -> PairLayout:
    """How a file holds its pairs, from config or first row; `DataFault` where it holds none.

    Raises `ConfigFault` for a flag that would mean nothing for such rows.
    """
    if config.completion is not None:
        raise ConfigFault(
            "--completion: the rule compares two responses; name them with --chosen FIELD --rejected FIELD"
        )
    first, sides = file.rows[0], (config.chosen or "chosen", config.rejected or "rejected")
    if all(f"input_ids_{side}" in first.fields for side in SIDES):
        found = PairLayout("tokens", sides)
    elif missing := next((side for side in sides if side not in first.fields), None):
        raise DataFault(
            f"{first.place}: the rule compares two responses, and the row has no `{missing}`; the fields are "
            f"{', '.join(first.fields)} (--chosen FIELD --rejected FIELD names others)"
        )
    elif isinstance(first.fields[sides[0]], list | dict) or _conversation(first):
        opening = config.prompt or next((name for name in OPENINGS if name in first.fields), None)
        found = PairLayout("messages", sides, opening=opening)
    else:
        found = PairLayout("text", sides, _prompt_of(first, config))
    if config.separator is not None and (found.kind != "text" or config.chat):
        raise ConfigFault(f"--separator: {file.name} has nothing to separate")
    if config.chat and found.kind != "text":
        raise ConfigFault(f"--chat: the rows of {file.name} are {found.kind} already")
    return found


def _conversation(row: Row) -> bool:
    """Whether two texts answer a conversation."""
    return any(isinstance(row.fields.get(name), list) for name in OPENINGS)


def _prompt_of(row: Row, config: RowConfig) -> Layout:
    if config.prompt is not None:
        layout = Layout("", config.prompt, separator="" if config.prompt == "prompt" else "\n")
    else:
        known = (p for p in PROMPTS if p.prompt in row.fields)
        layout = next(known, None)
    if layout is None:
        names = ", ".join(str(p.prompt) for p in PROMPTS)
        raise DataFault(
            f"{row.place}: a pair of responses without a prompt ({names}); the fields are "
            f"{', '.join(row.fields)} (--prompt FIELD --chosen FIELD --rejected FIELD names others)"
        )
    return layout if config.separator is None else replace(layout, separator=config.separator)


def sides_of(row: Row, layout: PairLayout, columns: Mapping[str, Column]) -> tuple[Side, Side]:
    """The two responses of a row, the chosen one first, each with its part of the columns.

    Raises `DataFault` naming the row where a response is missing or empty.
    """
    if layout.kind == "messages":
        opening, answers = _messages(row, layout)
        made = [
            {"messages": [*opening, *answer]} | _columns(row, columns, side)
            for answer, side in zip(answers, SIDES, strict=True)
        ]
        layouts = [Layout("messages")] * 2
        counts = [sum(turn.get("role") == "assistant" for turn in answer) for answer in answers]
    elif layout.kind == "tokens":
        made = [
            {n: row.fields[f"{n}_{side}"] for n in TOKENS if f"{n}_{side}" in row.fields}
            | _columns(row, columns, side)
            for side in SIDES
        ]
        layouts, counts = [Layout("input_ids")] * 2, [None, None]
    else:
        assert layout.text is not None, "a layout of texts says where the prompt is"
        made = [row.fields | _columns(row, columns, side) for side in SIDES]
        layouts, counts = [replace(layout.text, response=field) for field in layout.sides], [None, None]
    places = [f"{row.place} ({side})" for side in SIDES]
    rows = [Row(p, fields, row.textual) for p, fields in zip(places, made, strict=True)]
    both = zip(rows, layouts, (True, False), counts, strict=True)
    first, second = (Side(r, of, chosen, count) for r, of, chosen, count in both)
    return first, second


def _columns(row: Row, columns: Mapping[str, Column], side: str) -> dict[str, object]:
    """The columns of one response under their own names."""
    found: dict[str, object] = {}
    for column in columns.values():
        field = f"{column.name}_{side}"
        if column.pattern is not None and field not in row.fields:
            continue  # it asks the response's text
        per_pair = column.extent == "pair" or (not column.declared and field not in row.fields)
        if per_pair and column.name in row.fields:
            found[column.name] = row.fields[column.name]
        elif not per_pair and field in row.fields:
            found[column.name] = row.fields[field]
        else:
            wanted = column.name if column.extent == "pair" else field
            other = (
                ""
                if per_pair
                else f" (one value for both responses is declared `{column.name}: ... per pair`)"
            )
            raise DataFault(
                f"{row.place}: no field `{wanted}`, a column that the rule reads{other}; the fields are "
                f"{', '.join(row.fields)}"
            )
    return found


# Messages ---------------------------------------------------------------------------------------


def _messages(row: Row, layout: PairLayout) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The messages before the two responses, and those of each response."""
    answers = [_turns(row, name, "assistant") for name in layout.sides]
    opening = [] if layout.opening is None else _turns(row, layout.opening, "user")
    if all(
        answer[0].get("role") != "assistant" for answer in answers
    ):  # two conversations from their beginning
        shared = list(takewhile(lambda turns: turns[0] == turns[1], zip(*answers, strict=False)))
        opening, answers = [turn for turn, _ in shared], [answer[len(shared) :] for answer in answers]
    for name, answer in zip(layout.sides, answers, strict=True):
        if not any(turn.get("role") == "assistant" for turn in answer):
            raise DataFault(f"{row.place}: a pair without two responses: `{name}` says nothing of its own")
    return opening, answers


def _turns(row: Row, name: str, speaker: str) -> list[dict[str, Any]]:
    """The messages in a field: a list, one message, or a text of the speaker."""
    value = row.fields.get(name)
    if isinstance(value, str) and value:
        return [{"role": speaker, "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        state = "is missing or empty" if not value else f"is {json_kind(value)}"
        raise DataFault(f"{row.place}: a pair needs messages or a text in `{name}`, which {state}")
    return [_turn(turn) for turn in turns]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A message with `role` and `content`, which some files call `from` and `value`."""
    if "from" not in turn or "value" not in turn:
        return turn
    return {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
