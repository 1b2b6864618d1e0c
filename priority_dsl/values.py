"""The checked form of an expression: a tree of values, each with its kind and the word that makes it.

A `Value` is what is left of a node once every name is resolved: a word of the registry applied to
values, or one of the leaves below. Equal values mean the same thing and are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priority_dsl.diagnostics import Span
from priority_dsl.kinds import Element, Extent, Kind

Option = str | float | int | tuple[str | float, ...]


@dataclass(frozen=True)
class Value:
    """A word applied to values. `options` are the settings that are no values (`ties`, a leaf's name).

    Leaves: `constant` (value), `param` (name), `column` (name), `symbol` (text), `model` (name).
    """

    word: str
    arguments: tuple[Value, ...] = ()
    options: tuple[tuple[str, Option], ...] = ()
    kind: Kind = field(default=None, compare=False)  # type: ignore[assignment]
    span: Span | None = field(default=None, compare=False, repr=False)

    def option(self, name: str) -> Option:
        """The setting `name`."""
        return dict(self.options)[name]

    def __hash__(self) -> int:
        return self._hash

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.word, self.arguments, self.options)))

    _hash: int = field(init=False, compare=False, repr=False, default=0)


BROKEN = Value("broken", kind=Kind(Extent.CONSTANT, Element.NUMBER))  # stands for a reported mistake


def walk(*roots: Value) -> Iterator[Value]:
    """Every distinct value below and with the roots, operands before what uses them."""
    seen: set[Value] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        value, done = stack.pop()
        if value in seen:
            continue
        if done:
            seen.add(value)
            yield value
        else:
            stack.append((value, True))
            stack += [(argument, False) for argument in reversed(value.arguments)]
