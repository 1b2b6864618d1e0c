"""What is wrong with a text, in the language's words: one function for each kind of syntax error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lark import Token

from priority_dsl.diagnostics import Diagnostic, Span, did_you_mean
from priority_dsl.nodes import Doc, Statement, Weight
from priority_dsl.spelling import DEEPEST, KEYWORDS, ONCE, RESERVED

TYPES = ("bool", "number", "category", "text", "spans")
EXTENTS = ("token", "example", "pair")
PARTS = ("response", "all")
DENOMINATORS = ("tokens", "kept", "weights", "none", "examples", "groups")

# How to say it instead, by the sign that was found.
INSTEAD = {
    "&": "write `and`",
    "&&": "write `and`",
    "|": "write `or`",
    "||": "write `or`",
    "!": "write `not`",
    "~": "write `not`",
    "^": "write `**` for a power",
    "===": "write `==`",
    "!==": "write `!=`",
    "<>": "write `!=`",
    "=>": "write `>=`",
    "=<": "write `<=`",
    ":=": "write `let NAME = ...` as a statement of its own",
    "//": "there is no integer division; `/` divides, and a comment starts with `#`",
    "%": "there is no remainder, and 20 % is written 0.2",
    "@": "there is no matrix product",
    ".": "there are no attributes or methods; every function is a plain word, as in `entropy(on)`",
    "?": "a choice is written `a if c else b`",
    "->": "there are no arrows; a comparison is `>`",
    "$": "names stand without a sign before them",
    "`": "names stand without quotes",
    "\\": "an expression in brackets may run over several lines without a sign at the line's end",
    "≥": "write `>=`",
    "≤": "write `<=`",
    "≠": "write `!=`",
    "−": "write `-` (this is a typographic minus)",
    "–": "write `-` (this is a dash)",
    "×": "write `*`",
    "·": "write `*`",
    "÷": "write `/`",
    "∞": "write `inf`",
    "\u00a0": "this is a no-break space: write a plain one",
    "²": "write `** 2`",
    "∈": "write `in`",
    "∧": "write `and`",
    "∨": "write `or`",
    "¬": "write `not`",
}
QUOTES = "'‘’“”„«»"
CHAINS = {"IN", "NOT", "COMPARISON"}
WORDLIKE = {"NAME", "NUMBER", "STRING", "INF"}
COMPOUND = {"+=", "-=", "*=", "/="}

# What could stand somewhere, in the order in which a message lists it.
OPERAND = {"NAME", "NUMBER", "LPAR"}
OPERATOR = {"PLUS", "STAR"}
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
    return f"`{shown}`" if shown != "`" else "a backquote"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def junk(token: Token) -> Diagnostic:
    """A character that the language does not have (PD101), or a string without its end (PD104)."""
    if token.type == "UNCLOSED_DOC":
        span = Span(token.start_pos or 0, (token.start_pos or 0) + 3)
        return Diagnostic("PD104", "a description that never ends", span, help='end it with `"""`')
    if token.type == "UNCLOSED_STRING":
        way_out = 'end it with `"` on the same line; a quote inside is written `\\"`'
        return Diagnostic("PD104", "a string that never ends", _span(token), help=way_out)
    what = "character" if len(token) == 1 else "characters"
    return Diagnostic("PD101", f"unexpected {what} {_quoted(token)}", _span(token), help=_say_instead(token))


def _say_instead(token: str) -> str:
    if token in INSTEAD:
        return INSTEAD[token]
    if token[0] in QUOTES:
        inside = token.strip(QUOTES)
        return f'strings stand in double quotes: `"{inside}"`' if inside else 'strings stand in `"` quotes'
    if token in COMPOUND:
        return "there is no assignment to a value that exists; `let` names a new one"
    if token[0] in INSTEAD and not token.isascii():
        return INSTEAD[token[0]]
    if token[0].isalnum():
        return "names are made of the letters a to z and A to Z, digits and `_`: write it out, as in `tau`"
    return "no rule uses it outside a string or a comment"


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
    return Diagnostic("PD107", message, _span(token), help=f"another name, for example `{token}_`")


def unknown_choice(token: Token, choices: Sequence[str]) -> Diagnostic:
    """A word that is none of the possible ones (PD109)."""
    offer = did_you_mean(str(token).strip('"'), choices)
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
    label = "expected " + _either(_expected(possible))
    choices = choices_at(tokens, place)
    if place == len(tokens):
        end = tokens[-1].end_pos or 0
        way_out = f"one of {', '.join(choices)}" if choices else _unfinished(tokens, possible)
        return Diagnostic("PD102", "the statement is not finished", Span(end, end + 1), label, way_out)
    token = tokens[place]
    if choices and (tokens[0].type != "COLUMN" or token.type != "LBRACE"):
        return unknown_choice(token, choices)
    if place == 1 and "NAME" in possible and tokens[0].type in DECLARING and token in RESERVED:
        return reserved(token)
    kind = "word" if token[0].isalpha() else "number" if token.type == "NUMBER" else "sign"
    kind = "string" if token.type == "STRING" else "description" if token.type == "DOC" else kind
    way_out = _way_out(tokens, place, possible)
    return Diagnostic("PD102", f"unexpected {kind} {_quoted(token)}", _span(token), label, way_out)


DECLARING = {"PARAM", "MODEL", "COLUMN", "LET"}


def _expected(possible: set[str]) -> list[str]:
    """The kinds of token as a reader would call them."""
    words = []
    if possible >= OPERAND:
        words.append("a value")
    else:
        words += ["a name"] if "NAME" in possible else []
        words += ["a number"] if "NUMBER" in possible else []
        words += ['a text in `"`'] if "STRING" in possible else []
        words += ["`(`"] if "LPAR" in possible and not possible >= OPERATOR else []
        words += ["`[`"] if "LSQB" in possible else []
    operator = possible >= OPERATOR
    words += ["an operator"] if operator else []
    words += [word for kind, word in WORDS.items() if kind in possible and not (operator and kind == "IN")]
    return words or ["something else"]


def _unfinished(tokens: Sequence[Token], possible: set[str]) -> str:
    if possible >= OPERAND and len(tokens) > 1:
        return "a statement ends with its line; in brackets an expression may run over several lines"
    if possible == {"ELSE"}:
        return ""
    return ""


def _way_out(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    """What the writer may have meant."""
    token = tokens[place]
    before = tokens[place - 1] if place else None
    for matches, way_out in WAYS_OUT:
        if matches(token, before, possible):
            return way_out(tokens, place) if callable(way_out) else way_out
    return ""


def _assignment(tokens: Sequence[Token], place: int) -> str:
    if place == 1 and tokens[0].type == "NAME":
        name = str(tokens[0])
        other = f"`let {name} = ...` names a value, `param {name} = 0.5` a number that the run may set"
        return did_you_mean(name, KEYWORDS, other)
    return "`==` compares; `=` stands in statements and before the value of a keyword argument"


def _misspelt(tokens: Sequence[Token], place: int) -> str:
    if place == 1:
        return did_you_mean(str(tokens[0]), KEYWORDS, "is an operator missing between the two?")
    if tokens[place - 1].type == "NUMBER":
        return f"write `{tokens[place - 1]} * {tokens[place]}` for a product"
    return "is an operator or a `,` missing between the two?"


Way = tuple[Callable[[Token, "Token | None", set[str]], bool], "str | Callable[[Sequence[Token], int], str]"]


def _is(*kinds: str) -> Callable[..., bool]:
    return lambda token, before, possible: token.type in kinds


# The first that fits says what to do: whether it fits (the token, the one before, what could stand there).
WAYS_OUT: list[Way] = [
    (_is("TRUTH"), "write 1 or 0, or a condition such as `p_on > 0.5`"),
    (_is("EQUAL"), _assignment),
    (_is("LSQB"), "there are no lists and no indexing; `[` starts a range in `param` and `column`"),
    (_is("LBRACE"), "a set stands behind `in`, or is the type of a `column`"),
    (lambda t, b, p: t.type == "PLUS" and b is not None and p >= OPERAND, "leave it out: only `-` is a sign"),
    (lambda t, b, p: b is None, "an expression ends with its line, unless it stands in brackets"),
    (_is("DOC"), 'a description is the first statement of a rule; a string stands in `"`'),
    (_is("COLON"), "a choice is written `a if c else b`"),
    (_is("ELSE"), "`else` needs an `if` before it, as in `a if c else b`"),
    (lambda t, b, p: t.type == "IF" and p >= OPERAND, "a choice is written `a if c else b`"),
    (lambda t, b, p: p == {"LBRACE"}, "`in` takes a set, as in `label in {pos, neg}`"),
    (lambda t, b, p: t.type in CHAINS and "AND" in p, "`in` does not chain: use brackets, or `and`"),
    (lambda t, b, p: t in KEYWORDS and "$END" in p, "a statement starts on its own line, or behind `;`"),
    (lambda t, b, p: t in KEYWORDS, "it is a word of the language and means nothing here"),
    (lambda t, b, p: t == "is", "write `==`"),
    (lambda t, b, p: b == "lambda", "there are no functions to define; `let` names a value"),
    (lambda t, b, p: t.type in WORDLIKE and p >= OPERATOR, _misspelt),
]


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
        seen.setdefault(statement.kind, statement)  # type: ignore[attr-defined]
    if None not in statements and not seen.keys() & {"weight", "loss", "keep"}:
        way_out = "give the weight of each token, for example `weight = p_on`"
        findings.append(Diagnostic("PD112", "the rule says nothing", Span(0, 0), help=way_out))
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
        way_out = "name it: `let NAME = ...` or `weight = ...`"
        return "an expression that stands alone is the last statement", way_out
    if kind in ONCE and kind in seen:
        what = "description" if kind == "doc" else f"`{kind}`"
        way_out = "an expression that stands alone is the weight: " if bare else ""
        return f"the rule has a {what} already", f"{way_out}keep one of the two"
    if isinstance(statement, Doc) and place:
        return "the description is not the first statement", "move it to the top"
    return None
