"""The slow oracle: what a rule means, token by token in float64 on Python lists, without torch.

It reads the checked rule as it stands, not the form that is compiled, and computes each word with the
registry's `oracle`. Equality with the loss graph is what the tests of the compiler assert; here nothing
is fast and nothing is clever.

Letters: B rows, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from priority_dsl import ieee
from priority_dsl.binding import reads_anew
from priority_dsl.checked import CheckedRule, text
from priority_dsl.kinds import Element, Stage
from priority_dsl.reference_scopes import Place, Seats, of_responses, reduced
from priority_dsl.registry import REGISTRY, Function, Reduction, Statistic, View
from priority_dsl.values import Value
from priority_dsl.vocabulary.chance import drawn
from priority_dsl.words import Chance, PairSide

IGNORED = -100
Logits = Sequence[Sequence[Sequence[float]]]  # [B][T][V]
Targets = Sequence[Sequence[int]]  # [B][T]
Numbers = list[list[float]]  # [B][T]
NLL_ON = Value("nll", (Value("model", (), (("name", "on"),)),))


@dataclass(frozen=True)
class Counts:
    """What the denominator of an optimizer step counts; the counts of micro-batches add up."""

    tokens: int
    examples: int
    kept: int
    weights: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tokens + other.tokens,
            self.examples + other.examples,
            self.kept + other.kept,
            self.weights + other.weights,
        )


@dataclass(frozen=True)
class Reference:
    """What a rule gives for a batch.

    `weights`, `losses` (what each token adds to `total`) and `nll` are lists like the targets, 0.0 where
    ignored; `counts` are those of this batch, whatever step it belongs to.
    """

    weights: Numbers
    losses: Numbers
    nll: Numbers
    total: float
    denominator: float
    counts: Counts

    @property
    def mean(self) -> float:
        """total / denominator; 0 where the denominator is 0 (law 6)."""
        return self.total / self.denominator if self.denominator else 0.0


def evaluate(
    checked: CheckedRule,
    logits: Logits,
    targets: Targets,
    *,
    models: Mapping[str, Logits] | None = None,
    stored: Mapping[str, Numbers] | None = None,
    columns: Mapping[str, Any] | None = None,
    examples: Targets | None = None,
    progress: float = 0.0,
    epoch: int = 0,
    seed: int = 0,
    step: Counts | None = None,
    base: Logits | None = None,
    rounding: Callable[[Value, float], float] | None = None,
) -> Reference:
    """The weights and the loss of a batch.

    `logits [B][T][V]` predict `targets [B][T]` (-100 is ignored), `models` maps further models to logits,
    `stored` what is read inside models to numbers `[B][T]`,
    `columns` names to lists `[B][T]` or one value a row `[B]`, `examples [B][T]` says which data-set row a
    token belongs to (default: its row), `seed` is that of the chance, `step` holds the counts of the whole
    optimizer step (default: this batch). `base` are the logits of `on` at which everything without gradient
    is held, the weight and what stands under `sg`: with it, differences of `total` in `logits` are its
    derivative. `rounding` replaces each number that a word or column gives, which shows how much the result
    depends on rounding.

    >>> from priority_dsl import check
    >>> out = evaluate(check("mass(ref) >= 0.5"), [[[0.0, 0.0]]], [[1]], models={"ref": [[[0.0, 3.0]]]})
    >>> out.weights, round(out.total, 4), out.denominator
    ([[1.0]], 0.6931, 1.0)
    """
    if checked.reads_pairs:
        assert examples is not None, "both responses of a pair share a data-set row"
        examples = of_responses(examples, (columns or {})["chosen"])
    places = [(b, t) for b, row in enumerate(targets) for t, y in enumerate(row) if y != IGNORED]
    batch = _Batch(
        checked,
        {**(models or {}), "on": logits},
        {**(models or {}), "on": logits if base is None else base},
        targets,
        columns or {},
        Seats.of(places, examples),
        {"progress": float(progress), "epoch": float(epoch)},
        seed,
        rounding or (lambda value, number: number),
        stored or {},
    )
    tokens = batch.tokens
    tokens.update({place: _Token(batch, place) for place in places})
    weights = {place: token.number(checked.weight, held=True) for place, token in tokens.items()}
    counts = Counts(
        len(places),
        len({e // 2 if checked.of_pairs else e for e in batch.seats.example.values()}),
        sum(w != 0 for w in weights.values()),
        math.fsum(abs(w) for w in weights.values()) if _finite(weights.values()) else math.nan,
    )
    losses = {
        place: token.loss(weights[place]) / token.divisor(step or counts) for place, token in tokens.items()
    }
    return Reference(
        _table(weights, targets),
        _table(losses, targets),
        _table({place: token.nll() for place, token in tokens.items()}, targets),
        math.fsum(losses.values()) if _finite(losses.values()) else sum(losses.values()),
        _denominator(checked, step or counts),
        counts,
    )


def _finite(numbers: Any) -> bool:
    return all(math.isfinite(n) for n in numbers)


def _table(numbers: Mapping[Place, float], targets: Targets) -> Numbers:
    return [[numbers.get((b, t), 0.0) for t in range(len(row))] for b, row in enumerate(targets)]


def _denominator(checked: CheckedRule, counts: Counts) -> float:
    match checked.normalize:
        case "tokens":
            return float(counts.tokens)
        case "terms":
            return float(counts.examples)
        case "kept":
            return float(counts.kept)
        case "weights":
            return counts.weights
    return 1.0


@dataclass(frozen=True)
class _Batch:
    checked: CheckedRule
    logits: Mapping[str, Logits]
    base: Mapping[str, Logits]
    targets: Targets
    columns: Mapping[str, Any]
    seats: Seats
    run: Mapping[str, float]
    seed: int
    rounding: Callable[[Value, float], float]
    stored: Mapping[str, Numbers]
    tokens: dict[Place, _Token] = field(default_factory=dict)


class _Token:
    """The values of a rule at one supervised token.

    `held` says that a value has no gradient because of where it stands: in the weight or under `sg`.
    """

    def __init__(self, batch: _Batch, place: Place) -> None:
        self.batch, self.place = batch, place
        self.target = batch.targets[place[0]][place[1]]
        self.known: dict[tuple[Value, bool], float] = {}

    def loss(self, weight: float) -> float:
        """What the token adds to the loss, before `normalize`."""
        if self.batch.checked.loss is None:
            return weight * self.nll() if weight != 0 else 0.0
        seats, checked = self.batch.seats, self.batch.checked
        if (checked.of_examples or checked.of_pairs) and seats.number[self.place] > 0:
            return 0.0  # a loss per example stands at its first token
        if checked.of_pairs and seats.example[self.place] % 2:
            return 0.0  # one per pair at that of the chosen response
        return self.number(self.batch.checked.loss, held=False)

    def divisor(self, counts: Counts) -> float:
        """The token's own number by which its loss is divided."""
        checked, seats = self.batch.checked, self.batch.seats
        if checked.normalize == "examples":
            whole = checked.of_examples or checked.of_pairs
            return counts.examples * (1 if whole else seats.length(self.place))
        found = [group.member for group in checked.groups if self.number(group.member, held=True)]
        if not found:
            return 1.0
        return sum(bool(token.number(found[0], held=True)) for token in self.batch.tokens.values())

    def nll(self) -> float:
        """The surprise of the trained model at the target."""
        return self.number(NLL_ON, held=False)

    def number(self, value: Value, held: bool) -> float:
        """What a value is worth; a condition is True or False."""
        key = (value, held)
        if key not in self.known:
            self.known[key] = self._compute(value, held)
        return self.known[key]

    def _compute(self, value: Value, held: bool) -> float:
        match value.word:
            case "constant":
                return float(value.option("value"))  # type: ignore[arg-type]
            case "param":
                return float(self.batch.checked.params[str(value.option("name"))].value)
            case "column":
                entry = self._entry(str(value.option("name")))
                if value.kind.element == Element.BOOL:
                    return bool(entry)
                return self.batch.rounding(value, float(entry))
            case "is_in":
                entry = self._entry(str(value.arguments[0].option("name")))
                return str(entry) in value.option("members")  # type: ignore[operator]
            case "position":
                return float(self.batch.seats.number[self.place])
            case "length":
                return float(self.batch.seats.length(self.place))
            case "progress" | "epoch":
                return self.batch.rounding(value, self.batch.run[value.word])
            case "sg" | "weight":
                return self.number(value.arguments[0], held=True)
            case "choose":  # the branch that is not taken is not even looked at (law 4)
                then, condition, otherwise = value.arguments
                return self.number(then if self.number(condition, held) else otherwise, held)
        number = self._word(value, held)
        return number if isinstance(number, bool) else self.batch.rounding(value, number)

    def _word(self, value: Value, held: bool) -> float:
        word = REGISTRY.words[value.word]
        if isinstance(word, Statistic) and word.inside:
            return float(self.batch.stored[text(value)][self.place[0]][self.place[1]])
        if isinstance(word, Statistic):
            rows = [self._logits(model, held) for model in value.arguments]
            result = word.oracle(*rows, self.target, **dict(value.options))
            return bool(result) if word.element == Element.BOOL else float(result)
        if isinstance(word, Chance):
            numbers = [self.number(argument, held) for argument in value.arguments]
            return word.oracle(self._drawn(value), *numbers)
        if isinstance(word, PairSide):
            seat = self.batch.seats.response(self.place, word.chosen)
            return self.batch.tokens[seat].number(value.arguments[0], held)
        if isinstance(word, Reduction):
            reads = {p: partial(token.number, held=held) for p, token in self.batch.tokens.items()}
            return reduced(value, self.batch.seats, self.place, reads)
        assert isinstance(word, Function), value.word
        if value.word == "multiply":
            return self._product(value, held)
        if value.word in ("log", "log2", "sqrt", "power", "power_of_both") and _is_chance(value.arguments[0]):
            return self._of_chance(value, held)
        result = word.oracle(*(self.number(argument, held) for argument in value.arguments))
        return bool(result) if word.element == Element.BOOL else float(result)

    def _product(self, value: Value, held: bool) -> float:
        """A product; a factor of 0 that has no gradient makes it 0, whatever the other is (law 4)."""
        factors = [self.number(argument, held) for argument in value.arguments]
        for argument, factor in zip(value.arguments, factors, strict=True):
            if factor == 0 and (held or not self._carries(argument)):
                return 0.0
        return factors[0] * factors[1]

    def _carries(self, value: Value) -> bool:
        """Whether gradient flows through a value; of an `if` that parameters decide, through its branch."""
        if value.word == "choose" and value.arguments[1].kind.stage == Stage.CONSTANT:
            then, condition, otherwise = value.arguments
            return self._carries(then if self.number(condition, held=True) else otherwise)
        if not isinstance(REGISTRY.get(value.word), Function):
            return value.kind.gradient
        return value.kind.gradient and any(self._carries(argument) for argument in value.arguments)

    def _of_chance(self, value: Value, held: bool) -> float:
        """A logarithm or power of the target's probability, by way of its surprise (law 2)."""
        chance, chance_held = value.arguments[0], held
        while chance.word == "sg":
            chance, chance_held = chance.arguments[0], True
        model = self._logits(chance.arguments[0], chance_held)
        surprise = REGISTRY.statistic("nll").oracle(model, self.target)
        surprise = self.batch.rounding(chance, surprise)
        if value.word in ("log", "log2"):
            return -surprise / (math.log(2.0) if value.word == "log2" else 1.0)
        exponent = 0.5 if value.word == "sqrt" else self.number(value.arguments[1], held)
        return 1.0 if surprise == 0 or exponent == 0 else ieee.exp(-exponent * surprise)

    def _drawn(self, value: Value) -> float:
        """The number of a draw: an example has one at position 0, what is drawn once one in epoch 0."""
        batch, place = self.batch, self.place
        epoch = 0 if value.option("once") else int(batch.run["epoch"])
        position = 0 if value.option("per") == "example" else batch.seats.number[place]
        calls: Any = value.option("place")
        return drawn(batch.seed, epoch, batch.seats.example[place], position, calls)

    def _entry(self, column: str) -> Any:
        """The token's entry of a column that has a value per token or per row."""
        row = self.batch.columns[column][self.place[0]]
        return row[self.place[1]] if isinstance(row, list | tuple) else row

    def _row(self, model: str, held: bool) -> list[float]:
        logits = self.batch.base if held else self.batch.logits
        return [float(z) for z in logits[model][self.place[0]][self.place[1]]]

    def _logits(self, model: Value, held: bool) -> list[float]:
        """The logits `[V]` of a model, a view of it, or `sg` of either."""
        if model.word == "model" or reads_anew(model):
            return self._row(text(model), held)
        if model.word == "sg":
            return self._logits(model.arguments[0], held=True)
        word = REGISTRY.words[model.word]
        assert isinstance(word, View), model.word
        seen = (
            self._logits(a, held) if a.kind.element == Element.MODEL else self.number(a, held=True)
            for a in model.arguments
        )
        return word.oracle(*seen)


def _is_chance(value: Value) -> bool:
    """Whether a value is the target's probability, perhaps under `sg`."""
    return _is_chance(value.arguments[0]) if value.word == "sg" else value.word == "p"
