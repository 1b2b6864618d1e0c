"""The figures of an evaluation against what counting by hand gives."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkers.table import CHECKERS, final_number
from trainer.cli import main
from trainer.config import EvalConfig
from trainer.evaluate import evaluate, held_out, mean_pass_at_k, pass_at_k
from trainer.faults import ConfigFault, DataFault, RunFault
from trainer.models import load_model
from trainer.sampling import Sample, sample, token_figures


@pytest.fixture(scope="module")
def loaded(model: str) -> Any:
    return load_model(model).eval()


@pytest.fixture(scope="module")
def base(other_model: str) -> Any:
    return load_model(other_model).eval()


@pytest.mark.parametrize("correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct: int, k: int):
    subsets = list(itertools.combinations([True] * correct + [False] * (6 - correct), k))
    assert pass_at_k(6, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_the_average():
    assert mean_pass_at_k([0, 1, 4], 4, 1) == pytest.approx((0 + 0.25 + 1) / 3)


@pytest.mark.parametrize("bad", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_no_count(bad: tuple[int, int, int]):
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(*bad)


NUMBERS = {
    "a\n#### 72": 72,
    "####7": 7,
    "#### -1,234.50 .": -1234.5,
    "#### $3": 3,
    "#### 1 #### 2": 2,
    "72": None,
    "#### x": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_final_number(text: str):
    found, wanted = final_number(text), NUMBERS[text]
    assert found == wanted if wanted is None or found is None else float(found) == wanted


def test_checkers():
    assert CHECKERS["gsm8k"]("so #### 1,000", "#### 1000", {})
    assert not CHECKERS["gsm8k"]("1000", "#### 1000", {})
    assert CHECKERS["exact"](" 7\n", "7", {})
    assert not CHECKERS["exact"]("7 .", "7", {})


def test_held_out_figures_are_those_of_the_supervised_tokens(
    loaded: Any, tokenizer: Any, sums: str, model: str
):
    figures = evaluate(EvalConfig(model=model, data=sums, quiet=True, device="cpu"))
    nll, right, count = 0.0, 0, 0
    for line in Path(sums).read_text().splitlines():
        row = json.loads(line)
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        start = len(tokenizer(row["prompt"])["input_ids"])
        logp = loaded(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        targets = torch.tensor(ids[start:])
        nll -= logp.gather(-1, targets[:, None]).sum().item()
        right += int((logp.argmax(-1) == targets).sum())
        count += len(targets)
    assert figures["tokens"] == count
    assert figures["nll"] == pytest.approx(nll / count, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(right / count)


def test_held_out_of_nothing_is_zero(loaded: Any):
    assert held_out(loaded, []).tokens == 0


def test_samples_come_in_order_and_the_seed_repeats_them(loaded: Any, tokenizer: Any):
    prompts = ["the quick", "1 + 2 =", "once upon a time there was"]

    def draw(seed: int) -> list[list[str]]:
        drawn = sample(loaded, tokenizer, prompts, 3, max_new_tokens=8, batch_size=4, seed=seed)
        assert [[s.prompt for s in several] for several in drawn] == [
            [tokenizer(prompt)["input_ids"]] * 3 for prompt in prompts
        ]
        assert all(1 <= len(s.ids) <= 8 for several in drawn for s in several)
        return [[s.text for s in several] for several in drawn]

    before = torch.random.get_rng_state()
    first = draw(0)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's chance is left alone"
    assert draw(0) == first
    assert draw(1) != first


def test_temperature_0_takes_the_likeliest_tokens_whatever_the_padding(loaded: Any, tokenizer: Any):
    prompts = ["the", "the quick brown fox jumps over", "1 + 2"]
    together = sample(loaded, tokenizer, prompts, temperature=0, max_new_tokens=6, batch_size=3)
    for prompt, (drawn,) in zip(prompts, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for token in drawn.ids:
            assert token == int(loaded(torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, token]


def test_a_response_ends_with_its_end_token(loaded: Any, tokenizer: Any):
    uniform = copy.deepcopy(loaded)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    drawn = sample(uniform, tokenizer, ["the"], 200, max_new_tokens=20, batch_size=200, seed=3)[0]
    ended = [s for s in drawn if tokenizer.eos_token_id in s.ids]
    assert ended, "a uniform model draws the end token at times"
    assert all(s.ids.index(tokenizer.eos_token_id) == len(s.ids) - 1 for s in ended)
    assert not any("</s>" in s.text for s in drawn)


def test_entropy_and_kl_by_hand(loaded: Any, base: Any):
    rows = [Sample("", [1, 5, 6], [7, 8, 2]), Sample("", [1, 9], [10])]
    figures = token_figures(loaded, rows, base, batch_size=2)
    entropy = kl = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.ids]])
        logp = loaded(ids).logits[0, len(row.prompt) - 1 : -1].double().log_softmax(-1)
        logq = base(ids).logits[0, len(row.prompt) - 1 : -1].double().log_softmax(-1)
        entropy -= (logp.exp() * logp).sum().item()
        kl += (logp.exp() * (logp - logq)).sum().item()
    assert figures.tokens == 4
    assert figures.entropy == pytest.approx(entropy / 4, rel=1e-5)
    assert figures.kl == pytest.approx(kl / 4, rel=1e-4)
    assert 0 < figures.entropy < math.log(320)


def test_a_model_has_no_divergence_from_itself(loaded: Any):
    figures = token_figures(loaded, [Sample("", [1, 5], [6, 7])], loaded)
    assert figures.kl == pytest.approx(0, abs=1e-7)
    assert token_figures(loaded, []).tokens == 0


def test_the_command_prints_and_writes_the_figures(
    model: str, other_model: str, sums: str, tmp_path: Path, capsys: Any
):
    output = tmp_path / "figures.json"
    words = ["eval", "--model", model, "--data", sums, "--limit", "4", "--samples", "4", "--checker", "exact",
             "--k", "2", "--max-new-tokens", "4", "--entropy", "--base", other_model, "--output", str(output),
             "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    figures = json.loads(output.read_text())
    assert list(figures) == [
        "nll", "perplexity", "accuracy", "tokens", "avg@4", "avg@4_stderr", "pass@2", "pass@2_stderr",
        "entropy", "kl",
    ]  # fmt: skip
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in figures if not name.endswith("_stderr"))
    assert "± 0.0%" in shown


def test_a_checker_of_ones_own(model: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(
        "def even(response, reference, row):\n"
        "    return row['prompt'] == 'what is 0 + 0 ?' and 'answer' in reference\n"
        "def broken(response, reference, row):\n    raise KeyError('x')\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": model,
        "data": sums,
        "limit": 4,
        "samples": 2,
        "max_new_tokens": 2,
        "quiet": True,
        "device": "cpu",
    }
    assert evaluate(EvalConfig(**settings, checker="mine:even"))["avg@2"] == 0.25
    with pytest.raises(RunFault, match=r"sums\.jsonl:1: the checker stopped: KeyError"):
        evaluate(EvalConfig(**settings, checker="mine:broken"))
    for name in ("mine:none", "nowhere:f", "exakt"):
        with pytest.raises(ConfigFault, match=f"^--checker {name}: "):
            evaluate(EvalConfig(**settings, checker=name))


def test_conversations_are_asked_through_the_template(model: str, write: Callable[..., str]):
    talk = [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]
    data = write("talk.jsonl", [{"messages": talk}])
    settings = {
        "model": model,
        "samples": 2,
        "checker": "exact",
        "max_new_tokens": 2,
        "quiet": True,
        "device": "cpu",
    }
    assert 0 <= evaluate(EvalConfig(data=data, **settings))["avg@2"] <= 1
    with pytest.raises(DataFault, match="have no prompt"):
        evaluate(EvalConfig(data=write("text.jsonl", [{"text": "a b"}]), **settings))
