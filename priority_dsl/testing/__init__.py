"""For users who test their own rules: strategies that draw rules and inputs, and the checks.

    from priority_dsl.testing import assert_equivalent
    def by_hand(logits, targets, models): ...
    assert_equivalent("mass(ref) >= 0.5", by_hand)

Needs hypothesis: install `priority_dsl[testing]`.
"""

from __future__ import annotations

from priority_dsl.testing.case import Case, cases
from priority_dsl.testing.drawing import Scope, expressions
from priority_dsl.testing.equivalence import assert_equivalent
from priority_dsl.testing.properties import PROPERTIES, check_properties, counterexample
from priority_dsl.testing.whole_rules import checked_rules, rules

__all__ = [
    "PROPERTIES",
    "Case",
    "Scope",
    "assert_equivalent",
    "cases",
    "check_properties",
    "checked_rules",
    "counterexample",
    "expressions",
    "rules",
]
