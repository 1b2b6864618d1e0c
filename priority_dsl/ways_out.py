"""The way out of a syntax error: what the writer of an unexpected character or word may have meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lark import Token

from priority_dsl.diagnostics import did_you_mean
from priority_dsl.spelling import KEYWORDS

Fits = Callable[[Token, Token | None, set[str]], bool]
WayOut = Callable[[Sequence[Token], int, set[str]], str]

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
    "=>": "write `>=`, or `=` before the value of an argument",
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
COMPOUND = {"+=", "-=", "*=", "/="}
QUOTES = "'‘’“”„«»"

# How a statement looks, by its first word.
EXAMPLES = {
    "CITE": 'cite "paper, equation"',
    "PARAM": "param tau = 0.5 in [0, 1]",
    "MODEL": 'model curated "what to bind"',
    "COLUMN": "column label: {pos, neg} per example",
    "LET": "let surprise = nll(on) - nll(ref)",
    "WEIGHT": "weight = mass(ref) >= 0.5",
    "LOSS": "loss = weight * nll(on)",
    "KEEP": "keep = mean(p_ref, example) > 0.1",
    "OVER": "over = all",
    "NORMALIZE": "normalize = groups(label)",
}
STARTING = [word.lower() for word in EXAMPLES]

# Kinds of token, as the grammar calls them.
OPERAND = {"NAME", "NUMBER", "LPAR"}  # all of them, where a value could stand
OPERATORS = {"PLUS", "STAR", "POWER", "COMPARISON", "AND", "OR"}  # any of them, where an operator could
MEMBER = {"NUMBER", "STRING"}
BEGINNING = {"NAME", "NUMBER", "STRING", "INF", "LPAR"}
CHAINS = {"IN", "NOT", "COMPARISON"}
CLOSERS = {"RPAR", "RSQB", "RBRACE"}

CLOSING = "`(` is closed by `)`, `{` by `}`; only a range may mix `[` and `)`"
NEXT = "a statement starts on a line of its own, or behind `;`"


def instead(token: str) -> str:
    """The way out for characters that the language does not have."""
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


def unfinished(tokens: Sequence[Token], possible: set[str]) -> str:
    """The way out where a statement stops too early."""
    if possible >= OPERAND:
        return "a statement ends with its line; in brackets an expression may run over several lines"
    return _example(tokens, len(tokens), possible) or f"for example `{EXAMPLES['WEIGHT']}`"


def _example(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    """How such a statement looks, where it goes wrong outside its expression."""
    example = EXAMPLES.get(tokens[0].type, "")
    return f"for example `{example}`" if example else ""  # empty for an expression that stands alone


def way_out(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    """What the writer may have meant by the token at `place`.

    `possible` are the kinds of token that could stand there.
    """
    token = tokens[place]
    before = tokens[place - 1] if place else None
    answers = (answer for fits, answer in WAYS_OUT if fits(token, before, possible))
    texts = (answer(tokens, place, possible) if callable(answer) else answer for answer in answers)
    return next(filter(None, texts), "take it away, or write what is expected before it")


def _assignment(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    if place == 1 and tokens[0].type == "NAME":
        name = str(tokens[0])[:40]
        other = f"`let {name} = ...` names a value, `param {name} = 0.5` a number that the run may set"
        return did_you_mean(name, STARTING, other)
    return "`==` compares; `=` stands in statements and before the value of a keyword argument"


def _neighbours(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    """Two values with nothing between them."""
    before, token = tokens[place - 1], tokens[place]
    if before.type == "NUMBER" and token.type == "NAME":
        digits = token.startswith("_") and token[1:].isdigit()
        return "digits stand together" if digits else f"write `{before[:40]} * {token[:40]}` for a product"
    other = "is an operator missing between the two?"
    if "COMMA" in possible:
        other = "is an operator or a `,` missing between the two?"
    return did_you_mean(str(before)[:40], STARTING, other) if place == 1 and before.type == "NAME" else other


def _another_statement(tokens: Sequence[Token], place: int, possible: set[str]) -> str:
    if "$END" in possible:
        return NEXT
    return "it is a word of the language and means nothing here"


def _is(*kinds: str) -> Fits:
    return lambda token, before, possible: token.type in kinds


# The first that fits says what to do. It sees the token, the one before, and what could stand there.
WAYS_OUT: list[tuple[Fits, str | WayOut]] = [
    (lambda t, b, p: p == {"LBRACE"}, "`in` takes a set, as in `label in {pos, neg}`"),
    (lambda t, b, p: p == {"IN"}, "write `!=`, or `not in` with a set"),
    (lambda t, b, p: p >= MEMBER and "LPAR" not in p, "a set holds words, strings and numbers, one or more"),
    (lambda t, b, p: p == {"COMMA", "RBRACE"}, "a set holds single words, strings and numbers"),
    (lambda t, b, p: not (p & OPERATORS or p >= OPERAND), _example),
    (lambda t, b, p: p == {"$END"} and t.type in BEGINNING, NEXT),
    (_is("TRUTH"), "write 1 or 0, or a condition such as `p_on > 0.5`"),
    (_is("EQUAL"), _assignment),
    (_is("LSQB"), "there are no lists and no indexing"),
    (_is("LBRACE"), "a set stands behind `in`, or is the type of a `column`"),
    (_is("SEMICOLON"), "`;` separates statements and cannot stand in brackets"),
    (lambda t, b, p: t.type in CLOSERS and bool(p & CLOSERS), CLOSING),
    (_is(*CLOSERS), "a value is missing before it"),
    (_is("COLON"), "a choice is written `a if c else b`"),
    (lambda t, b, p: t.type in ("IF", "ELSE") and p >= OPERAND, "a choice is written `a if c else b`"),
    (lambda t, b, p: t.type == "PLUS" and b is not None and p >= OPERAND, "leave it out: only `-` is a sign"),
    (lambda t, b, p: b is None, "an expression ends with its line, unless it stands in brackets"),
    (_is("DOC"), 'a description is the first statement of a rule; a string stands in `"`'),
    (_is("ELSE"), "`else` needs an `if` before it, as in `a if c else b`"),
    (lambda t, b, p: t.type in CHAINS and bool(p & OPERATORS), "`in` does not chain: use brackets, or `and`"),
    (lambda t, b, p: t in KEYWORDS, _another_statement),
    (lambda t, b, p: t == "is", "write `==`"),
    (lambda t, b, p: b == "lambda", "there are no functions to define; `let` names a value"),
    (lambda t, b, p: t.type in BEGINNING and bool(p & OPERATORS), _neighbours),
    (_is("COMMA"), "`,` separates arguments and the members of a set"),
]
