"""Tree to text: the canonical form of a rule, which parses back to an equal tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from priority_dsl import nodes
from priority_dsl.nodes import Expr, Node, Rule, Statement
from priority_dsl.parser import parse
from priority_dsl.spelling import RESERVED, is_name

# How tightly an expression holds together, loosest first; Python's order.
CHOICE, OR, AND, NOT, COMPARISON, SUM, PRODUCT, SIGN, POWER, ATOM = range(10)
BINARY = {"or": OR, "and": AND, "+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "**": POWER}


def format_rule(rule: Rule | str) -> str:
    """The canonical text of a rule: one statement a line, as few brackets as possible, comments kept.

    `parse(format_rule(tree)) == tree`, and formatting a formatted text changes nothing. What fits on one
    line without a comment has no line end behind it; anything longer is a file and ends with one. A lone
    word keeps brackets around it, because `(p_on)` is a rule where `p_on` would be read as a library name.
    Blank lines, line breaks in brackets and superfluous brackets are not kept.
    Raises `PriorityError` (PD101 to PD112) for a text that does not parse.
    """
    if isinstance(rule, str):
        rule = parse(rule)
    lines: list[str] = []
    for statement in rule.statements:
        lines += statement.comments
        behind = f"  {statement.trailing}" if statement.trailing is not None else ""
        lines.append(_STATEMENTS[type(statement)](statement) + behind)
    lines += rule.comments
    if len(lines) == 1 and rule.statements[0].trailing is None:
        return f"({lines[0]})" if is_name(lines[0]) and lines[0] != "inf" else lines[0]
    return "\n".join(lines) + "\n"


def format_expression(expr: Expr | nodes.Keyword) -> str:
    """The canonical text of an expression, on one line, with as few brackets as possible."""
    return _EXPRESSIONS[type(expr)](expr)


def format_number(value: float) -> str:
    """A number as the language writes it: `2`, `0.5`, `1e-09`, `inf`; the sign in front."""
    return repr(value).removesuffix(".0")


def format_bounds(bounds: nodes.Bounds) -> str:
    """A range as the language writes it, such as `(0, inf)`."""
    opening, closing = "(" if bounds.low_open else "[", ")" if bounds.high_open else "]"
    return f"{opening}{format_number(bounds.low)}, {format_number(bounds.high)}{closing}"


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


# ---------------------------------------------------------------- expressions


def _strength(expr: Node) -> int:
    match expr:
        case nodes.Conditional():
            return CHOICE
        case nodes.Binary():
            return BINARY[expr.op]
        case nodes.Unary():
            return NOT if expr.op == "not" else SIGN
        case nodes.Compare() | nodes.Membership():
            return COMPARISON
    return ATOM


def _at(least: int, expr: Node) -> str:
    """An expression where only one that holds together at least so tightly can stand bare."""
    text = format_expression(expr)  # type: ignore[arg-type]
    return text if _strength(expr) >= least else f"({text})"


def _unary(expr: nodes.Unary) -> str:
    return f"not {_at(NOT, expr.operand)}" if expr.op == "not" else f"-{_at(SIGN, expr.operand)}"


def _binary(expr: nodes.Binary) -> str:
    own = BINARY[expr.op]
    left, right = (ATOM, SIGN) if expr.op == "**" else (own, own + 1)
    return f"{_at(left, expr.left)} {expr.op} {_at(right, expr.right)}"


def _compare(expr: nodes.Compare) -> str:
    first, *others = (_at(SUM, operand) for operand in expr.operands)
    return first + "".join(f" {op} {operand}" for op, operand in zip(expr.ops, others, strict=True))


def _membership(expr: nodes.Membership) -> str:
    members = ", ".join(map(format_expression, expr.members))
    return f"{_at(SUM, expr.operand)} {'not in' if expr.negated else 'in'} {{{members}}}"


def _conditional(expr: nodes.Conditional) -> str:
    text = f"{_at(OR, expr.then)} if {_at(OR, expr.condition)}"
    return text if expr.otherwise is None else f"{text} else {format_expression(expr.otherwise)}"


def _call(expr: nodes.Call) -> str:
    return f"{expr.function}({', '.join(map(format_expression, (*expr.arguments, *expr.keywords)))})"


_EXPRESSIONS: dict[type, Callable[[Any], str]] = {
    nodes.Number: lambda e: format_number(e.value),
    nodes.String: lambda e: _quote(e.value),
    nodes.Name: lambda e: e.name,
    nodes.Unary: _unary,
    nodes.Binary: _binary,
    nodes.Compare: _compare,
    nodes.Membership: _membership,
    nodes.Conditional: _conditional,
    nodes.Keyword: lambda e: f"{e.name}={format_expression(e.value)}",
    nodes.Call: _call,
}


# ---------------------------------------------------------------- statements


def _param(statement: nodes.Param) -> str:
    text = f"param {statement.name} = {format_number(statement.default)}"
    return text if statement.bounds is None else f"{text} in {format_bounds(statement.bounds)}"


def _model(statement: nodes.Model) -> str:
    if statement.value is not None:
        return f"model {statement.name} = {format_expression(statement.value)}"
    return f"model {statement.name} {_quote(statement.description or '')}"


def _category(value: str) -> str:
    return value if is_name(value) and value not in RESERVED else _quote(value)


def _column(statement: nodes.Column) -> str:
    kind: str = statement.type
    if statement.values is not None:
        kind = f"{{{', '.join(map(_category, statement.values))}}}"
    if statement.bounds is not None:
        kind = f"{kind} in {format_bounds(statement.bounds)}"
    per = "" if statement.per == "example" else f" per {statement.per}"
    return f"column {statement.name}: {kind}{per}"


def _weight(statement: nodes.Weight) -> str:
    return ("" if statement.bare else "weight = ") + format_expression(statement.value)


def _normalize(statement: nodes.Normalize) -> str:
    by = "" if statement.by is None else f"({format_expression(statement.by)})"
    return f"normalize = {statement.choice}{by}"


_STATEMENTS: dict[type[Statement], Callable[[Any], str]] = {
    nodes.Doc: lambda s: f'"""{s.text}"""',
    nodes.Cite: lambda s: f"cite {_quote(s.text)}",
    nodes.Param: _param,
    nodes.Model: _model,
    nodes.Column: _column,
    nodes.Let: lambda s: f"let {s.name} = {format_expression(s.value)}",
    nodes.Weight: _weight,
    nodes.Loss: lambda s: f"loss = {format_expression(s.value)}",
    nodes.Keep: lambda s: f"keep = {format_expression(s.value)}",
    nodes.Over: lambda s: f"over = {s.choice}",
    nodes.Normalize: _normalize,
}
