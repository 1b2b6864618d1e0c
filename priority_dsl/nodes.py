"""The tree of a rule: frozen Pydantic nodes, JSON in and out, no behaviour.

Two trees are equal when they say the same thing: spans (places in a text) take no part in equality.
A tree that validates can be printed and parsed back to an equal one, so a program may build rules
from JSON: `Rule.model_validate_json(rule.model_dump_json())`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from priority_dsl.diagnostics import Span
from priority_dsl.spelling import DEEPEST as DEEPEST
from priority_dsl.spelling import KEYWORDS as KEYWORDS
from priority_dsl.spelling import LONGEST as LONGEST
from priority_dsl.spelling import ONCE as ONCE
from priority_dsl.spelling import RESERVED as RESERVED
from priority_dsl.spelling import SCOPES as SCOPES
from priority_dsl.spelling import Comment, Declared, Description, Identifier, Line, Magnitude, Real, Word


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
    value: Magnitude


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

    @model_validator(mode="after")
    def _plain_members(self) -> Membership:
        for member in self.members:
            plain = member.operand if isinstance(member, Unary) and member.op == "-" else member
            if not isinstance(plain, Number if plain is not member else Number | String | Name):
                raise ValueError("members of a set are symbols, strings or (signed) numbers")
        return self


class Conditional(Node):
    """`then if condition else otherwise`; `otherwise` is None where the `else` was left out."""

    kind: Literal["conditional"] = "conditional"
    then: Expr
    condition: Expr
    otherwise: Expr | None = None


class Keyword(Node):
    """A keyword argument `name=value` of a call."""

    kind: Literal["keyword"] = "keyword"
    name: Word
    value: Expr


class Call(Node):
    """`function(arguments, name=value)`; its span starts with the name of the function."""

    kind: Literal["call"] = "call"
    function: Word
    arguments: tuple[Expr, ...] = ()
    keywords: tuple[Keyword, ...] = ()


Expr = Annotated[
    Number | String | Name | Unary | Binary | Compare | Membership | Conditional | Call,
    Field(discriminator="kind"),
]


class Bounds(Node):
    """A declared range such as `(0, inf)` or `[0, 1]`."""

    kind: Literal["bounds"] = "bounds"
    low: Real
    high: Real
    low_open: bool = False
    high_open: bool = False


class Statement(Node):
    """Base of statements; `comments` stand on the lines above, `trailing` behind it on its line."""

    comments: tuple[Comment, ...] = ()
    trailing: Comment | None = None


class Doc(Statement):
    """The description of a rule between triple quotes; the first statement where there is one."""

    kind: Literal["doc"] = "doc"
    text: Description


class Cite(Statement):
    """Where the formula stands: paper, section, equation, or code."""

    kind: Literal["cite"] = "cite"
    text: Line


class Param(Statement):
    """`param NAME = NUMBER in RANGE`; `default` is signed."""

    kind: Literal["param"] = "param"
    name: Declared
    default: Real
    bounds: Bounds | None = None


class Model(Statement):
    """`model NAME "what to bind"`, or `model NAME = ema(R)` with the call in `value`."""

    kind: Literal["model"] = "model"
    name: Declared
    description: Line | None = None
    value: Expr | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Model:
        if (self.description is None) == (self.value is None):
            raise ValueError("a model has either a description or a value")
        return self


class Column(Statement):
    """`column NAME: TYPE per EXTENT`; `values` for `{a, b}`, `bounds` for `number in RANGE`."""

    kind: Literal["column"] = "column"
    name: Declared
    type: Literal["bool", "number", "category", "text", "spans"]
    values: Annotated[tuple[Line, ...], Field(min_length=1)] | None = None
    bounds: Bounds | None = None
    per: Literal["token", "example", "pair"] = "example"

    @model_validator(mode="after")
    def _fits_the_type(self) -> Column:
        if self.values is not None and self.type != "category":
            raise ValueError("only a category has values")
        if self.bounds is not None and self.type != "number":
            raise ValueError("only a number has bounds")
        return self


class Let(Statement):
    """`let NAME = EXPR`."""

    kind: Literal["let"] = "let"
    name: Declared
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

    @model_validator(mode="after")
    def _groups_by(self) -> Normalize:
        if (self.by is not None) != (self.choice == "groups"):
            raise ValueError("`groups`, and nothing else, has an expression in `by`")
        return self


AnyStatement = Annotated[
    Doc | Cite | Param | Model | Column | Let | Weight | Loss | Keep | Over | Normalize,
    Field(discriminator="kind"),
]


class Rule(Node):
    """A whole rule: its statements in order, and the comments behind the last one."""

    kind: Literal["rule"] = "rule"
    statements: tuple[AnyStatement, ...]
    comments: tuple[Comment, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Rule:
        kinds = [statement.kind for statement in self.statements]
        if repeated := [kind for kind in ONCE if kinds.count(kind) > 1]:
            raise ValueError(f"more than one {repeated[0]}")
        if "doc" in kinds[1:]:
            raise ValueError("the description is not the first statement")
        if any(isinstance(s, Weight) and s.bare for s in self.statements[:-1]):
            raise ValueError("a bare weight is not the last statement")
        if not {"weight", "loss", "keep"} & set(kinds):
            raise ValueError("the rule says nothing: it has no weight, loss or keep")
        return self

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
