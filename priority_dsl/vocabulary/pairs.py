"""Pairs: two responses to one prompt, of which one was preferred. `priority_dsl.pairing` lays them out."""

from __future__ import annotations

from priority_dsl.registry import REGISTRY
from priority_dsl.words import PairSide

chosen = PairSide(
    "chosen", "pairs", "A value of the preferred response of a pair, one per example: a value per pair.",
    "chosen(mean(p_ref, example)) - rejected(mean(p_ref, example))",
)  # fmt: skip
rejected = PairSide(
    "rejected", "pairs", "A value of the other response of a pair, one per example: a value per pair.",
    "1 if chosen(length) > rejected(length) else 0.5", chosen=False,
)  # fmt: skip
REGISTRY.add(chosen)
REGISTRY.add(rejected)
