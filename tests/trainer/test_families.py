"""A fused training step is the dense one, in loss and in every parameter's gradient, whatever the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from priority_dsl import compile_rule
from tests.trainer.families import MODELS, VOCABULARY, make
from trainer.batches import IGNORED, Batch
from trainer.trained import Call, Found, Trained

TOLERANCE = 1e-5  # of the largest gradient: float32, another order of sums
RULES = {
    "soft": "p_on ** 0.5",
    "selection": "p_on <= 0.02",
    "statistics in the loss": "weight = p_on; loss = weight * nll_on - 0.1 * H_on + 0.2 * mass(on)",
}


def a_batch(rows: int = 3, width: int = 9) -> Batch:
    """Random tokens; the first ones of a row and the last ones of the last are no targets."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, width + 1), generator=chance)
    targets = ids[:, 1:].clone()
    targets[:, :2] = targets[-1, -3:] = IGNORED
    response = targets != IGNORED
    examples = torch.arange(rows).unsqueeze(-1).expand(rows, width)
    return Batch(
        input_ids=ids[:, :-1], targets=targets, response=response, examples=examples, columns={}, stored={},
        places=("",) * rows, tokens=ids.numel(),
    )  # fmt: skip


def gradients(model: Any, rule: str, fused: bool) -> tuple[Found, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    batch = a_batch()
    found = Trained(model, compile_rule(rule), fused, bf16=False)(Call(batch, {"examples": batch.examples}))
    found.mean.backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_is_the_dense_step(name: str, rule: str):
    model = make(name)
    (dense, expected), (fused, got) = gradients(model, rule, False), gradients(model, rule, True)
    torch.testing.assert_close(fused.mean, dense.mean, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(fused.weights, dense.weights, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(fused.nll, dense.nll, rtol=TOLERANCE, atol=TOLERANCE)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=TOLERANCE * largest)
    assert float(expected[head_name(model)].abs().max()) > 0.01 * largest, (
        "the head learns, so it is compared"
    )


def head_name(model: Any) -> str:
    """The name of the head's weight; of tied embeddings it is the embedding's."""
    weight = model.get_output_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_a_frozen_head_gets_no_gradient_and_the_body_the_same(name: str):
    model = make(name)
    model.get_output_embeddings().weight.requires_grad_(False)
    (_, expected), (_, got) = gradients(model, "dft", False), gradients(model, "dft", True)
    assert head_name(model) not in got
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=1e-6)


def test_tied_embeddings_get_the_gradient_of_both_ends():
    model = make("llama tied")
    _, both = gradients(model, "1", True)
    weight = model.get_input_embeddings().weight
    hidden = model.base_model(input_ids=a_batch().input_ids).last_hidden_state
    rule, batch = compile_rule("1"), a_batch()
    (head_only,) = torch.autograd.grad(rule.fused_loss(hidden.detach(), weight, batch.targets).mean, weight)
    (body_only,) = torch.autograd.grad(rule.fused_loss(hidden, weight.detach(), batch.targets).mean, weight)
    assert min(float(g.abs().max()) for g in (head_only, body_only)) > 1e-3
    torch.testing.assert_close(both["model.embed_tokens.weight"], head_only + body_only, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral, experts", "qwen3-moe, experts"])
def test_a_router_loss_is_no_part_of_a_rule(name: str):
    # The model computes it only where its config asks, and adds it to a loss of its own, which is not used.
    plain, asking = make(name), make(name, output_router_logits=True, router_aux_loss_coef=10.0)
    (found, expected), (also, got) = gradients(plain, "1", True), gradients(asking, "1", True)
    assert torch.equal(found.mean, also.mean)
    assert all(torch.equal(got[parameter], gradient) for parameter, gradient in expected.items())
