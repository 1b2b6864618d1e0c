"""Methods on scopes, text and time from the command line: GSM8K with stories260K. Needs PRIORITY_DATA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_chance import log
from trainer.batches import step_rows
from trainer.cli import main
from trainer.columns import ColumnReader
from trainer.config import RowConfig
from trainer.data import Example, Reader
from trainer.models import load_tokenizer

ROWS = 64
LONGEST = 320  # tokens of a row in this vocabulary of 512; a few of the rows are cut before their answer
Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> str:
    return str(data_dir / "models" / "stories260K")


@pytest.fixture(scope="module")
def questions(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], str]:
    """Some of the shorter rows of GSM8K as a file."""
    text = (data_dir / "sft" / "gsm8k_train.jsonl").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines(keepends=True) if len(line) < 480]
    folder = tmp_path_factory.mktemp("gsm8k")

    def some(first: int, count: int) -> str:
        path = folder / f"{first}-{count}.jsonl"
        path.write_text("".join(lines[first : first + count]), encoding="utf-8")
        return str(path)

    return some


@pytest.fixture(scope="module")
def command(
    stories: str, questions: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Runs `priority train` on GSM8K and returns the output folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, rule: str, *more: str, rows: tuple[int, int] = (0, ROWS)) -> Path:
        words = ["train", "--model", stories, "--data", questions(*rows), "--rule", rule, "--quiet"]
        words += ["--output", str(folder / name), "--cache", str(folder / "cache"), "--device", "cpu"]
        words += ["--learning-rate", "1e-3", "--max-length", str(LONGEST), *more]
        assert main(words) == 0
        return folder / name

    return run


@pytest.fixture(scope="module")
def warm(command: Callable[..., Path]) -> Path:
    """The model after ten steps on other rows."""
    return command("warm", "sft", "--max-steps", "10", rows=(500, 80))


@pytest.fixture(scope="module")
def examples(stories: str, questions: Callable[[int, int], str]) -> list[Example]:
    config = RowConfig(model=stories, data=(questions(0, ROWS),), max_length=LONGEST)
    return (
        Reader(config, load_tokenizer(stories), 512, LONGEST, ColumnReader({}))
        .read([questions(0, ROWS)])
        .rows
    )


def test_the_warmed_model_has_learned(warm: Path):
    lines = log(warm)
    assert lines[-1]["nll"] < 0.8 * lines[0]["nll"]


def test_sftkey_trains_on_the_answer_in_the_second_half(
    command: Callable[..., Path], examples: list[Example], stories: str
):
    rule = 'param s = 0.5 in [0, 1]; weight = 1 if progress < s else after("#### ")'
    lines = log(command("sftkey", rule))
    assert len(lines) == 8
    assert [line["weight_nonzero"] for line in lines[:4]] == [1.0] * 4
    tokenizer = load_tokenizer(stories)
    for line, rows in zip(lines[4:], step_rows(len(examples), 8, 0, 0)[4:], strict=True):
        wanted = sum(answer_tokens(examples[i], tokenizer) for i in rows)
        assert wanted > 8
        assert round(line["weight_nonzero"] * line["supervised_tokens"]) == wanted
        assert line["weight_mean"] == pytest.approx(line["weight_nonzero"])
        assert line["loss"] < 0.2 * line["nll"], "divided by all supervised tokens"


def answer_tokens(row: Example, tokenizer: Any) -> int:
    """How many tokens of a row are what is after `#### `, its end token among them; 0 where that was cut."""
    if row.ids[-1] != tokenizer.eos_token_id:
        return 0
    answer = tokenizer.decode(row.ids[:-1]).rpartition("#### ")[2]
    return 1 + next(n for n in range(1, 20) if tokenizer.decode(row.ids[-1 - n : -1]).strip() == answer)


def test_token_cleaning_keeps_its_share_of_the_data_set(
    command: Callable[..., Path], warm: Path, examples: list[Example]
):
    lines = log(command("token_cleaning", "token_cleaning", "--bind", f"warm={warm}"))
    tokens = sum(sum(row.response[1:]) for row in examples)
    assert sum(line["supervised_tokens"] for line in lines) == tokens
    kept = [round(line["weight_nonzero"] * line["supervised_tokens"]) for line in lines]
    assert sum(kept) == math.floor(0.6 * tokens)
    shares = {round(line["weight_nonzero"], 3) for line in lines}
    assert len(shares) > 3, "a share of the data set, not of each step"
    assert all(line["weight_mean"] == pytest.approx(line["weight_nonzero"]) for line in lines)


def test_rho1_keeps_its_share_of_every_step(command: Callable[..., Path], warm: Path):
    more = ["--bind", f"curated={warm}", "--max-steps", "4"]
    lines = log(command("rho1", "rho1", *more))
    for line in lines:
        n = line["supervised_tokens"]
        assert round(line["weight_nonzero"] * n) == math.ceil(0.6 * n)
    parts = log(command("rho1 in parts", "rho1", *more, "--batch-size", "2", "--accumulation", "4"))
    for one, other in zip(lines, parts, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    # A random half would have the mean loss; the model is furthest behind where its own loss is high.
    assert all(line["loss"] > line["nll"] for line in lines)


def test_forgetting_learns_some_and_unlearns_others_more_and_more(
    command: Callable[..., Path], warm: Path, examples: list[Example]
):
    lines = log(command("forgetting", "forgetting", "--bind", f"warm={warm}"))
    tokens = sum(sum(row.response[1:]) for row in examples)
    first, *rest = lines
    assert first["weight_negative"] == 0
    positive = round(first["weight_nonzero"] * first["supervised_tokens"])
    for step, line in enumerate(rest, start=1):
        negative, strength = line["weight_negative"], 0.25 * step / len(lines)
        assert line["weight_nonzero"] == 1.0
        assert 0.1 < negative < 0.5
        assert line["weight_mean"] == pytest.approx(1 - negative - strength * negative, abs=1e-6)
        positive += round((1 - negative) * line["supervised_tokens"])
    assert positive == math.ceil(0.7 * tokens)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[-1]["nll"]


def test_tshirt_keeps_examples_by_their_noisy_neighbours(
    command: Callable[..., Path], examples: list[Example]
):
    """A fifth of the rows by mean, half of those by deviation; another run draws the same."""
    settings = [word for pair in ("n=3", "share=0.05") for word in ("--set", pair)]
    runs = [command(name, "tshirt", *settings, "--batch-size", "1") for name in ("tshirt", "again")]
    first, again = map(log, runs)
    assert len(first) == math.ceil(math.ceil(0.1 * len(examples)) / 2) == 4
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert len({line["loss"] for line in first}) == 4
    other = log(command("other", "tshirt", *settings, "--batch-size", "1", "--seed", "5"))
    assert {line["nll"] for line in other} != {line["nll"] for line in first}
