"""What is wrong with a text, in the language's words: one function for each kind of syntax error."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from priority_dsl.diagnostics import Diagnostic, Span, did_you_mean
from priority_dsl.nodes import Doc, Statement, Weight
from priority_dsl.spelling import DEEPEST, ONCE, RESERVED, is_name
from priority_dsl.ways_out import OPERAND, OPERATORS, instead, unfinished, way_out

TYPES = ("bool", "number", "category", "text", "spans")
EXTENTS = ("token", "example", "pair")
PARTS = ("response", "all")
DENOMINATORS = ("tokens", "kept", "weights", "none", "examples", "groups")

# What other languages call the types of a column.
SYNONYMS = {"float": "number", "int": "number", "str": "text", "string": "text", "label": "category"}

DECLARING = {"PARAM", "MODEL", "COLUMN", "LET"}

# What could stand somewhere, in the order in which a message lists it.
WORDS = {
    "ELSE": "`else`",
    "EQUAL": "`=`",
    "COLON": "`:`",
    "IN": "`in`",
    "PER": "`per`",
    "COMMA": "`,`",
    "RPAR": "`)`",
    "RSQB": "`]`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "$END": "the end of the statement",
}


def _span(token: Token) -> Span:
    return Span(token.start_pos or 0, token.end_pos or 0)


def _quoted(token: str) -> str:
    """A piece of the text as a message shows it: short, on one line, nothing invisible."""
    cut = token if len(token) <= 30 else token[:27] + "..."
    shown = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in cut)
    return f"`{shown}`" if "`" not in shown else f"'{shown}'"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def junk(token: Token) -> Diagnostic:
    """A character that the language does not have (PD101), or a string without its end (PD104)."""
    if token.type == "UNCLOSED_DOC":
        span = Span(token.start_pos or 0, (token.start_pos or 0) + 3)
        return Diagnostic("PD104", "a description that never ends", span, help='end it with `"""`')
    if token.type == "UNCLOSED_STRING":
        way = 'end it with `"` on the same line; a quote inside is written `\\"`'
        return Diagnostic("PD104", "a string that never ends", _span(token), help=way)
    what = "character" if len(token) == 1 else "characters"
    return Diagnostic("PD101", f"unexpected {what} {_quoted(token)}", _span(token), help=instead(token))


def unclosed(token: Token) -> Diagnostic:
    """A bracket that is never closed (PD103)."""
    closing = {"(": ")", "[": "]", "{": "}"}[str(token)]
    return Diagnostic("PD103", f"`{token}` is never closed", _span(token), help=f"add the `{closing}`")


def unopened(token: Token, innermost: Token | None) -> Diagnostic:
    """A closing bracket that closes nothing (PD103)."""
    if innermost is None:
        message, label = f"`{token}` closes nothing", "no bracket is open here"
    else:
        message, label = f"`{token}` does not close `{innermost}`", f"`{innermost}` is still open here"
    return Diagnostic("PD103", message, _span(token), label, help="take it away, or add its partner")


def too_deep(span: Span) -> Diagnostic:
    """A tree, or brackets, of too many levels (PD106)."""
    message = f"the expression has more than {DEEPEST} levels"
    return Diagnostic("PD106", message, span, help="give parts of it a name with `let`")


def reserved(token: Token) -> Diagnostic:
    """A word of the language where a statement declares a name (PD107)."""
    message = f"`{token}` is a word of the language and cannot be a name"
    return Diagnostic("PD107", message, _span(token), help=f"choose another, for example `{token}_`")


def unknown_choice(token: Token, choices: Sequence[str]) -> Diagnostic:
    """A word that is none of the possible ones (PD109)."""
    word = SYNONYMS.get(token, str(token).strip('"'))
    offer = did_you_mean(word, choices, f"for example `{choices[0]}`")
    label = "expected " + _either([f"`{c}`" for c in choices])
    return Diagnostic("PD109", f"unknown choice {_quoted(token)}", _span(token), label, offer)


def choices_at(tokens: Sequence[Token], place: int) -> tuple[str, ...]:
    """The words that may stand at a place of a statement; empty where that is not a short list."""
    first = tokens[0].type
    if place == 2 and tokens[1].type == "EQUAL" and first in ("OVER", "NORMALIZE"):
        return PARTS if first == "OVER" else DENOMINATORS
    if first == "COLUMN" and place == 3:
        return TYPES
    if first == "COLUMN" and place > 3 and tokens[place - 1].type == "PER":
        return EXTENTS
    return ()


def unexpected(tokens: Sequence[Token], place: int, possible: set[str]) -> Diagnostic:
    """A word or sign where it cannot stand (PD102), or a more telling error of the same place.

    `possible` are the kinds of token that could stand at `place`; `place` is past the end where the
    statement stops too early.
    """
    choices = choices_at(tokens, place)
    label = "expected " + _either([f"`{c}`" for c in choices] or _expected(possible))
    if place == len(tokens):
        end = tokens[-1].end_pos or 0
        way = unfinished(tokens, possible)
        return Diagnostic("PD102", "the statement is not finished", Span(end, end + 1), label, way)
    token = tokens[place]
    if choices and token.type != "LBRACE":
        return unknown_choice(token, choices)
    if place == 1 and "NAME" in possible and tokens[0].type in DECLARING and token in RESERVED:
        return reserved(token)
    message = f"unexpected {_kind(token)} {_quoted(token)}"
    return Diagnostic("PD102", message, _span(token), label, way_out(tokens, place, possible))


def _kind(token: Token) -> str:
    if token.type in ("NUMBER", "STRING"):
        return token.type.lower()
    if token.type == "DOC":
        return "description"
    return "word" if is_name(token) else "sign"


def _expected(possible: set[str]) -> list[str]:
    """The kinds of token as a reader would call them."""
    words = []
    if possible >= OPERAND:
        words.append("a value")
    else:
        words += ["a name"] if "NAME" in possible else []
        words += ["a number"] if "NUMBER" in possible else []
        words += ['a text in `"`'] if "STRING" in possible else []
        words += ["`(`"] if "LPAR" in possible and not possible & OPERATORS else []
        words += ["`[`"] if "LSQB" in possible else []
    operator = bool(possible & OPERATORS)
    words += ["an operator"] if operator else []
    words += [word for kind, word in WORDS.items() if kind in possible and not (operator and kind == "IN")]
    return words or ["something else"]


def misplaced(statements: Sequence[Statement | None]) -> list[Diagnostic]:
    """Statements that are repeated or out of place (PD108), and a rule that says nothing (PD112).

    `statements` are in the order of the text; None is one that could not be read.
    """
    findings: list[Diagnostic] = []
    seen: dict[str, Statement] = {}
    for place, statement in enumerate(statements):
        if statement is None:
            continue
        if message := _out_of_place(statements, place, seen):
            findings.append(Diagnostic("PD108", message[0], statement.span, help=message[1]))
            continue
        seen.setdefault(statement.kind, statement)  # type: ignore[attr-defined]
    if None not in statements and not findings and not seen.keys() & {"weight", "loss", "keep"}:
        way = "give the weight of each token, for example `weight = p_on`"
        findings.append(Diagnostic("PD112", "the rule says nothing", Span(0, 0), help=way))
    return findings


def _out_of_place(
    statements: Sequence[Statement | None], place: int, seen: dict[str, Statement]
) -> tuple[str, str] | None:
    """What is wrong with the place of a statement, and the way out."""
    statement = statements[place]
    bare = isinstance(statement, Weight) and statement.bare
    kind = statement.kind  # type: ignore[union-attr]
    if bare and place + 1 < len(statements):
        if statements[place + 1] is None:
            return None
        way = "name it: `let NAME = ...` or `weight = ...`"
        return "an expression that stands alone is the last statement", way
    if kind in ONCE and kind in seen:
        what = "the description" if kind == "doc" else f"`{kind}`"
        way = "an expression that stands alone is the weight: " if bare else ""
        return f"{what} is given twice", f"{way}keep one of the two"
    if isinstance(statement, Doc) and place:
        return "the description is not the first statement", "move it to the top"
    return None
