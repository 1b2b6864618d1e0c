"""The columns that a rule reads: taken from each row, checked against their declaration.

A value per example is a scalar. A value per token is a list aligned with the row's `input_ids`, so only rows
that are tokenised already can have one. What a regex or a column of `spans` says of the response's characters
becomes a value per token here, where there is a text; a tokenised row brings it as a list of bools. Fields
that the rule does not read are left alone.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

from trainer.faults import DataFault
from trainer.rows import Row, json_kind, whole_text
from trainer.spans import TextTokens

if TYPE_CHECKING:
    from priority_dsl.checked import Column

Value = bool | float | str
TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@dataclass
class ColumnReader:
    """Reads the columns of a rule (named `rule` in messages) from rows.

    It remembers what an undeclared column was given first.
    """

    columns: Mapping[str, Column]
    rule: str = "<rule>"
    _extents: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> extent and where it was seen

    @property
    def reads_text(self) -> bool:
        """Whether a column says something of the characters of a response."""
        return any(column.pattern or column.spans for column in self.columns.values())

    def read(
        self, row: Row, tokens: int | None, text: TextTokens | None = None
    ) -> dict[str, Value | list[Value]]:
        """The values of one row; `tokens` is the length of its input ids, None where it is `text`."""
        return {column.name: self._value(column, row, tokens, text) for column in self.columns.values()}

    def _value(
        self, column: Column, row: Row, tokens: int | None, text: TextTokens | None
    ) -> Value | list[Value]:
        if column.pattern is not None and text is not None:
            return [*text.matched(*column.pattern, row.place, self.rule)]
        if column.pattern is not None and column.name not in row.fields:
            raise DataFault(
                f"{row.place}: the row is tokenised, so there is no text in which to look for "
                f"`{column.name}`; give it a field of that name, true or false for each input id, or use "
                "rows of text"
            )
        if column.name not in row.fields:
            raise DataFault(
                f"{row.place}: no field `{column.name}`, a column that the rule reads{_near(column, row)}"
            )
        value = row.fields[column.name]
        where = f"{row.place}: column `{column.name}`"
        if value is None or (row.textual and value == "" and column.element != "text"):
            raise DataFault(f"{where} has no value")
        if column.spans and text is not None:
            return [*self._spans(value, row.textual, text, where)]
        if self._extent(column, value, row.place, where) == "example":
            return _checked(column, value, row.textual, where)
        if tokens is None:
            raise DataFault(
                f"{where} has a value per token, which needs rows that are tokenised already (`input_ids`)"
            )
        values = _list(value, where, tokens)
        return [_checked(column, v, False, f"{where}, token {i}") for i, v in enumerate(values)]

    def _spans(self, value: object, textual: bool, text: TextTokens, where: str) -> list[bool]:
        if textual:
            try:
                value = json.loads(str(value))
            except ValueError as error:
                raise DataFault(f"{where} must be a list, written as JSON in this file") from error
        return text.within(value, where)

    def _extent(self, column: Column, value: object, place: str, where: str) -> str:
        given = "token" if isinstance(value, list) else "example"
        if not column.declared:
            extent, first = self._extents.setdefault(column.name, (given, place))
            if extent != given:
                raise DataFault(f"{where} has a value per {given}, but per {extent} at {first}")
            return extent
        if column.extent == "pair" and given == "example":
            return given  # which field holds it, `trainer.pairs` knows
        if column.extent != given and not (given == "example" and column.extent == "token"):
            raise DataFault(f"{where} is declared per {column.extent}, but the row has {json_kind(value)}")
        return column.extent


def check_categories(columns: Mapping[str, Column], seen: Iterable[Mapping[str, object]]) -> None:
    """Refuse a category that the data never show, most likely a misspelt one.

    `seen` are the values of all rows. A column that declares its categories may hold none of some.
    """
    wanted = {
        c.name: set(c.categories or ())
        for c in columns.values()
        if not c.declared and c.element == "category"
    }
    shown: dict[str, set[object]] = {name: set() for name in wanted}
    for values in seen:
        for name, found in shown.items():
            value = values[name]
            found.update(value) if isinstance(value, list) else found.add(value)
    for name, categories in wanted.items():
        for missing in sorted(categories - shown[name]):
            listed = ", ".join(map(str, sorted(shown[name], key=str)[:20]))
            raise DataFault(
                f"column `{name}` is never `{missing}` in the data, which the rule asks for; "
                f"its values are: {listed} "
                f"(`column {name}: {{...}}` in the rule declares values that may be absent)"
            )


def _near(column: Column, row: Row) -> str:
    close = get_close_matches(column.name, row.fields, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; the fields are {', '.join(row.fields)}"


def _list(value: object, where: str, tokens: int) -> list[object]:
    if not isinstance(value, list):
        raise DataFault(
            f"{where} is per token: a list of {tokens} values is needed, this is {json_kind(value)}"
        )
    if len(value) != tokens:
        raise DataFault(f"{where} has {len(value)} values for {tokens} input ids")
    return value


def _checked(column: Column, value: object, textual: bool, where: str) -> Value:
    """The value as the rule takes it, or `DataFault` where it is not what the column is declared to be."""
    match column.element:
        case "bool":
            found = TRUTH.get(str(value).lower()) if textual else value
            if not isinstance(found, bool):
                raise DataFault(f"{where} must be true or false, this is {_shown(value)}")
            return found
        case "number":
            return _number(column, value, textual, where)
        case "category":
            if not isinstance(value, str):
                raise DataFault(
                    f"{where} must be one of some words, this is {_shown(value)}; write it as a text"
                )
            if column.closed and value not in column.categories:
                allowed = ", ".join(sorted(column.categories))
                raise DataFault(
                    f"{where} is `{value}`, which the rule does not declare; it declares {allowed}"
                )
            return whole_text(value, where)
    if not isinstance(value, str):
        raise DataFault(f"{where} must be text, this is {_shown(value)}")
    return whole_text(value, where)


def _number(column: Column, value: object, textual: bool, where: str) -> float:
    try:
        found = float(value) if textual and isinstance(value, str) else value
    except ValueError:
        found = value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise DataFault(f"{where} must be a number, this is {_shown(value)}")
    try:
        number = float(found)
    except OverflowError as error:
        raise DataFault(f"{where} has more digits than a number here can hold") from error
    if not math.isfinite(number):
        raise DataFault(f"{where} is {found}, which is not a finite number")
    if not column.range.contains(number):
        raise DataFault(f"{where} is {found}, outside the range {column.range} that the rule declares")
    return number


def _shown(value: object) -> str:
    text = reprlib.repr(value)  # which ends for any depth and any number of digits
    return f"{json_kind(value)} ({text if len(text) <= 40 else text[:40] + '...'})"
