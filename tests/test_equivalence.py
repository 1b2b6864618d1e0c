"""The loss graph is what the language says: drawn rules against the oracle, in values and in gradients."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from priority_dsl import compile_rule
from priority_dsl.registry import REGISTRY, Function, Statistic
from priority_dsl.rule import CompiledRule
from priority_dsl.testing import Case, cases, checked_rules
from priority_dsl.testing.comparing import Comparison, close, reference
from priority_dsl.values import walk
from priority_dsl.vocabulary import statistics as bodies

RULES = 2100
LEAST = 20  # draws of each word
INTERNAL = {"power_of_probability"}  # made by the compiler: no text says it
# They become other words, declare a model, want a text column, or want the whole data set before a call.
COMPOSED = {"rule", "draws", "ema", "reading", "dataset"}
DTYPES = (torch.float64, torch.float64, torch.float32)


@st.composite
def rules_with_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, pairs: tuple[bool, ...] = (False,)
) -> tuple[CompiledRule, Case]:
    rule = compile_rule(draw(checked_rules(pairs=draw(st.sampled_from(pairs)))))
    return rule, draw(cases(rule, dtypes=dtypes))


def words_of(rule: CompiledRule) -> set[str]:
    """The words of the language that a rule reads, operators by their signs."""
    found = set()
    for value in walk(*rule.checked.roots):
        options = dict(value.options)
        word = REGISTRY.get(str(options["name"]) if value.word == "column" else value.word)
        if word is not None:
            found.add(shown(word))
        if "scope" in options:
            found.add(str(options["scope"]))
        if "pattern" in options:  # what a regex asks is a column
            found.add(options["pattern"][0])
    return found


def shown(word) -> str:
    return getattr(word, "symbol", "") or word.name


def drawable() -> set[str]:
    return {shown(w) for w in REGISTRY.words.values() if w.name not in INTERNAL | COMPOSED}


def table(counts: dict[str, int], columns: int = 6) -> str:
    cells = [f"{word:>14} {count:<5}" for word, count in sorted(counts.items(), key=lambda item: -item[1])]
    rows = (cells[i : i + columns] for i in range(0, len(cells), columns))
    return "\n".join("".join(row).rstrip() for row in rows)


def test_drawn_rules_equal_the_oracle(record_property: pytest.RecordProperty) -> None:
    counts: Counter[str] = Counter()  # what happened
    words: Counter[str] = Counter(dict.fromkeys(drawable(), 0))
    texts: set[str] = set()

    @settings(max_examples=RULES, suppress_health_check=list(HealthCheck))
    @given(rules_with_cases(pairs=(False, False, False, False, True)))
    def compare(drawn: tuple[CompiledRule, Case]) -> None:
        rule, case = drawn
        comparison = Comparison(rule, case).check()
        read = words_of(rule)
        if rule.text not in texts:
            words.update(read)
            counts["read a statistic"] += any(isinstance(REGISTRY.get(w), Statistic) for w in read)
        texts.add(rule.text)
        counts["compared"] += 1
        counts["decided by rounding"] += bool(comparison.excused)
        counts["ties"] += any(len(set(row)) < len(row) for b in case.logits.tolist() for row in b)
        counts["-inf logits"] += bool((case.logits == -math.inf).any())
        counts["impossible targets"] += any(math.isinf(x) for row in comparison.wanted.nll for x in row)
        counts["ignored tokens"] += bool((~case.valid).any())
        counts["nothing supervised"] += not case.valid.any()
        counts["refused weights"] += not all(
            math.isfinite(w) for row in comparison.wanted.weights for w in row
        )
        if counts["compared"] % 10 == 0 and (out := comparison.loss()) is not None:
            assert torch.equal(rule.weights(case.logits, case.targets, **case.settings), out.weights)
        if case.logits.dtype == torch.float64:
            coordinates = 4 if rule.checked.loss is not None else 1
            counts["slopes compared"] += comparison.check_gradient(Random(counts["compared"]), coordinates)

    compare()
    happened = ", ".join(f"{what} {count}" for what, count in counts.items())
    record_property("summary", f"rules drawn: {len(texts)} different, {happened}\n{table(words)}")
    assert len(texts) >= 2000
    assert counts["read a statistic"] >= 0.8 * len(texts)
    assert counts["decided by rounding"] < 0.01 * counts["compared"]
    assert counts["slopes compared"] >= 1000
    for what in ("ties", "-inf logits", "impossible targets", "ignored tokens", "nothing supervised"):
        assert counts[what] >= 50, what
    assert {word: count for word, count in words.items() if count < LEAST} == {}


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(rules_with_cases((torch.float64,)))
def test_micro_batches_make_the_step(drawn: tuple[CompiledRule, Case]) -> None:
    """Law 8 for the counts: rows given one by one, over the counts of all, are what all rows give at once."""
    rule, case = drawn
    whole = Comparison(rule, replace(case, examples=None))
    if whole.check().loss() is None or whole.excused:
        return
    rows = [row_of(case, b) for b in range(len(case.targets))]
    parts = [rule.observe(row.logits, row.targets, **row.settings) for row in rows]
    oracle_parts = [reference(rule, row).counts for row in rows]
    step, oracle_step = sum(parts[1:], parts[0]), sum(oracle_parts[1:], oracle_parts[0])
    total, oracle_total = 0.0, 0.0
    for row in rows:
        out = rule.loss(row.logits, row.targets, **row.settings, step=step)
        total += out.total.item()
        oracle_total += reference(rule, row, step=oracle_step).total
        assert close(out.denominator.item(), whole.wanted.denominator, 1e-10)
    scale = 1 + sum(abs(x) for row in whole.wanted.losses for x in row)
    # The oracle of one row sees no other rows, so it has the values of the row's own batch.
    for sum_of_parts in (total, *([] if rule.checked.batches else [oracle_total])):
        if math.isfinite(whole.wanted.total):
            assert abs(sum_of_parts - whole.wanted.total) <= 1e-10 * scale


def row_of(case: Case, b: int) -> Case:
    """One row of a case as a batch."""
    return Case(
        case.logits[b : b + 1],
        case.targets[b : b + 1],
        {name: z[b : b + 1] for name, z in case.models.items()},
        {name: column[b : b + 1] for name, column in case.columns.items()},
        torch.full_like(case.targets[b : b + 1], b),  # as in the whole: chance reads it
        case.progress,
        case.epoch,
        case.seed,
        {name: values[b : b + 1] for name, values in case.stored.items()},
    )


# One deliberate error per statistic -------------------------------------------------------------


def _ties_counted_apart(z, y):
    ordered = z.sort(-1, descending=True).values
    e = (ordered - z.amax(-1, keepdim=True)).exp()
    return (e * ordered.new_ones(ordered.shape).cumsum(-1)).sum(-1) / e.sum(-1)


def _not_renormalised(z, y, k):
    e = bodies.largest(bodies.centred(z).exp() / bodies.total(z).unsqueeze(-1), k)[0]
    return -(e * e.log().masked_fill(e == 0, 0.0)).sum(-1)


def _zero_times_infinity(z, y):
    d = bodies.centred(z)
    return bodies.total(z).log() - (d.exp() * d).sum(-1) / bodies.total(z)


WRONG = {
    "nll": lambda z, y: bodies.nll.body(z, y).clamp(max=30.0),
    "p": lambda z, y: bodies.p.body(z, y).clamp(min=1e-8),
    "logp": lambda z, y: bodies.nll.body(z, y),
    "entropy": _zero_times_infinity,
    "topk_entropy": _not_renormalised,
    "mass": lambda z, y, ties: bodies.mass.body(z, y, "exclude"),
    "rank": lambda z, y: (z >= bodies.at_target(z, y)).sum(-1).to(z.dtype),
    "expected_rank": _ties_counted_apart,
    "pmax": lambda z, y: bodies.p.body(z, y).maximum(bodies.centred(z).exp().mean(-1)),
    "margin": lambda z, y: bodies.at_target(z, y).squeeze(-1) - z.amax(-1),
    "kl": lambda a, b, y: bodies.kl.body(b, a, y),
    "cross_entropy": lambda a, b, y: bodies.cross_entropy.body(b, a, y),
    "logratio": lambda z, y: bodies.nll.body(z, y).clamp(max=30.0),
    "same_top": lambda a, b, y, k: bodies.same_top.body(a, b, y, k + 1),
}
PART = {"logratio": "nll"}  # of what the compiler writes it out as; its own body is not emitted
BUILT = sorted(n for n, w in REGISTRY.words.items() if isinstance(w, Statistic) and not w.inside)


def _holds(text: str, draws: int = 60) -> bool:
    """Whether a rule equals the oracle on so many drawn cases."""
    rule = compile_rule(text)

    @settings(
        max_examples=draws, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(rule))
    def compare(case: Case) -> None:
        Comparison(rule, case).check()

    try:
        compare()
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", BUILT)
def test_a_wrong_body_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    word = REGISTRY.statistic(name)
    text = f"weight = tanh({word.example.replace('20', '2')})"
    assert _holds(text)
    part = REGISTRY.statistic(PART.get(name, name))
    monkeypatch.setitem(REGISTRY.words, part.name, replace(part, body=WRONG[name]))
    assert not _holds(text)


def _without_its_derivative(word: Function) -> Function:
    """The same function with a derivative that is 1 % too large."""
    assert word.derivative is not None
    exact = word.derivative
    return replace(word, derivative=lambda *a: tuple(None if x is None else x * 1.01 for x in exact(*a)))


LOSSES = {
    "abs": "abs(nll_on - 1)",
    "add": "nll_on + H_on",
    "choose": "nll_on if mass_on > 0.5 else H_on",
    "clip": "clip(nll_on, 0.5, 3)",
    "divide": "nll_on / (1 + H_on)",
    "exp": "exp(-H_on)",
    "log": "log(nll_on + 1)",
    "log2": "log2(nll_on + 1)",
    "log_sigmoid": "log_sigmoid(margin_on)",
    "max": "max(nll_on, H_on)",
    "min": "min(nll_on, H_on)",
    "multiply": "p_on * nll_on",
    "negate": "-p_on",
    "power": "(H_on + 1) ** 2",
    "power_of_both": "(H_on + 1) ** nll_on",
    "power_of_probability": "p_on ** 0.3",
    "sigmoid": "sigmoid(nll_on - 1)",
    "sqrt": "sqrt(H_on + 1)",
    "subtract": "nll_on - H_on",
    "tanh": "tanh(nll_on)",
}
FLAT = {"sg", "sign"}  # nothing flows through them


def test_every_derivative_is_tried() -> None:
    words = (w for w in REGISTRY.words.values() if isinstance(w, Function) and w.derivative is not None)
    assert {word.name for word in words} - FLAT == set(LOSSES)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_wrong_derivative_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def slopes_agree() -> bool:
        rule = compile_rule(f"loss = {LOSSES[name]}")
        random = Random(1)

        @settings(max_examples=20, phases=[Phase.generate], database=None, derandomize=True, deadline=None)
        @given(cases(rule, dtypes=(torch.float64,)))
        def compare(case: Case) -> None:
            Comparison(rule, case).check().check_gradient(random)

        try:
            compare()
        except AssertionError:
            return False
        return True

    assert slopes_agree()
    monkeypatch.setitem(REGISTRY.words, name, _without_its_derivative(REGISTRY.function(name)))
    assert not slopes_agree()
