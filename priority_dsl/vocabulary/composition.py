"""Composition: the word that reads another rule; `priority_dsl.composition` checks its calls."""

from __future__ import annotations

from priority_dsl.registry import REGISTRY
from priority_dsl.words import Composition

rule = Composition(
    "rule", "composition", "The weight of a library rule, detached; a condition where the weight is one. "
    "Its parameters are given by name, as numbers or parameters of this rule, or have their defaults.",
    'rule("dft") * rule("prift_mass", tau=0.3)',
)  # fmt: skip
REGISTRY.add(rule)
