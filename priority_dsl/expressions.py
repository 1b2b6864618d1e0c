"""From the nodes of an expression to values: names, kinds, ranges, stages, every mistake with its place.

A mistake is reported and stands in the tree as `BROKEN`, which passes every further check, so that one
mistake is reported once and the rest of the text is still checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from priority_dsl import nodes
from priority_dsl.calls import Calls
from priority_dsl.categories import Categories
from priority_dsl.composition import Composition
from priority_dsl.declarations import Declarations, Findings
from priority_dsl.diagnostics import Span
from priority_dsl.folding import known_range
from priority_dsl.kinds import Element, Extent, Kind, Range, Stage, join
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_expression
from priority_dsl.registry import (
    ALIASES,
    REGISTRY,
    Function,
    Reading,
    Reduction,
    Scope,
    Statistic,
    View,
    Word,
)
from priority_dsl.scoping import Scoping
from priority_dsl.values import BROKEN, Option, Value
from priority_dsl.viewing import Viewing

TRAINED = Kind(Extent.CONSTANT, Element.MODEL, stage=Stage.ONLINE, gradient=True)
FROZEN = Kind(Extent.CONSTANT, Element.MODEL, stage=Stage.FROZEN)
MOVING = Kind(Extent.CONSTANT, Element.MODEL, stage=Stage.ONLINE)
READ_BY_VIEW = (
    "a text is read by a view, as in `nll(reading(ref, COLUMN))`; to compare it, declare a category"
)


class Expressions:
    """Checks expressions against the declarations of a rule and makes their values, equal ones once."""

    def __init__(self, declared: Declarations, findings: Findings) -> None:
        self.declared = declared
        self.findings = findings
        self.pool: dict[Value, Value] = {}
        self.weight: Value | None = None  # set once `weight` is checked; `loss` may read it
        self.categories = Categories(self)
        self.places: Mapping[int, int] = {}  # of calls that draw or read another rule, by their `id`
        self.path: tuple[int, ...] = ()  # the places of the rules that read this one, the outermost first
        self.calls = Calls(self)
        self.scoping = Scoping(self)
        self.viewing = Viewing(self)
        self.composition = Composition(self)
        self.outer: Expressions | None = None  # of the rule that reads this one

    def stand_in(self, outer: Expressions, path: tuple[int, ...], inside: tuple[str, ...]) -> None:
        """Check a rule that another reads, with that one's parameters, under the names `inside`."""
        self.outer, self.path, self.composition.inside = outer, path, inside

    @property
    def params(self) -> Mapping[str, float]:
        """The parameter values in force: those of the outermost rule."""
        if self.outer is not None:
            return self.outer.params
        return {name: p.value for name, p in self.declared.params.items()}

    def place(self, node: nodes.Call) -> tuple[int, ...]:
        """Which call of the rule this is: what keeps the draws of two calls apart."""
        return (*self.path, self.places[id(node)])

    def value(
        self, word: str, kind: Kind, *arguments: Value, span: Span | None = None, **options: Option
    ) -> Value:
        """The one value that applies a word to these arguments."""
        made = Value(word, arguments, tuple(sorted(options.items())), kind, span)
        return self.pool.setdefault(made, made)

    def error(self, code: str, message: str, node: nodes.Node, label: str = "", help: str = "") -> Value:
        """Report a mistake at a node; the value that stands for it passes every further check."""
        self.findings.add(code, message, node.span, label, help)
        return BROKEN

    # By what is wanted --------------------------------------------------------------------------

    def number(self, node: Expr) -> Value:
        """A number; a condition is read as 0 or 1."""
        return self.as_number(self.visit(node), node)

    def as_number(self, value: Value, node: Expr) -> Value:
        """A value as a number; text, categories and models are none."""
        if value is BROKEN or value.kind.element == Element.NUMBER:
            return value
        if value.kind.element == Element.BOOL:
            kind = join([value.kind], Element.NUMBER, value.kind.range, gradient=False)
            return self.value("indicator", kind, value, span=node.span)
        what = format_expression(node)
        if value.kind.element == Element.MODEL:
            return self.error(
                "PD302",
                f"`{what}` is a model, not a number",
                node,
                "a model",
                f"read a statistic of it: `p({what})`",
            )
        return self.error(
            "PD302", f"`{what}` is a {value.kind.element}, not a number", node, f"a {value.kind.element}",
            READ_BY_VIEW if value.kind.element == Element.TEXT else f"compare it: `{what} == ...`",
        )  # fmt: skip

    def condition(self, node: Expr) -> Value:
        """A condition; a number is none."""
        value = self.visit(node)
        if value is BROKEN or value.kind.element == Element.BOOL:
            return value
        what, element = format_expression(node), value.kind.element
        ways = {Element.NUMBER: f"{what} > 0", Element.MODEL: f"p({what}) > 0.5"}
        return self.error(
            "PD301", f"`{what}` is a {element}, where a condition is needed", node, f"a {element}",
            READ_BY_VIEW if element == Element.TEXT
            else f"compare it: `{ways.get(element, f'{what} == ...')}`",
        )  # fmt: skip

    def model(self, node: Expr) -> Value:
        """A model: a name, a view, or `sg` of one."""
        named = self.declared.lets.get(node.name) if isinstance(node, nodes.Name) else None
        if named is not None and named.kind.element == Element.MODEL:
            return self.visit(node)
        if isinstance(node, nodes.Name) and node.name not in self.declared.model_names():
            known = self.declared.model_names()
            return self.error(
                "PD208", f"`{node.name}` is not a model", node, f"the models are {', '.join(known)}",
                self.findings.suggest(node.name, known, f'declare it: model {node.name} "what to bind"'),
            )  # fmt: skip
        value = self.visit(node)
        if value is BROKEN or value.kind.element == Element.MODEL:
            return value
        return self.error(
            "PD208", f"`{format_expression(node)}` is not a model", node, f"a {value.kind.element}",
            "a statistic reads a model: `p(on)`, `mass(ref)`",
        )  # fmt: skip

    # By what is written -------------------------------------------------------------------------

    def visit(self, node: Expr) -> Value:
        """The value of any expression."""
        match node:
            case nodes.Number():
                return self.constant(node.value, node.span)
            case nodes.String():
                return self.error(
                    "PD302", "text is no value", node, "text", 'compare a column: `label == "neg"`'
                )
            case nodes.Name():
                return self.name(node)
            case nodes.Unary(op="not"):
                return self.apply("negation", [self.condition(node.operand)], node)
            case nodes.Unary():
                return self.apply("negate", [self.number(node.operand)], node)
            case nodes.Binary(op="and" | "or"):
                operands = [self.condition(node.left), self.condition(node.right)]
                return self.apply(REGISTRY.operators[node.op].name, operands, node)
            case nodes.Binary():
                operands = [self.number(node.left), self.number(node.right)]
                return self.apply(REGISTRY.operators[node.op].name, operands, node)
            case nodes.Compare():
                return self.compare(node)
            case nodes.Membership():
                return self.categories.membership(node)
            case nodes.Conditional():
                return self.conditional(node)
            case nodes.Call():
                return self.calls.call(node)
        raise TypeError(f"not an expression: {node!r}")

    def constant(self, value: float, span: Span | None = None) -> Value:
        """A number that was written."""
        kind = Kind(Extent.CONSTANT, Element.NUMBER, Range.of((value,)))
        return self.value("constant", kind, span=span, value=value)

    def conditional(self, node: nodes.Conditional, outermost: bool = False) -> Value:
        """`a if c else b`; the `else` may be left out only where `outermost` of `weight`, and is 1."""
        condition = self.condition(node.condition)
        then = self.number(node.then)
        if node.otherwise is not None:
            otherwise = self.number(node.otherwise)
        elif outermost:
            otherwise = self.constant(1.0)
        else:
            return self.error(
                "PD111", "an `if` without `else` inside an expression", node, "what is it otherwise?",
                "write the `else`; only the outermost `if` of `weight` may leave it out (it is `else 1`)",
            )  # fmt: skip
        return self.apply("choose", [then, condition, otherwise], node)

    def compare(self, node: nodes.Compare) -> Value:
        """A chain of comparisons: all of its links hold."""
        if self.categories.is_test(node):
            return self.categories.test(node)
        operands = [self.number(operand) for operand in node.operands]
        links = []
        for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
            link = self.apply(REGISTRY.operators[op].name, [left, right], node)
            if link is not BROKEN and link.kind.range.point is not None and link.kind.stage > Stage.CONSTANT:
                verdict = "true" if link.kind.range.point else "false"
                self.findings.warn(
                    "PD404", f"the comparison is always {verdict}", node.span,
                    f"{left.kind.range} {op} {right.kind.range}", "leave it out, or move the threshold",
                )  # fmt: skip
            links.append(link)
        result = links[0]
        for link in links[1:]:
            result = self.apply("both", [result, link], node)
        return result

    def name(self, node: nodes.Name) -> Value:
        """What a name means, in the order of the language: declared, STATISTIC_MODEL, given, a word."""
        found = BROKEN if node.name in self.declared.failed else self.resolve(node.name, node.span)
        if found is not None:
            return found
        name = ALIASES.get(node.name, node.name)
        word = REGISTRY.get(name) or REGISTRY.reduction(name)
        if node.name == "weight":
            return self.error(
                "PD113", "`weight` cannot be read here", node, "only `loss` reads it, after `weight = ...`",
                "give the expression a name with `let` and use that",
            )  # fmt: skip
        if word is not None and not getattr(word, "symbol", ""):
            return self.lone_word(word, node)
        return self.error(
            "PD203", f"unknown name `{node.name}`", node, "not a statistic, parameter, column or `let`",
            self.findings.suggest(
                node.name,
                self.declared.readable(),
                f"declare it: `param {node.name} = 1`, `column {node.name}: number`, or give {node.name}=1",
            ),
        )  # fmt: skip

    def resolve(self, name: str, span: Span | None) -> Value | None:
        """The value that a name alone has; None where it has none."""
        declared = self.declared
        declared.used.add(name)
        if name == "weight" and self.weight is not None:
            return self.value("weight", self.weight.kind.detached(), self.weight, span=span)
        if name in declared.lets:
            return declared.lets[name]
        if name in declared.params or (name not in declared.names() and self._implied(name)):
            range = declared.params[name].range
            return self.value("param", Kind(Extent.CONSTANT, Element.NUMBER, range), span=span, name=name)
        if name in declared.columns:
            return self.column(name, span)
        if name in declared.model_names():
            moving = name in declared.models and declared.models[name].ema is not None
            kind = TRAINED if name == "on" else MOVING if moving else FROZEN
            return self.value("model", kind, span=span, name=name)
        pair = declared.split(name)
        if pair:
            model = self.resolve(pair[1], span)
            assert model is not None
            return self.calls.statistic(REGISTRY.statistic(pair[0]), [model], {}, span)
        word = REGISTRY.get(name)
        return self.reading(word, span) if isinstance(word, Reading) else None

    def _implied(self, name: str) -> bool:
        reads_already = self.declared.split(name) or name in REGISTRY.names() or name in nodes.RESERVED
        return not reads_already and self.declared.implied(name) is not None

    def column(self, name: str, span: Span | None) -> Value:
        """The value of a declared column."""
        column = self.declared.columns[name]
        extent = Extent[column.extent.upper()]
        kind = Kind(extent, Element(column.element), column.range, Stage.DATA)
        return self.value("column", kind, span=span, name=name)

    def reading(self, word: Reading, span: Span | None) -> Value:
        """The value of a word that stands alone; those that come as columns are read as columns."""
        kind = Kind(word.extent, word.element, word.range, word.stage)
        if word.given == "column":
            return self.value("column", kind, span=span, name=word.name)
        return self.value(word.name, kind, span=span)

    def lone_word(self, word: Word, node: nodes.Name | nodes.Call) -> Value:
        """A word that needs arguments and has none, or a scope."""
        name = node.name if isinstance(node, nodes.Name) else node.function
        if isinstance(word, Scope):
            return self.error(
                "PD308", f"`{word.name}` is a scope, not a value", node, "what of it?",
                f"a reduction goes over it: `mean(p_on, {word.signature})`",
            )  # fmt: skip
        if isinstance(word, Statistic):
            ways = [f"{name}_{m}" for m in self.declared.model_names()]
            if word.models > 1 or any(o.default is None for o in word.options.values()):
                ways = [word.signature]
            return self.error(
                "PD204", f"`{name}` is a statistic and needs its model", node, "of which model?",
                "write " + " or ".join(f"`{way}`" for way in ways),
            )  # fmt: skip
        return self.error(
            "PD204", f"`{name}` needs its arguments", node, word.group, f"write `{word.signature}`"
        )

    def apply(self, name: str, values: Sequence[Value], node: Expr) -> Value:
        """A function applied to checked values: its kind by the function's own rules."""
        if BROKEN in values:
            return BROKEN
        word = REGISTRY.function(name)
        if name == "power" and values[1].kind.gradient:
            word = REGISTRY.function("power_of_both")
        self.hazard(word, values, node)
        range = word.range(*(v.kind.range for v in values))
        carries = word.derivative is not None and word.name not in ("sg", "sign")
        kind = join([v.kind for v in values], word.element, range, gradient=carries)
        return self.value(word.name, kind, *values, span=node.span)

    def hazard(self, word: Function | View | Reduction, values: Sequence[Value], node: Expr) -> None:
        """Report a division, power or logarithm that the ranges do not make safe."""
        if word.hazard is None or (word.name in ("log", "log2", "sqrt") and is_probability(values[0])):
            return
        verdict = word.hazard(*(known_range(v, self.params) for v in values))
        if verdict == "certain":
            self.error(
                "PD309", f"{word.danger}, always", node, "no number comes out of this", "change the rule"
            )
        elif verdict == "possible":
            parts = ", ".join(str(v.kind.range) for v in values)
            self.findings.warn(
                "PD405", f"{word.danger} is possible here", node.span, f"of {parts}",
                "bound it with max or clip, or declare the range of what it reads",
            )  # fmt: skip


def is_probability(value: Value) -> bool:
    """Whether a value is the target's probability (perhaps under `sg`), whose logarithm is `-nll`."""
    while value.word == "sg":
        value = value.arguments[0]
    return value.word == "p"
