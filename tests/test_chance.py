"""Chance: draws depend on seed, epoch, data-set row, position and place, and on nothing else (law 10)."""

from __future__ import annotations

import doctest
import itertools
import math
from typing import Any

import pytest
import torch

from priority_dsl import check, compile_rule, nodes, parse
from priority_dsl.chance import drawn_once, places
from priority_dsl.chance import uniform as generator
from priority_dsl.checked import text
from priority_dsl.diagnostics import PriorityError
from priority_dsl.kinds import Extent, Stage
from priority_dsl.plan import plan
from priority_dsl.values import walk
from priority_dsl.vocabulary import chance as plain
from priority_dsl.vocabulary.chance import drawn
from tests.test_compile import has_compiler

B, T, V = 4, 6, 5
TARGETS = torch.tensor([[1, 2, -100, 3, 0, 4], [-100, 3, 4, 0, 1, 2], [0] * 6, [1, -100, -100, 2, 2, 2]])
LOGITS = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
# What users' runs depend on. Never edit these numbers: other numbers are another generator.
FIXED = {
    (0, 0, 0, 0, (1,)): 10867573,
    (0, 0, 0, 1, (1,)): 2058678,
    (0, 0, 1, 0, (1,)): 15142603,
    (0, 1, 0, 0, (1,)): 50142,
    (1, 0, 0, 0, (1,)): 1181823,
    (0, 0, 0, 0, (2,)): 326801,
    (0, 0, 0, 0, (2, 1)): 8033254,
    (9223372036854775807, 7, 123456789, 4095, (3,)): 9636958,
    (-1, 0, -1, 0, (1,)): 10694311,
}


def draws(seed: int, epoch: int, example: int, position: int, place: tuple[int, ...]) -> float:
    """One draw of the generator in tensors."""
    whole = [torch.tensor(n) for n in (seed, epoch)]
    each = [torch.tensor([n]) for n in (example, position)]
    return generator(*whole, *each, place, torch.ones(())).item()


def weights(rule: str, **settings) -> torch.Tensor:
    return compile_rule(rule).weights(LOGITS, TARGETS, **settings)


# The numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FIXED)
def test_the_generator_never_changes(key):
    assert drawn(*key) * 2**24 == FIXED[key]
    assert draws(*key) == drawn(*key)


def test_the_example_of_the_docstring():
    assert doctest.testmod(plain).failed == 0


def test_the_first_step_is_splitmix64():
    """The published first output of splitmix64 for the seed 0."""
    assert drawn(0, 0, 0, 0, ()) != drawn(0, 0, 0, 0, (0,))
    from priority_dsl.chance import _mixed

    assert _mixed(torch.zeros((), dtype=torch.int64)).item() % 2**64 == 0xE220A8397B1DCDAF


def test_tensors_and_plain_integers_draw_the_same():
    keys = list(itertools.product((0, 3, 2**32 - 1), (0, 5), (0, 1, 2**40), (0, 17), ((1,), (9,), (2, 3))))
    assert [draws(*key) for key in keys] == [drawn(*key) for key in keys]
    assert len({draws(*key) for key in keys}) == len(keys)


def test_a_draw_is_the_same_number_in_both_precisions():
    rule = compile_rule("weight = uniform()")
    wide = rule.weights(LOGITS.double(), TARGETS, seed=3)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, rule.weights(LOGITS, TARGETS, seed=3).double())
    assert torch.equal(wide * 2**24, (wide * 2**24).round())


def test_a_compiled_rule_draws_the_same():
    rule = compile_rule("weight = uniform() * bernoulli(0.7, example)")

    def call(logits, targets, examples, seed):
        return rule.loss(logits, targets, examples=examples, seed=seed, epoch=2).weights

    examples = torch.tensor([7, 5, 3, 8]).unsqueeze(-1).expand_as(TARGETS)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (0, 1, 2**32 - 1, 2**63 - 1):
        assert torch.equal(compiled(LOGITS, TARGETS, examples, seed), call(LOGITS, TARGETS, examples, seed))


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
def test_compiled_code_wraps_around_too():
    keys = [
        torch.tensor(3),
        torch.tensor(5),
        torch.arange(1000),
        torch.arange(1000) % 7,
        (1, 2),
        torch.ones(()),
    ]
    torch.compiler.reset()
    assert torch.equal(torch.compile(generator, fullgraph=True)(*keys), generator(*keys))


# What a draw depends on -------------------------------------------------------------------------


def test_positions_count_supervised_tokens():
    found = weights("weight = uniform()", seed=5, epoch=1)
    for row, targets in enumerate(TARGETS.tolist()):
        count = itertools.count()
        wanted = [0.0 if y == -100 else drawn(5, 1, row, next(count), (1,)) for y in targets]
        assert found[row].tolist() == wanted


def test_an_example_has_one_draw():
    found = weights("weight = uniform(example)", seed=5)
    for row in range(B):
        assert set(found[row][TARGETS[row] != -100].tolist()) == {drawn(5, 0, row, 0, (1,))}


def test_seed_epoch_row_and_place_all_count():
    base = weights("weight = uniform()", seed=0)
    rows = torch.arange(B).unsqueeze(-1).expand_as(TARGETS)
    live = TARGETS != -100
    others = [
        weights("weight = uniform()", seed=1),
        weights("weight = uniform()", epoch=1),
        weights("weight = uniform()", examples=rows + B),
        weights("weight = 0 * uniform() + uniform()"),
    ]
    assert torch.equal(base, weights("weight = uniform()", examples=rows))
    for other in others:
        assert (base[live] != other[live]).all()


def test_two_calls_draw_apart_and_a_let_is_one_draw():
    twice = weights("let u = uniform(); weight = u - u + 1")
    assert (twice[TARGETS != -100] == 1).all()
    apart = weights("weight = 1 + uniform() - uniform()")
    assert (apart[TARGETS != -100] != 1).all()
    of_both = check("let c = bernoulli(0.5); weight = c; loss = weight * nll_on + c * H_on")
    assert len({v for v in walk(*of_both.roots) if v.word == "bernoulli"}) == 1


def test_a_bernoulli_is_a_uniform_below_its_chance():
    for rule in ("bernoulli(0.4)", "bernoulli(0.4, example)", "bernoulli(p_on)", "bernoulli(p_on, example)"):
        below = rule.replace("bernoulli(0.4", "uniform(").replace("bernoulli(p_on", "uniform(")
        chance = "0.4" if "0.4" in rule else "p_on"
        below = below.replace("(, ", "(") + f" < {chance}"
        assert torch.equal(weights(rule, seed=9), weights(below, seed=9)), below


def test_certain_chances():
    assert (weights("weight = bernoulli(0)") == 0).all()
    assert torch.equal(weights("weight = bernoulli(1)"), (TARGETS != -100).float())
    assert check("weight = bernoulli(1)").range.point == 1.0


LAYOUTS = {
    "alone": [[b] for b in range(B)],
    "in pairs": [[0, 1], [2, 3]],
    "another order": [[3, 1], [2], [0]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_of_the_batch_changes_nothing(layout):
    rule = compile_rule("weight = uniform() * bernoulli(p_on, example) + bernoulli(0.5)")
    examples = torch.tensor([12, 7, 3, 40]).unsqueeze(-1).expand_as(TARGETS)
    whole = rule.weights(LOGITS, TARGETS, examples=examples, seed=4, epoch=2)
    for rows in layout:
        part = rule.weights(LOGITS[rows], TARGETS[rows], examples=examples[rows], seed=4, epoch=2)
        assert torch.equal(part, whole[rows])


def test_packing_and_padding_change_nothing():
    rule = compile_rule("weight = uniform() + uniform(example)")
    examples = torch.tensor([12, 7, 3, 40]).unsqueeze(-1).expand_as(TARGETS)
    whole = rule.weights(LOGITS, TARGETS, examples=examples, seed=4)
    packed = rule.weights(
        LOGITS.reshape(1, B * T, V), TARGETS.reshape(1, -1), examples=examples.reshape(1, -1), seed=4
    )
    assert torch.equal(packed.reshape(B, T), whole)
    padding = torch.full((B, 2), -100)
    padded = rule.weights(
        torch.cat([torch.zeros(B, 2, V), LOGITS], 1), torch.cat([padding, TARGETS], 1),
        examples=examples[:, :1].expand(B, T + 2), seed=4,
    )  # fmt: skip
    assert torch.equal(padded[:, 2:], whole)


def test_the_fused_loss_draws_the_same():
    rule = compile_rule("weight = bernoulli(0.5) * uniform(example)")
    head = torch.nn.Linear(3, V, bias=False)
    hidden = torch.randn(B, T, 3)
    dense = rule.loss(head(hidden), TARGETS, seed=11, epoch=1)
    fused = rule.fused_loss(hidden, head, TARGETS, seed=11, epoch=1, rows=2)
    assert torch.equal(fused.weights, dense.weights)
    assert torch.allclose(fused.mean, dense.mean)
    assert 0 < (dense.weights != 0).sum() < (TARGETS != -100).sum()


def test_counting_a_step_draws_the_same():
    rule = compile_rule("normalize = kept; weight = bernoulli(0.5)")
    out = rule.loss(LOGITS, TARGETS, seed=2)
    seen = rule.observe(None, TARGETS, seed=2)
    assert seen.kept == out.denominator == (out.weights != 0).sum()


def test_a_batch_value_of_draws_is_that_of_the_whole_step():
    rule = compile_rule("weight = top(uniform(), 0.5, batch) * uniform(example) / mean(uniform(), batch)")
    examples = torch.tensor([12, 7, 3, 40]).unsqueeze(-1).expand_as(TARGETS)
    settings: dict[str, Any] = {"seed": 4, "epoch": 2}
    whole = rule.loss(LOGITS, TARGETS, examples=examples, **settings)
    rows = [[3], [0, 2], [1]]
    seen = [rule.observe(LOGITS[r], TARGETS[r], examples=examples[r], **settings) for r in rows]
    step = sum(seen[1:], seen[0])
    for r in rows:
        part = rule.loss(LOGITS[r], TARGETS[r], examples=examples[r], step=step, **settings)
        assert torch.equal(part.weights, whole.weights[r])
    assert (whole.weights != 0).sum() == 10, "half of 20 supervised tokens"


def test_a_seed_has_64_bits():
    with pytest.raises(PriorityError, match="PD503"):
        weights("weight = uniform()", seed=2**63)


# Places -----------------------------------------------------------------------------------------


def call_places(rule: str) -> list[tuple[str, int]]:
    tree = parse(rule)
    known = places(tree)
    assert known is not None
    calls = [v for v in walk(*check(tree).roots) if v.word in ("uniform", "bernoulli")]
    assert {v.option("place") for v in calls} == {(n,) for n in known.values()}
    return [(v.word, v.option("place")[0]) for v in calls]  # type: ignore[index]


def test_places_are_in_the_order_of_the_text():
    rule = "weight = (uniform() if bernoulli(0.5) else uniform(example)) * max(uniform(), 0.5)"
    assert sorted(call_places(rule), key=lambda c: c[1]) == [
        ("uniform", 1),
        ("bernoulli", 2),
        ("uniform", 3),
        ("uniform", 4),
    ]


def test_a_tree_without_a_text_has_the_same_places():
    tree = parse("weight = uniform() if bernoulli(0.5) else 0")
    bare = nodes.Rule.model_validate_json(tree.model_dump_json(exclude={"span"}))
    assert check(bare).weight == check(tree).weight


def test_one_node_at_two_places_is_two_calls():
    drawing = nodes.Call(function="uniform")
    tree = nodes.Rule(statements=(nodes.Weight(value=nodes.Binary(op="-", left=drawing, right=drawing)),))
    assert places(tree) is None
    assert check(tree).weight == check("weight = uniform() - uniform()").weight


def test_names_of_draws_differ():
    rule = check("weight = uniform() + uniform() + uniform(example)")
    names = {text(v) for v in walk(rule.weight) if v.word == "uniform"}
    assert names == {"uniform(call=1)", "uniform(call=2)", "uniform(example, call=3)"}


# Kinds and plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "extent", "stage"),
    [
        ("weight = uniform()", Extent.TOKEN, Stage.RUN),
        ("weight = uniform(example)", Extent.EXAMPLE, Stage.RUN),
        ("weight = bernoulli(0.5, example)", Extent.EXAMPLE, Stage.RUN),
        ("weight = bernoulli(p_ref, example)", Extent.TOKEN, Stage.RUN),
        ("weight = bernoulli(p_on)", Extent.TOKEN, Stage.ONLINE),
    ],
)
def test_kinds(rule, extent, stage):
    kind = check(rule).weight.kind
    assert (kind.extent, kind.stage, kind.gradient) == (extent, stage, False)


def test_a_frozen_chance_is_stored_and_its_draw_is_not():
    how = plan(check("bernoulli(p_ref) and uniform() < 0.5"))
    assert [c.name for c in how.stored] == ["p(ref)"]
    assert how.kept == ()


def test_drawn_once_is_known_with_the_data():
    value = check("weight = bernoulli(p_ref, example) * (uniform() < progress)").weight
    once = drawn_once(value)
    stages = {v.word: v.kind.stage for v in walk(once)}
    assert stages["bernoulli"] == Stage.FROZEN
    assert stages["uniform"] == Stage.DATA
    assert once.kind.stage == Stage.RUN, "progress is the run's"
    assert text(once) != text(value)
    assert drawn_once(check("weight = uniform() < 0.5").weight).kind.stage == Stage.DATA


def test_drawn_once_is_drawn_in_epoch_0():
    from dataclasses import replace

    checked = check("weight = uniform()")
    once = compile_rule(replace(checked, weight=drawn_once(checked.weight)))
    rule = compile_rule(checked)
    first = rule.weights(LOGITS, TARGETS, seed=3)
    assert torch.equal(once.weights(LOGITS, TARGETS, seed=3, epoch=2), first)
    assert not torch.equal(rule.weights(LOGITS, TARGETS, seed=3, epoch=2), first)


# Statistics: bounds that a good generator misses once in a million ------------------------------

MANY = 1 << 16


def numbers(**keys) -> torch.Tensor:
    """Draws `[MANY]` along one key, the others 0 and the first call."""
    along = torch.arange(MANY)
    key = {"seed": 0, "epoch": 0, "example": 0, "position": 0, "place": (1,), **keys}
    tensors = [
        along if key[n] is None else torch.tensor(key[n]) for n in ("seed", "epoch", "example", "position")
    ]
    return generator(*tensors, key["place"], torch.ones((), dtype=torch.float64)).expand(MANY)


ALONG = ("seed", "epoch", "example", "position")


@pytest.mark.parametrize("along", ALONG)
def test_draws_are_even(along):
    u = numbers(**{along: None})
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / MANY)
    counts = (u * 256).long().bincount(minlength=256).double()
    chi2 = ((counts - MANY / 256) ** 2 / (MANY / 256)).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


@pytest.mark.parametrize("along", ALONG)
def test_neighbours_are_independent(along):
    u = numbers(**{along: None})
    for step in (1, 2, 3, 16, 256, 4096):
        one, other = u[:-step], u[step:]
        assert abs(correlation(one, other)) < 5 / math.sqrt(len(one))
        cells = ((one * 16).long() * 16 + (other * 16).long()).bincount(minlength=256).double()
        chi2 = ((cells - len(one) / 256) ** 2 / (len(one) / 256)).sum().item()
        assert abs(chi2 - 255) < 6 * math.sqrt(2 * 255), f"{along} {step} apart"


@pytest.mark.parametrize(("along", "other"), list(itertools.permutations(ALONG, 2)))
def test_keys_are_not_mixed_up(along, other):
    """Sequences along one key for neighbouring values of another, and along the two keys in turn."""
    base = numbers(**{along: None})
    for value in (1, 2, 1000):
        assert abs(correlation(base, numbers(**{along: None, other: value}))) < 5 / math.sqrt(MANY)
    assert abs(correlation(base, numbers(**{other: None}))) < 5 / math.sqrt(MANY)


@pytest.mark.parametrize("along", ALONG)
def test_places_are_independent(along):
    of_calls = [numbers(**{along: None, "place": p}) for p in ((1,), (2,), (3,), (1, 1), (2, 1), (1, 2))]
    for one, other in itertools.combinations(of_calls, 2):
        assert abs(correlation(one, other)) < 5 / math.sqrt(MANY)


def test_a_chance_is_kept():
    for q in (0.01, 0.3, 0.9):
        share = (numbers(position=None) < q).double().mean().item()
        assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / MANY)
