"""The fused loss is the dense loss: numbers and gradients, for every rule, head and chunk."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from priority_dsl import compile_rule, list_rules
from priority_dsl.binding import bound_names
from priority_dsl.rule import CompiledRule
from priority_dsl.step import LossOutput
from priority_dsl.testing.case import inside_of
from priority_dsl.vocab_pass import Head
from priority_dsl.vocab_pass.gradients import Gradients

MORE_RULES = [
    "loss = sg(H_on) * nll_on - 0.1 * H_on",
    "loss = mass_on * nll_on + pmax_on + margin_on",
    "loss = kl(ref, on) + cross_entropy(sg(tempered(on, 0.7)), on)",
    "loss = topk_entropy(on, 3) + expected_rank_on * 0.1",
    "loss = nll_on if p_on > 0.2 else p_on",
    "loss = logp_on ** 2 + p_on",
    "weight = (mass(ref) >= 0.5) * (1 + progress)",
    "normalize = examples; weight = p_on",
    "normalize = kept; weight = p_on > 0.2",
    "normalize = weights; weight = p_ref - 0.2",
    "normalize = none; weight = 0.3",
    "nll(tempered(on, 2)) * 0.1",
    "loss = mean(nll_on, example)",
    "loss = nll_on * sg(mean(H_on, chunk(2))) + 0.1 * suffix_sum(p_on) + std(rank_on, window(1)) * p_on",
    "loss = cross_entropy(ref, on) * mean(p_on, window(1)) + sg(zscore(margin_on, example)) * p_on",
    "top(H_on, 0.4, batch) * mean(p_ref, example)",
    "quantile(nll_on, 0.3, batch, where=position > 0) * sum(kl(ref, on), example)",
    "normalize = groups(p_on > 0.1); weight = mean(p_on, example)",
    "normalize = kept; weight = bottom(nll(tempered(on, 2)), 0.5, example)",
]
HEADS = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"bias": True, "scale": 0.25},
    "cap": {"cap": 2.0},
    "scale and cap": {"bias": True, "scale": 0.5, "cap": 3.0},
}


@dataclass
class Case:
    """Hidden states, a head and all that a rule may read, for a batch of rows."""

    hidden: Tensor
    head: Head
    targets: Tensor
    reads: dict

    @classmethod
    def draw(
        cls, rule: CompiledRule, dtype=torch.float64, shape=(3, 7), vocabulary=13, width=5, **head
    ) -> Case:
        g = torch.Generator().manual_seed(len(rule.text) + vocabulary)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

        pairs = rule.checked.reads_pairs
        shape = (4, 7) if pairs else shape
        targets = torch.randint(0, vocabulary, shape, generator=g)
        targets[torch.rand(shape, generator=g) < 0.3] = -100
        weight = normal(vocabulary, width)
        if vocabulary > 4:
            weight[3] = weight[1]  # ties
        bias = normal(vocabulary) * 0 if head.pop("bias", False) else None
        if bias is not None and vocabulary > 5:
            bias[5] = -torch.inf
            targets[targets == 5] = 0
        models = {n: normal(*shape, vocabulary) for n in sorted(bound_names(*rule.checked.roots) - {"on"})}
        columns = {}
        for name in rule.requires.columns - {"chosen"}:
            column = rule.checked.columns[name]
            size = shape if column.extent == "token" else shape[:1]
            drawn = torch.rand(size, generator=g)
            if column.extent == "pair":
                drawn = drawn[: len(drawn) // 2].repeat_interleave(2)
            columns[name] = {
                "bool": drawn < 0.5,
                "number": drawn / 2 + (0.4 if column.range.high > 0 else -0.6),
                "category": (drawn < 0.5).long() - 1,
                "text": ["a text"] * len(drawn),
            }[column.element]
            if column.element == "category" and column.closed:
                columns[name] = columns[name].abs()
        inside = {n: torch.rand(shape, generator=g).to(dtype) for n in sorted(inside_of(rule.checked))}
        reads = {"models": models, "columns": columns, "progress": 0.4, "stored": inside}
        if pairs:
            columns["chosen"] = torch.tensor([True, False, False, True])
            reads["examples"] = torch.tensor([[0], [0], [1], [1]]).expand(shape)
        if rule.plan.surveys:  # what is known of the whole data set
            chosen = torch.rand(shape, generator=g) < 0.5
            reads["stored"] = {c.name: chosen ^ c.name.startswith("not ") for c in rule.plan.stored}
        return cls(normal(*shape, width), Head(weight, bias, **head), targets, reads)

    def gradients(self, out: LossOutput, *leaves: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.mean, leaves))


def compare(rule: CompiledRule, case: Case, rows: int | None, tolerance: float) -> None:
    """Dense on the product and fused: weights, losses, total, denominator, gradients of hidden and head."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.head.weight.clone().requires_grad_()
    bias = None if case.head.bias is None else case.head.bias.clone().requires_grad_()
    head = Head(weight, bias, case.head.scale, case.head.cap)
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    dense = rule.loss(head.logits(hidden), case.targets, **case.reads)
    fused = rule.fused_loss(hidden, head, case.targets, **case.reads, rows=rows)
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(fused.weights, dense.weights, **near)
    torch.testing.assert_close(fused.losses, dense.losses, **near)
    torch.testing.assert_close(fused.total, dense.total, **near)
    torch.testing.assert_close(fused.denominator, dense.denominator, **near)
    skipped = (fused.nll == 0) & (dense.nll > 1e-9)
    torch.testing.assert_close(fused.nll[~skipped], dense.nll[~skipped], **near)
    assert (dense.weights[skipped] == 0).all()
    for got, expected in zip(case.gradients(fused, *leaves), case.gradients(dense, *leaves), strict=True):
        torch.testing.assert_close(got, expected.nan_to_num(), **near)


@pytest.mark.parametrize("text", [*list_rules(), *MORE_RULES])
@pytest.mark.parametrize("rows", [1, None])
def test_fused_is_dense(text, rows):
    rule = compile_rule(text)
    compare(rule, Case.draw(rule), rows, 1e-10)


@pytest.mark.parametrize("text", [*list_rules(), *MORE_RULES])
def test_fused_is_dense_in_float32(text):
    rule = compile_rule(text)
    compare(rule, Case.draw(rule, torch.float32), 4, 1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("text", ["dft", "prift_mass", "asft", MORE_RULES[0], MORE_RULES[1], MORE_RULES[3]])
def test_heads(head, text):
    rule = compile_rule(text)
    compare(rule, Case.draw(rule, **HEADS[head]), 4, 1e-10)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5,), (2, 0)])
@pytest.mark.parametrize("vocabulary", [1, 2, 9])
@pytest.mark.parametrize("text", ["sft", "dft", "profit", "loss = H_on + nll_on", "-1 if label == neg"])
def test_small_shapes(shape, vocabulary, text):
    rule = compile_rule(text)
    case = Case.draw(rule, shape=shape, vocabulary=vocabulary)
    case.reads["columns"] = {name: torch.zeros(shape, dtype=torch.long) for name in rule.requires.columns}
    compare(rule, case, 2, 1e-10)


@pytest.mark.parametrize("live", ["none", "one", "ignored"])
def test_few_live_rows(live):
    rule = compile_rule("column keep_it: bool per token; weight = keep_it")
    case = Case.draw(rule)
    keep = torch.zeros(case.targets.shape, dtype=torch.bool)
    if live == "one":
        case.targets[0, 0], keep[0, 0] = 2, True
    if live == "ignored":
        case.targets[:] = -100
    case.reads["columns"] = {"keep_it": keep}
    compare(rule, case, 2, 1e-10)


def counted_rows(monkeypatch, rule: CompiledRule, case: Case, **reads) -> tuple[int, int]:
    """Rows for which logits are made, and rows whose gradient is multiplied out."""
    made, multiplied = [], []
    fill, add = Head.fill, Gradients.add
    monkeypatch.setattr(Head, "fill", lambda self, xs, out: made.append(len(out)) or fill(self, xs, out))
    monkeypatch.setattr(
        Gradients, "add", lambda self, rows, xs, dz: multiplied.append(len(rows)) or add(self, rows, xs, dz)
    )
    rule.fused_loss(case.hidden.requires_grad_(), case.head, case.targets, **{**case.reads, **reads})
    return sum(made), sum(multiplied)


def test_dead_tokens_are_skipped(monkeypatch):
    """Stored weights of 0 cost no logits; a selection that reads the model costs no gradient at 0."""
    stored = compile_rule("prift_mass")
    case = Case.draw(stored, shape=(4, 25))
    valid = case.targets != -100
    chosen = torch.rand(case.targets.shape) < 0.3
    reads = {"models": {}, "stored": {"mass(ref) >= tau": chosen}}
    live = int((chosen & valid).sum())
    assert counted_rows(monkeypatch, stored, case, **reads) == (live, live)
    monkeypatch.undo()
    online = compile_rule("p_on >= 0.2")
    case = Case.draw(online, shape=(4, 25))
    kept = int((online.weights(case.head.logits(case.hidden), case.targets) != 0).sum())
    assert 0 < kept < int((case.targets != -100).sum())
    assert counted_rows(monkeypatch, online, case) == (int((case.targets != -100).sum()), kept)


def test_a_frozen_head_gets_no_gradient_and_a_scaled_loss_a_scaled_one():
    rule = compile_rule("dft")
    case = Case.draw(rule)
    hidden = case.hidden.requires_grad_()
    once = torch.autograd.grad(rule.fused_loss(hidden, case.head, case.targets).mean, hidden)[0]
    thrice = torch.autograd.grad(3 * rule.fused_loss(hidden, case.head, case.targets).mean, hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)
    assert case.head.weight.grad is None
    with torch.no_grad():
        assert not rule.fused_loss(hidden, case.head, case.targets).total.requires_grad


def test_an_offset_of_the_logits_costs_no_digits():
    rule = compile_rule("loss = nll_on + 0.1 * H_on")
    case = Case.draw(rule, torch.float32, bias=True)
    plain = Head(case.head.weight, torch.zeros(13))
    moved = Head(case.head.weight, torch.full((13,), 1000.0))
    hidden = case.hidden.requires_grad_()
    a, b = (
        torch.autograd.grad(rule.fused_loss(hidden, h, case.targets).mean, hidden)[0] for h in (plain, moved)
    )
    exact = Case.draw(rule, torch.float64, bias=True)
    exact_hidden = exact.hidden.requires_grad_()
    head = Head(exact.head.weight, torch.zeros(13, dtype=torch.float64))
    (c,) = torch.autograd.grad(rule.fused_loss(exact_hidden, head, exact.targets).mean, exact_hidden)
    torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.double(), c, rtol=1e-2, atol=1e-4)  # the product itself rounds at 1e3


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_operands_give_float32_statistics(autocast):
    torch.manual_seed(0)
    rule = compile_rule("dft")
    hidden, weight = torch.randn(40, 16), torch.randn(30, 16)
    targets = torch.randint(0, 30, (40,))
    kind = torch.float32 if autocast else torch.bfloat16
    hidden, weight = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = rule.fused_loss(hidden, weight, targets)
    out.mean.backward()
    assert out.weights.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == kind
    wide_hidden, wide_weight = (
        hidden.detach().float().requires_grad_(),
        weight.detach().float().requires_grad_(),
    )
    wide = rule.fused_loss(wide_hidden, wide_weight, targets)
    wide.mean.backward()
    assert (out.mean - wide.mean).abs() < 0.02
    assert (
        torch.nn.functional.cosine_similarity(weight.grad.float().ravel(), wide_weight.grad.ravel(), 0) > 0.99
    )
