"""T-SHIRT's filter: the examples that it keeps, by hand from the PMI of its neighbours, and in a run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from priority_dsl import compile_rule
from priority_dsl.survey import Rows
from priority_dsl.vocabulary.chance import drawn
from tests.rules.test_train import DATA, END, SEED, tiny, tokenised  # noqa: F401  (a fixture)
from tests.rules.twins import keeps_of_tshirt
from trainer.cli import main

EXAMPLES = 9


def drawn_pmis(seed: int, count: int) -> list[list[list[float]]]:
    """The PMI by neighbour, example and token, in eighths so that some are equal."""
    of = random.Random(seed)
    lengths = [of.randrange(1, 7) for _ in range(EXAMPLES)]
    return [[[of.randrange(-16, 17) / 8 for _ in range(n)] for n in lengths] for _ in range(count)]


def surveyed(pmis: list[list[list[float]]]) -> list[Rows]:
    """The rows of a data set with the statistics that give these PMI, one row a batch."""
    rows = []
    for i in range(EXAMPLES):
        length = len(pmis[0][i])
        targets = torch.tensor([[-100, *[1] * length, -100]])
        statistics = {}
        for number, of_draw in enumerate(pmis, 1):
            near = f"perturbed(ref, scale, draw={number})"
            alone = torch.rand(1, length + 2, dtype=torch.float64).mul(8).round() / 8
            pmi = torch.tensor([[0.0, *of_draw[i], 0.0]], dtype=torch.float64)
            statistics |= {f"nll({near})": alone + pmi + 2, f"nll(unprompted({near}))": alone + 2}
        rows.append(Rows(targets, statistics, examples=torch.full(targets.shape, i)))
    return rows


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_examples_that_it_keeps(count: int, share: float) -> None:
    rule = compile_rule("tshirt", n=count, share=share)
    assert len(rule.plan.keep) == 2 * count
    for seed in range(4):
        pmis = drawn_pmis(seed, count)
        rows = surveyed(pmis)
        numbers = rule.survey(lambda rows=rows: rows, keep=True)
        kept = [bool(rule.kept(row, numbers)[0, 0]) for row in rows]
        assert kept == keeps_of_tshirt(pmis, share)


# From the command line ----------------------------------------------------------------------------


def nll_of(model: Any, ids: list[int], noise: Tensor) -> Tensor:
    """The nll of each token but the first, the embeddings being noisy."""
    embedded = model.get_input_embeddings()(torch.tensor([ids])) + noise
    said = model(inputs_embeds=embedded).logits[0, :-1].log_softmax(-1)
    return -said.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def pmis_by_hand(folder: Path, rows: list[dict[str, Any]], scale: float, count: int) -> list[Any]:
    """The PMI by neighbour, example and token, from the generator of law 10."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    width = model.config.hidden_size

    def noise(length: int, example: int, number: int) -> Tensor:
        each = [drawn(SEED, 0, example, entry, (1, 0, number)) for entry in range(length * width)]
        bound = scale / (length * width) ** 0.5
        return (2 * torch.tensor(each).reshape(1, length, width) - 1) * bound

    found = []
    for number in range(1, count + 1):
        of_draw = []
        for example, row in enumerate(rows):
            ids, response = tokenised(row)
            before = response.index(True)
            alone = [END, *ids[before:]]
            with_prompt = nll_of(model, ids, noise(len(ids), example, number))[before - 1 :]
            of_draw.append((with_prompt - nll_of(model, alone, noise(len(alone), example, number))).tolist())
        found.append(of_draw)
    return found


@pytest.mark.parametrize("name", ["tshirt"])
def test_trains(name: str, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """The rows that are kept are those by hand, and the first logged step is about them alone."""
    rows = [json.loads(line) for line in (DATA / "plain.jsonl").read_text().splitlines()]
    kept = keeps_of_tshirt(pmis_by_hand(tiny, rows, 20, 3), 0.4)
    assert sum(kept) == 2
    where = ["--model", str(tiny), "--data", str(DATA / "plain.jsonl"), "--output", str(tmp_path / "run")]
    how = ["--set", "n=3", "--set", "share=0.4", "--set", "scale=20", "--cache", str(tmp_path / "cache")]
    steps = ["--max-steps", "3", "--batch-size", "5", "--learning-rate", "0.01", "--seed", str(SEED)]
    assert main(["train", "--rule", name, *where, *how, *steps, "--device", "cpu"]) == 0
    assert "3 rows left out by `keep`" in capfd.readouterr().err
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    losses = []
    for row in (row for row, keep in zip(rows, kept, strict=True) if keep):
        ids, response = tokenised(row)
        with torch.no_grad():
            losses.append(nll_of(model, ids, torch.zeros(()))[response.index(True) - 1 :])
    assert first["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
