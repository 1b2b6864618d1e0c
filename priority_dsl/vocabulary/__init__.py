"""The vocabulary of the language, by theme; importing it fills the registry, without torch."""

from priority_dsl.vocabulary import (
    arithmetic,
    chance,
    composition,
    logic,
    pairs,
    planned,
    reductions,
    statistics,
    surroundings,
    text,
    views,
)

__all__ = [
    "arithmetic",
    "chance",
    "composition",
    "logic",
    "pairs",
    "planned",
    "reductions",
    "statistics",
    "surroundings",
    "text",
    "views",
]
