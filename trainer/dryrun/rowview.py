"""Rows token by token with the weight of each token below it, in colour where there is any.

Without colour everything can still be read: weights are numbers, ignored tokens have a dot in their place.
Special tokens have their names, spaces and line breaks have signs, bytes that are no whole character are
shown as `<0xE2>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIGNS = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
IGNORED = "·"  # in place of a weight
EDGE = 12  # ignored tokens that stay at each end of a stretch
MOST = 400  # tokens of a row that are shown
LEGEND = (
    "token above, its weight below; dim and `·`: not trained on; red: 0; yellow to green: up to 1 and more; "
    "magenta: below 0"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A token as it is shown: what it reads, its weight (None where it is ignored), or a note without one."""

    text: str
    weight: float | None = None
    note: bool = False

    @property
    def below(self) -> str:
        """What stands below the token."""
        if self.note:
            return ""
        return IGNORED if self.weight is None else weight_text(self.weight)

    @property
    def style(self) -> str:
        """The colour by what the token counts."""
        if self.weight is None:
            return "dim"
        if self.weight <= 0:
            return "red" if self.weight == 0 else "bold magenta"
        return "yellow" if self.weight < 0.5 else "green" if self.weight < 1 else "bold green"


def cells_of(pieces: Sequence[str], weights: Sequence[float | None]) -> list[Cell]:
    """The tokens of a row as cells, without the middle of long ignored stretches and what is too long."""
    cells: list[Cell] = []
    at = 0
    while at < len(pieces) and at < MOST:
        end = at
        while end < len(pieces) and weights[end] is None:
            end += 1
        if end - at > 3 * EDGE:
            cells += [Cell(piece) for piece in pieces[at : at + EDGE]]
            cells.append(Cell(f"[... {end - at - 2 * EDGE} ignored tokens ...]", note=True))
            cells += [Cell(piece) for piece in pieces[end - EDGE : end]]
            at = end
        else:
            cells.append(Cell(pieces[at], weights[at]))
            at += 1
    if at < len(pieces):
        cells.append(Cell(f"[... {len(pieces) - at} more tokens]", note=True))
    return cells


def lines_of(cells: Sequence[Cell], width: int, encoding: str = "utf-8") -> Iterator[Text]:
    """The cells in pairs of lines, tokens and what is below them, none wider than `width` where it can be."""
    above, below, used = Text(no_wrap=True), Text(no_wrap=True), 0
    for cell in cells:
        shown, under = encodable(cell.text, encoding), encodable(cell.below, encoding)
        size = max(cell_len(shown), cell_len(under))
        if used and used + 1 + size > width:
            yield from (above, below)
            above, below, used = Text(no_wrap=True), Text(no_wrap=True), 0
        gap = " " if used else ""
        above.append(gap).append(shown + " " * (size - cell_len(shown)), cell.style)
        below.append(gap).append(under + " " * (size - cell_len(under)), cell.style)
        used += size + len(gap)
    if used:
        yield from (above, below)


def show(console: Console, cells: Sequence[Cell]) -> None:
    """Print cells as wide as the console is."""
    for line in lines_of(cells, console.width, console.encoding):
        line.rstrip()
        console.print(line, soft_wrap=True)


def encodable(text: str, encoding: str) -> str:
    """The text as a terminal of this encoding can show it."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def weight_text(weight: float) -> str:
    """A weight in a few characters; `0` and `1` are exactly these."""
    if weight in (0, 1, -1):
        return f"{weight:.0f}"
    if abs(weight) < 0.005 or abs(weight) >= 1000:
        return re.sub(r"e([+-])0?", r"e\1", f"{weight:.0e}").replace("e+", "e")
    return f"{weight:.2f}"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """How each token reads by itself, its leading space among it."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    known: dict[int, str] = {}
    for i in dict.fromkeys(ids):
        name = tokenizer.convert_ids_to_tokens(i)
        if i in special:
            known[i] = name
            continue
        after = tokenizer.decode([*anchor, i], clean_up_tokenization_spaces=False)
        text = after[len(before) :] if after.startswith(before) else str(name)
        known[i] = "".join(map(_sign, text)) if text and "\ufffd" not in text else _bytes(str(name))
    return [known[i] for i in ids]


def _sign(char: str) -> str:
    if char in SIGNS:
        return SIGNS[char]
    return char if char.isprintable() else f"<{ord(char):#06x}>"


def _bytes(name: str) -> str:
    """A token that is a part of a character, byte by byte."""
    numbers = {char: number for number, char in bytes_to_unicode().items()}
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name) or not all(char in numbers for char in name):
        return name
    return "".join(f"<0x{numbers[char]:02X}>" for char in name)
