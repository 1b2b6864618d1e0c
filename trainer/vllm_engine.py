"""Responses drawn through vLLM, which is no dependency of this project: the same samples, another engine."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import EvalConfig
from trainer.faults import ConfigFault, ModelFault, first_line
from trainer.sampling import Sample


def refuse_missing(config: EvalConfig) -> None:
    """`ConfigFault` where vLLM is not installed, or cannot draw from what the config names."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigFault(
            "--engine vllm: vLLM is not installed: pip install vllm (it needs a GPU), or leave the flag out"
        )
    if (Path(config.model) / "adapter_config.json").is_file():
        raise ConfigFault(
            f"--engine vllm: {config.model} is an adapter: merge it into its base, and name that"
        )
    if config.quantize is not None:
        raise ConfigFault("--engine vllm: --quantize is for the engine transformers")


def draw(
    config: EvalConfig,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
) -> list[list[Sample]]:
    """Draw responses to prompts, as `sampling.sample` does; the engine and its memory are gone afterwards.

    Each prompt has a seed of its own, from the seed and its number. Raises `ModelFault` for a model that the
    engine does not load.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    greedy = config.temperature == 0
    settings: list[Any] = [
        SamplingParams(
            n=1 if greedy else config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=max_new_tokens,
            stop=list(stop),
            seed=config.seed + number * config.samples,  # several of a prompt take the seeds that follow
            skip_special_tokens=True,
        )
        for number in range(len(prompts))
    ]
    try:
        engine = LLM(
            model=config.model,
            dtype="bfloat16" if config.dtype == "bf16" else "float32",
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # the engine raises whatever its parts raise
        raise ModelFault(f"--engine vllm: {config.model} does not load: {first_line(error)}") from error
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in encoded], settings, use_tqdm=not config.quiet
    )
    found = [
        [Sample(response.text, list(ids), list(response.token_ids)) for response in answer.outputs]
        for ids, answer in zip(encoded, answers, strict=True)
    ]
    del engine, answers
    gc.collect()
    return [several * config.samples if greedy else several for several in found]
