"""The same model, rows and steps for every trainer: what a run came to, wherever it was trained.

Rows are token ids with a label, a column with a value a row (`label`) and one with a value a token
(`marked`). The rows of a step are those that `priority train` takes, in its order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from priority_dsl import compile_rule
from tests.trainer.conftest import make_model, make_tokenizer
from trainer.batches import step_rows
from trainer.config import TrainConfig
from trainer.train import train

STEPS, ROWS, RATE, SEED = 20, 4, 3e-3, 3
RULES = {
    "dft": ("dft", {}),
    "prift_mass": ("prift_mass", {"tau": 0.4}),
    "asft": ("asft", {}),
    "span": ("column marked: bool per token; weight = 1 if marked else 0.25", {}),
    "signed": ("forgetting_table", {}),
}


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the loss and the gradient norm of every step, the log, the parameters."""

    losses: list[float]
    norms: list[float]
    log: list[dict[str, Any]]
    parameters: dict[str, torch.Tensor]


def make_rows(count: int = 24, vocabulary: int = 320) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for i in range(count):
        ids = [draw.randrange(5, vocabulary) for _ in range(draw.randrange(6, 14))]
        prompt = draw.randrange(1, 4)
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * prompt + ids[prompt:],
                "label": ("pos", "neg", "pos")[i % 3],
                "marked": [draw.random() < 0.4 for _ in ids],
            }
        )
    return rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer."""
    made = tmp_path_factory.mktemp("integrations") / "model"
    make_tokenizer(made)
    make_model(made, seed=0, max_position_embeddings=256)
    return made


@pytest.fixture
def fresh(folder: Path) -> Callable[[], Any]:
    """A fresh copy of the model."""
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    made = AutoTokenizer.from_pretrained(folder)
    made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return make_rows()


@pytest.fixture
def data(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


def ordered(data: Dataset, steps: int = STEPS) -> Dataset:
    """The rows of a data set in the order in which `priority train` visits them, one epoch after another."""
    visited: list[int] = []
    epoch = 0
    while len(visited) < steps * ROWS:
        visited += [i for step in step_rows(len(data), ROWS, SEED, epoch) for i in step]
        epoch += 1
    return data.select(visited[: steps * ROWS])


def settings(folder: Path, accumulation: int = 1, **others: Any) -> dict[str, Any]:
    """The arguments of TrainingArguments and SFTConfig that make the steps of `priority train`."""
    return {
        "output_dir": str(folder),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_beta2": 0.95,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // accumulation,
        "per_device_eval_batch_size": ROWS,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": SEED,
        **others,
    }


def outcome(trainer: Any) -> Outcome:
    """Train on the rows in their order, and what it came to."""
    # A setting from transformers 5.2 on; this is the method that reads it, in every version.
    trainer._get_train_sampler = lambda data=None: SequentialSampler(data or trainer.train_dataset)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return Outcome([line["loss"] for line in log], [line["grad_norm"] for line in log], log, parameters)


@pytest.fixture(scope="session")
def ours(
    folder: Path, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """What `priority train` makes of a rule of RULES, with the same steps."""
    known: dict[str, Outcome] = {}
    here = tmp_path_factory.mktemp("ours")
    path = here / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(name: str) -> Outcome:
        if name not in known:
            text, params = RULES[name]
            output = here / name
            train(
                TrainConfig(
                    model=str(folder), data=(str(path),), rule=text, set=params, output=str(output),
                    cache=str(here / "cache"), max_steps=STEPS, batch_size=ROWS, learning_rate=RATE,
                    schedule="constant", warmup=0, seed=SEED, quiet=True, device="cpu",
                )
            )  # fmt: skip
            log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            log = [line for line in log if "loss" in line]
            parameters = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
            losses, norms = [line["loss"] for line in log], [line["grad_norm"] for line in log]
            known[name] = Outcome(losses, norms, log, {n: p.detach() for n, p in parameters.items()})
        return known[name]

    return run


def rule_of(name: str) -> Any:
    text, params = RULES[name]
    return compile_rule(text, **params)


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Losses to 1e-5, parameters to 1e-4, gradient norms to 1e-4 of their size."""
    assert len(found.losses) == len(expected.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4, abs=1e-5)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, parameter in found.parameters.items():
        assert (parameter - expected.parameters[name]).abs().max() < 1e-4, name
