"""Text: who speaks a token, and where its characters stand in the response.

Text is tokenised once, whole; a token is inside when its characters overlap the range (law 12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from priority_dsl.kinds import BOOLEAN, Element
from priority_dsl.registry import REGISTRY, reading
from priority_dsl.words import Pattern

if TYPE_CHECKING:
    from regex import Match

ROLES = ("system", "user", "assistant", "tool")
Ranges = list[tuple[int, int]]

role = reading(
    "role", "text", "Who speaks the token: system, user, assistant or tool; rows of prompt and completion "
    "have user and assistant. What a template writes around a turn belongs to the turn.",
    "role == assistant", element=Element.CATEGORY, values=ROLES, given="column",
)  # fmt: skip
response = reading(
    "response", "text", "Whether the token is the assistant's, the end token included.",
    "1 if response else 0.1", element=Element.BOOL, range=BOOLEAN, given="column",
)  # fmt: skip


def _pattern(example: str) -> Callable[[Callable[[Iterator[Match[str]], int], Ranges]], Pattern]:
    """Define a word that takes a regex; the decorated function says which characters it means."""

    def define(body: Callable[[Iterator[Match[str]], int], Ranges]) -> Pattern:
        word = Pattern(body.__name__, "text", " ".join((body.__doc__ or "").split()), example, body=body)
        REGISTRY.add(word)
        return word

    return define


@_pattern('1 if span("<answer>(.*?)</answer>") else 0.1')
def span(matches: Iterator[Match[str]], length: int) -> Ranges:
    """Whether the token is in a match of the regex in the response; in its group 1 where the regex has
    groups. The end token is in none."""
    return [match.span(min(1, match.re.groups)) for match in matches]


@_pattern('after("#### ")')
def after(matches: Iterator[Match[str]], length: int) -> Ranges:
    """Whether the token reaches past the end of the regex's first match in the response, as the end token
    does; false without a match."""
    first = next(matches, None)
    return [] if first is None else [(first.end(), length + 1)]


@_pattern('0.5 if before("####") else 1')
def before(matches: Iterator[Match[str]], length: int) -> Ranges:
    """Whether the token begins before the regex's first match in the response; true of the whole response,
    the end token included, without a match."""
    first = next(matches, None)
    return [(0, length + 1 if first is None else first.start())]
