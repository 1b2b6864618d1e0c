"""Pairs of responses: values of one of them, losses and columns per pair, against torch and the oracle."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from priority_dsl import PriorityError, compile_rule, pairing
from priority_dsl.rule import CompiledRule
from priority_dsl.testing import Case, cases, check_properties, checked_rules
from priority_dsl.testing.comparing import Comparison

DPO = """
param beta = 0.1 in (0, inf)
let d = sum(logratio(on, ref), example)
loss = -log_sigmoid(beta * (chosen(d) - rejected(d)))
"""
EVERYTHING = list(HealthCheck)


# By hand ----------------------------------------------------------------------------------------


def sequence_log_ratios(logits: Tensor, ref: Tensor, case: Case) -> dict[tuple[int, bool], Tensor]:
    """log pi(y) - log pi_ref(y), summed over the supervised tokens of each response, by row and side."""
    sides = case.columns["chosen"]
    of_token = sides.unsqueeze(-1).expand(case.targets.shape) if sides.dim() == 1 else sides
    found: dict[tuple[int, bool], Tensor] = {}
    for b, row in enumerate(case.targets.tolist()):
        for t, y in enumerate(row):
            if y != -100:
                key = (int(case.examples[b, t]), bool(of_token[b, t]))  # type: ignore[index]
                of = logits[b, t].log_softmax(-1)[y] - ref[b, t].log_softmax(-1)[y]
                found[key] = found.get(key, torch.zeros((), dtype=logits.dtype)) + of
    return found


def dpo_by_hand(logits: Tensor, case: Case, beta: float) -> list[Tensor]:
    """The loss of each pair, in the order of the data-set rows."""
    d = sequence_log_ratios(logits, case.models["ref"], case)
    rows = sorted({row for row, _ in d})
    return [-torch.nn.functional.logsigmoid(beta * (d[row, True] - d[row, False])) for row in rows]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dpo_equals_dpo_by_hand(packed: bool, dtype: torch.dtype) -> None:
    """Drawn batches with ties, logits of -inf and ignored tokens; packed, two rows of the batch are one."""
    rule = compile_rule(DPO, beta=0.3)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    compared = Counter[str]()

    @settings(
        max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=EVERYTHING
    )
    @given(cases(rule, dtypes=(dtype,), extreme=False))
    def compare(case: Case) -> None:
        case.logits.masked_fill_(~case.valid.unsqueeze(-1), 0.0)  # some are NaN, which autograd would spread
        case = packed_by_two(case) if packed and case.columns["chosen"].dim() == 1 else case
        leaf, own = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
        losses = dpo_by_hand(own, case, 0.3)
        if not losses or not torch.stack(losses).isfinite().all():
            return
        out, wanted = rule.loss(leaf, case.targets, **case.settings), torch.stack(losses).mean()
        assert float(out.denominator) == len(losses)
        torch.testing.assert_close(out.mean, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            out.losses.sum(), torch.stack(losses).sum().detach(), rtol=tolerance, atol=tolerance
        )
        assert int((out.losses != 0).sum()) == len(losses)  # one place a pair, -log sigmoid is never 0
        mine, theirs = (torch.autograd.grad(x, z)[0] for x, z in ((out.mean, leaf), (wanted, own)))
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        assert case.examples is not None
        compared["cases"] += 1
        compared["packed"] += bool((case.examples != case.examples[:, :1]).any())
        compared["several pairs"] += len(losses) > 1

    compare()
    assert compared["cases"] >= 40
    assert compared["several pairs"] >= 10
    assert compared["packed"] >= (10 if packed else 0)


def packed_by_two(case: Case) -> Case:
    """The same responses, two of them in each row."""
    assert case.examples is not None
    rows, tokens = case.targets.shape
    shape = (rows // 2, 2 * tokens)
    models = {name: z.reshape(*shape, -1) for name, z in case.models.items()}
    sides = case.columns["chosen"].unsqueeze(-1).expand(rows, tokens).reshape(shape)
    return Case(
        case.logits.reshape(*shape, -1),
        case.targets.reshape(shape),
        models,
        {"chosen": sides},
        case.examples.reshape(shape),
    )


def pairs(seed: int = 0, count: int = 3, tokens: int = 5, vocabulary: int = 7) -> Case:
    """Pairs whose responses come in no order, of different lengths, as rows of the batch."""
    random = torch.Generator().manual_seed(seed)
    shape = (2 * count, tokens)
    order = torch.randperm(2 * count, generator=random)
    targets = torch.randint(vocabulary, shape, generator=random)
    lengths = torch.randint(1, tokens, (2 * count, 1), generator=random)
    targets = targets.masked_fill(torch.arange(tokens) >= lengths, -100)
    logits, ref = (torch.randn(*shape, vocabulary, generator=random, dtype=torch.float64) for _ in range(2))
    return Case(
        logits,
        targets,
        {"ref": ref},
        {"chosen": (order % 2 == 0)},
        (10 - order // 2).unsqueeze(-1).expand(shape),
    )


def part(case: Case, rows: list[int]) -> Case:
    """Some rows of a case."""
    assert case.examples is not None
    models = {name: z[rows] for name, z in case.models.items()}
    columns = {name: values[rows] for name, values in case.columns.items()}
    return Case(case.logits[rows], case.targets[rows], models, columns, case.examples[rows])


def rows_of(case: Case) -> dict[int, tuple[int, int]]:
    """The batch rows of the chosen and the rejected response, by data-set row."""
    assert case.examples is not None
    of: dict[int, dict[bool, int]] = {}
    for b, (row, side) in enumerate(
        zip(case.examples[:, 0].tolist(), case.columns["chosen"].tolist(), strict=True)
    ):
        of.setdefault(row, {})[side] = b
    return {row: (sides[True], sides[False]) for row, sides in sorted(of.items())}


def weights(text: str, case: Case, **columns: Any) -> Tensor:
    given = {**case.settings, "columns": {**case.columns, **columns}}
    return compile_rule(text).weights(case.logits, case.targets, **given)


# Values of one response -------------------------------------------------------------------------


def test_both_responses_see_the_value_of_one() -> None:
    case = pairs()
    lengths = case.valid.sum(-1)
    for text, which in (("chosen(length)", 0), ("rejected(length)", 1)):
        found = weights(text, case)
        for both in rows_of(case).values():
            for b in both:
                assert (found[b][case.valid[b]] == lengths[both[which]]).all()
    assert not weights("chosen(length)", case)[~case.valid].any()


def test_a_condition_of_a_response_is_a_condition() -> None:
    case = pairs(count=4)
    column = torch.tensor([True, False] * 4)
    found = weights(
        "column bad: bool; weight = 0.5 if chosen(bad) and not rejected(bad) else 2", case, bad=column
    )
    for first, second in rows_of(case).values():
        wanted = 0.5 if column[first] and not column[second] else 2.0
        assert (found[first][case.valid[first]] == wanted).all()
        assert (found[second][case.valid[second]] == wanted).all()


def test_what_both_have_in_common_is_itself() -> None:
    checked = compile_rule(
        "column gap: number per pair; weight = chosen(gap) + chosen(progress) + rejected(2)"
    ).checked
    assert not any(word in str(checked.weight) for word in ("chosen", "rejected"))
    assert str(checked.weight.kind.extent) == "pair"


def test_a_column_per_pair() -> None:
    case = pairs()
    assert case.examples is not None
    gap = case.examples[:, 0].double() / 10
    found = weights("column gap: number per pair; weight = gap", case, gap=gap)
    torch.testing.assert_close(found, gap.unsqueeze(-1).expand(found.shape).masked_fill(~case.valid, 0.0))


def test_batch_values_count_each_pair_once() -> None:
    case = pairs(count=4)
    lengths = case.valid.sum(-1).double()
    of_pairs = [float(lengths[first] - lengths[second]) for first, second in rows_of(case).values()]
    mean = weights("mean(chosen(length) - rejected(length), batch)", case)[case.valid]
    torch.testing.assert_close(mean, torch.full_like(mean, sum(of_pairs) / 4))
    both = weights("mean(length, batch) + 0 * chosen(length)", case)[case.valid]
    torch.testing.assert_close(both, torch.full_like(both, float(lengths.mean())))


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.26, 2), (1.0, 4), (0.25, 1)])
def test_top_keeps_whole_pairs_and_breaks_ties_by_data_set_row(share: float, count: int) -> None:
    case = pairs(count=4)
    kept = weights(f"top(chosen(length) * 0, {share}, batch)", case)
    rows = [row for row, both in rows_of(case).items() if all(kept[b].any() for b in both)]
    assert rows == sorted(rows_of(case))[:count]
    assert sum(bool(row.any()) for row in kept) == 2 * count


def test_the_responses_of_a_pair_draw_apart() -> None:
    drawn = weights("chosen(uniform(example)) - rejected(uniform(example))", pairs(count=4))
    assert (drawn[drawn != 0].unique().numel()) == 4
    apart = weights("uniform(example) - chosen(uniform(example))", pairs())
    assert apart.any()


# The loss of a pair -----------------------------------------------------------------------------


def test_the_loss_of_a_pair_stands_at_the_first_token_of_the_chosen_response() -> None:
    case = pairs()
    out = compile_rule(DPO).loss(case.logits, case.targets, **case.settings)
    places = out.losses.nonzero().tolist()
    assert places == sorted(
        [first, int(case.valid[first].long().argmax())] for first, _ in rows_of(case).values()
    )


@pytest.mark.parametrize(
    ("normalize", "number"),
    [("", 3), ("normalize = examples", 3), ("normalize = none", 1), ("normalize = tokens", 0)],
)
def test_what_a_loss_per_pair_is_divided_by(normalize: str, number: int) -> None:
    case = pairs()
    whole = compile_rule(DPO + normalize).loss(case.logits, case.targets, **case.settings)
    total = compile_rule(DPO + "normalize = none").loss(case.logits, case.targets, **case.settings).total
    torch.testing.assert_close(whole.mean, total / (number or int(case.valid.sum())))


def test_a_weight_of_tokens_inside_the_loss_of_a_pair() -> None:
    case = pairs()
    rule = compile_rule(
        "weight = p_ref; let d = sum(weight * logratio(on, ref), example); "
        "loss = -log_sigmoid(chosen(d) - rejected(d))"
    )
    out = rule.loss(case.logits, case.targets, **case.settings)
    y = case.targets.clamp(min=0).unsqueeze(-1)
    logp, logp_ref = (z.log_softmax(-1).gather(-1, y).squeeze(-1) for z in (case.logits, case.models["ref"]))
    d = (logp_ref.exp() * (logp - logp_ref) * case.valid).sum(-1)
    wanted = [-torch.nn.functional.logsigmoid(d[a] - d[b]) for a, b in rows_of(case).values()]
    torch.testing.assert_close(out.mean, torch.stack(wanted).mean())
    assert (out.weights[case.valid] > 0).all()


@pytest.mark.parametrize("text", [DPO, DPO.replace("example)\n", "example) - mean(chosen(length), batch)\n")])
def test_pairs_spread_over_micro_batches_make_the_step(text: str) -> None:
    case, rule = pairs(count=4), compile_rule(text)
    leaf = case.logits.clone().requires_grad_()
    whole = rule.loss(leaf, case.targets, **case.settings)
    whole.mean.backward()
    parts = [part(case, list(both)) for both in rows_of(case).values()]
    seen = [rule.observe(p.logits, p.targets, **p.settings) for p in parts]
    step = sum(seen[1:], seen[0])
    total = torch.zeros((), dtype=torch.float64)
    for p, both in zip(parts, rows_of(case).values(), strict=True):
        own = p.logits.clone().requires_grad_()
        out = rule.loss(own, p.targets, **p.settings, step=step)
        assert out.denominator == whole.denominator == 4
        out.mean.backward()
        total += out.mean.detach()
        assert leaf.grad is not None
        torch.testing.assert_close(own.grad, leaf.grad[list(both)])
    torch.testing.assert_close(total, whole.mean.detach())


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize(
    "text", [DPO, "weight = p_ref * chosen(length)", "nll_ref < chosen(mean(nll_on, example))"]
)
def test_the_fused_loss_is_the_dense_one_in_any_chunks(text: str, rows: int) -> None:
    """The responses of a pair, and the tokens of a response, fall into several chunks."""
    case, rule = pairs(count=4), compile_rule(text)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 5, 6, generator=random, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 6, generator=random, dtype=torch.float64, requires_grad=True)
    fused = rule.fused_loss(hidden, head, case.targets, **case.settings, rows=rows)
    dense = rule.loss(hidden @ head.T, case.targets, **case.settings)
    torch.testing.assert_close(fused.mean, dense.mean)
    torch.testing.assert_close(fused.weights, dense.weights)
    mine, theirs = (torch.autograd.grad(out.mean, (hidden, head)) for out in (fused, dense))
    torch.testing.assert_close(mine, theirs)


def test_nothing_supervised_is_a_loss_of_zero_with_a_graph() -> None:
    case = pairs()
    leaf = case.logits.clone().requires_grad_()
    for targets in (torch.full_like(case.targets, -100), case.targets[:0]):
        rows = len(targets)
        given = part(case, list(range(rows)))
        out = compile_rule(DPO).loss(leaf[:rows], targets, **given.settings)
        assert out.mean == 0
        out.mean.backward()


def test_what_every_rule_promises_holds_of_dpo() -> None:
    assert len(check_properties(DPO, examples=40)) >= 5


# Mistakes ---------------------------------------------------------------------------------------


def refused(case: Case, **changed: Any) -> str:
    with pytest.raises(PriorityError) as caught:
        compile_rule(DPO).loss(case.logits, case.targets, **{**case.settings, **changed})
    (only,) = caught.value.diagnostics
    return f"{only.code} {only.message} {only.help}"


def test_a_call_must_say_which_responses_belong_together() -> None:
    case = pairs()
    assert "PD502" in refused(case, columns={})
    assert 'columns={"chosen": ...}' in refused(case, columns={})
    assert "PD510" in refused(case, examples=None)
    assert "examples=" in refused(case, examples=None)


@pytest.mark.parametrize(("missing", "side"), [(1, "rejected"), (0, "chosen")])
def test_half_a_pair_is_refused_by_its_row(missing: int, side: str) -> None:
    case = pairs()
    row, both = next(iter(rows_of(case).items()))
    left = part(case, [b for b in range(6) if b != both[missing]])
    assert f"the pair of data-set row {row} has no supervised token of its {side} response" in refused(left)
    case.targets[both[missing]] = -100
    assert f"PD510 the pair of data-set row {row}" in refused(case)


# Drawn rules ------------------------------------------------------------------------------------


@st.composite
def rules_with_cases(draw: st.DrawFn) -> tuple[CompiledRule, Case]:
    rule = compile_rule(draw(checked_rules(pairs=True)))
    return rule, draw(cases(rule, dtypes=(torch.float64, torch.float64, torch.float32)))


def compare_drawn(examples: int) -> Counter[str]:
    """Drawn rules about pairs against the oracle, and slopes against finite differences."""
    counts = Counter[str]()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=EVERYTHING,
    )  # fmt: skip
    @given(rules_with_cases())
    def compare(drawn: tuple[CompiledRule, Case]) -> None:
        rule, case = drawn
        comparison = Comparison(rule, case).check()
        counts["rules"] += 1
        counts["about pairs"] += rule.checked.reads_pairs
        counts["losses per pair"] += rule.checked.of_pairs
        counts["excused"] += bool(comparison.excused)
        if case.logits.dtype == torch.float64:
            slopes = comparison.check_gradient(Random(counts["rules"]))
            counts["slopes"] += slopes
            counts["slopes of pairs"] += slopes * rule.checked.of_pairs

    compare()
    return counts


def test_drawn_rules_equal_the_oracle(record_property: pytest.RecordProperty) -> None:
    counts = compare_drawn(400)
    record_property("summary", ", ".join(f"{what} {count}" for what, count in counts.items()))
    assert counts["about pairs"] >= 200
    assert counts["losses per pair"] >= 60
    assert counts["slopes of pairs"] >= 150
    assert counts["excused"] <= 4


def test_a_pair_without_a_number_in_the_branch_that_is_not_taken_keeps_its_gradient() -> None:
    case = pairs(count=1, tokens=2)
    for z in (case.logits, case.models["ref"]):
        first = rows_of(case)[10][0]
        z[first, 0, case.targets[first, 0]] = -torch.inf  # the log-ratio of this token is no number
    d = "sum(logratio(on, ref), example)"
    rule = compile_rule(f"loss = log_sigmoid(chosen({d}) - rejected({d})) if p_on > 2 else rejected({d})")
    leaf = case.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rule.loss(leaf, case.targets, **case.settings).total, leaf)
    (wanted,) = torch.autograd.grad(
        compile_rule(f"loss = rejected({d}) + 0 * p_on").loss(leaf, case.targets, **case.settings).total, leaf
    )
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, wanted)


def test_a_wrong_side_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "numbered", lambda rows, chosen: 2 * rows + chosen.long())
    with pytest.raises(AssertionError):
        compare_drawn(100)


def test_a_wrong_derivative_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = pairing.Response.returned
    monkeypatch.setattr(pairing.Response, "returned", lambda self, g: exact(self, g) * 1.01)
    with pytest.raises(AssertionError):
        compare_drawn(100)
