"""Categories: `label == neg`, `role in {user, tool}`; the columns that such a test declares by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from priority_dsl import nodes
from priority_dsl.checked import Column
from priority_dsl.diagnostics import nearest
from priority_dsl.kinds import BOOLEAN, Element, Kind, Stage
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_expression
from priority_dsl.registry import REGISTRY, Reading
from priority_dsl.values import BROKEN, Value

if TYPE_CHECKING:
    from priority_dsl.expressions import Expressions


class Categories:
    """Tests of a category column against symbols, for one rule."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions

    def is_test(self, node: nodes.Compare) -> bool:
        """Whether a comparison is of a category: the left side is one, or the right is text or a symbol."""
        if any(isinstance(operand, nodes.String) for operand in node.operands):
            return True
        if len(node.ops) != 1 or node.ops[0] not in ("==", "!="):
            return self._is_category(node.operands[0])
        left, right = node.operands[0], node.operands[1]
        return self._is_category(left) or (self._is_free(left) and self._is_symbol(left, right))

    def _is_symbol(self, left: Expr, right: Expr) -> bool:
        """Whether the right side of a test of an unknown name is meant as a symbol.

        A name that has a value counts as one (and is then refused: quote it), unless the left side looks
        like a misspelt word.
        """
        if self._is_free(right):
            return True
        if not (isinstance(left, nodes.Name) and isinstance(right, nodes.Name)):
            return False
        return not nearest(left.name, self.of.declared.readable())

    def _is_category(self, node: Expr) -> bool:
        if not isinstance(node, nodes.Name):
            return False
        column, word = self.of.declared.columns.get(node.name), REGISTRY.get(node.name)
        return (column is not None and column.element in ("category", "text")) or (
            isinstance(word, Reading) and word.element == Element.CATEGORY
        )

    def _is_free(self, node: Expr) -> bool:
        """Whether a name has no meaning of its own, so that it can be a new column or a symbol."""
        if not isinstance(node, nodes.Name) or node.name in nodes.RESERVED:
            return False
        declared = self.of.declared
        taken = (
            node.name in declared.names()
            or node.name in declared.model_names()
            or node.name in declared.given
        )
        return not (taken or declared.split(node.name) or isinstance(REGISTRY.get(node.name), Reading))

    def test(self, node: nodes.Compare) -> Value:
        """`column == symbol` or `column != symbol`."""
        op = node.ops[0]
        if len(node.ops) > 1 or op not in ("==", "!="):
            return self.of.error(
                "PD302", "categories have no order and comparisons of them do not chain", node,
                help="use `==`, `!=` or `in {a, b}`, joined by `and`",
            )  # fmt: skip
        return self._member(node.operands[0], [node.operands[1]], op == "!=", node)

    def membership(self, node: nodes.Membership) -> Value:
        """`x in {a, b}`: of a category, or of a number where all members are numbers."""
        if self._is_category(node.operand) or not all(_is_number(m) for m in node.members):
            return self._member(node.operand, node.members, node.negated, node)
        operand = self.of.number(node.operand)
        equal = [self.of.apply("equal", [operand, self.of.number(m)], node) for m in node.members]
        result = equal[0]
        for other in equal[1:]:
            result = self.of.apply("either", [result, other], node)
        return self.of.apply("negation", [result], node) if node.negated else result

    def every_test(self, node: Expr) -> list[Value] | None:
        """Of a category column, a test for each of its values; None where the node is none.

        The column must list its values: one that the run has not met yet would have a group of its own.
        """
        if not isinstance(node, nodes.Name) or not self._is_category(node):
            return None
        column = self._column(node, node)
        if column is None or not column.closed:
            error = self.of.error(
                "PD305", f"the values of `{node.name}` are not known", node, "one group for each of them",
                f"list them: `column {node.name}: {{a, b}}`, or group by a condition",
            )  # fmt: skip
            return [error]
        symbols = [nodes.String(value=name, span=node.span) for name in column.categories]
        return [self._member(node, [symbol], False, node) for symbol in symbols]

    def _member(self, left: Expr, members: Sequence[Expr], negated: bool, node: Expr) -> Value:
        column = self._column(left, node)
        symbols = [self._symbol(member, column) for member in members]
        if column is None or None in symbols:
            return BROKEN
        known = tuple(dict.fromkeys([*column.categories, *(s for s in symbols if s)]))
        self.of.declared.columns[column.name] = replace(column, categories=known)
        operand = self.of.resolve(column.name, left.span)
        assert operand is not None
        kind = Kind(operand.kind.extent, Element.BOOL, BOOLEAN, Stage.DATA)
        chosen = tuple(sorted({s for s in symbols if s}))
        test = self.of.value("is_in", kind, operand, span=node.span, members=chosen)
        return self.of.apply("negation", [test], node) if negated else test

    def _column(self, left: Expr, node: Expr) -> Column | None:
        """The category column that is tested; an unknown name becomes one, per token until data says."""
        declared = self.of.declared
        if isinstance(left, nodes.Name):
            declared.used.add(left.name)
            word = REGISTRY.get(left.name)
            if isinstance(word, Reading) and word.element == Element.CATEGORY:
                return declared.columns.get(left.name) or Column(
                    left.name, "category", "token", word.values, declared=True, closed=True
                )
            if self._is_free(left):
                return Column(left.name, "category", "token", declared=False, span=left.span)
            column = declared.columns.get(left.name)
            if column is not None and column.element == "category":
                return column
        value = self.of.visit(left)
        if value.word != "broken":
            self.of.error(
                "PD302", f"`{format_expression(left)}` is a {value.kind.element}, not a category", node,
                *_never_equal(value.kind.element),
            )  # fmt: skip
        return None

    def _symbol(self, node: Expr, column: Column | None) -> str | None:
        """The text of a symbol or string on the right; None (reported) where it is none."""
        if isinstance(node, nodes.Name) and not self._is_free(node):
            self.of.error(
                "PD209", f"`{node.name}` is also a name that has a value here", node, "which is meant?",
                f'for the category, quote it: "{node.name}"; for the value, declare the left side first',
            )  # fmt: skip
            return None
        if not isinstance(node, nodes.Name | nodes.String):
            what = format_expression(node)
            self.of.error(
                "PD302", f"`{what}` is not a category", node, "a symbol or text is needed",
                f'write "{what}" for the category, or declare the column as a number',
            )  # fmt: skip
            return None
        symbol = node.name if isinstance(node, nodes.Name) else node.value
        if column is not None and column.closed and symbol not in column.categories:
            self.of.error(
                "PD210", f"`{column.name}` is never `{symbol}`", node, f"of {', '.join(column.categories)}",
                self.of.findings.suggest(symbol, column.categories, "use one of its values"),
            )  # fmt: skip
            return None
        return symbol


def _never_equal(element: Element) -> tuple[str, str]:
    """Why a value that is no category cannot be compared with text, and the way out."""
    if element == Element.TEXT:
        return "free text", "declare it as a category to compare it"
    return f"a {element} is never equal to text", "compare it with a number"


def _is_number(node: Expr) -> bool:
    return isinstance(node, nodes.Number) or (
        isinstance(node, nodes.Unary) and isinstance(node.operand, nodes.Number)
    )
