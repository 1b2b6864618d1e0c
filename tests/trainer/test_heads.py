"""A model taken apart gives its own logits, whatever its head does; one that does not is used whole."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from priority_dsl.integrations.heads import WholeLogits, plain_figures, read_head, take_apart, why_whole
from tests.trainer.families import MODELS, make


def frozen(name: str) -> Any:
    return make(name).requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_give_the_logits_of_the_model(name: str):
    model, said = frozen(name), []
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, head = take_apart(model, False, said.append)(ids)
    assert not said
    assert hidden.shape[-1] != 48, "hidden states, not logits"
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(
        head.logits(hidden.reshape(18, -1)), whole.reshape(18, -1), rtol=1e-5, atol=1e-5
    )


def test_a_scale_that_is_not_known_is_noticed_and_whole_logits_are_used(monkeypatch: pytest.MonkeyPatch):
    model, said = frozen("cohere, logit_scale"), []
    monkeypatch.setattr("priority_dsl.integrations.heads.SCALES", {})
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, head = take_apart(model, False, said.append)(ids)
    assert isinstance(head, WholeLogits)
    assert "whole logits are used" in said[0]
    assert torch.equal(head.logits(hidden), model(input_ids=ids).logits)


def test_bf16_runs_body_and_head_in_bf16_and_gives_float32_logits():
    model = frozen("llama")
    hidden, head = take_apart(model, True, print)(torch.arange(8).unsqueeze(0))
    assert (hidden.dtype, head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert head.logits(hidden[0]).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        own = model(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert torch.equal(head.logits(hidden[0]), own[0].float())


def test_nothing_holds_the_model_afterwards():
    model = frozen("llama")
    parts = take_apart(model, False, print)
    count = sum(p.numel() for p in model.parameters())
    assert count
    before = _alive()
    del model, parts
    gc.collect()
    assert before - _alive() >= count


def _alive() -> int:
    return sum(o.numel() for o in gc.get_objects() if type(o) is torch.nn.Parameter)


def test_a_model_in_training_is_checked_without_its_dropout_and_stays_in_training():
    model = make("llama", attention_dropout=0.5).train()
    assert why_whole(model) is None
    assert model.training
    assert model.model.layers[0].training
    assert not make("llama").training


def test_the_head_that_is_read_is_the_models_own():
    model = make("phi, bias")
    head = read_head(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias


class Adapted(torch.nn.Linear):
    """A layer that is not a plain linear one, as adapters put in its place."""


def test_why_a_model_stays_whole():
    model = make("llama")
    model.lm_head = Adapted(16, 48)
    assert why_whole(model) == ("LlamaForCausalLM: its output layer is Adapted, not a plain linear layer")
    model = make("cohere, logit_scale")
    model.config.logit_scale = 2.0  # the model has read its config already and keeps 0.125
    assert why_whole(model) == "CohereForCausalLM: body and head do not give the model's logits"


def test_plain_figures_are_those_of_full_logits():
    model = frozen("llama tied")
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, head = take_apart(model, False, print)(ids)
    logits = head.logits(hidden)
    targets = torch.where(torch.rand(2, 9) < 0.5, logits.argmax(-1), 5)
    asked = torch.rand(2, 9) < 0.7
    nll, right = plain_figures(hidden, head, targets.masked_fill(~asked, -100), asked)
    own = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(nll, own.masked_fill(~asked, 0.0))
    assert torch.equal(right, (logits.argmax(-1) == targets) & asked)
    assert 0 < int(right.sum()) < int(asked.sum())
