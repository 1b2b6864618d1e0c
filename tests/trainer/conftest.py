"""A tiny random Llama with a tokenizer of its own, made on the spot: these tests need no data folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "the quick brown fox jumps over the lazy dog . 1 + 2 = 3 ; 4 * 5 = 20 ; what is the sum ? "
    "the answer is 7 "
    "once upon a time there was a little model that learned to count from one to ten "
) * 4
Rows = Iterable[dict[str, Any]]


def make_tokenizer(folder: Path, text: str = TEXT) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special[3:],
    )  # fmt: skip
    made.chat_template = CHATML
    made.save_pretrained(folder)


def make_model(folder: Path, seed: int, **changes: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = LlamaConfig(**{**shape, **heads, "initializer_range": 0.3, **changes})
    config.bos_token_id, config.eos_token_id = 1, 2
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def model(make_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Llama: vocabulary 320, context 64."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(make_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with other weights and the same tokenizer."""
    return make_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., str]:
    """Makes a model folder, with a tokenizer learned from `text` unless that is empty."""

    def make(folder: Path, seed: int, text: str = TEXT, **changes: Any) -> str:
        if text:
            make_tokenizer(folder, text)
        make_model(folder, seed, **changes)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Rows], str]:
    """Writes rows as jsonl and returns the path."""

    def to_file(name: str, rows: Rows) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def sums(write: Callable[[str, Rows], str]) -> str:
    """A file of 24 small prompt/completion rows of different lengths."""
    rows = [
        {"prompt": f"what is {i} + {i * 3} ?", "completion": f" the answer is {4 * i}" + " ." * (i % 5)}
        for i in range(24)
    ]
    return write("sums.jsonl", rows)
