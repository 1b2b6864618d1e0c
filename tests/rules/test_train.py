"""Each rule that reads a column, on its example data, through the real `priority train`.

The first logged step is computed again here, row by row without padding, from the file, the first model and
the rule's twin: a column shifted by one, a row mixed up or a wrong denominator shows as another loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from priority_dsl import compile_rule
from tests.rules.twins import TWINS
from trainer.cli import main

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in DATA.glob("*.jsonl"))
END = 1  # the id of the end token


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer and a tokenizer with one token a character."""
    folder = tmp_path_factory.mktemp("tiny")
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "<pad>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,  # far from uniform, so that every token has a loss of its own
        eos_token_id=END,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokenised(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to the response (the end token does)."""
    if "input_ids" in row:
        return row["input_ids"], [label != -100 for label in row["labels"]]
    prompt, completion = ([3 + ord(c) - 32 for c in row[field]] for field in ("prompt", "completion"))
    return [*prompt, *completion, END], [False] * len(prompt) + [True] * (len(completion) + 1)


@torch.no_grad()
def first_step_by_hand(name: str, folder: Path) -> tuple[float, float]:
    """The weighted loss of all rows as one step, before any update, and the plain nll of the responses."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rule = compile_rule(name)
    weighted, denominator, nll, tokens = 0.0, 0.0, 0.0, 0
    for line in (DATA / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, response = tokenised(row)
        logits = model(torch.tensor([ids])).logits[:, :-1]
        everything = torch.tensor([ids[1:]])
        supervised = everything.masked_fill(~torch.tensor([response[1:]]), -100)
        targets = everything if rule.over == "all" else supervised
        columns = {"response": [response[1:]]}
        for field in rule.requires.columns - {"response"}:
            columns[field] = [row[field][1:]] if isinstance(row[field], list) else [row[field]]
        _, loss, count = TWINS[name](logits, targets, {}, columns, **rule.params)
        _, plain, plain_count = TWINS["sft"](logits, supervised, {}, {})
        weighted, denominator = weighted + loss.sum().item(), denominator + count
        nll, tokens = nll + plain.sum().item(), tokens + int(plain_count)
    return weighted / denominator, nll / tokens


def test_every_rule_that_reads_a_column_has_example_data() -> None:
    rules = (path.stem for path in (Path(__file__).parents[2] / "rules").glob("*.rule"))
    assert sorted(name for name in rules if compile_rule(name).requires.columns) == NAMES
    for name in NAMES:
        assert len((DATA / f"{name}.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("layout", [(8, 1), (2, 3)], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("name", NAMES)
def test_example_data_trains(name: str, layout: tuple[int, int], tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = ["--model", str(tiny), "--data", str(DATA / f"{name}.jsonl"), "--output", str(run)]
    how = ["--rule", name, "--max-steps", "2", "--learning-rate", "0.01", "--device", "cpu"]
    steps_of = ["--batch-size", str(layout[0]), "--accumulation", str(layout[1])]
    assert main(["train", *where, *how, *steps_of]) == 0

    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    weighted, nll = first_step_by_hand(name, tiny)
    assert steps[0]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert steps[0]["nll"] == pytest.approx(nll, rel=1e-5)

    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (tiny, run))
    assert any(not torch.equal(before[key], after[key]) for key in before)
