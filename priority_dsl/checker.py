"""From the tree of a rule to a checked rule: every statement in order, all findings reported together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from priority_dsl import (
    lint,
    nodes,
    vocabulary,  # noqa: F401  (importing the vocabulary fills the registry)
)
from priority_dsl.chance import drawn_once, places
from priority_dsl.checked import CheckedRule, Column, Group, text
from priority_dsl.declarations import Declarations, Findings
from priority_dsl.diagnostics import PriorityError, Source, did_you_mean
from priority_dsl.expressions import Expressions
from priority_dsl.folding import fold
from priority_dsl.kinds import Element, Extent, Stage
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_rule
from priority_dsl.registry import REGISTRY, Reading, Reduction
from priority_dsl.values import BROKEN, Value, carrying, walk


def check_tree(
    tree: nodes.Rule, source: Source | None = None, given: Mapping[str, object] | None = None
) -> CheckedRule:
    """Check a tree; `given` are parameter values. PriorityError with every finding where one is an error."""
    source = source or Source(format_rule(tree))
    if places(tree) is None:  # one node at two places is two calls
        tree = nodes.Rule.model_validate_json(tree.model_dump_json())
    return Checker(tree, Declarations(Findings(source), given or {})).run()


class Checker:
    """Checks one rule: the outermost, or one that is read inside another."""

    def __init__(self, tree: nodes.Rule, declared: Declarations) -> None:
        self.tree, self.declared, self.findings = tree, declared, declared.findings
        self.expressions = Expressions(self.declared, self.findings)
        self.expressions.places = places(tree) or {}
        self.doc = ""
        self.cites: list[str] = []
        self.weight: Value | None = None
        self.loss: Value | None = None
        self.over: nodes.Over | None = None
        self.normalize: nodes.Normalize | None = None
        self.groups: tuple[Group, ...] = ()
        self.keep: Value | None = None

    def read_statements(self) -> None:
        """Check every statement, and the rules that are read as parts of this one."""
        for statement in self.tree.statements:
            self.statement(statement)
        self.expressions.composition.settle(self)

    def run(self) -> CheckedRule:
        """The checked rule; PriorityError with every finding where one is an error."""
        self.read_statements()
        self.unused_values()
        weight = self.weight or self.expressions.constant(1.0)
        if self.loss is not None and self.weight is not None and not self.findings.of("error"):
            self.loss_reads_weight(self.loss)
        self.pairs_are_kept_whole()
        self.views_of_responses()
        if errors := self.findings.of("error"):
            raise PriorityError(errors)
        self.readings_are_columns()
        checked = CheckedRule(
            source=self.findings.source,
            tree=self.tree,
            doc=self.doc,
            cites=tuple(self.cites),
            params=self.declared.params,
            models=self.declared.models,
            columns=self.declared.columns,
            weight=weight,
            loss=self.loss,
            over=self.over_choice(),
            normalize=self.normalize_choice(),
            groups=self.groups,
            keep=self.keep,
        )
        lint.examine(checked, self.findings, self.declared)
        return replace(checked, warnings=self.findings.of("warning"))

    def statement(self, statement: nodes.Statement) -> None:
        """Check one statement."""
        match statement:
            case nodes.Doc(text=text):
                self.doc = text
            case nodes.Cite(text=text):
                self.cites.append(text)
            case nodes.Param():
                self.declared.param(statement)
            case nodes.Model():
                rate = None if statement.value is None else self.expressions.viewing.rate(statement.value)
                self.declared.model(statement, rate)
            case nodes.Column():
                self.declared.column(statement)
            case nodes.Let():
                value = self.expressions.visit(statement.value)
                if self.declared.free(statement.name, statement.span):
                    self.declared.lets[statement.name] = value
                    self.declared.let_spans[statement.name] = statement.span
            case nodes.Weight():
                self.weight = self.expressions.weight = self.weight_value(statement)
            case nodes.Loss():
                self.expressions.weight = self.weight or self.expressions.constant(1.0)
                self.loss = self.loss_value(statement)
            case nodes.Over():
                self.over = statement
            case nodes.Normalize():
                self.normalize = statement
                if statement.by is not None:
                    self.groups = self.grouped(statement.by)
            case nodes.Keep():
                self.keep = self.kept(statement)

    def kept(self, statement: nodes.Keep) -> Value | None:
        """Which examples are trained on: a condition with one value an example, known before training."""
        node = statement.value
        value = drawn_once(self.expressions.condition(node))
        if value is BROKEN:
            return None
        if value.kind.extent > Extent.EXAMPLE:
            self.findings.add(
                "PD305", "`keep` differs from token to token", node.span,
                "whole examples are kept or left out", "sum the tokens up: `mean(..., example)`",
            )  # fmt: skip
        elif value.kind.stage > Stage.FROZEN:
            what = "the model being trained" if value.kind.stage == Stage.ONLINE else "the run itself"
            self.findings.add(
                "PD311", "`keep` is decided before training", node.span, f"this reads {what}",
                "read columns, `ref` or a declared model, or give the example the weight 0",
            )  # fmt: skip
        return value

    def pairs_are_kept_whole(self) -> None:
        """Refuse a `keep` that could leave out one response of a pair."""
        roots = [self.weight, self.loss, self.keep, *(group.member for group in self.groups)]
        values = walk(*(root for root in roots if root is not None and root is not BROKEN))
        if self.keep is None or self.keep.kind.extent != Extent.EXAMPLE:
            return
        if any(value.kind.extent == Extent.PAIR for value in values):
            node = next(s for s in self.tree.statements if isinstance(s, nodes.Keep))
            self.findings.add(
                "PD305", "`keep` differs from response to response", node.value.span,
                "pairs are kept or left out whole", "say of which response: `chosen(...)`, `rejected(...)`",
            )  # fmt: skip

    def grouped(self, by: Expr) -> tuple[Group, ...]:
        """The groups by whose sizes tokens are divided: those of a condition or of a category."""
        tests = self.expressions.categories.every_test(by)
        if tests is None:
            condition = self.expressions.condition(by)
            tests = [condition, self.expressions.apply("negation", [condition], by)]
        if BROKEN in tests:
            return ()
        return tuple(Group(test, self.expressions.scoping.how_many(test, by)) for test in tests)

    def over_choice(self) -> Any:
        """The tokens that the rule is about."""
        return self.over.choice if self.over else "response"

    def normalize_choice(self) -> Any:
        """What the loss is divided by: what the rule says, else by as many as the loss has terms."""
        if self.normalize is not None:
            return self.normalize.choice
        whole = self.loss is not None and self.loss.kind.extent in (Extent.EXAMPLE, Extent.PAIR)
        return "terms" if whole else "tokens"

    def weight_value(self, statement: nodes.Weight) -> Value:
        """The weight: a number, detached; an `if` may leave out its `else`, which is 1."""
        node = statement.value
        if isinstance(node, nodes.Conditional):
            value = self.expressions.conditional(node, outermost=True)
        else:
            value = self.expressions.number(node)
        if value is not BROKEN and value.kind.stage == Stage.CONSTANT:
            number = fold(value, self.expressions.params)
            if not math.isfinite(number) and not self.findings.of("error"):
                self.findings.add(
                    "PD309", f"the weight is {number}", node.span, "not finite", "change the rule"
                )
        return value

    def loss_value(self, statement: nodes.Loss) -> Value:
        """The loss of a token: a number through which gradient reaches the trained model."""
        value = self.expressions.visit(statement.value)
        if value is BROKEN:
            return value
        if value.kind.element != Element.NUMBER or not value.kind.gradient:
            self.findings.add(
                "PD310", "this loss has no gradient: it would train nothing", statement.value.span,
                "no `on` statistic outside `sg(...)`", "a loss such as `weight * nll(on)`",
            )  # fmt: skip
            return BROKEN
        for part in carrying(value):
            word = REGISTRY.get(part.word)
            if isinstance(word, Reduction) and (word.derivative is None or part.option("scope") == "batch"):
                self.findings.add(
                    "PD312", f"no gradient flows through `{text(part)}`", part.span,
                    "it would be left out of the loss silently", "say that it is held: wrap it in `sg(...)`",
                )  # fmt: skip
        return value

    def loss_reads_weight(self, loss: Value) -> None:
        """Refuse a loss that ignores the weight of its rule."""
        if not any(value.word == "weight" for value in walk(loss)):
            node = next(s for s in self.tree.statements if isinstance(s, nodes.Loss))
            self.findings.add(
                "PD306", "the rule gives a weight and its loss does not read it", node.span,
                "the weight would be ignored", "multiply by `weight` in the loss, or leave the weight out",
            )  # fmt: skip

    def views_of_responses(self) -> None:
        """Refuse a view that reads the response alone where the rule is about every token."""
        roots = [root for root in (self.weight, self.loss) if root is not None]
        for value in walk(*roots) if self.over_choice() == "all" else ():
            if value.word in ("unprompted", "reading"):
                self.findings.add(
                    "PD314",
                    f"`{text(value)}` says nothing of the prompt's tokens, and the rule is about all",
                    value.span, "reads the response after another prompt, or none",
                    "leave out `over = all`, or read the model itself",
                )  # fmt: skip

    def unused_values(self) -> None:
        """Refuse values that are given for names which the rule does not read."""
        for name in sorted(self.declared.unused_given):
            known = list(self.declared.params)
            help = did_you_mean(name, known, f"it has {', '.join(known) or 'no parameters'}")
            self.findings.add(
                "PD206", f"the rule does not read `{name}`, for which a value is given", None,
                help=self.expressions.composition.handed_on(name) or help,
            )  # fmt: skip

    def readings_are_columns(self) -> None:
        """`role`, `response` and what a regex asks come with the data: list them among the columns."""
        roots = [self.weight, self.loss, self.keep, *(group.member for group in self.groups)]
        for value in walk(*(root for root in roots if root is not None)):
            name = str(value.option("name")) if value.word == "column" else ""
            word = REGISTRY.get(name)
            if isinstance(word, Reading) and name not in self.declared.columns:
                element = "bool" if word.element == Element.BOOL else "category"
                self.declared.columns[name] = Column(
                    name, element, "token", word.values, word.range, closed=True
                )
            pattern = dict(value.options).get("pattern")
            if isinstance(pattern, tuple) and value.word == "column":
                kind, regex = map(str, pattern)
                self.declared.columns[name] = Column(
                    name, "bool", "token", range=value.kind.range, pattern=(kind, regex)
                )
