"""The scope `draws(n)`: n copies of a value, each with draws of its own, come to one value elementwise.

A draw is drawn once, before training, and its place says which copy it is of; what stands for
`mean(x, draws(n))` is ordinary arithmetic. Plan, passes, cache, graphs and oracle see nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from priority_dsl import nodes
from priority_dsl.chance import drawn_once, is_repeated, of_copy
from priority_dsl.chance import draws as is_drawn
from priority_dsl.folding import fold
from priority_dsl.kinds import Element, Extent, Kind, Range, Stage, join
from priority_dsl.printer import format_expression
from priority_dsl.registry import REGISTRY, Reduction
from priority_dsl.values import BROKEN, Value, walk

if TYPE_CHECKING:
    from priority_dsl.expressions import Expressions

MOST = 64  # copies of one value, so that no rule hangs the compiler (law 13)
MOST_OF_A_RULE = 256  # copies that all calls of a rule make together
AWAY = ("sum", "mean", "median", "quantile", "min_over", "max_over", "std", "count")


class Repeated:
    """Writes out the reductions over `draws(n)` of one rule."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions
        self.copies: dict[int, dict[Value, Value]] = {}  # by the number of the copy
        self.made = 0

    def reduced(self, word: Reduction, values: Sequence[Value], count: int, node: nodes.Call) -> Value:
        """What a reduction of n copies comes to; BROKEN (reported) where that makes no sense."""
        x, settings = drawn_once(values[0]), values[1 : 1 + len(word.settings)]
        if self.refused(word, x, len(values) > 1 + len(settings), count, node):
            return BROKEN
        self.made += count
        xs = [self.copy(x, number) for number in range(1, count + 1)]
        match word.name:
            case "sum" | "count":
                return self.total(xs)
            case "mean":
                return self.ranged(self.over("divide", self.total(xs), self.number(count)), word, x)
            case "std":
                return self.ranged(self.deviation(xs), word, x)
            case "min_over":
                return self.ranged(self.folded("min", xs), word, x)
            case "max_over":
                return self.ranged(self.folded("max", xs), word, x)
        share = 0.5 if word.name == "median" else self.share(settings[0], node)
        return BROKEN if share is None else self.ranged(self.quantile(xs, share), word, x)

    # What is refused -----------------------------------------------------------------------------

    def refused(self, word: Reduction, x: Value, where: bool, count: int, node: nodes.Call) -> bool:
        """Whether the call is reported as one that cannot be written out."""
        problem = self.problem(word, x, where, count, node)
        if problem is None:
            return False
        code, message, label, help = problem
        self.of.error(code, message, node, label, help)
        return True

    def problem(
        self, word: Reduction, x: Value, where: bool, count: int, node: nodes.Call
    ) -> tuple[str, str, str, str] | None:
        """What is wrong with a call: code, message, label, way out."""
        what = format_expression(node.arguments[0]) if node.arguments else word.written
        if word.name not in AWAY:
            return (
                "PD315", f"`{word.written}` does not go over `draws`", "a value for each draw would come out",
                "take `mean`, `std`, `sum`, `min`, `max`, `median`, `quantile` or `count` over the draws",
            )  # fmt: skip
        if where:
            return (
                "PD315", "`where` does not go with `draws`", "it chooses among tokens, not among draws",
                f"reduce first: `mean({what}, example, where=...)`, and that over `draws(n)`",
            )  # fmt: skip
        drawn = [part for part in walk(x) if is_drawn(part)]
        if not drawn:
            return (
                "PD315", f"nothing is drawn in `{what}`", "n evaluations would all be the same",
                "read a `perturbed` model, `uniform` or `bernoulli`, or leave `draws` out",
            )  # fmt: skip
        if any(map(is_repeated, drawn)):
            return (
                "PD315", f"`{what}` goes over draws already", "draws of draws",
                "take one `draws(n)` with more draws, of the value inside",
            )  # fmt: skip
        if count > MOST or self.made + count > MOST_OF_A_RULE:
            whole = f"at most {MOST} in a call and {MOST_OF_A_RULE} in a rule"
            return "PD304", f"`draws({count})` is too many", whole, "each is one more evaluation: take fewer"
        if x.kind.stage > Stage.FROZEN:
            late = "the model being trained" if x.kind.stage == Stage.ONLINE else "the run itself"
            return (
                "PD311", "what goes over draws is computed before training", f"this reads {late}",
                "read `ref` or a declared model inside `draws`",
            )  # fmt: skip
        return None

    def share(self, value: Value, node: nodes.Call) -> float | None:
        """The number q of a quantile; None (reported) where it is not known before anything runs."""
        if value.kind.stage == Stage.CONSTANT:
            return min(max(fold(value, self.of.params), 0.0), 1.0)
        self.of.error(
            "PD311", "what goes over draws is computed before training", node, "this reads the run itself",
            "use a number or a parameter",
        )  # fmt: skip
        return None

    # Copies --------------------------------------------------------------------------------------

    def copy(self, x: Value, number: int) -> Value:
        """The value with every draw below it drawn apart from those of the other copies."""
        known = self.copies.setdefault(number, {})
        for part in walk(x, into=lambda value: value not in known):
            if part in known:
                continue
            options = of_copy(part, number) if is_drawn(part) else part.options
            changed = replace(part, arguments=tuple(known[a] for a in part.arguments), options=options)
            known[part] = self.of.pool.setdefault(changed, changed)
        return known[x]

    # Elementwise ---------------------------------------------------------------------------------

    def over(self, name: str, *values: Value) -> Value:
        """A function of values, with the kind that its own rules give."""
        word = REGISTRY.function(name)
        kind = join(
            [v.kind for v in values], word.element, word.range(*(v.kind.range for v in values)), False
        )
        return self.of.value(name, kind, *values)

    def number(self, value: float) -> Value:
        """A number of the rule."""
        kind = Kind(Extent.CONSTANT, Element.NUMBER, Range.of((float(value),)))
        return self.of.value("constant", kind, value=float(value))

    def folded(self, name: str, xs: Sequence[Value]) -> Value:
        """A function of two applied to all, in a tree of little depth."""
        while len(xs) > 1:
            paired = [self.over(name, *pair) for pair in zip(xs[::2], xs[1::2], strict=False)]
            xs = [*paired, *xs[len(paired) * 2 :]]
        return xs[0]

    def total(self, xs: Sequence[Value]) -> Value:
        """The sum."""
        return self.folded("add", xs)

    def deviation(self, xs: Sequence[Value]) -> Value:
        """The standard deviation, divided by n; exactly 0 where all are equal, infinite ones too."""
        count = self.number(len(xs))
        mean = self.over("divide", self.total(xs), count)
        apart = [self.over("abs", self.over("subtract", x, mean)) for x in xs]
        squares = [self.over("multiply", a, a) for a in apart]
        root = self.over("sqrt", self.over("divide", self.total(squares), count))
        equal = self.over("equal", self.folded("min", xs), self.folded("max", xs))
        return self.over("choose", self.number(0), equal, root)

    def quantile(self, xs: Sequence[Value], share: float) -> Value:
        """The quantile, interpolated linearly between two places of the sorted values."""
        place = share * (len(xs) - 1)
        ordered = self.ordered(xs)
        low, high, part = ordered[math.floor(place)], ordered[math.ceil(place)], place - math.floor(place)
        if part == 0:
            return low
        between = self.over("multiply", self.over("subtract", high, low), self.number(part))
        return self.over("choose", low, self.over("equal", low, high), self.over("add", low, between))

    def ordered(self, xs: Sequence[Value]) -> list[Value]:
        """The values from the smallest to the largest."""
        ordered = list(xs)
        for low, high in exchanges(len(ordered)):
            pair = ordered[low], ordered[high]
            ordered[low], ordered[high] = self.over("min", *pair), self.over("max", *pair)
        return ordered

    def ranged(self, value: Value, word: Reduction, x: Value) -> Value:
        """The result with the range that the reduction has over any scope."""
        if value.kind.element == Element.BOOL or value.word == "constant":
            return value
        made = replace(value, kind=replace(value.kind, range=word.range(x.kind.range)))
        self.of.pool[made] = made
        return made


def exchanges(count: int) -> Iterator[tuple[int, int]]:
    """The comparisons that sort any `count` numbers: which two places, the smaller to the first.

    Source: Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M (merge exchange, after Batcher).
    """
    top = 1 << max(count - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
