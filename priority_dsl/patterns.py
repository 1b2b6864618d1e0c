"""Regexes in a rule, `span("...")` and its like: checked with the rule, searched for in a response.

A regex is data that a stranger may have written: what it repeats is bounded before it is compiled, and the
search for it has a time limit (law 13), which the `regex` package has and `re` has not.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from priority_dsl import nodes
from priority_dsl.diagnostics import Span
from priority_dsl.kinds import BOOLEAN, Element, Extent, Kind, Stage
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_expression
from priority_dsl.registry import REGISTRY
from priority_dsl.values import BROKEN, Value
from priority_dsl.words import Pattern

if TYPE_CHECKING:
    from priority_dsl.calls import Calls

SECONDS = 1.0  # for the search of one regex in one response
LARGEST = 1_000_000  # characters times least repeats: the package writes `a{1000}` out before it searches
COUNTS = re.compile(r"\{(\d+)")
RAW = r"strings are raw: `\d` is a digit, `\(` a bracket, `\"` a quotation mark"


class BadPattern(ValueError):
    """A text that is no regex: why, the character where that shows (None: no one place) and a way out."""

    def __init__(self, why: str, position: int | None = None, help: str = RAW) -> None:
        super().__init__(why)
        self.why, self.position, self.help = why, position, help


@lru_cache(maxsize=64)
def compiled(pattern: str) -> Any:
    """The regex of a text, by the `regex` package; raises BadPattern."""
    size = len(pattern)
    for count in COUNTS.findall("".join(pattern.split())):
        size *= max(1, int(count[:10]))
    if size > LARGEST:
        raise BadPattern(
            f"its counts multiply to more than {LARGEST:,}", help="repeat less, or write `*` or `+`"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructs that may change their meaning one day
            return regex.compile(pattern)
    except regex.error as error:
        said: Any = error
        raise BadPattern(said.msg, said.pos) from error
    except (RecursionError, MemoryError) as error:
        raise BadPattern("it is nested too deeply", help="write it with fewer brackets") from error
    except Exception as error:  # the package's parser trips over some texts
        raise BadPattern(f"it cannot be read ({type(error).__name__})") from error


def ranges(word: str, pattern: str, text: str, seconds: float = SECONDS) -> list[tuple[int, int]]:
    """The ranges `[start, end)` of characters that `span`, `after` or `before` means in a response.

    They may overlap and may be empty; the end token stands at `[len(text), len(text) + 1)`. Raises
    TimeoutError where the search takes longer than `seconds` or more memory than there is, BadPattern.

    >>> ranges("after", "#### ", "so #### 7")
    [(8, 10)]
    """
    found = REGISTRY.words[word]
    assert isinstance(found, Pattern), word
    try:
        return found.body(_matches(compiled(pattern), text, seconds), len(text))
    except MemoryError as error:
        raise TimeoutError("out of memory") from error


def _matches(searched: Any, text: str, seconds: float) -> Iterator[Any]:
    """The matches in order; TimeoutError once they have taken too long together."""
    end = time.monotonic() + seconds
    for match in searched.finditer(text, timeout=seconds):
        yield match
        if time.monotonic() > end:
            raise TimeoutError("too many matches")


def pattern_value(calls: Calls, word: Pattern, node: nodes.Call) -> Value:
    """The value of a call with a regex: a column per token whose name is the call's text."""
    of = calls.of
    bound = calls.bind(node, ("regex",), {})
    if bound is None:
        return BROKEN
    written = bound[0][0]
    if not isinstance(written, nodes.String):
        return of.error(
            "PD302",
            f"`{word.name}` takes a regex in quotes",
            written,
            "not a text",
            f"write `{word.signature}`",
        )
    try:
        compiled(written.value)
    except BadPattern as error:
        place = _place(written, error.position)
        of.findings.add(
            "PD313", f"`{_shown(written.value)}` is not a regex: {error.why}", place, help=error.help
        )  # fmt: skip
        return BROKEN
    kind = Kind(Extent.TOKEN, Element.BOOL, BOOLEAN, Stage.DATA)
    name = f"{word.name}({format_expression(written)})"
    return of.value("column", kind, span=node.span, name=name, pattern=(word.name, written.value))


def _shown(pattern: str) -> str:
    return pattern if len(pattern) <= 60 else f"{pattern[:60]}..."


def _place(written: Expr, position: int | None) -> Span | None:
    """The character of a string at which its regex goes wrong; the whole string where it is no one place."""
    assert isinstance(written, nodes.String)
    if written.span is None or position is None:
        return written.span
    raw = len(written.value[:position].replace('"', '\\"'))
    start = min(written.span.start + 1 + raw, written.span.end - 1)
    return Span(start, start + 1)
