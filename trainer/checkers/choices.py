"""Which option of a multiple-choice row a text chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase

from trainer.checkers.numbers_in_text import boxed_contents

KEYS = ("answer_idx", "answer_key", "answerKey", "label", "cop", "answer")  # fields that may name the letter
SAID = re.compile(
    r"(?i:answer|option|choice)(?:\s+is|\s*:)?\s*:?\s*[*_\"'(\[\\]*(?:text\{)?\(?([A-Z])(?![\w'])"
)
AFTER = re.compile(r"(?i:answer|option|choice)(?:\s+is\b|\s*:)\s*:?\s*(.+)")
ALONE = re.compile(r"[\s*_\"'(\[]*([A-Z])(?:[\s*_\"')\].:,;]|$)")


def options_of(row: Mapping[str, object]) -> dict[str, str]:
    """The options of a row by letter: `options` or `choices` as object, list or texts with labels; or opa...

    Raises ValueError for a row without them.
    """
    given = next((row[name] for name in ("options", "choices") if row.get(name)), None)
    if given is None and "opa" in row:
        given = [row[f"op{letter}"] for letter in "abcde" if row.get(f"op{letter}") is not None]
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        labels = given.get("label") or ascii_uppercase
        return {str(key).upper(): str(text) for key, text in zip(labels, given["text"], strict=False)}
    if isinstance(given, dict) and given:
        return {str(key).upper(): str(text) for key, text in given.items()}
    if isinstance(given, list) and given:
        return dict(zip(ascii_uppercase, map(str, given), strict=False))
    raise ValueError("the row has no options (fields options, choices, or opa to opd)")


def choose(text: str, row: Mapping[str, object], key: bool = False) -> set[str]:
    """The letters that a text chooses; several where options have the same text, none where it is unclear.

    `key`: the text is the row's reference; a field of the row that names a letter or number goes before it.
    """
    options = options_of(row)
    if key and (named := _named(row, options)):
        return {named}
    for part in boxed_contents(text)[-1:]:
        if found := _letter(part, options) or _by_text(part, options):
            return found
    for after in AFTER.findall(text)[-1:]:
        if found := _whole(after, options):
            return found
    said = [letter for letter in SAID.findall(text) if letter in options]
    if said:
        return {said[-1]}
    return _whole(text, options) or _letter(text, options) or _by_text(text, options)


def _named(row: Mapping[str, object], options: Mapping[str, str]) -> str | None:
    for name in KEYS:
        value = row.get(name)
        if isinstance(value, str) and value.strip().upper() in options:
            return value.strip().upper()
        # numbers count the options from 0
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
            return list(options)[value]
    return None


def _letter(text: str, options: Mapping[str, str]) -> set[str]:
    """The letter that a text begins with, standing alone."""
    match = ALONE.match(text)
    whole = match is not None and match.end() == len(text.rstrip())
    if match is None or match[1] not in options:
        return set()
    # `A patient with ...` begins with a word, not with an option.
    return {match[1]} if whole or not re.match(r"\s*[A-Z]\s+\w", text) else set()


def _whole(text: str, options: Mapping[str, str]) -> set[str]:
    """The options whose text is all of the text; a text that is a letter means the letter."""
    if _plain(text).upper() in options:
        return set()
    return {letter for letter, option in options.items() if _plain(option) == _plain(text)}


def _by_text(text: str, options: Mapping[str, str]) -> set[str]:
    """The options whose text is the text, or the longest that it holds if no other stands apart from it."""
    plain = _plain(text)
    if same := _whole(text, options):
        return same
    held = {letter: _plain(option) for letter, option in options.items()}
    held = {
        letter: o for letter, o in held.items() if o and re.search(rf"(?<!\w){re.escape(o)}(?!\w)", plain)
    }
    longest = max(held.values(), key=len, default="")
    return (
        {letter for letter, o in held.items() if o == longest}
        if all(o in longest for o in held.values())
        else set()
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .\n\t*\"'").split())
