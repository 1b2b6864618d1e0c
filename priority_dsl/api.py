"""The doors of the package: from a text, a library name or a path to a checked or a compiled rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from priority_dsl import library
from priority_dsl.checked import CheckedRule
from priority_dsl.checker import check_tree
from priority_dsl.declarations import Declarations, Findings
from priority_dsl.diagnostics import Source
from priority_dsl.explain import explain_rule
from priority_dsl.nodes import Rule
from priority_dsl.parser import parse
from priority_dsl.printer import format_rule
from priority_dsl.registry import REGISTRY, Reading

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def check(rule: str | Rule, **values: float) -> CheckedRule:
    """Check a rule text, a library name, a `.rule` path or a tree, without torch.

    `values` are parameter values. PriorityError holds every finding: PD1xx syntax, PD2xx names, PD3xx
    kinds; warnings (PD4xx) are in `.warnings` of the result.
    """
    if isinstance(rule, Rule):
        return check_tree(rule, Source(format_rule(rule)), values)
    source = library.resolve(rule, words=_words_alone())
    return check_tree(parse(source.text, source.name), source, values)


def _words_alone() -> list[str]:
    """The words that are a value by themselves: `p_on`, `position`."""
    readings = REGISTRY.names(Reading)
    declared = Declarations(Findings(Source("")), {})
    return [*readings, *(f"{statistic}_{model}" for statistic, model in declared.statistics_of_models())]


def compile_rule(rule: str | Rule | CheckedRule, **values: float) -> CompiledRule:
    """Compile a rule text, a library name, a `.rule` path, a tree or a checked rule to a loss graph.

    `values` are parameter values; one that the rule does not read is an error (PD206), as is one outside
    the declared range (PD307). Errors as in `check`.
    """
    from priority_dsl.rule import CompiledRule  # torch is loaded here, not before

    if isinstance(rule, CheckedRule):
        if not values:
            return CompiledRule(rule)
        rule = rule.tree
    name = rule.strip() if isinstance(rule, str) and rule.strip() in library.list_rules() else None
    return CompiledRule(check(rule, **values), name)


def explain(rule: str | Rule | CheckedRule | CompiledRule, **values: float) -> str:
    """What a rule is, as text: regime, range, what it reads and when it is known, warnings."""
    if isinstance(rule, str | Rule):
        return explain_rule(check(rule, **values))
    return explain_rule(rule) if isinstance(rule, CheckedRule) else rule.explain()
