"""The vocabulary of the language, by theme; importing it fills the registry, without torch."""

from priority_dsl.vocabulary import (
    arithmetic,
    attention,
    chance,
    composition,
    logic,
    pairs,
    reductions,
    statistics,
    surroundings,
    text,
    views,
)

__all__ = [
    "arithmetic",
    "attention",
    "chance",
    "composition",
    "logic",
    "pairs",
    "reductions",
    "statistics",
    "surroundings",
    "text",
    "views",
]
