"""Reductions over scopes: law 7 by hand, groups of every kind, gradients, whole steps, the whole data set."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from priority_dsl import PriorityError, compile_rule, survey
from priority_dsl.groups import share_of
from priority_dsl.survey import Rows
from priority_dsl.testing import check_properties

SCOPES = ("example", "batch", "chunk(2)", "chunk(3)", "window(1)", "window(2)")
NUMBER = "column x: number per token"
few = st.integers(-2, 2).map(float)  # so that ties are the rule


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, targets, where and example ids [B, T]: ties, ignored tokens, packed rows, ids in no order."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    cells = rows * width
    x = draw(st.lists(few | st.floats(-5, 5, width=32), min_size=cells, max_size=cells))
    valid = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=cells, max_size=cells))
    where = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    ids = draw(st.permutations(range(2 * rows)))
    cut = draw(st.integers(0, width))
    examples = [[ids[2 * b + (t >= cut)] for t in range(width)] for b in range(rows)]
    targets = torch.tensor([0 if v else -100 for v in valid]).reshape(rows, width)
    shape = (rows, width)
    return (
        torch.tensor(x, dtype=torch.float64).reshape(shape),
        targets,
        torch.tensor(where).reshape(shape),
        torch.tensor(examples),
    )


compiled = functools.cache(compile_rule)


def by_rule(text: str, x: Tensor, targets: Tensor, where: Tensor, examples: Tensor) -> Tensor:
    """What an expression of x gives each token, in float64."""
    rule = compiled(f"{NUMBER}; column c: bool per token; loss = nll_on * ({text})")
    logits = torch.zeros(*x.shape, 2, dtype=torch.float64)
    columns = {"x": x, "c": where}
    out = rule.loss(logits, targets, columns=columns, examples=examples)
    return out.losses / math.log(2.0)


def members(scope: str, targets: Tensor, examples: Tensor, row: int, column: int) -> list[tuple[int, int]]:
    """The places of a scope around a token, in order of example and position: written out from the page."""
    live = [(b, t) for b, t in (targets != -100).nonzero().tolist()]
    number: dict[tuple[int, int], int] = {}
    for b, t in live:
        number[b, t] = sum((b, u) in number and examples[b, u] == examples[b, t] for u in range(t))
    here = (row, column)
    own = [p for p in live if examples[p] == examples[here]]
    found = {
        "example": own,
        "batch": live,
        "chunk": [p for p in own if number[p] // _size(scope) == number[here] // _size(scope)],
        "window": [p for p in own if abs(number[p] - number[here]) <= _size(scope)],
    }[scope.partition("(")[0]]
    return sorted(found, key=lambda p: (int(examples[p]), number[p]))


def _size(scope: str) -> int:
    return int(scope.partition("(")[2].removesuffix(")") or 1)


# Law 7 ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    tables(),
    st.sampled_from(SCOPES),
    st.sampled_from(["0.07", "0.5", "0.3", "0", "1", "0.999"]),
    st.sampled_from(["ceil", "floor"]),
    st.booleans(),
)
def test_top_keeps_exactly_the_share_and_breaks_ties_by_example_and_position(
    table: tuple[Tensor, ...], scope: str, share: str, rounding: str, filtered: bool
) -> None:
    x, targets, where, examples = table
    condition = ", where=c" if filtered else ""
    kept = by_rule(f"top(x, {share}, {scope}, round={rounding}{condition})", *table)  # type: ignore[arg-type]
    lowest = by_rule(f"bottom(x, {share}, {scope}, round={rounding}{condition})", *table)  # type: ignore[arg-type]
    for b, t in (targets != -100).nonzero().tolist():
        places = [p for p in members(scope, targets, examples, b, t) if not filtered or where[p]]
        exact = Fraction(share) * len(places)
        count = math.ceil(exact) if rounding == "ceil" else math.floor(exact)
        for found, sign in ((kept, 1), (lowest, -1)):
            best = sorted(places, key=lambda p: (-sign * x[p].item(), places.index(p)))[:count]
            assert found[b, t].item() == ((b, t) in best)


@given(st.integers(0, 10**6), st.integers(0, 10_000), st.sampled_from(["ceil", "floor"]))
def test_a_share_is_the_decimal_that_was_written(count: int, thousandths: int, rounding: str) -> None:
    share = Fraction(thousandths, 10_000)
    whole = math.ceil(share * count) if rounding == "ceil" else math.floor(share * count)
    assert share_of(float(share), torch.tensor(count), rounding) == whole
    assert share_of(0.07, torch.tensor(100), "ceil") == 7, "0.07 * 100 is 7.000000000000001 in floats"


@pytest.mark.parametrize("scope", ["batch", "example", "chunk(4)", "window(4)"])
def test_what_is_no_number_is_never_kept_and_hides_nothing(scope: str) -> None:
    impossible = torch.tensor([0.0, -math.inf])
    logits = torch.stack([torch.zeros(2), impossible, torch.zeros(2), torch.zeros(2)]).unsqueeze(0)
    targets = torch.ones(1, 4, dtype=torch.long)  # at token 1 the difference is inf - inf
    rule = compile_rule(f"top(nll_ref - nll_on, 1, {scope})")
    assert rule.weights(logits, targets, models={"ref": logits}).tolist() == [[1.0, 0.0, 1.0, 1.0]]


# Numbers ----------------------------------------------------------------------------------------

HAND = {
    "sum(x, S)": np.sum,
    "mean(x, S)": np.mean,
    "median(x, S)": np.median,
    "min(x, S)": np.min,
    "max(x, S)": np.max,
    "std(x, S)": np.std,
    "count(x > 0, S)": lambda xs: np.sum(xs > 0),
    "quantile(x, 0.3, S)": lambda xs: np.quantile(xs, 0.3),
}


@pytest.mark.parametrize("text", HAND)
@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(SCOPES), st.booleans())
def test_reductions_are_numpys(text: str, table: tuple[Tensor, ...], scope: str, filtered: bool) -> None:
    x, targets, where, examples = table
    call = text.replace("S", scope).removesuffix(")") + (", where=c)" if filtered else ")")
    found = by_rule(call, *table)  # type: ignore[arg-type]
    for b, t in (targets != -100).nonzero().tolist():
        xs = [x[p].item() for p in members(scope, targets, examples, b, t) if not filtered or where[p]]
        wanted = HAND[text](np.array(xs)) if xs else 0.0
        assert found[b, t].item() == pytest.approx(wanted, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(SCOPES))
def test_rescaled_values_and_those_of_a_constant(table: tuple[Tensor, ...], scope: str) -> None:
    x, targets, _, examples = table
    minmax, zscore = (by_rule(f"{name}(x, {scope})", *table) for name in ("minmax", "zscore"))  # type: ignore[arg-type]
    for b, t in (targets != -100).nonzero().tolist():
        xs = np.array([x[p].item() for p in members(scope, targets, examples, b, t)])
        constant = bool((xs == xs[0]).all())
        low, spread = (xs.min(), np.ptp(xs)) if not constant else (0.0, 1.0)
        assert minmax[b, t].item() == pytest.approx(0.0 if constant else (x[b, t].item() - low) / spread)
        z = 0.0 if constant else (x[b, t].item() - xs.mean()) / xs.std()
        assert zscore[b, t].item() == pytest.approx(z, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_a_suffix_ends_with_its_example(table: tuple[Tensor, ...]) -> None:
    x, targets, _, examples = table
    found = by_rule("suffix_sum(x)", *table)  # type: ignore[arg-type]
    for b, t in (targets != -100).nonzero().tolist():
        own = members("example", targets, examples, b, t)
        assert found[b, t].item() == pytest.approx(sum(x[p].item() for p in own[own.index((b, t)) :]))


def test_an_infinity_stays_in_its_group() -> None:
    x = torch.tensor([[math.inf, 1.0, 2.0], [3.0, -math.inf, 4.0]])
    targets = torch.zeros(2, 3, dtype=torch.long)
    rule = compile_rule(f"{NUMBER}; loss = nll_on * clip(suffix_sum(1 / x), -9, 9)")
    columns = {"x": torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.5, 8.0]])}
    assert rule.loss(torch.zeros(2, 3, 2), targets, columns=columns).total.isfinite()
    from priority_dsl.groups import suffix_sum

    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    position = torch.tensor([0, 1, 2, 0, 1, 2])
    sums = suffix_sum(x.reshape(-1), torch.ones(6, dtype=torch.bool), ids, position)
    assert sums.tolist() == [math.inf, 3.0, 2.0, -math.inf, -math.inf, 4.0]


@pytest.mark.parametrize("scope", ["chunk(1)", "example", "batch"])
def test_equal_infinities_do_not_deviate(scope: str) -> None:
    targets = torch.ones(1, 2, dtype=torch.long)
    logits = torch.tensor([[[0.0, -math.inf], [0.0, -math.inf]]])
    rule = compile_rule(f"std(nll_on, {scope}) + zscore(nll_on, {scope})")
    assert rule.weights(logits, targets).tolist() == [[0.0, 0.0]]


def test_values_per_example_count_once() -> None:
    targets = torch.tensor([[0, 0, 0, 0], [0, 0, -100, -100], [0, -100, -100, -100]])
    rule = compile_rule("column s: number; weight = mean(s, batch) + 0 * p_on")
    logits = torch.zeros(3, 4, 2)
    weights = rule.weights(logits, targets, columns={"s": [1.0, 2.0, 6.0]})
    assert weights[0, 0].item() == 3.0, "not 13 / 7, as over tokens"
    best = compile_rule("column s: number; weight = top(s, 0.5, batch)")
    assert best.weights(logits, targets, columns={"s": [1.0, 6.0, 6.0]})[:, 0].tolist() == [0.0, 1.0, 1.0]


# Nothing to count -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "text", ["mean(p_on, S)", "top(p_on, 0.5, S)", "quantile(p_on, 0.5, S)", "zscore(p_on, S)"]
)
def test_an_empty_batch_and_an_ignored_one_have_a_loss_of_zero(text: str, scope: str) -> None:
    rule = compile_rule(text.replace("S", scope))
    for shape in ((0, 3), (2, 0), (2, 3)):
        logits = torch.zeros(*shape, 4, requires_grad=True)
        out = rule.loss(logits, torch.full(shape, -100))
        assert out.mean.item() == 0.0
        out.mean.backward()
        assert not logits.grad.any()  # type: ignore[union-attr]


# Whole steps ------------------------------------------------------------------------------------

STEPS = (
    "H_on / max(mean(H_on, batch), 0.01)",
    "top(p_on, 0.5, batch)",
    "top(rank_on, 0.3, batch, round=floor)",
    "let tau = median(mean(nll_on, example), batch); weight = max(p_on ** (1 / max(tau, 0.1)), 0.01)",
    "weight = top(p_on, 0.3, batch); normalize = kept",
    "weight = sigmoid(zscore(p_on - p_ref, batch)); normalize = weights",
    "column c: bool per token; weight = 1 if c else -0.2; normalize = groups(c)",
    "weight = p_on; normalize = groups(p_on > 0.2)",
    "minmax(minmax(nll_on, batch), example)",
    "loss = mean(nll_on, example) ** 2",
    "top(uniform(), 0.5, batch)",
    "weight = top(mean(p_on, example), 0.5, batch); normalize = examples",
)


@pytest.mark.parametrize("text", STEPS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_same_however_it_is_spread(text: str, fused: bool) -> None:
    torch.manual_seed(0)
    rule, (b, t, v) = compile_rule(text), (8, 6, 7)
    hidden = torch.randn(b, t, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(v, 5, dtype=torch.float64)
    targets = torch.randint(0, v, (b, t)).masked_fill(torch.rand(b, t) < 0.3, -100)
    reference = torch.randn(b, t, v, dtype=torch.float64)
    marked, examples = torch.rand(b, t) < 0.4, torch.arange(b).unsqueeze(-1).expand(b, t) + 3

    def given(part: list[int]) -> dict:
        return {
            "models": {"ref": reference[part]},
            "columns": {"c": marked[part]},
            "examples": examples[part],
        }

    def loss(part: list[int], step: object):  # type: ignore[no-untyped-def]
        if fused:
            return rule.fused_loss(hidden[part], head, targets[part], step=step, **given(part))
        return rule.loss(hidden[part] @ head.T, targets[part], step=step, **given(part))

    one = loss(list(range(b)), None)
    (slope,) = torch.autograd.grad(one.mean, hidden)
    for parts in ([[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 2, 4], [0], [7, 1, 3, 5]], [[i] for i in range(b)]):
        on = [(hidden[p].detach(), head) if fused else hidden[p].detach() @ head.T for p in parts]
        seen = [rule.observe(z, targets[p], **given(p)) for z, p in zip(on, parts, strict=True)]
        step = sum(seen[1:], start=seen[0])
        outs = [loss(p, step) for p in parts]
        weights = torch.zeros(b, t, dtype=torch.float64)
        for part, out in zip(parts, outs, strict=True):
            weights[part] = out.weights
        torch.testing.assert_close(weights, one.weights, rtol=1e-12, atol=1e-12)
        total = sum(out.mean for out in outs)
        torch.testing.assert_close(total, one.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], slope, rtol=1e-10, atol=1e-10)


def test_ties_of_a_batch_need_the_rows_of_the_data_set() -> None:
    rule = compile_rule("top(p_on, 0.5, batch)")
    logits, targets = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    step = rule.observe(logits, targets) + rule.observe(logits, targets)
    with pytest.raises(PriorityError, match="PD508"):
        rule.loss(logits, targets, step=step)


def test_a_step_of_another_rule_is_refused() -> None:
    step = compile_rule("weight = p_on").observe(None, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(PriorityError, match="PD507"):
        compile_rule("p_on / mean(p_on, batch)").loss(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), step=step
        )


def test_a_whole_rule_of_scopes_keeps_what_every_rule_promises() -> None:
    check_properties("top(nll_ref - nll_on, 0.6, example) * minmax(p_on, batch)", examples=20)
    check_properties(
        "weight = top(nll_ref, 0.6, dataset) * zscore(mean(p_ref, chunk(2)), dataset)", examples=40
    )


# The data set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [2**22, 0], ids=["kept", "read anew"])
@pytest.mark.parametrize("share", ["0.07", "0.5", "1"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), st.integers(1, 3), st.booleans())
def test_the_data_set_read_in_any_batches(
    kept: int,
    share: str,
    monkeypatch: pytest.MonkeyPatch,
    table: tuple[Tensor, ...],
    size: int,
    filtered: bool,
) -> None:
    monkeypatch.setattr(survey, "MOST_KEPT", kept)
    x, targets, where, examples = table
    condition = ", where=c" if filtered else ""
    rule = compiled(
        f"{NUMBER}; column c: bool per token; let s = mean(x, example)\n"
        f"weight = top(x, {share}, dataset{condition}) + zscore(x, dataset) "
        "+ (x > quantile(x, 0.3, dataset)) + max(s, dataset) + std(s, dataset) + minmax(x, dataset) "
        "+ count(x > 0, dataset)"
    )

    def read(step: int) -> list[Rows]:
        parts = [slice(i, i + step) for i in range(0, len(x), step)]
        return [Rows(targets[p], {}, {"x": x[p], "c": where[p]}, examples[p]) for p in parts]

    whole, parted = (rule.survey(lambda n=n: read(n)) for n in (len(x), size))
    assert {k: v.item() for k, v in whole.items()} == {k: v.item() for k, v in parted.items()}
    (stored,) = (
        rule.stored_columns(r.targets, statistics={}, columns=r.columns, examples=r.examples, numbers=parted)
        for r in read(len(x))
    )
    logits = torch.zeros(*x.shape, 2)
    found = rule.weights(logits, targets, stored=stored)
    batch = compiled(rule.text.replace("dataset", "batch"))  # the same over one batch of everything
    wanted = batch.weights(logits, targets, columns={"x": x, "c": where}, examples=examples)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_call_does_not_see_the_data_set() -> None:
    rule = compile_rule("top(nll_ref, 0.5, dataset)")
    logits, targets = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(PriorityError, match="PD509"):
        rule.weights(logits, targets, models={"ref": logits})
    kept = {"top(nll(ref), 0.5, dataset)": torch.tensor([[True, False]])}
    assert rule.weights(logits, targets, stored=kept).tolist() == [[1.0, 0.0]]


def test_keep_is_decided_over_all_rows_and_the_data_set_is_what_was_kept() -> None:
    targets = torch.zeros(4, 2, dtype=torch.long)
    rule = compile_rule(
        "column s: number; keep = s > median(s, dataset); weight = s / max(max(s, dataset), 1)"
    )
    rows = [Rows(targets, {}, {"s": [1.0, 2.0, 3.0, 9.0]})]
    numbers = rule.survey(lambda: rows, keep=True)
    assert rule.kept(rows[0], numbers)[:, 0].tolist() == [False, False, True, True]
    assert rule.survey(lambda: rows) != numbers
    assert (
        str(compile_rule("column s: number; keep = s > 1; weight = 1").regime) == "hard selection (external)"
    )
