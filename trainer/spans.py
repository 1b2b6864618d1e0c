"""Characters -> tokens: which tokens of a row stand where a regex, a range or a quoted text says.

Text is tokenised once, whole, and the token ids never change; a token is inside when its characters overlap
the range (law 12). Ranges count the characters of a response from 0; its end token stands behind the last.
"""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from priority_dsl import patterns
from trainer.chat import Rendered, Turn
from trainer.faults import DataFault
from trainer.rows import json_kind

Offsets = Sequence[tuple[int, int]]
Range = tuple[int, int]


class RegexFault(DataFault):
    """A regex of the rule that runs away on a row: the rule's mistake, so no row is left out for it."""


class TextTokens:
    """A tokenised row of text: for each token, which response it is of and which of its characters it has.

    A multi-byte character that is spread over several tokens belongs to all of them. A character that the
    tokenizer has merged into the one before (a combining mark) belongs to that one's token. What stands
    before a response's text in its turn counts as its first character, what stands behind it (the end token)
    as the one after its last. A token without characters of its own stands where the next one is.
    """

    def __init__(self, rendered: Rendered, offsets: Offsets, tokens: int) -> None:
        """`tokens` may be one more than there are offsets: an end token that was added to a plain text."""
        self.texts = [rendered.text[r.text] for r in rendered.responses]
        self.origins = [
            None if r.origin is None else (r.origin - r.start, r.length) for r in rendered.responses
        ]
        start, end = _whole_characters(rendered.text, offsets)
        opened = np.array([r.opened for r in rendered.responses])
        closed = np.array([r.closed for r in rendered.responses])
        if rendered.plain and (tokens > len(offsets) or offsets[-1][0] == offsets[-1][1]):
            behind = len(rendered.text)  # the end token of a plain text has no characters
            start, end = np.append(start[: tokens - 1], behind), np.append(end[: tokens - 1], behind + 1)
            closed[-1] += 1
        nearest = np.minimum(np.searchsorted(closed, start, side="right"), len(closed) - 1)
        inside = (opened[nearest] < end) & (start < closed[nearest])
        first = np.array([r.start for r in rendered.responses])[nearest]
        length = np.array([len(text) for text in self.texts])[nearest]
        self.start = np.clip(start - first, 0, length)
        self.end = np.maximum(np.clip(end - first, 0, length + 1), self.start + 1)
        self.response = np.where(inside, nearest, -1)

    def marked(self, ranges: Sequence[Sequence[Range]]) -> list[bool]:
        """Which tokens overlap one of the ranges of their response; those outside all responses do not."""
        found = np.zeros(len(self.response), dtype=bool)
        for number, (text, of_one) in enumerate(zip(self.texts, ranges, strict=True)):
            steps = np.zeros(len(text) + 3, dtype=np.int64)
            for start, end in of_one:
                if start < end:
                    steps[start] += 1
                    steps[end] -= 1
            covered = np.concatenate([[0], np.cumsum(np.cumsum(steps) > 0)])  # before character i
            mine = self.response == number
            found[mine] = covered[self.end[mine]] > covered[self.start[mine]]
        return found.tolist()

    def matched(self, word: str, pattern: str, place: str, rule: str) -> list[bool]:
        """Which tokens `span`, `after` or `before` marks; `DataFault` where the regex runs away."""
        try:
            return self.marked([patterns.ranges(word, pattern, text) for text in self.texts])
        except TimeoutError as error:
            shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
            raise RegexFault(
                f'{place}: rule `{rule}`: the regex of `{word}("{shown}")` took more than '
                f"{patterns.SECONDS:g} s on this row's response and was stopped; write it so that a text "
                "can be matched in one way only, `[^<]*` for `.*` or `a++` for `(a+)+`"
            ) from error

    def within(self, entries: object, where: str) -> list[bool]:
        """Which tokens a value of a column of `spans` marks: ranges `[start, end]` and quoted texts.

        Ranges are half-open and count the characters of the row's own response. `DataFault` for what is
        neither, for a range outside the response, for ranges where there are several responses and for quoted
        texts that are not there.
        """
        if not isinstance(entries, list):
            raise DataFault(
                f"{where} must be a list of [start, end] and of quoted texts, this is {json_kind(entries)}"
            )
        found: list[list[Range]] = [[] for _ in self.texts]
        missing = []
        for entry in entries:
            if isinstance(entry, str):
                quoted = [_occurrences(entry, text) for text in self.texts] if entry else []
                if not any(quoted):
                    shown = entry if len(entry) <= 80 else f"{entry[:80]}..."
                    missing.append(json.dumps(shown, ensure_ascii=False))
                for ranges, more in zip(found, quoted, strict=False):
                    ranges += more
            else:
                found[0].append(self._own_range(entry, where))
        if missing:
            what = f"{where} quotes what is not in the response, letter by letter"
            raise DataFault(f"{what}: {', '.join(missing)}")
        return self.marked(found)

    def _own_range(self, entry: object, where: str) -> Range:
        """A range of the row's own response as one of the text that the template shows."""
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(i) is int for i in entry)):
            raise DataFault(
                f"{where} holds {reprlib.repr(entry)}, which is neither [start, end] nor a quoted text"
            )
        if len(self.texts) > 1:
            raise DataFault(
                f"{where} has character ranges, and the row {len(self.texts)} assistant messages; quote the "
                "texts, or give each message a row of its own"
            )
        if self.origins[0] is None:
            raise DataFault(
                f"{where} has character ranges, and the chat template changes the response; quote the texts"
            )
        origin, length = self.origins[0]
        start, end = entry
        if not 0 <= start <= end <= length:
            raise DataFault(
                f"{where} holds {entry}, which is no range of the response's {length} characters: "
                "[start, end), counted from 0"
            )
        low, high = (min(max(0, origin + i), len(self.texts[0])) for i in (start, end))
        return low, high


def _occurrences(quote: str, text: str) -> list[Range]:
    found, at = [], text.find(quote)
    while at >= 0:
        found.append((at, at + len(quote)))
        at = text.find(quote, at + 1)
    return found


def _whole_characters(text: str, offsets: Offsets) -> tuple[np.ndarray, np.ndarray]:
    """The offsets as starts and ends, none empty, marks that were merged into a character with it."""
    span = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    start, end = span[:, 0], span[:, 1]
    steps = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(steps, start, 1)
    np.add.at(steps, end, -1)
    merged = np.cumsum(steps) <= 0
    merged[-1] = False
    for place in np.flatnonzero(merged):
        merged[place] = not text[place].isspace()
    own = np.where(merged, len(text), np.arange(len(text) + 1))  # what is not merged, else the end
    until = np.minimum.accumulate(own[::-1])[::-1]
    end = np.where(end > start, until[end], end)
    return start, np.maximum(end, start + 1)


# The response mask ------------------------------------------------------------------------------


def mark_tokens(offsets: Offsets, turns: Sequence[Turn]) -> tuple[list[bool], list[str | None]]:
    """Which tokens are the response and who speaks at each, from character offsets.

    A token is in a turn when its characters overlap it; one that reaches into a response belongs to it. A
    token without characters (a begin token) stands where the next one is. Outside all turns the role is None.
    """
    span = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    start, end = span[:, 0], np.maximum(span[:, 1], span[:, 0] + 1)
    response, _ = _covered(start, end, [turn for turn in turns if turn.response])
    spoken, roles = _covered(start, end, [turn for turn in turns if not turn.response])
    roles[~spoken] = None
    roles[response] = "assistant"
    return response.tolist(), roles.tolist()


def _covered(start: np.ndarray, end: np.ndarray, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """Which character ranges overlap a turn, and the role of the first turn that does not end before them."""
    ends = np.array([turn.end for turn in turns] + [np.iinfo(np.int64).max])
    starts = np.array([turn.start for turn in turns] + [np.iinfo(np.int64).max])
    roles = np.array([turn.role for turn in turns] + [None], dtype=object)
    nearest = np.searchsorted(ends, start, side="right")
    return starts[nearest] < end, roles[nearest]


# Offsets ----------------------------------------------------------------------------------------


@contextmanager
def untrimmed(tokenizer: Any) -> Iterator[None]:
    """A fast tokenizer whose offsets keep the whitespace of a token, which some leave out; the ids stay."""
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    state = b"" if before is None else before.__getstate__()
    if before is None or b'"trim_offsets":true' not in state:
        yield
        return
    whole = copy.deepcopy(before)
    whole.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
    backend.post_processor = whole
    try:
        yield
    finally:
        backend.post_processor = before
