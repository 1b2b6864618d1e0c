"""The form of a rule that is computed: the same value, written so that it is exact and safe.

`log(p)` becomes `-nll`, `p ** a` becomes `exp(-a * nll)` (law 2); `logratio` is written out; an `if` whose
condition is known from the parameters becomes its branch. Rewriting sees through `sg`, which moves onto
what replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from priority_dsl.expressions import is_probability
from priority_dsl.folding import fold
from priority_dsl.kinds import Element, Extent, Kind, Range, Stage, join
from priority_dsl.registry import REGISTRY, Function, Reduction
from priority_dsl.scoping import stage_of
from priority_dsl.values import Value, walk
from priority_dsl.words import PairSide


def normal_form(value: Value, params: Mapping[str, float]) -> Value:
    """The value as it is computed for the parameter values in force."""
    known: dict[Value, Value] = {}
    for part in walk(value):
        arguments = tuple(known[a] for a in part.arguments)
        kind = _of_arguments(part, arguments)
        known[part] = _rewrite(Value(part.word, arguments, part.options, kind, part.span), params)
    return known[value]


def _of_arguments(value: Value, arguments: tuple[Value, ...]) -> Kind:
    """The kind of a function of these arguments: a branch that is taken is known as early as it is."""
    word = REGISTRY.get(value.word)
    if arguments == value.arguments or not isinstance(word, Function | Reduction | PairSide):
        return value.kind
    if isinstance(word, Reduction):
        carries = value.kind.gradient and arguments[0].kind.gradient
        return replace(value.kind, stage=stage_of(value.option("scope"), arguments), gradient=carries)
    carries = value.kind.gradient and any(a.kind.gradient for a in arguments)
    earliest = Stage.DATA if isinstance(word, PairSide) else Stage.CONSTANT
    stage = max([earliest, *(a.kind.stage for a in arguments)])
    return replace(value.kind, stage=stage, gradient=carries)


def _rewrite(value: Value, params: Mapping[str, float]) -> Value:
    arguments = value.arguments
    if value.word == "choose" and arguments[1].kind.stage == Stage.CONSTANT:
        return arguments[0] if fold(arguments[1], params) else arguments[2]
    if value.word == "logratio":
        a, b = (_statistic("logp", value, model) for model in arguments)
        return _apply("subtract", a, b)
    if not arguments or not is_probability(arguments[0]):
        return value
    surprise = _surprise(arguments[0])
    if value.word == "log":
        return _apply("negate", surprise)
    if value.word == "log2":
        return _apply("divide", _apply("negate", surprise), _number(math.log(2.0)))
    if value.word == "sqrt":
        return _apply("power_of_probability", surprise, _number(0.5))
    if value.word in ("power", "power_of_both"):
        return _apply("power_of_probability", surprise, arguments[1])
    return value


def by_surprise(value: Value) -> Value:
    """The value with `p` and `logp` written by the `nll` from which they are computed: one number serves."""
    known: dict[Value, Value] = {}
    for part in walk(value):
        arguments = tuple(known[a] for a in part.arguments)
        if part.word in ("p", "logp"):
            logp = _apply("negate", _statistic("nll", part, *arguments))
            known[part] = _apply("exp", logp) if part.word == "p" else logp
        else:
            known[part] = Value(part.word, arguments, part.options, part.kind, part.span)
    return known[value]


def _surprise(probability: Value) -> Value:
    """The nll whose `exp(-nll)` a probability is, under the same `sg`."""
    if probability.word == "sg":
        return _apply("sg", _surprise(probability.arguments[0]))
    return _statistic("nll", probability, *probability.arguments)


def _statistic(name: str, like: Value, *models: Value) -> Value:
    """A statistic of models, known when and as differentiable as another."""
    stage, gradient = max(m.kind.stage for m in models), any(m.kind.gradient for m in models)
    word = REGISTRY.statistic(name)
    return Value(
        name, models, (), Kind(Extent.TOKEN, word.element, word.range_of(), stage, gradient), like.span
    )


def _number(value: float) -> Value:
    return Value(
        "constant", (), (("value", value),), Kind(Extent.CONSTANT, Element.NUMBER, Range.of((value,)))
    )


def _apply(name: str, *arguments: Value) -> Value:
    word = REGISTRY.function(name)
    range = word.range(*(a.kind.range for a in arguments))
    return Value(name, arguments, (), join([a.kind for a in arguments], word.element, range, name != "sg"))
