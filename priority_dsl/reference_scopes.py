"""Which tokens a reduction of the oracle goes over, as lists of places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from priority_dsl.kinds import Element, Extent
from priority_dsl.registry import REGISTRY, Reduction
from priority_dsl.values import Value

Place = tuple[int, int]  # row and position of a target
Table = Sequence[Sequence[int]]


def of_responses(examples: Table, chosen: Sequence[Sequence[bool] | bool]) -> Table:
    """The example of each target where a data-set row has two responses: they are numbered through.

    `chosen` says of each target, or of each row of the batch, whether it is of the chosen response.
    """
    of_token = [
        list(side) if isinstance(side, list | tuple) else [side] * len(row)
        for row, side in zip(examples, chosen, strict=True)
    ]
    return [
        [2 * example + (0 if side else 1) for example, side in zip(row, sides, strict=True)]
        for row, sides in zip(examples, of_token, strict=True)
    ]


@dataclass(frozen=True)
class Seats:
    """Where the supervised tokens of a batch stand: example of each place, and its number there from 0."""

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
            if _extent(value) == Extent.PAIR and scope in ("batch", "dataset"):
                found = [p for p in found if self.example[p] % 2 == 0]
        return sorted(found, key=lambda p: (self.example[p], self.number[p]))

    def of_examples(self, value: Value) -> bool:
        """Whether a reduction goes over values per example or pair rather than per token."""
        options, word = dict(value.options), REGISTRY.words[value.word]
        assert isinstance(word, Reduction)
        of_tokens = options["scope"] in ("chunk", "window") or not word.scoped
        return not of_tokens and _extent(value) in (Extent.EXAMPLE, Extent.PAIR)

    def first(self, example: int) -> Place:
        """The first token of an example."""
        return next(p for p, e in self.example.items() if e == example and self.number[p] == 0)

    def response(self, here: Place, chosen: bool) -> Place:
        """The first token of the chosen or the rejected response of the place's pair."""
        return self.first(self.example[here] // 2 * 2 + (0 if chosen else 1))

    def stands_for(self, value: Value, here: Place) -> Place:
        """The token that a place's value is taken from where a reduction goes over examples or pairs."""
        if not self.of_examples(value):
            return here
        whole = dict(value.options)["scope"] in ("batch", "dataset")
        of_pair = whole and _extent(value) == Extent.PAIR
        return self.response(here, chosen=True) if of_pair else self.first(self.example[here])


def _extent(value: Value) -> Extent:
    """The extent of what a reduction goes over."""
    members = [value.arguments[0], *value.arguments[-1:] * ("where" in dict(value.options))]
    return max(m.kind.extent for m in members)


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
    at = seats.stands_for(value, here)
    if at not in kept:
        return False if word.element == Element.BOOL else 0.0
    return word.oracle(xs, kept.index(at), *settings, *chosen)
