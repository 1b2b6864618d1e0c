"""--strict: what would be a warning stops the command."""

from __future__ import annotations

from dataclasses import replace

from priority_dsl import CheckedRule, PriorityError


def refuse_warnings(rule: CheckedRule) -> None:
    """Raise `PriorityError` with the rule's warnings as errors, if it has any."""
    if rule.warnings:
        raise PriorityError([replace(warning, severity="error") for warning in rule.warnings])
