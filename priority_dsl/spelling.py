"""How the words of the language are spelt: reserved words, limits, and what a text in a tree may hold.

The types at the end are strings and numbers that `format_rule` can write and `parse` reads back.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator

DEEPEST = 100  # levels of a tree
LONGEST = 20_000  # characters of a text

KEYWORDS = frozenset(
    "if else and or not in param model column let weight loss keep over normalize cite per".split()
)
SCOPES = frozenset({"example", "batch", "dataset", "chunk", "window", "draws"})
RESERVED = KEYWORDS | SCOPES | {"inf", "True", "False"}
ONCE = ("doc", "weight", "loss", "keep", "over", "normalize")  # statements that a rule has at most one of
SURROGATE = re.compile("[\ud800-\udfff]+")  # halves of a character, which no UTF-8 file can hold


def _characters(text: str) -> str:
    if SURROGATE.search(text):
        raise ValueError("half a character (a lone surrogate) cannot be written to a file")
    return text


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text or text.endswith("\\"):
        raise ValueError('a string is one line and does not end in a backslash (only `\\"` is an escape)')
    return text


def _documentation(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if '"""' in text or text.endswith('"'):
        raise ValueError('a description holds no `"""` and does not end in a quote')
    return text


def _comment(text: str) -> str:
    if not text.startswith("#") or "\n" in text or "\r" in text or text != text.rstrip():
        raise ValueError("a comment starts with `#` and is one line without trailing blanks")
    return text


def _magnitude(value: float) -> float:
    if math.copysign(1.0, value) < 0:
        raise ValueError("a number is not negative (write a unary minus)")
    return value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("there is no NaN in the language")
    return value


def is_name(text: str) -> bool:
    """Whether a text has the form of a name: ASCII letters, digits and `_`, no digit first."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None


def _identifier(text: str) -> str:
    if text in RESERVED - SCOPES - {"weight"} or not is_name(text):
        raise ValueError(f"`{text}` is not a name")
    return text


def _word(text: str) -> str:
    if text == "weight":
        raise ValueError("`weight` is a value, not a function or an argument")
    return text


def _declared(text: str) -> str:
    if text in RESERVED or not is_name(text):
        raise ValueError(f"`{text}` is not a name that a rule can declare")
    return text


Identifier = Annotated[str, AfterValidator(_identifier)]  # what an expression reads
Word = Annotated[Identifier, AfterValidator(_word)]  # a function or a keyword argument
Declared = Annotated[str, AfterValidator(_declared)]  # what a statement declares
Text = Annotated[str, AfterValidator(_characters)]
Line = Annotated[Text, AfterValidator(_one_line)]
Description = Annotated[Text, AfterValidator(_documentation)]
Comment = Annotated[Text, AfterValidator(_comment)]
Real = Annotated[float, AfterValidator(_not_nan)]
Magnitude = Annotated[Real, AfterValidator(_magnitude)]
