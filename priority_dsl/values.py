"""The checked form of an expression: a tree of values, each with its kind and the word that makes it.

A `Value` is what is left of a node once every name is resolved: a word of the registry applied to
values, or one of the leaves below. Equal values mean the same thing and are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

from priority_dsl.diagnostics import Span
from priority_dsl.kinds import Element, Extent, Kind

Option = str | float | int | tuple[str | float, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A word applied to values. `options` are the settings that are no values (`ties`, a leaf's name).

    Leaves: `constant` (value), `param`, `column`, `model`, `stored` (name). Two values are equal when word,
    arguments and options are: told by a fingerprint, since a `let` used twice makes a graph in which a
    comparison branch by branch would never end.
    """

    word: str
    arguments: tuple[Value, ...] = ()
    options: tuple[tuple[str, Option], ...] = ()
    kind: Kind = field(default=None)  # type: ignore[assignment]
    span: Span | None = field(default=None, repr=False)
    fingerprint: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        said = repr((self.word, self.options)).encode()
        below = b"".join(a.fingerprint for a in self.arguments)
        object.__setattr__(self, "fingerprint", sha256(said + below).digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<{self.word} of {len(self.arguments)}, {dict(self.options)}>"

    def option(self, name: str) -> Option:
        """The setting `name`."""
        return dict(self.options)[name]


BROKEN = Value("broken", kind=Kind(Extent.CONSTANT, Element.NUMBER))  # stands for a reported mistake


def walk(*roots: Value, into: Callable[[Value], bool] = lambda value: True) -> Iterator[Value]:
    """Every distinct value below and with the roots, operands before what uses them.

    Operands are visited where `into` holds of what uses them.
    """
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
            stack += [(argument, False) for argument in reversed(value.arguments) if into(value)]


def carrying(root: Value) -> Iterator[Value]:
    """The values through which gradient flows from the root: not those under `weight` or `sg`."""
    return (v for v in walk(root, into=lambda value: value.kind.gradient) if v.kind.gradient)
