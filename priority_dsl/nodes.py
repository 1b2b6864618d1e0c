"""The tree of a rule: frozen Pydantic nodes, JSON in and out, no behaviour.

Two trees are equal when they say the same thing: spans (places in a text) take no part in equality.
A tree that validates can be printed and parsed back to an equal one, so a program may build rules
from JSON: `Rule.model_validate_json(rule.model_dump_json())`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from priority_dsl.diagnostics import Span

DEEPEST = 100  # levels of a tree
LONGEST = 20_000  # characters of a text

KEYWORDS = frozenset(
    "if else and or not in param model column let weight loss keep over normalize cite per".split()
)
SCOPES = frozenset({"example", "batch", "dataset", "chunk", "window", "draws"})
RESERVED = KEYWORDS | SCOPES | {"inf"}


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text or text.endswith("\\"):
        raise ValueError('a string is one line and does not end in a backslash (only `\\"` is an escape)')
    return text


def _documentation(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ValueError('a description holds no `"""` and does not end in a quote')
    return text


def _comment(text: str) -> str:
    if not text.startswith("#") or "\n" in text or "\r" in text or text != text.rstrip():
        raise ValueError("a comment starts with `#` and is one line without trailing blanks")
    return text


def _number(value: float) -> float:
    if math.isnan(value) or math.copysign(1.0, value) < 0:
        raise ValueError("a number is not negative (write a unary minus) and not NaN")
    return value


def _name(text: str) -> str:
    if text in KEYWORDS - {"weight"} or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"`{text}` is not a name")
    return text


Identifier = Annotated[str, AfterValidator(_name)]
Line = Annotated[str, AfterValidator(_one_line)]
Comment = Annotated[str, AfterValidator(_comment)]


class Node(BaseModel):
    """Base of all nodes: immutable, no unknown fields, a span that takes no part in equality."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    span: Span | None = Field(default=None, repr=False)

    def content(self) -> tuple[Any, ...]:
        """The values that equality compares: every field but the span."""
        return tuple(getattr(self, name) for name in type(self).model_fields if name != "span")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.content() == other.content()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.content()))


class Number(Node):
    """A literal such as `0.5`; never negative (a minus sign is `Unary`); may be `inf`."""

    kind: Literal["number"] = "number"
    value: Annotated[float, AfterValidator(_number)]


class String(Node):
    """A literal such as `"####"`, one line, without its quotes."""

    kind: Literal["string"] = "string"
    value: Line


class Name(Node):
    """A word: a parameter, column, `let`, statistic such as `p_on`, scope or symbol; also `weight`."""

    kind: Literal["name"] = "name"
    name: Identifier


class Unary(Node):
    """`-x` or `not x`."""

    kind: Literal["unary"] = "unary"
    op: Literal["-", "not"]
    operand: Expr


class Binary(Node):
    """Arithmetic or logic on two operands; Python's precedence and associativity."""

    kind: Literal["binary"] = "binary"
    op: Literal["+", "-", "*", "/", "**", "and", "or"]
    left: Expr
    right: Expr


class Compare(Node):
    """A chain such as `0.2 < p_on <= 0.8`: one more operand than operators."""

    kind: Literal["compare"] = "compare"
    ops: Annotated[tuple[Literal["<", "<=", ">", ">=", "==", "!="], ...], Field(min_length=1)]
    operands: tuple[Expr, ...]

    @model_validator(mode="after")
    def _one_more_operand(self) -> Compare:
        if len(self.operands) != len(self.ops) + 1:
            raise ValueError("a comparison has one operand more than operators")
        return self


class Membership(Node):
    """`x in {a, b}` or `x not in {a, b}`; members are symbols, strings or (signed) numbers."""

    kind: Literal["membership"] = "membership"
    operand: Expr
    negated: bool = False
    members: Annotated[tuple[Expr, ...], Field(min_length=1)]


class Conditional(Node):
    """`then if condition else otherwise`; `otherwise` is None where the `else` was left out."""

    kind: Literal["conditional"] = "conditional"
    then: Expr
    condition: Expr
    otherwise: Expr | None = None


class Keyword(Node):
    """A keyword argument `name=value` of a call."""

    kind: Literal["keyword"] = "keyword"
    name: Identifier
    value: Expr


class Call(Node):
    """`function(arguments, name=value)`; its span starts with the name of the function."""

    kind: Literal["call"] = "call"
    function: Identifier
    arguments: tuple[Expr, ...] = ()
    keywords: tuple[Keyword, ...] = ()


Expr = Annotated[
    Number | String | Name | Unary | Binary | Compare | Membership | Conditional | Call,
    Field(discriminator="kind"),
]


class Bounds(Node):
    """A declared range such as `(0, inf)` or `[0, 1]`."""

    kind: Literal["bounds"] = "bounds"
    low: float
    high: float
    low_open: bool = False
    high_open: bool = False


class Statement(Node):
    """Base of statements; `comments` stand on the lines above, `trailing` behind it on its line."""

    comments: tuple[Comment, ...] = ()
    trailing: Comment | None = None


class Doc(Statement):
    """The description of a rule between triple quotes; the first statement where there is one."""

    kind: Literal["doc"] = "doc"
    text: Annotated[str, AfterValidator(_documentation)]


class Cite(Statement):
    """Where the formula stands: paper, section, equation, or code."""

    kind: Literal["cite"] = "cite"
    text: Line


class Param(Statement):
    """`param NAME = NUMBER in RANGE`; `default` is signed."""

    kind: Literal["param"] = "param"
    name: Identifier
    default: float
    bounds: Bounds | None = None


class Model(Statement):
    """`model NAME "what to bind"`, or `model NAME = ema(R)` with the call in `value`."""

    kind: Literal["model"] = "model"
    name: Identifier
    description: Line | None = None
    value: Expr | None = None


class Column(Statement):
    """`column NAME: TYPE per EXTENT`; `values` for `{a, b}`, `bounds` for `number in RANGE`."""

    kind: Literal["column"] = "column"
    name: Identifier
    type: Literal["bool", "number", "category", "text", "spans"]
    values: tuple[Line, ...] | None = None
    bounds: Bounds | None = None
    per: Literal["token", "example", "pair"] = "example"


class Let(Statement):
    """`let NAME = EXPR`."""

    kind: Literal["let"] = "let"
    name: Identifier
    value: Expr


class Weight(Statement):
    """`weight = EXPR`; `bare` where the expression stood alone."""

    kind: Literal["weight"] = "weight"
    value: Expr
    bare: bool = False


class Loss(Statement):
    """`loss = EXPR`."""

    kind: Literal["loss"] = "loss"
    value: Expr


class Keep(Statement):
    """`keep = EXPR`."""

    kind: Literal["keep"] = "keep"
    value: Expr


class Over(Statement):
    """`over = response` or `over = all`."""

    kind: Literal["over"] = "over"
    choice: Literal["response", "all"]


class Normalize(Statement):
    """`normalize = CHOICE`; `groups(C)` has its expression in `by`."""

    kind: Literal["normalize"] = "normalize"
    choice: Literal["tokens", "kept", "weights", "none", "examples", "groups"]
    by: Expr | None = None


AnyStatement = Annotated[
    Doc | Cite | Param | Model | Column | Let | Weight | Loss | Keep | Over | Normalize,
    Field(discriminator="kind"),
]


class Rule(Node):
    """A whole rule: its statements in order, and the comments behind the last one."""

    kind: Literal["rule"] = "rule"
    statements: tuple[AnyStatement, ...] = ()
    comments: tuple[Comment, ...] = ()

    @model_validator(mode="after")
    def _not_too_deep(self) -> Rule:
        if depth(self) > DEEPEST + 1:
            raise ValueError(f"deeper than {DEEPEST} levels")
        return self


def children(node: Node) -> list[Node]:
    """The nodes directly below a node, in reading order."""
    below: list[Node] = []
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, Node):
            below.append(value)
        elif isinstance(value, tuple):
            below += [v for v in value if isinstance(v, Node)]
    return below


def depth(node: Node) -> int:
    """Levels of the tree below and with `node`, counted without recursion; a leaf has 1."""
    level, deepest = [node], 0
    while level:
        deepest += 1
        level = [child for parent in level for child in children(parent)]
    return deepest
