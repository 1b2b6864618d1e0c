"""Each rule that reads columns, a step, the data set or chance, through the real `priority train`.

The first logged step is computed again here, from the file, the first model and the rule's twin: a column
shifted by one, a row mixed up, a value of one micro-batch alone or a wrong denominator shows as another loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from priority_dsl import compile_rule
from tests.rules.pairs import PAIRS
from tests.rules.twins import KEEPS, TWINS, by_twin
from trainer.cli import main

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in DATA.glob("*.jsonl") if path.stem != "plain")
PLAIN = [
    *("talr", "talr_ref", "entropy_scaling", "srft", "rho1", "token_cleaning", "forgetting", "t3s"),
    *("entrodrop", "entrodrop_table", "top_p", "bottom_p", "top_entropy", "bottom_entropy"),
    *("top_p_ref", "bottom_p_ref", "top_entropy_ref", "bottom_entropy_ref"),
    *("prift_ema", "prift_cross", "kd_decomposed", "gem", "selectkd", "selectkd_table", "swift_table"),
    *("sstoken", "sstoken_table"),
]
POINTWISE = [  # one layout tells as much as two
    *("sft", "dft", "dft_table", "profit", "high_pass", "ranktuner", "asft", "asft_table"),
    *("eaft", "eaft_axolotl", "eaft_llamafactory", "eaft_ref", "idft", "idft_ref", "idft_release"),
    *("prift_prob", "prift_mass", "prift_mass_release", "talr_fixed", "talr_fixed_ref"),
    *("rho1_table", "srft_table", "tshirt_table"),
]
OTHERS = ("curated", "warm", "early", "teacher", "other", "rl")
# A model compared with itself differs by rounding alone.
ANOTHER_REFERENCE = ("rho1_table",)
# Where the default shows little on five rows or in the first step.
SETTINGS = {
    "profit": {"tau": 0.005},
    "prift_mass": {"tau": 0.1},
    "prift_mass_release": {"tau": 0.005},
    "sftkey": {"s": 0},  # its data have the marks that the text must give
    "selectit": {"share": 0.6},
    "instruction_mining": {"share": 0.6},
    "entrodrop": {"middle": 0, "rate": 1},
    # Before the first step all gain is rounding, which minmax would spread over [0, 1].
    "sstoken": {"gamma": 0},
}
SEED = 11
END = 1  # the id of the end token


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer and a tokenizer with one token a character."""
    return made(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one with the same tokenizer."""
    return made(tmp_path_factory.mktemp("other"), seed=1)


def made(folder: Path, seed: int) -> Path:
    """A model and its tokenizer, written."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "<pad>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
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
def first_step_by_hand(name: str, data: Path, folder: Path, other: Path) -> tuple[float, float]:
    """All rows as one step before any update: the weighted loss and the plain nll of the responses."""
    rule = compile_rule(name, **SETTINGS.get(name, {}))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    if name in KEEPS:
        fields = {key: [row[key] for row in rows] for key in rows[0]}
        kept = KEEPS[name](fields, **rule.params)
        assert 0 < sum(kept) < len(rows)
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    whole = [tokenised(row) for row in rows]
    everything = padded([ids[1:] for ids, _ in whole], -100)
    answers = padded([response[1:] for _, response in whole], False)
    supervised = torch.tensor(everything).masked_fill(~torch.tensor(answers), -100)
    targets = torch.tensor(everything) if rule.over == "all" else supervised
    columns: dict[str, Any] = {"response": answers}
    for field in rule.requires.columns - {"response"}:
        values = [row[field] for row in rows]
        columns[field] = padded([v[1:] for v in values], 0) if isinstance(values[0], list) else values
    said = {place: logits(place, [ids for ids, _ in whole]) for place in (folder, other)}
    reference = other if name in ANOTHER_REFERENCE else folder
    models = {"ref": said[reference], "slow": said[folder], **dict.fromkeys(OTHERS, said[other])}
    if "perturbed_text" in rows[0]:
        read = behind_other_prompts(folder, rows, said[folder])
        models |= {f"reading({name}, perturbed_text)": read for name in ("ref", "on")}
    if name == "tshirt_table":
        models["unprompted(ref)"] = without_prompts(folder, whole, said[folder])
    if "attention(on, prompt)" in rule.requires.statistics:
        columns["attention"] = padded([paid_to_the_prompt(folder, *row) for row in whole], 0.0)
    moment = {"rows": range(len(rows)), "progress": 0.0, "seed": SEED, "epoch": 0}
    _, loss, count = by_twin(name, said[folder], targets, models, columns, rule.params, moment)
    _, plain, tokens = TWINS["sft"](said[folder], supervised, {}, {})
    return loss.sum().item() / count, plain.sum().item() / tokens


def behind_other_prompts(folder: Path, rows: list[dict[str, Any]], like: Tensor) -> Tensor:
    """What a model says of each response behind the prompt in `perturbed_text`, where its targets stand."""
    said = torch.zeros_like(like)
    for line, row in zip(said, rows, strict=True):
        own, _ = tokenised(row)
        ids, _ = tokenised({**row, "prompt": row["perturbed_text"]})
        first, length = len(row["prompt"]) - 1, len(row["completion"]) + 1
        line[first : first + length] = logits(folder, [ids])[0, -length:]
        assert len(own) == first + 1 + length
    return said


def without_prompts(folder: Path, rows: list[tuple[list[int], list[bool]]], like: Tensor) -> Tensor:
    """What a model says of each response behind nothing but the end token, where its targets stand."""
    said = torch.zeros_like(like)
    for line, (ids, response) in zip(said, rows, strict=True):
        before = response.index(True)
        line[before - 1 : len(ids) - 1] = logits(folder, [[END, *ids[before:]]])[0]
    return said


def paid_to_the_prompt(folder: Path, ids: list[int], response: list[bool]) -> list[float]:
    """The attention of the last layer that each token but the first pays to earlier ones of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    last = model(torch.tensor([ids]), output_attentions=True).attentions[-1][0].mean(0)
    prompt = torch.tensor([not mark for mark in response])
    return [last[i, :i][prompt[:i]].sum().item() for i in range(1, len(ids))]


def padded(rows: list[list[Any]], filler: Any) -> list[list[Any]]:
    """Rows of the same length."""
    longest = max(map(len, rows))
    return [[*row, *[filler] * (longest - len(row))] for row in rows]


def logits(folder: Path, rows: list[list[int]]) -> Tensor:
    """What a model says of each row by itself `[B, T, V]`, zeros behind its end."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    each = [model(torch.tensor([ids])).logits[0, :-1] for ids in rows]
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)


def test_every_rule_that_reads_a_column_has_example_data() -> None:
    rules = (path.stem for path in (Path(__file__).parents[2] / "rules").glob("*.rule"))
    reads = (name for name in rules if name not in PAIRS and compile_rule(name).requires.columns)
    assert sorted(reads) == NAMES
    for name in NAMES:
        assert len((DATA / f"{name}.jsonl").read_text().splitlines()) == 5


# Columns are the same in any layout; values of the step are found in another way where it is one batch.
RUNS = [(name, (2, 3)) for name in (*NAMES, *PLAIN, *POINTWISE)]
RUNS += [(name, (8, 1)) for name in ("wit", *PLAIN)]


@pytest.mark.parametrize(("name", "layout"), RUNS, ids=[f"{n}-{b} rows x {a}" for n, (b, a) in RUNS])
def test_trains(name: str, layout: tuple[int, int], tiny: Path, other: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", DATA / f"{name if name in NAMES else 'plain'}.jsonl"
    where = ["--model", str(tiny), "--data", str(data), "--output", str(run), "--cache", str(tmp_path)]
    how = [
        "--rule",
        name,
        "--max-steps",
        "3",
        "--learning-rate",
        "0.01",
        "--device",
        "cpu",
        "--seed",
        str(SEED),
    ]
    bound = {*OTHERS, *(["ref"] if name in ANOTHER_REFERENCE else [])}
    for model in compile_rule(name).requires.models & bound:
        how += ["--bind", f"{model}={other}"]
    for key, value in SETTINGS.get(name, {}).items():
        how += ["--set", f"{key}={value}"]
    steps_of = ["--batch-size", str(layout[0]), "--accumulation", str(layout[1])]
    assert main(["train", *where, *how, *steps_of]) == 0

    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    weighted, nll = first_step_by_hand(name, data, tiny, other)
    assert steps[0]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert steps[0]["nll"] == pytest.approx(nll, rel=1e-5)

    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (tiny, run))
    assert any(not torch.equal(before[key], after[key]) for key in before)
