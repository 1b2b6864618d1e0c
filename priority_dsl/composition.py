"""Rules inside rules: `rule("dft") * rule("prift_mass", tau=t)`.

The inner rule is checked by itself, with names of its own, and its weight becomes a value of the outer rule.
What it needs beside a weight is joined to the outer rule: models and columns are declared once for both, and
what it says of the whole loss must be what the outer rule says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from priority_dsl import library, nodes
from priority_dsl.chance import renumbered
from priority_dsl.checked import Column, ModelDeclaration
from priority_dsl.declarations import Declarations, Findings
from priority_dsl.diagnostics import Diagnostic, PriorityError, did_you_mean
from priority_dsl.folding import fold
from priority_dsl.kinds import Range, Stage
from priority_dsl.parser import parse
from priority_dsl.printer import format_expression
from priority_dsl.values import BROKEN, Value

if TYPE_CHECKING:
    from priority_dsl.checker import Checker
    from priority_dsl.expressions import Expressions

SHIPPED = 256  # trees of library rules that are kept
Declared = Column | ModelDeclaration


@lru_cache(SHIPPED)
def _tree(text: str, name: str) -> nodes.Rule:
    return parse(text, name)


class InnerDeclarations(Declarations):
    """The names of a rule inside another: its parameters are values of the outer rule, or their defaults."""

    def __init__(self, findings: Findings, outer: Expressions, bound: Mapping[str, nodes.Keyword]) -> None:
        super().__init__(findings, {})
        self.outer, self.bound = outer, bound
        self.parameters: list[str] = []

    def param(self, node: nodes.Param) -> None:
        """A parameter is a value with a name, as `let` makes them, and nothing that the run sets."""
        super().param(node)
        parameter = self.params.pop(node.name, None)
        if parameter is None:  # refused, and reported
            return
        self.parameters.append(node.name)
        if node.name in self.bound:
            self.lets[node.name] = self._given(self.bound[node.name], parameter.range)
        else:
            self.lets[node.name] = self.outer.constant(parameter.value)

    def _given(self, keyword: nodes.Keyword, range: Range) -> Value:
        """What the outer rule gives for a parameter: a number of parameters, in the declared range."""
        value = self.outer.number(keyword.value)
        if value is BROKEN:
            return value
        what = format_expression(keyword.value)
        if value.kind.stage > Stage.CONSTANT:
            return self.outer.error(
                "PD305", f"`{what}` is known only when the rule runs", keyword,
                f"`{keyword.name}` is a parameter", "give a number, or a parameter of this rule",
            )  # fmt: skip
        number = fold(value, self.outer.params)
        if not range.contains(number):
            return self.outer.error(
                "PD307", f"the value given for `{keyword.name}` is {number:g}, outside {range}", keyword,
                "the range that the inner rule declares", "stay in the range",
            )  # fmt: skip
        return replace(value, kind=replace(value.kind, range=common(value.kind.range, range)))


def common(a: Range, b: Range) -> Range:
    """The values of `a` that are in the interval `b`, which holds one of them."""
    if a.values is not None:
        return Range.of(v for v in a.values if b.contains(v))
    low, low_open = max((a.low, a.low_open), (b.low, b.low_open))
    high, high_closed = min((a.high, not a.high_open), (b.high, not b.high_open))
    return Range(low, high, low_open, not high_closed)


@dataclass(frozen=True)
class Read:
    """A rule that was read: its name, the call that reads it, and what the checker found in it."""

    name: str
    call: nodes.Call
    checker: Checker


class Composition:
    """The rules that one rule reads, and what they ask of it."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions
        self.inside: tuple[str, ...] = ()  # the rules of the library that are being read, the outermost first
        self.read: list[Read] = []

    # One call -----------------------------------------------------------------------------------

    def call(self, node: nodes.Call) -> Value:
        """The weight of a rule of the library; a condition where it is one."""
        name = self._name(node)
        if name is None:
            return BROKEN
        if name in self.inside:
            circle = " reads ".join(f"`{n}`" for n in (*self.inside[self.inside.index(name) :], name))
            return self.of.error(
                "PD213", f"the rule `{name}` reads itself: {circle}", node, "this closes the circle",
                "a rule of the library reads only rules that do not read it",
            )  # fmt: skip
        bound = {keyword.name: keyword for keyword in node.keywords}
        inner = self._checked(name, bound, node)
        if inner is None or not self._fits(inner, bound, node):
            return BROKEN
        self.read.append(inner)
        return self._weight(inner)

    def _name(self, node: nodes.Call) -> str | None:
        """The name that a call gives; None (reported) where it is none of the library."""
        form = 'write `rule("dft")`, and parameters by name: `rule("prift_mass", tau=0.3)`'
        first = node.arguments[0] if node.arguments else None
        names = [keyword.name for keyword in node.keywords]
        problem = ""
        if first is None:
            problem = "which rule?"
        elif not isinstance(first, nodes.String):
            problem = "the name stands in quotes"
        elif len(node.arguments) > 1:
            problem = "parameters are given by name"
        elif twice := next((n for n in names if names.count(n) > 1), None):
            problem = f"`{twice}` is given twice"
        if problem or not isinstance(first, nodes.String):
            self.of.error("PD303", "the call of `rule` does not fit", node, problem, form)
            return None
        known = library.list_rules()
        if first.value not in known:
            stem = first.value.rsplit("/", 1)[-1].removesuffix(library.SUFFIX)
            self.of.error(
                "PD201", f"the library has no rule `{first.value}`", first, "rules are read by name alone",
                did_you_mean(stem, known, "`priority rules` lists the library"),
            )  # fmt: skip
            return None
        return first.value

    def _checked(self, name: str, bound: Mapping[str, nodes.Keyword], node: nodes.Call) -> Read | None:
        """The inner rule, checked with its parameters bound; its findings are reported under its name."""
        from priority_dsl.checker import Checker  # the checker reads expressions, which read rules

        source = library.resolve(name)
        findings = Findings(source)
        try:
            declared = InnerDeclarations(findings, self.of, bound)
            checker = Checker(_tree(source.text, source.name), declared)
            checker.expressions.stand_in(self.of, self.of.place(node), (*self.inside, name))
            checker.read_statements()
        except PriorityError as error:
            findings.found += error.diagnostics
            checker = None
        for finding in findings.found:
            self.of.findings.found.append(self._told(finding, node))
        if checker is None or findings.of("error"):
            return None
        return Read(name, node, checker)

    def _told(self, finding: Diagnostic, node: nodes.Call) -> Diagnostic:
        """A finding of the inner rule, with the call that leads to it."""
        source = self.of.findings.source
        place = "" if node.span is None else ":{}:{}".format(*source.position(node.span.start))
        help = f"{finding.help}\nread by `{format_expression(node)}` at {source.name}{place}"
        return replace(finding, help=help)

    def _fits(self, inner: Read, bound: Mapping[str, nodes.Keyword], node: nodes.Call) -> bool:
        """Whether the rule has the parameters that are given, and is a weight alone."""
        parameters = _parameters(inner)
        for name, keyword in bound.items():
            if name not in parameters:
                has = f"it has {', '.join(parameters) or 'no parameters'}"
                self.of.error(
                    "PD303", f"the rule `{inner.name}` has no parameter `{name}`", keyword, "not a parameter",
                    did_you_mean(name, parameters, has),
                )  # fmt: skip
        if inner.checker.loss is not None:
            self.of.error(
                "PD213", f"the rule `{inner.name}` has a loss of its own", node,
                "its weight alone is another method", "write out the weight and the loss that you mean",
            )  # fmt: skip
        return inner.checker.loss is None and set(bound) <= set(parameters)

    def _weight(self, inner: Read) -> Value:
        """The weight as a value: without gradient, and as a condition where it is one."""
        value = inner.checker.weight or self.of.constant(1.0)
        if value.word == "indicator":
            value = value.arguments[0]
        return self.of.value("sg", value.kind.detached(), value) if value.kind.gradient else value

    def handed_on(self, name: str) -> str:
        """How a value that is given for a parameter of an inner rule reaches it; empty where none has it."""
        inner = next((r for r in self.read if name in _parameters(r)), None)
        if inner is None:
            return ""
        return f'`{inner.name}` has it: hand it on with `rule("{inner.name}", {name}={name})`'

    # The whole rule -----------------------------------------------------------------------------

    def settle(self, outer: Checker) -> None:
        """Join what the rules that were read declare to the outer rule, and refuse what does not fit it."""
        owner: dict[str, str] = {}
        for inner in self.read:
            for kind, declared, own in (
                ("model", inner.checker.declared.models, outer.declared.models),
                ("column", inner.checker.declared.columns, outer.declared.columns),
            ):
                for name, declaration in declared.items():
                    self._join(kind, declaration, own, inner, owner.get(name, "this rule"))  # type: ignore[arg-type]
                    owner.setdefault(name, f"`{inner.name}`")
                    self.of.declared.used.add(name)
            self._agrees(inner, outer)

    def _join(self, kind: str, declared: Declared, own: dict[str, Declared], inner: Read, owner: str) -> None:
        """One declaration of an inner rule: a new one, or the same as is there."""
        name, here = declared.name, self.of.declared
        there = own.get(name)
        others = {"parameter": here.params, "model": here.models, "column": here.columns}
        if clash := next((what for what, names in others.items() if what != kind and name in names), ""):
            self.of.error(
                "PD214", f"`{name}` is a {kind} of `{inner.name}` and a {clash} of {owner}", inner.call,
                "one name, two things", f"rename the {clash}",
            )  # fmt: skip
        elif there is None:
            own[name] = replace(declared, span=None)  # its place is in another text
        elif _content(there) != _content(declared):
            declaring = (
                s for s in inner.checker.tree.statements if isinstance(s, nodes.Model | nodes.Column)
            )
            written = [_written(inner.checker, s) for s in declaring if s.name == name]
            way_out = "declare it in both"
            if written:
                way_out = f"declare it as `{inner.name}` does: `{written[0]}`"
            self.of.error(
                "PD214", f"`{name}` is not the same {kind} in `{inner.name}` and in {owner}", inner.call,
                "one name, two things", way_out,
            )  # fmt: skip
        elif isinstance(there, Column) and isinstance(declared, Column):
            every = tuple(dict.fromkeys([*there.categories, *declared.categories]))
            own[name] = replace(there, categories=every)

    def _agrees(self, inner: Read, outer: Checker) -> None:
        """Refuse a rule that says of the whole loss what the outer rule does not."""
        asks = inner.checker
        says = {
            "over": (asks.over, asks.over_choice() == outer.over_choice()),
            "normalize": (
                asks.normalize,
                asks.normalize_choice() == outer.normalize_choice() and asks.groups == outer.groups,
            ),
            "keep": (
                next((s for s in asks.tree.statements if isinstance(s, nodes.Keep)), None),
                _same_keep(asks.keep, outer.keep),
            ),
        }
        for what, (statement, same) in says.items():
            if statement is not None and not same:
                written = _written(asks, statement)
                self.of.error(
                    "PD213", f"the rule `{inner.name}` says `{written}`, and this rule does not", inner.call,
                    f"its weight under another `{what}` is another method",
                    f"write `{written}` in this rule too",
                )  # fmt: skip


def texts_inside(tree: nodes.Rule) -> dict[str, str]:
    """The texts of all rules that a rule reads with `rule("NAME")`, and that those read, by name, sorted.

    The rule must be one that checks.
    """
    found: dict[str, str] = {}
    waiting: list[nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        waiting += nodes.children(node)
        if isinstance(node, nodes.Call) and node.function == "rule":
            named = node.arguments[0]
            if isinstance(named, nodes.String) and named.value not in found:
                source = library.resolve(named.value)
                found[named.value] = source.text
                waiting.append(_tree(source.text, source.name))
    return dict(sorted(found.items()))


def _parameters(inner: Read) -> list[str]:
    """The parameters of an inner rule."""
    declared = inner.checker.declared
    assert isinstance(declared, InnerDeclarations)
    return declared.parameters


def _same_keep(a: Value | None, b: Value | None) -> bool:
    """Whether two `keep` are one method: each may have draws of its own."""
    if a is None or b is None:
        return a is b
    return renumbered(a) == renumbered(b)


def _content(declared: Declared) -> Any:
    """What makes two declarations the same; the values of an open category are those of both."""
    if isinstance(declared, Column) and not declared.closed:
        return replace(declared, span=None, categories=())
    return replace(declared, span=None)


def _written(checker: Checker, statement: nodes.Node) -> str:
    """A statement as the rule's text has it, on one line."""
    assert statement.span is not None, "a rule of the library is parsed from its text"
    return " ".join(checker.findings.source.text[slice(*statement.span)].split())
