"""Heads in the wild and what stands around them: adapters, frozen parts, 16 bits, scalers, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from priority_dsl import compile_rule
from priority_dsl.vocab_pass import Head, products
from tests.vocab_pass.whole import in_two_passes

RULES = ["dft", "loss = nll_on + 0.1 * H_on", "top(H_on, 0.5, batch)", "loss = kl(ref, on) * 0.5"]


def drawn(dtype: torch.dtype = torch.float64, rows: int = 40, width: int = 6, vocabulary: int = 23):
    """Hidden states, weight, bias, adapter, targets and a frozen model's logits."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < 0.3] = -100
    adapter = (normal(2, width), normal(vocabulary, 2), 0.5)
    models = {"ref": normal(rows, vocabulary)}
    return normal(rows, width), normal(vocabulary, width), normal(vocabulary), adapter, targets, models


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "body", "all but up"])
@pytest.mark.parametrize("scaled", [False, True])
def test_low_rank_adapters(text: str, frozen: str, scaled: bool) -> None:
    """The same as the dense loss on `weight + factor * up @ down`, gradient to what is not frozen."""
    hidden, weight, bias, (down, up, factor), targets, models = drawn()
    hidden.requires_grad_(frozen not in ("body", "all but up"))
    weight.requires_grad_(frozen not in ("weight", "all but up"))
    bias.requires_grad_(frozen != "all but up")
    down.requires_grad_(frozen != "all but up")
    up.requires_grad_()
    shape = {"scale": 0.5, "cap": 3.0} if scaled else {}
    head = Head(weight, bias, adapters=((down, up, factor),), **shape)
    merged = Head(weight + factor * up @ down, bias, **shape)
    rule, leaves = compile_rule(text), [t for t in (hidden, weight, bias, down, up) if t.requires_grad]
    dense = rule.loss(merged.logits(hidden), targets, models=models)
    expected = torch.autograd.grad(dense.mean, leaves)
    for compiled in (rule, in_two_passes(rule)):
        for rows in (None, 7):
            fused = compiled.fused_loss(hidden, head, targets, models=models, rows=rows)
            torch.testing.assert_close(fused.mean, dense.mean)
            torch.testing.assert_close(torch.autograd.grad(fused.mean, leaves), expected)


def test_logits_of_a_head_with_adapters() -> None:
    hidden, weight, bias, adapter, *_ = drawn()
    head = Head(weight, bias, scale=0.3, cap=2.0, adapters=(adapter,))
    with torch.no_grad():
        held = head.logits(hidden.reshape(5, 8, -1))
    torch.testing.assert_close(held, head.logits(hidden.reshape(5, 8, -1)))
    assert held.shape == (5, 8, 23)


def test_a_frozen_head_costs_no_product_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("priority_dsl.vocab_pass.gradients.add_to_weight", lambda *a: made.append("weight"))
    original = products.to_hidden
    monkeypatch.setattr(
        "priority_dsl.vocab_pass.gradients.to_hidden", lambda *a: made.append("hidden") or original(*a)
    )
    hidden, weight, *_, targets, _ = drawn()
    rule = compile_rule("dft")
    rule.fused_loss(hidden.requires_grad_(), weight, targets).mean.backward()
    assert made == ["hidden"]
    made.clear()
    rule.fused_loss(hidden.detach(), weight.requires_grad_(), targets)
    assert made == ["weight"]
    made.clear()
    rule.fused_loss(hidden.detach(), weight.detach(), targets)
    assert made == []


@pytest.mark.parametrize("head", ["linear", "bare"])
def test_tied_embeddings_get_both_gradients(head: str) -> None:
    *_, targets, _ = drawn(rows=20)
    table = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(20) % 23
    rule = compile_rule("dft")
    linear = nn.Linear(6, 23, bias=False)
    linear.weight = nn.Parameter(table)
    weight = linear.weight if head == "linear" else table
    given = linear if head == "linear" else table
    dense = rule.loss(weight[ids].tanh() @ weight.T, targets).mean
    fused = rule.fused_loss(weight[ids].tanh(), given, targets).mean
    torch.testing.assert_close(torch.autograd.grad(fused, weight), torch.autograd.grad(dense, weight))


def test_the_gradient_may_be_asked_for_again_and_is_not_shared() -> None:
    hidden, weight, *_, targets, _ = drawn()
    hidden.requires_grad_()
    weight.requires_grad_()
    total = compile_rule("dft").fused_loss(hidden, weight, targets).total
    once = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in once]
    thrice = torch.autograd.grad(3 * total, (hidden, weight), retain_graph=True)
    for a, b, c in zip(once, kept, thrice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, 3 * b)
    last = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(last, once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, hidden)


def test_a_grad_scaler_and_accumulation() -> None:
    hidden, weight, *_, targets, _ = drawn(torch.float32)
    weight.requires_grad_()
    rule, scaler = compile_rule("dft"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for part in (slice(0, 20), slice(20, 40)):
        scaler.scale(rule.fused_loss(hidden[part], weight, targets[part]).total).backward()
    got = weight.grad
    weight.grad = None
    rule.fused_loss(hidden, weight, targets).total.backward()
    assert got is not None
    torch.testing.assert_close(got, 1024.0 * weight.grad, rtol=1e-4, atol=1e-2)


def test_activation_checkpointing_around_the_loss_and_a_compiled_model_before_it() -> None:
    hidden, weight, *_, targets, _ = drawn(torch.float32)
    body, rule = nn.Linear(6, 6), compile_rule("loss = nll_on + 0.1 * H_on")

    def total(x: Tensor) -> Tensor:
        return rule.fused_loss(body(x).tanh(), weight, targets).total

    (expected,) = torch.autograd.grad(total(hidden), body.weight)
    again = torch.utils.checkpoint.checkpoint(total, hidden, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, body.weight)[0], expected)
    compiled = torch.compile(lambda x: body(x).tanh(), backend="aot_eager")
    (got,) = torch.autograd.grad(rule.fused_loss(compiled(hidden), weight, targets).total, body.weight)
    torch.testing.assert_close(got, expected)


# 16 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_operands_are_those_of_float32(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(products, "TILE_BYTES", 7 * 6 * 4)  # tiles of 7 rows, the last of 2
    hidden, weight, *_ = drawn(dtype)
    out = torch.empty(40, 23)
    products.make_logits(hidden, weight, out)
    torch.testing.assert_close(out, hidden.float() @ weight.float().T)
    products.make_logits(hidden, weight, out, add=True)
    torch.testing.assert_close(out, 2 * hidden.float() @ weight.float().T)
    back = products.to_hidden(out, weight, hidden)
    assert back.dtype == dtype
    torch.testing.assert_close(back, (out @ weight.float()).to(dtype))
    total = torch.full((23, 6), torch.nan)
    products.add_to_weight(total, out, hidden, fresh=True)
    products.add_to_weight(total, out, hidden)
    torch.testing.assert_close(total, 2 * out.T @ hidden.float())


def test_the_gradient_of_a_16_bit_head_is_rounded_once() -> None:
    hidden, weight, *_, targets, _ = drawn(torch.bfloat16)
    rule = compile_rule("dft")
    got = _gradients(rule, hidden, weight, targets)
    wide = _gradients(rule, hidden.float(), weight.float(), targets)
    for a, b in zip(got, wide, strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=2**-8, atol=1e-6)


def _gradients(rule, *given: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = (t.detach().requires_grad_() for t in given[:2])
    return torch.autograd.grad(rule.fused_loss(hidden, weight, given[2]).total, (hidden, weight))
