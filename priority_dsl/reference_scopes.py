"""Which tokens a reduction of the oracle goes over, as lists of places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from priority_dsl.kinds import Element, Extent
from priority_dsl.registry import REGISTRY, Reduction
from priority_dsl.values import Value

Place = tuple[int, int]  # row and position of a target


@dataclass(frozen=True)
class Seats:
    """Where the supervised tokens of a batch stand: the example of each place, and its number there from 0."""

    example: Mapping[Place, int]
    number: Mapping[Place, int]

    @classmethod
    def of(cls, places: Sequence[Place], examples: Sequence[Sequence[int]] | None) -> Seats:
        """The seats of some places, in order; `examples` names the example of each (default: its row)."""
        example = {p: p[0] if examples is None else examples[p[0]][p[1]] for p in places}
        seen: dict[int, int] = {}
        number = {}
        for place in places:
            number[place] = seen.get(example[place], 0)
            seen[example[place]] = number[place] + 1
        return cls(example, number)

    def length(self, place: Place) -> int:
        """The number of supervised tokens of the place's example."""
        return sum(e == self.example[place] for e in self.example.values())

    def scope(self, value: Value, here: Place) -> list[Place]:
        """The places that a reduction goes over as seen from one of them, in order of example and number.

        Values per example are counted once, at the first token of each.
        """
        options = dict(value.options)
        scope, size = options["scope"], int(options.get("size", 0))  # type: ignore[arg-type]
        found: Iterable[Place] = self.example
        if scope not in ("batch", "dataset"):
            found = [p for p in found if self.example[p] == self.example[here]]
        if scope == "chunk":
            found = [p for p in found if self.number[p] // size == self.number[here] // size]
        if scope == "window":
            found = [p for p in found if abs(self.number[p] - self.number[here]) <= size]
        if self.of_examples(value):
            found = [p for p in found if self.number[p] == 0]
        return sorted(found, key=lambda p: (self.example[p], self.number[p]))

    def of_examples(self, value: Value) -> bool:
        """Whether a reduction goes over values per example rather than per token."""
        options, word = dict(value.options), REGISTRY.words[value.word]
        assert isinstance(word, Reduction)
        members = [value.arguments[0], *value.arguments[-1:] * ("where" in options)]
        of_tokens = options["scope"] in ("chunk", "window") or not word.scoped
        return not of_tokens and max(m.kind.extent for m in members) == Extent.EXAMPLE

    def first(self, here: Place) -> Place:
        """The first token of the place's example."""
        return next(p for p in self.example if self.example[p] == self.example[here] and self.number[p] == 0)


def reduced(value: Value, seats: Seats, here: Place, number: Mapping[Place, object]) -> float:
    """A reduction as seen from one place; `number` maps places to what reads values there."""
    word, options = REGISTRY.words[value.word], dict(value.options)
    assert isinstance(word, Reduction)
    read = {p: number[p] for p in seats.scope(value, here)}
    where = value.arguments[-1] if "where" in options else None
    kept = [p for p, at in read.items() if where is None or at(where)]  # type: ignore[operator]
    xs = [float(read[p](value.arguments[0])) for p in kept]  # type: ignore[operator]
    settings = [float(number[here](a)) for a in value.arguments[1 : 1 + len(word.settings)]]  # type: ignore[operator]
    chosen = [options[name] for name in word.options]
    if not word.rescales:
        return word.oracle(xs, *settings, *chosen) if xs else 0.0
    at = seats.first(here) if seats.of_examples(value) else here
    if at not in kept:
        return False if word.element == Element.BOOL else 0.0
    return word.oracle(xs, kept.index(at), *settings, *chosen)
