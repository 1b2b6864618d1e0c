"""A small language that says how much each training token counts, compiled to a loss graph."""

from __future__ import annotations

from priority_dsl.api import check, compile_rule, explain
from priority_dsl.checked import CheckedRule
from priority_dsl.diagnostics import Diagnostic, PriorityError
from priority_dsl.library import list_rules
from priority_dsl.nodes import Rule
from priority_dsl.parser import parse
from priority_dsl.printer import format_rule

__version__ = "0.1.0"

__all__ = [
    "CheckedRule",
    "Diagnostic",
    "PriorityError",
    "Rule",
    "check",
    "compile_rule",
    "explain",
    "format_rule",
    "list_rules",
    "parse",
]
