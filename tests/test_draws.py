"""`draws(n)`: what it comes to against loops by hand, its names, its limits."""

from __future__ import annotations

import math
import random
import statistics
import time
from typing import Any

import pytest
import torch

from priority_dsl import PriorityError, check, compile_rule
from priority_dsl.binding import bound_names
from priority_dsl.repeated import exchanges
from priority_dsl.vocabulary.chance import drawn

B, T, V = 3, 4, 6
TARGETS = torch.tensor([[1, 2, -100, 3], [0, 4, 5, 1], [-100, -100, -100, -100]])
LIVE = TARGETS >= 0
SEED = 7


def weights(text: str, **reads: Any) -> torch.Tensor:
    return compile_rule(text).weights(None, TARGETS, seed=SEED, **reads)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability(z: torch.Tensor) -> torch.Tensor:
    return z.softmax(-1).gather(-1, TARGETS.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def neighbours(text: str) -> dict[str, torch.Tensor]:
    return {name: logits(seed) for seed, name in enumerate(sorted(bound_names(*check(text).roots)))}


def quantile(xs: list[float], q: float) -> float:
    place = q * (len(xs) - 1)
    low, high = sorted(xs)[math.floor(place)], sorted(xs)[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


BY_HAND = {
    "mean(x, draws(n))": statistics.fmean,
    "sum(x, draws(n))": math.fsum,
    "std(x, draws(n))": statistics.pstdev,
    "min(x, draws(n))": min,
    "max(x, draws(n))": max,
    "median(x, draws(n))": statistics.median,
    "quantile(x, 0.3, draws(n))": lambda xs: quantile(xs, 0.3),
    "quantile(x, 1, draws(n))": max,
    "count(x > 0.5, draws(n))": lambda xs: sum(x > 0.5 for x in xs),
}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("call", BY_HAND)
def test_of_perturbed_models_as_a_loop_by_hand(call: str, count: int):
    text = f"let x = p(perturbed(ref, 5)); weight = {call.replace('draws(n)', f'draws({count})')}"
    said = neighbours(text)
    assert len(said) == count
    each = torch.stack([probability(z) for z in said.values()])
    found = weights(text, models=said)
    for at in LIVE.nonzero().tolist():
        wanted = BY_HAND[call](each[:, at[0], at[1]].tolist())
        assert found[at[0], at[1]].item() == pytest.approx(wanted, abs=1e-12)
    assert not found[~LIVE].any()


@pytest.mark.parametrize("call", BY_HAND)
def test_of_chance_as_a_loop_by_hand(call: str):
    found = weights(f"let x = uniform(); weight = {call.replace('draws(n)', 'draws(5)')}", epoch=3)
    for b, row in enumerate(LIVE.tolist()):
        for position, t in enumerate(t for t, live in enumerate(row) if live):
            xs = [drawn(SEED, 0, b, position, (1, 0, number)) for number in range(1, 6)]
            assert found[b, t].item() == pytest.approx(BY_HAND[call](xs), abs=1e-6)


def test_what_is_drawn_below_a_reduction_over_the_example():
    text = "let x = mean(p(perturbed(ref, 5)), example, where=uniform() < 0.5); weight = std(x, draws(3))"
    said = neighbours(text)
    found = weights(text, models=said)
    for b in range(B):
        places = [t for t in range(T) if LIVE[b, t]]
        means = []
        for number, z in enumerate(said.values(), 1):
            chosen = [
                probability(z)[b, t].item()
                for position, t in enumerate(places)
                if drawn(SEED, 0, b, position, (1, 0, number)) < 0.5
            ]
            means.append(statistics.fmean(chosen) if chosen else 0.0)
        for t in places:
            assert found[b, t].item() == pytest.approx(statistics.pstdev(means), abs=1e-12)


def test_each_draw_is_bound_under_a_name_of_its_own():
    first = {f"perturbed(ref, 5, draw={n})" for n in (1, 2)}
    assert bound_names(*check("mean(p(perturbed(ref, 5)), draws(2))").roots) == first
    two = "mean(kl(perturbed(ref, 5), perturbed(ref, 5)), draws(2))"
    assert bound_names(*check(two).roots) == first | {f"perturbed(ref, 5, call=2, draw={n})" for n in (1, 2)}
    inside = "mean(p(unprompted(perturbed(ref, 5))), draws(1)) + 0 * p(perturbed(ref, 5))"
    assert bound_names(*check(inside).roots) == {
        "unprompted(perturbed(ref, 5, draw=1))",
        "perturbed(ref, 5, call=2)",
    }


def test_draws_of_one_let_are_the_same_draws():
    text = "let x = p(perturbed(ref, 5)); weight = mean(x, draws(4)) + std(x, draws(4)) + max(x, draws(2))"
    assert len(neighbours(text)) == 4
    assert not weights("let u = uniform(); weight = mean(u, draws(4)) - mean(u, draws(4))").any()
    assert weights("weight = mean(uniform(), draws(4)) - mean(uniform(), draws(4))")[LIVE].all()


def test_draws_are_apart_and_the_same_for_the_same_seed():
    text = "weight = max(uniform(), draws(9)) - min(uniform(), draws(9))"
    one = "let u = uniform(); weight = max(u, draws(9)) - min(u, draws(9))"
    assert (weights(one)[LIVE] > 0.1).all()
    assert torch.equal(weights(text), weights(text))
    assert torch.equal(weights(text), weights(text, epoch=4)), "drawn once, before training"
    assert not torch.equal(weights(text), compile_rule(text).weights(None, TARGETS, seed=SEED + 1))


def test_one_draw_of_several_is_none_of_another_call():
    apart = weights("weight = mean(uniform(), draws(1)) - uniform()")
    assert (apart[LIVE] != 0).all()


def test_the_deviation_of_one_draw_and_of_equal_draws_is_exactly_0():
    assert not weights("std(uniform(), draws(1))").any()
    text = "std(nll(perturbed(ref, 5)), draws(3))"
    alike = dict.fromkeys(neighbours(text), logits(3))
    assert not weights(text, models=alike).any()
    impossible = torch.full((B, T, V), -math.inf).index_fill(-1, torch.tensor([V - 1]), 0.0)
    never = weights(text, models=dict.fromkeys(neighbours(text), impossible))
    assert not never.any(), "infinite in every draw"


def test_kinds_and_the_plan():
    rule = compile_rule("mean(nll(perturbed(ref, 5)), draws(3)) < 2")
    assert str(rule.checked.weight.kind.stage) == "frozen"
    assert [of.models for of in rule.plan.passes] == [(f"perturbed(ref, 5, draw={n})",) for n in (1, 2, 3)]
    assert [column.bits for column in rule.plan.stored] == [1]
    assert rule.plan.kept == ()
    assert str(check("weight = std(uniform(example), draws(3))").weight.kind.extent) == "example"
    assert check("weight = std(uniform(), draws(3))").range.high == 0.5


def test_any_number_of_values_is_sorted():
    for count in range(1, 65):
        for _ in range(3):
            values = [random.randrange(10) for _ in range(count)]
            for low, high in exchanges(count):
                values[low], values[high] = sorted((values[low], values[high]))
            assert values == sorted(values)


def test_no_rule_hangs_the_compiler():
    with pytest.raises(PriorityError, match="PD304"):
        check("mean(uniform(), draws(1e9))")
    body = "let x = uniform()" + "".join(f"; let x{i} = exp(-x) * x" for i in range(300))
    text = body + "; weight = " + " + ".join(f"median(x{i} + uniform(), draws(64))" for i in range(90))
    start = time.process_time()
    with pytest.raises(PriorityError, match="in a rule"):
        check(text)
    assert time.process_time() - start < 5
