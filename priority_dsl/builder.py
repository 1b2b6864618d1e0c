# ruff: noqa: D102 - what a method of the builder reads stands above its rule in the grammar
"""The parser's callbacks: each grammar rule as the node it stands for.

A method gets what stands in its grammar rule, in order: tokens, and what other methods returned. Its
name is the rule's name in `grammar/priority.lark`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lark import Token

from priority_dsl import nodes
from priority_dsl.diagnostics import Diagnostic, PriorityError, Span
from priority_dsl.spelling import DEEPEST, RESERVED
from priority_dsl.syntax_errors import (
    DENOMINATORS,
    EXTENTS,
    PARTS,
    TYPES,
    reserved,
    too_deep,
    unknown_choice,
)

Children = list[Any]


class Part(NamedTuple):
    """A node in the making: the characters it takes, brackets around it included, and its levels."""

    node: Any
    start_pos: int
    end_pos: int
    levels: int


class Value(NamedTuple):
    """A signed number, or the values of a category, with the characters it takes."""

    value: Any
    start_pos: int
    end_pos: int


def _span(children: Sequence[Any]) -> Span:
    return Span(children[0].start_pos, children[-1].end_pos)


def _part(kind: type[nodes.Node], children: Children, **fields: Any) -> Part:
    """A node over its children; a tree that would be too deep stops here."""
    levels = 1 + max((c.levels for c in children if isinstance(c, Part)), default=0)
    span = _span(children)
    if levels >= DEEPEST:  # the statement is a level too
        raise PriorityError([too_deep(span)])
    return Part(kind(span=span, **fields), span.start, span.end, levels)


def _nodes(children: Children) -> tuple[Any, ...]:
    return tuple(c.node for c in children if isinstance(c, Part))


def _text(token: Token) -> str:
    """The content of a STRING: without quotes, `\\"` as `"`."""
    return token[1:-1].replace('\\"', '"')


def _declared(token: Token) -> str:
    """The name that a statement declares; a reserved word is refused (PD107)."""
    if token in RESERVED:
        raise PriorityError([reserved(token)])
    return str(token)


def _choice(token: Token, choices: tuple[str, ...]) -> Any:
    """One of a few words; another one is refused (PD109)."""
    if token not in choices:
        raise PriorityError([unknown_choice(token, choices)])
    return str(token)


class Builder:
    """One method for each grammar rule that stands for a node."""

    # ------------------------------------------------------------ expressions

    def number(self, children: Children) -> Part:
        return _part(nodes.Number, children, value=float(children[0]))

    def string(self, children: Children) -> Part:
        return _part(nodes.String, children, value=_text(children[0]))

    def name(self, children: Children) -> Part:
        return _part(nodes.Name, children, name=str(children[0]))

    def brackets(self, children: Children) -> Part:
        return Part(children[1].node, children[0].start_pos, children[2].end_pos, children[1].levels)

    def unary(self, children: Children) -> Part:
        return _part(nodes.Unary, children, op=str(children[0]), operand=children[1].node)

    negative = unary

    def binary(self, children: Children) -> Part:
        left, op, right = children
        return _part(nodes.Binary, children, op=str(op), left=left.node, right=right.node)

    def compare(self, children: Children) -> Part:
        ops = tuple(map(str, children[1::2]))
        return _part(nodes.Compare, children, ops=ops, operands=_nodes(children))

    def membership(self, children: Children) -> Part:
        operand, *members = _nodes(children)
        negated = children[1].type == "NOT"
        return _part(nodes.Membership, children, operand=operand, negated=negated, members=tuple(members))

    def conditional(self, children: Children) -> Part:
        then, condition, *otherwise = _nodes(children)
        last = otherwise[0] if otherwise else None
        return _part(nodes.Conditional, children, then=then, condition=condition, otherwise=last)

    def keyword(self, children: Children) -> Part:
        return _part(nodes.Keyword, children, name=str(children[0]), value=children[2].node)

    def call(self, children: Children) -> Part:
        positional: list[Any] = []
        keywords: list[nodes.Keyword] = []
        for part in (c for c in children if isinstance(c, Part)):
            if isinstance(part.node, nodes.Keyword):
                keywords.append(part.node)
            elif keywords:
                raise PriorityError([_late_argument(part)])
            else:
                positional.append(part.node)
        name = str(children[0])
        return _part(
            nodes.Call, children, function=name, arguments=tuple(positional), keywords=tuple(keywords)
        )

    # ------------------------------------------------------------ parts of statements

    def signed(self, children: Children) -> Value:
        value = float(children[-1])
        return Value(-value if len(children) == 2 else value, *_span(children))

    def bounds(self, children: Children) -> nodes.Bounds:
        opening, low, _, high, closing = children
        return nodes.Bounds(
            low=low.value,
            high=high.value,
            low_open=opening == "(",
            high_open=closing == ")",
            span=_span(children),
        )

    def type(self, children: Children) -> Value:
        kind = _choice(children[0], TYPES)
        fields: dict[str, Any] = {"type": kind}
        if len(children) > 1:
            if kind != "number":
                raise PriorityError([_ranged(children[0], children[2])])
            fields["bounds"] = children[2]
        end = children[2].span.end if len(children) > 1 else children[0].end_pos
        return Value(fields, children[0].start_pos, end)

    def categories(self, children: Children) -> Value:
        values = tuple(
            _text(c) if c.type == "STRING" else str(c) for c in children if c.type in ("STRING", "NAME")
        )
        return Value({"type": "category", "values": values}, *_span(children))

    # ------------------------------------------------------------ statements

    def doc(self, children: Children) -> nodes.Doc:
        return nodes.Doc(text=children[0][3:-3], span=_span(children))

    def cite(self, children: Children) -> nodes.Cite:
        return nodes.Cite(text=_text(children[1]), span=_span(children))

    def param(self, children: Children) -> nodes.Param:
        name, default = _declared(children[1]), children[3]
        bounds = children[5] if len(children) > 4 else None
        span = Span(children[0].start_pos, bounds.span.end if bounds else default.end_pos)
        return nodes.Param(name=name, default=default.value, bounds=bounds, span=span)

    def model(self, children: Children) -> nodes.Model:
        name = _declared(children[1])
        if len(children) == 3:
            return nodes.Model(name=name, description=_text(children[2]), span=_span(children))
        return nodes.Model(name=name, value=children[3].node, span=_span(children))

    def column(self, children: Children) -> nodes.Column:
        name, kind = _declared(children[1]), children[3]
        per = _choice(children[5], EXTENTS) if len(children) > 4 else "example"
        return nodes.Column(name=name, **kind.value, per=per, span=_span(children))

    def let(self, children: Children) -> nodes.Let:
        return nodes.Let(name=_declared(children[1]), value=children[3].node, span=_span(children))

    def weight(self, children: Children) -> nodes.Weight:
        return nodes.Weight(value=children[2].node, span=_span(children))

    def bare(self, children: Children) -> nodes.Weight:
        return nodes.Weight(value=children[0].node, bare=True, span=_span(children))

    def loss(self, children: Children) -> nodes.Loss:
        return nodes.Loss(value=children[2].node, span=_span(children))

    def keep(self, children: Children) -> nodes.Keep:
        return nodes.Keep(value=children[2].node, span=_span(children))

    def over(self, children: Children) -> nodes.Over:
        return nodes.Over(choice=_choice(children[2], PARTS), span=_span(children))

    def normalize(self, children: Children) -> nodes.Normalize:
        choice = _choice(children[2], DENOMINATORS)
        by = children[4].node if len(children) > 3 else None
        if (by is not None) != (choice == "groups"):
            raise PriorityError([_grouped(children)])
        return nodes.Normalize(choice=choice, by=by, span=_span(children))


def _late_argument(part: Part) -> Diagnostic:
    message = "a positional argument behind a keyword argument"
    place = Span(part.start_pos, part.end_pos)
    return Diagnostic("PD102", message, place, help="keyword arguments stand last")


def _ranged(kind: Token, bounds: nodes.Bounds) -> Diagnostic:
    message = f"a column of type `{kind}` has no range"
    return Diagnostic("PD102", message, bounds.span, help="only `number` takes one, as in `number in [0, 1]`")


def _grouped(children: Children) -> Diagnostic:
    choice = children[2]
    if choice == "groups":
        message, way_out = "`groups` needs what to group by", "for example `normalize = groups(label)`"
    else:
        message, way_out = f"`{choice}` takes no argument", f"write `normalize = {choice}`"
    return Diagnostic("PD102", message, _span(children[2:]), help=way_out)
