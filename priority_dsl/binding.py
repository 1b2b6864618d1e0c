"""What must be bound: the models that say something to a rule, under the names by which callers give it.

A model is bound by its name, and a view that reads anew by its text, since it takes a forward pass of its
own: `tempered(unprompted(ref), 2)` reads what is bound as `unprompted(ref)`. A view that only changes logits
is computed from what it sees.
"""

from __future__ import annotations

from collections.abc import Iterator

from priority_dsl.checked import text
from priority_dsl.registry import REGISTRY, View
from priority_dsl.values import Value, walk


def reads_anew(value: Value) -> bool:
    """Whether a value is a view in a forward pass of its own."""
    word = REGISTRY.get(value.word)
    return isinstance(word, View) and word.reads_anew


def bindings(*roots: Value) -> dict[str, Value]:
    """The models and views that the roots read, by the name under which each is bound."""
    found = (v for v in walk(*roots, into=lambda v: not reads_anew(v)) if v.word == "model" or reads_anew(v))
    return {text(v): v for v in found}


def bound_names(*roots: Value) -> set[str]:
    """The names under which what the roots read is bound."""
    return set(bindings(*roots))


def base_model(value: Value) -> str:
    """The model of which a bound value is a view."""
    while value.word != "model":
        value = value.arguments[0]
    return str(value.option("name"))


def views(value: Value) -> Iterator[Value]:
    """The views of a bound value, the outermost first."""
    while value.word != "model":
        yield value
        value = value.arguments[0]
