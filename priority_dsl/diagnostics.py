"""What is wrong with a rule, where, and the way out: spans, diagnostics, the caret rendering.

Codes are stable. `codes.py` holds the one table of them, with a bad and a good example each.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]

MOST_RENDERED = 50  # findings that the text of an error shows; `diagnostics` holds all of them
WIDEST_LINE = 160  # a longer line of the rule is shown as the part around the place


class Span(NamedTuple):
    """A half-open range `[start, end)` of characters in the text of a rule."""

    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """The text of a rule and the name under which messages speak of it (a file name, or `<rule>`)."""

    text: str
    name: str = "<rule>"

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a character offset, both from 1; an offset past the end is the end."""
        before = self.text[: max(0, offset)]
        return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1

    def line(self, number: int) -> str:
        """The text of line `number` (from 1) without its line end; empty past the last line."""
        lines = self.text.split("\n")
        return lines[number - 1] if 0 < number <= len(lines) else ""


@dataclass(frozen=True)
class Diagnostic:
    """One finding: a stable code, what is wrong, the place, a word under the caret, and the way out.

    `span` is None where a finding has no place in a text (a value given from outside, a missing tensor).
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    help: str = ""
    severity: Severity = "error"
    source: Source = field(default=Source(""), repr=False)

    @property
    def line(self) -> int | None:
        """Line of the place, from 1; None without a place."""
        return None if self.span is None else self.source.position(self.span.start)[0]

    @property
    def column(self) -> int | None:
        """Column of the place in characters, from 1; None without a place."""
        return None if self.span is None else self.source.position(self.span.start)[1]

    def __str__(self) -> str:
        return render(self)


class PriorityError(Exception):
    """Everything that is wrong with a rule, its values or the tensors it was given, reported together.

    `diagnostics` holds each finding; `str(error)` is the rendered text.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        texts = [render(d) for d in self.diagnostics[:MOST_RENDERED]]
        rest = len(self.diagnostics) - len(texts)
        super().__init__("\n\n".join(texts + [f"and {rest} more"] * (rest > 0)))

    def __reduce__(self):
        return (PriorityError, (self.diagnostics,))


def failure(code: str, message: str, help: str = "", **place) -> PriorityError:
    """A `PriorityError` of a single finding, ready to raise."""
    return PriorityError([Diagnostic(code, message, help=help, **place)])


def render(diagnostic: Diagnostic) -> str:
    """The finding as text: headline, place, the line with a caret under the place, help."""
    parts = [f"{diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}"]
    margin = "  "
    if diagnostic.span is not None:
        line, column = diagnostic.source.position(diagnostic.span.start)
        margin = " " * (len(str(line)) + 2)
        parts.append(f"{margin[1:]}--> {diagnostic.source.name}:{line}:{column}")
        parts += _excerpt(diagnostic, line, column, margin)
    if diagnostic.help:
        parts.append(f"{margin}= help: " + diagnostic.help.replace("\n", f"\n{margin}        "))
    return "\n".join(parts)


def _excerpt(diagnostic: Diagnostic, line: int, column: int, margin: str) -> list[str]:
    assert diagnostic.span is not None
    text = diagnostic.source.line(line)
    length = max(1, min(diagnostic.span.end - diagnostic.span.start, len(text) - column + 1))
    start = column - 1
    if len(text) > WIDEST_LINE:
        cut = max(0, start - 60)
        text, start = text[cut : cut + WIDEST_LINE - 20], start - cut
        if cut:
            text, start = "..." + text, start + 3
        length = max(1, min(length, len(text) - start))
    text = "".join(c if c.isprintable() else " " for c in text)
    caret = " " * _width(text[:start]) + "^" * max(1, _width(text[start : start + length]))
    label = f" {diagnostic.label}" if diagnostic.label else ""
    return [f"{margin}|", f" {line} | {text}", f"{margin}| {caret}{label}"]


def _width(text: str) -> int:
    """Columns that `text` takes in a terminal: wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like `word`, best first; empty where none is close."""
    return get_close_matches(word, sorted(set(known)), n=count, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A help text that offers the nearest known words, or `otherwise` where none is close."""
    close = nearest(word, known)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else otherwise
