"""Chance: numbers and conditions that are drawn, the same for the same seed on any layout of the batch.

What is drawn is a hash of seed, epoch, example, position and the call's place in the rule (law 10), never of
how often something was drawn before. `priority_dsl.chance` makes it in tensors; `drawn` says the same number
in plain integers.
"""

from __future__ import annotations

from collections.abc import Iterable

from priority_dsl.kinds import Element, Range, compared
from priority_dsl.registry import REGISTRY
from priority_dsl.words import Chance, Verdict

DRAWN = Range(0.0, 1.0, high_open=True)


def drawn(seed: int, epoch: int, example: int, position: int, place: Iterable[int]) -> float:
    """The number in [0, 1) of a draw, a multiple of 2**-24; `place` says which call of the rule draws.

    Each key is stirred in by a step of splitmix64, all arithmetic modulo 2**64.
    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, Figure 13.

    >>> drawn(seed=0, epoch=0, example=0, position=0, place=(1,))
    0.6477578282356262
    """
    state = 0
    for key in (seed, epoch, example, position, *place):
        state = ((state ^ (key % 2**64)) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return (state >> 40) / 2**24


def _no_chance(q: Range) -> Verdict:
    if q.low > 1 or q.high < 0:
        return "certain"
    return "possible" if q.low < 0 or q.high > 1 else None


uniform = Chance(
    "uniform", "chance", "A number drawn evenly from [0, 1): one for each token, or with `uniform(example)` "
    "one for each example. Two calls draw apart, a `let` used twice is one draw, each epoch draws anew.",
    "uniform() < 1 - progress", body=lambda u: u, oracle=lambda u: u, range=lambda: DRAWN,
)  # fmt: skip
bernoulli = Chance(
    "bernoulli", "chance", "A condition that holds with chance q, drawn for each token, or with "
    "`bernoulli(q, example)` for each example: `uniform() < q`.", "1 if bernoulli(0.1, example) else p_on",
    arguments=("q",), element=Element.BOOL, body=lambda u, q: u < q, oracle=lambda u, q: u < q,
    range=lambda q: compared("<", DRAWN, q), hazard=_no_chance,
)  # fmt: skip
REGISTRY.add(uniform)
REGISTRY.add(bernoulli)
