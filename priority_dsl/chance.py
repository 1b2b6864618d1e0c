"""The generator behind `uniform` and `bernoulli`: what is drawn depends on what it is for, on nothing else.

A draw is a hash of seed, epoch, example, position and the call's place in the rule (law 10), so it is the
same on any layout of the batch, after a resume, and in the fused loss. Everything here is operators on int64
tensors, which wrap around; importing it loads no torch.

The numbers are part of the language: users' runs depend on them. `vocabulary.chance.drawn` says the same in
plain integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from priority_dsl import nodes
from priority_dsl.kinds import Stage
from priority_dsl.registry import REGISTRY, leaf
from priority_dsl.values import Option, Value, walk
from priority_dsl.words import Chance, View

CALLS = {"uniform": "chance", "bernoulli": "chance", "perturbed": "noise", "rule": "rule"}  # counted together
INCREMENT, FIRST, SECOND = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # the constants of splitmix64 as int64


def _shifted(state: Any, by: int) -> Any:
    """A shift to the right that fills with zeros; the one of int64 copies the sign."""
    return (state >> by) & (2 ** (64 - by) - 1)


def _mixed(state: Any) -> Any:
    """A step of splitmix64 on the state of the hash, int64 `[N]` or 0-dimensional."""
    state = state + INCREMENT
    state = (state ^ _shifted(state, 30)) * FIRST
    state = (state ^ _shifted(state, 27)) * SECOND
    return state ^ _shifted(state, 31)


@leaf
def uniform(seed: Any, epoch: Any, example: Any, position: Any, place: tuple[int, ...], one: Any) -> Any:
    """Numbers in [0, 1), multiples of 2**-24, in the dtype of `one`: the same in float32 and float64.

    `seed` is a 0-dimensional int64 tensor, `epoch` one or an integer, `example` int64 `[N]`, `position` one
    or an integer; `place` says which call of the rule draws.
    """
    state = _mixed(seed)
    for key in (epoch, example, position, *place):
        state = _mixed(state ^ key)
    return _shifted(state, 40).to(one.dtype) * 2.0**-24


# Places -----------------------------------------------------------------------------------------


def places(tree: nodes.Rule) -> dict[int, int] | None:
    """The place of each call that draws or reads another rule, from 1 in the order of the text, by its `id`.

    None where the tree holds one node at two places, so that its `id` says nothing.
    """
    found: dict[int, int] = {}
    counts = dict.fromkeys(CALLS.values(), 0)
    for call in _calls(tree):
        if call.function in CALLS:
            if id(call) in found:
                return None
            counts[CALLS[call.function]] += 1
            found[id(call)] = counts[CALLS[call.function]]
    return found


def _calls(tree: nodes.Rule) -> Iterator[nodes.Call]:
    """Every call in the order of the text: fields of nodes stand in it."""
    stack: list[Any] = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, nodes.Call):
            yield part
        if isinstance(part, nodes.Node):
            stack += reversed(part.content())
        elif isinstance(part, tuple):
            stack += reversed(part)


# Drawn several times ----------------------------------------------------------------------------

COPY = 0  # no call has this place, so that what follows it in a place is the number of a copy


def of_copy(value: Value, number: int) -> tuple[tuple[str, Option], ...]:
    """The options of a draw in one of the copies that `draws(n)` makes."""
    options = dict(value.options)
    place: Any = options["place"]
    return tuple(sorted({**options, "place": (*place, COPY, number), "once": 1}.items()))


def is_repeated(value: Value) -> bool:
    """Whether a draw is already one of the copies of `draws(n)`."""
    return COPY in value.option("place")  # type: ignore[operator]


def placed(value: Value) -> tuple[str, list[str]]:
    """The place of a draw as names show it: the call, `2` or `1.2`, and when: `draw=3`, `once`."""
    place: Any = value.option("place")
    call = place[: place.index(COPY)] if COPY in place else place
    when = [f"draw={place[-1]}"] if COPY in place else ["once"] if value.option("once") else []
    return ".".join(map(str, call)), when


def renumbered(root: Value) -> Value:
    """The value with its draws numbered in the order in which they are read.

    So the same expression written at two places of a text is the same; which draws it shares stays.
    """
    numbers: dict[tuple[int, ...], tuple[int, ...]] = {}
    known: dict[Value, Value] = {}
    for part in walk(root):
        options = dict(part.options)
        if draws(part):
            place: Any = options["place"]
            cut = place.index(COPY) if COPY in place else len(place)
            options["place"] = (*numbers.setdefault(place[:cut], (len(numbers) + 1,)), *place[cut:])
        arguments = tuple(known[a] for a in part.arguments)
        known[part] = replace(part, arguments=arguments, options=tuple(sorted(options.items())))
    return known[root]


# Drawn once -------------------------------------------------------------------------------------


def draws(value: Value) -> bool:
    """Whether a value is a draw, or a view that draws what it reads."""
    word = REGISTRY.get(value.word)
    return isinstance(word, Chance) or (isinstance(word, View) and word.draws)


def own_stage(value: Value) -> Stage:
    """When a value is known as far as chance goes: what is drawn anew each epoch, not before the run."""
    if not draws(value):
        return Stage.CONSTANT
    return Stage.DATA if value.option("once") else Stage.RUN


def drawn_once(root: Value) -> Value:
    """The value with its chance drawn once, as in epoch 0, and known with the data.

    So it is in `keep` and under `dataset` (law 10). Stages follow from the operands again; what a word needs
    by itself (a step for `batch`) stays.
    """
    known: dict[Value, Value] = {}
    for part in walk(root):
        arguments = tuple(known[a] for a in part.arguments)
        options = dict(part.options)
        before = max((a.kind.stage for a in part.arguments), default=Stage.CONSTANT)
        stage = max((a.kind.stage for a in arguments), default=Stage.CONSTANT)
        if draws(part):
            options["once"] = 1
            stage = max(stage, Stage.DATA)
        elif part.kind.stage > before:
            stage = part.kind.stage
        changed = replace(part, arguments=arguments, options=tuple(sorted(options.items())))
        known[part] = part if changed == part else replace(changed, kind=replace(part.kind, stage=stage))
    return known[root]
