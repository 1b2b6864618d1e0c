"""Numbers and boxed expressions in the text of an answer."""

from __future__ import annotations

import re
from fractions import Fraction

# A number: sign, thousands separators or plain digits, decimals, exponent; or a fraction of two of them.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
PLAIN = rf"(?:{DIGITS})(?:[eE][-+]?\d{{1,3}}(?![\w.]))?"
FRAC = r"\\[dt]?frac\s*\{\s*(?P<over>-?\d+)\s*\}\s*\{\s*(?P<under>\d+)\s*\}"
# A minus after a word or a number takes away; a digit inside a word, as in x2, is no number.
NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![\w)\]}}])(?P<sign>[-−]\s?))?[$€£]?"
    rf"(?:{FRAC}|(?P<first>{PLAIN})(?:\s*/\s*(?P<second>{PLAIN}))?)"
)
SET = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol|displaystyle)\s*\{([^{}]*)\}", re.DOTALL)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")


def boxed_contents(text: str) -> list[str]:
    r"""What stands in each `\boxed{...}`, with the braces in it, in order; none for an unclosed one."""
    found = []
    for match in BOX.finditer(text):
        depth, escaped = 0, False
        for place in range(match.end(), len(text)):
            sign = text[place]
            if escaped or sign == "\\":
                escaped = not escaped
                continue
            depth += (sign == "{") - (sign == "}")
            if depth == 0:
                found.append(text[match.end() + 1 : place])
                break
    return found


def bare(expression: str) -> str:
    """An expression without what only sets it: a font around all of it, dollars, a full stop, (27) as 27."""
    before = None
    while before != expression:
        before = expression
        expression = expression.strip().strip("$").removesuffix(".").strip()
        if (match := SET.fullmatch(expression)) and match[1].count("{") == match[1].count("}"):
            expression = match[1]
    return re.sub(r"^\((\d+)\)$", r"\1", expression)


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text in order, exactly: `-1,234.5`, `$3`, `3/4`, `\\frac{3}{4}`, `1e-3`, `50%`: 50."""
    plain = (
        text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\\$", "$").replace("−", "-")
    )
    found = []
    for match in NUMBER.finditer(plain):
        over, under = match["over"] or match["first"], match["under"] or match["second"] or "1"
        value = [Fraction(part.replace(",", "")) for part in (over, under)]
        if value[1]:
            found.append((-1 if match["sign"] else 1) * value[0] / value[1])
    return found


def value_of(text: str) -> Fraction | None:
    """The number that an answer ends in: after the last ####, in the last box, or the last of all."""
    _, marked, final = text.rpartition("####")
    if marked and (there := numbers(final)):
        return there[0]
    if (boxes := boxed_contents(text)) and (there := numbers(boxes[-1])):
        return there[-1]
    there = numbers(text)
    return there[-1] if there else None


def same_number(a: Fraction, b: Fraction, tolerance: Fraction = Fraction(1, 10**6)) -> bool:
    """Whether two numbers are equal: whole ones exactly, others within a millionth of the larger."""
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
