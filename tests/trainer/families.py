"""Tiny random models of the families that people train, by their real classes and configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 48
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama tied": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL),
    "gemma2, soft cap": ("Gemma2", {**SMALL, "final_logit_softcapping": 0.5}),
    "gemma3, tied": ("Gemma3Text", {**SMALL, "tie_word_embeddings": True}),
    "gemma3, soft cap": ("Gemma3Text", {**SMALL, "final_logit_softcapping": 2.0}),
    "cohere, logit_scale": ("Cohere", {**SMALL, "logit_scale": 0.125}),
    "granite, logits_scaling": ("Granite", {**SMALL, "logits_scaling": 8.0}),
    "falcon-h1, lm_head_multiplier": (
        "FalconH1",
        {**SMALL, "lm_head_multiplier": 0.25, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8,
         "mamba_d_state": 4, "mamba_chunk_size": 4},
    ),
    "phi, bias": ("Phi", SMALL),
    "gpt2, tied": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "gptneox": ("GPTNeoX", SMALL),
    "opt": ("OPT", {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "word_embed_proj_dim": 8, "max_position_embeddings": 64}),
    "mixtral, experts": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe, experts": ("Qwen3Moe", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 8, "decoder_sparse_step": 1}),
}  # fmt: skip


def make(name: str, **changes: Any) -> Any:
    """A model of a family in eval mode, its weights spread so that its logits differ."""
    family, settings = MODELS[name]
    torch.manual_seed(0)
    spread = {"init_std" if family == "OPT" else "initializer_range": 0.5}
    if family == "GPT2":  # dropout would differ between two steps
        spread |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = getattr(transformers, f"{family}Config")(**{**settings, **spread, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()
