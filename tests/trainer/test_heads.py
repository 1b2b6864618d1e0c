"""A model taken apart gives its own logits, whatever its head does; one that does not is used whole."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers

from trainer.heads import WholeLogits, take_apart

SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "tied": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "soft cap": ("Gemma2", {**SMALL, "final_logit_softcapping": 0.5}),
    "logit_scale": ("Cohere", {**SMALL, "logit_scale": 0.125}),
    "logits_scaling": ("Granite", {**SMALL, "logits_scaling": 8.0}),
    "bias": ("Phi", SMALL),
    "gpt2": ("GPT2", {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
                      "eos_token_id": 2}),
    "gptneox": ("GPTNeoX", SMALL),
    "opt": ("OPT", {"vocab_size": 48, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "word_embed_proj_dim": 8, "max_position_embeddings": 64}),
    "qwen3": ("Qwen3", SMALL),
}  # fmt: skip


def make(name: str) -> Any:
    family, settings = MODELS[name]
    torch.manual_seed(0)
    spread = {"init_std" if family == "OPT" else "initializer_range": 0.5}
    config = getattr(transformers, f"{family}Config")(**settings, **spread)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_give_the_logits_of_the_model(name: str):
    model, said = make(name), []
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, head = take_apart(model, False, said.append)(ids)
    assert not said
    assert hidden.shape[-1] != 48, "hidden states, not logits"
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(
        head.logits(hidden.reshape(18, -1)), whole.reshape(18, -1), rtol=1e-5, atol=1e-5
    )


def test_a_scale_that_is_not_known_is_noticed_and_whole_logits_are_used(monkeypatch: pytest.MonkeyPatch):
    model, said = make("logit_scale"), []
    monkeypatch.setattr("trainer.heads.SCALES", {})
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, head = take_apart(model, False, said.append)(ids)
    assert isinstance(head, WholeLogits)
    assert "whole logits are used" in said[0]
    assert torch.equal(head.logits(hidden), model(input_ids=ids).logits)


def test_bf16_runs_body_and_head_in_bf16_and_gives_float32_logits():
    model = make("llama")
    hidden, head = take_apart(model, True, print)(torch.arange(8).unsqueeze(0))
    assert (hidden.dtype, head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert head.logits(hidden[0]).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        own = model(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert torch.equal(head.logits(hidden[0]), own[0].float())


def test_nothing_holds_the_model_afterwards():
    model = make("llama")
    parts = take_apart(model, False, print)
    count = sum(p.numel() for p in model.parameters())
    assert count
    before = _alive()
    del model, parts
    gc.collect()
    assert before - _alive() >= count


def _alive() -> int:
    return sum(o.numel() for o in gc.get_objects() if type(o) is torch.nn.Parameter)
