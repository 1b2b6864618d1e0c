"""`priority eval` as a whole: tasks, responses and what ends them, pairs, standard errors, vLLM."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkers.estimates import pass_at_k, standard_error
from trainer.checkers.tasks import TASKS
from trainer.cli import main
from trainer.config import EvalConfig
from trainer.evaluate import evaluate
from trainer.faults import BadRows, ConfigFault, DataFault
from trainer.models import load_model
from trainer.sampling import OwnChance, before, sample

Write = Callable[..., str]


@pytest.fixture(scope="module")
def loaded(model: str) -> Any:
    return load_model(model).eval()


def settings(model: str, data: str, **more: Any) -> EvalConfig:
    return EvalConfig.model_validate({"model": model, "data": data, "device": "cpu", "quiet": True, **more})


# Estimates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k"), [(10_000, 1, 5_000), (10_000, 3, 10), (4_000, 3_999, 1), (10_000, 5, 9_999)]
)
def test_pass_at_k_is_exact_for_many_samples(n: int, c: int, k: int):
    missed = Fraction(1)
    for i in range(n - c + 1, n + 1):  # the product form of C(n - c, k) / C(n, k)
        missed *= 1 - Fraction(k, i)
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - max(missed, 0)), rel=1e-15)


def test_the_standard_error_is_over_prompts():
    assert standard_error([1.0]) is None
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
    values = [0.25, 0.5, 1.0, 0.0]
    mean = sum(values) / 4
    assert standard_error(values) == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4))


# Chance and what ends a response ---------------------------------------------------------------------


def test_responses_do_not_depend_on_batch_size_or_other_prompts(loaded: Any, tokenizer: Any):
    prompts = ["the quick", "1 + 2 =", "once upon a time there was"]

    def draw(asked: list[str], batch_size: int, samples: int = 3) -> list[list[str]]:
        drawn = sample(
            loaded,
            tokenizer,
            asked,
            samples,
            max_new_tokens=8,
            batch_size=batch_size,
            seed=5,
            own_chance=True,
        )
        return [[s.text for s in several] for several in drawn]

    first = draw(prompts, 64)
    assert len({text for several in first for text in several}) > 5, "responses differ"
    assert draw(prompts, 1) == draw(prompts, 4) == first
    assert draw(prompts[2:], 2) == first[2:]
    assert [several[:2] for several in first] == draw(prompts, 64, samples=2)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_own_chance_draws_from_the_distribution(temperature: float, top_p: float):
    count = 20_000
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    chances = [torch.tensor([(i + 0.5) / count], dtype=torch.float64) for i in range(count)]
    draw = OwnChance(chances, 3, temperature, top_p)
    scores = draw(torch.zeros(count, 3, dtype=torch.long), logits.expand(count, -1))
    assert torch.equal((scores == 0).sum(-1), torch.ones(count, dtype=torch.long))
    found = torch.bincount(scores.argmax(-1), minlength=5) / count
    p = (logits / temperature).softmax(-1)
    kept = torch.zeros(5)
    mass = 0.0
    for i in p.argsort(descending=True):
        if mass < top_p:
            kept[i] = p[i]
        mass += float(p[i])
    assert found == pytest.approx(kept / kept.sum(), abs=2e-4)


def test_a_response_ends_before_a_stop_text(loaded: Any, tokenizer: Any):
    free = sample(loaded, tokenizer, ["the", "1 + 2"], 8, max_new_tokens=20, own_chance=True)
    text = max((s.text for several in free for s in several), key=len)
    stop = [text[5:7]]
    ended = sample(loaded, tokenizer, ["the", "1 + 2"], 8, max_new_tokens=20, own_chance=True, stop=stop)
    for long, short in zip(chain(*free), chain(*ended), strict=True):
        assert short.text == before(long.text, stop)
        assert short.ids == long.ids[: len(short.ids)]
        if short.text != long.text:
            assert stop[0] in tokenizer.decode(short.ids, skip_special_tokens=True)
            assert stop[0] not in tokenizer.decode(short.ids[:-1], skip_special_tokens=True)
    assert any(len(s.ids) < len(f.ids) for s, f in zip(chain(*ended), chain(*free), strict=True))


# Tasks and what is written ---------------------------------------------------------------------------

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "1 + 2 ?", "answer": "so #### 3"}, {"question": "2 + 2 ?", "answer": "#### 4"}],
    "math": [
        {"problem": "1 + 2 ?", "answer": 3.0},
        {"problem": "$x$ ?", "answer": "4", "solution": "\\boxed{4}"},
    ],
    "medmcqa": [{"question": "a ?", "options": {"A": "1", "B": "2"}, "answer_idx": "B", "answer": "2"}],
    "humaneval": [
        {"prompt": "def f(a):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 2\n",
         "canonical_solution": "    return a + 1\n"},
    ],
    "mbpp": [
        {"text": "Add one.", "code": "def f(a):\r\n    return a + 1", "test_list": ["assert f(1) == 2"]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_task_reads_asks_and_checks_its_rows(
    name: str, loaded: Any, model: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name == "math":
        pytest.importorskip("math_verify")
    asked: list[str] = []

    def answers(_: Any, tokenizer: Any, prompts: list[str], samples: int, **others: Any) -> Any:
        """A model that knows the answer to every other sample."""
        from trainer.sampling import Sample

        assert others["stop"] == TASKS[name].stop
        assert others["max_new_tokens"] == 20
        asked.extend(prompts)
        shape = {"math": "\\boxed{%s}", "humaneval": "%s"}.get(name, "%s")
        golds = [TASKS[name].answer(row) for row in ROWS[name]]
        return [[Sample(shape % gold, [1], [2]), Sample("?", [1], [2])] for gold in golds]

    monkeypatch.setattr("trainer.evaluate.sample", answers)
    data, kept = write("rows.jsonl", ROWS[name]), tmp_path / "responses.jsonl"
    found = evaluate(
        settings(model, data, task=name, samples=2, max_new_tokens=20, responses=str(kept), max_length=60)
    )
    assert found["avg@2"] == 0.5
    assert found["pass@2"] == 1.0
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"{data}:{i + 1}" for i in range(len(ROWS[name]))]
    assert [line["prompt"] for line in lines] == asked
    assert all([r["right"] for r in line["responses"]] == [True, False] for line in lines)
    assert all(line["responses"][1]["text"] == "?" and line["responses"][1]["why"] for line in lines)


def test_rows_that_are_no_rows_of_the_task_are_named(model: str, write: Write):
    data = write("rows.jsonl", [{"question": "1 ?", "answer": "#### 1"}, {"question": "2 ?"}])
    with pytest.raises((BadRows, DataFault), match=r"rows\.jsonl:2: no field `answer`"):
        evaluate(settings(model, data, task="gsm8k"))
    found = evaluate(settings(model, data, task="gsm8k", bad_rows="skip", samples=1, max_new_tokens=2))
    assert found["avg@1"] == 0


def test_rows_that_a_task_would_read_name_it(model: str, write: Write):
    with pytest.raises(DataFault, match="these rows look like those of --task math"):
        evaluate(settings(model, write("rows.jsonl", ROWS["math"])))


REFUSED = {
    "--task gsm8": r"unknown; did you mean gsm8k\? known are gsm8k, math",
    "--task math --prompt a --completion b": "--task says what of a row is prompt and response",
    "--samples 2": "--samples needs --checker",
    "--responses x": "--responses needs --samples",
    "--stop x": "--stop needs --samples",
    "--engine vllm": "--engine needs --samples",
    "--samples 1 --checker exact --workers 2": "--workers is for the checkers python and boxed",
    "--samples 1 --checker exact --unsafe-checker": "--unsafe-checker is for the checker python",
    "--samples 1 --checker nothing": "unknown; ",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_would_be_ignored_are_refused(flags: str, model: str, sums: str, capsys: Any):
    assert main(["eval", "--model", model, "--data", sums, "--device", "cpu", *flags.split()]) == 2
    assert REFUSED[flags].replace("\\", "") in capsys.readouterr().err


def test_options_that_no_prompt_shows_are_told(model: str, write: Write, capsys: Any):
    data = write("rows.jsonl", ROWS["medmcqa"])
    evaluate(settings(model, data, quiet=False, samples=1, checker="choice", max_new_tokens=2))
    assert "the rows look like those of --task medmcqa" in capsys.readouterr().err


def test_a_prompt_without_room_has_no_response(model: str, write: Write, capsys: Any):
    rows = [{"prompt": "1 " * 80, "completion": "2"}, {"prompt": "1", "completion": "2"}]
    found = evaluate(
        settings(model, write("rows.jsonl", rows), quiet=False, samples=2, checker="exact", max_new_tokens=2)
    )
    assert found["avg@2"] == 0
    assert "1 of 2 prompts leave no room in the context of 64" in capsys.readouterr().err


def test_a_checker_that_stops_at_times_is_counted(
    model: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    (tmp_path / "at_times.py").write_text(
        "def check(response, reference, row):\n"
        "    assert row['prompt'] != 'what is 1 + 3 ?'\n    return True\n"
    )
    monkeypatch.chdir(tmp_path)
    found = evaluate(
        settings(model, sums, quiet=False, limit=4, samples=2, max_new_tokens=2, checker="at_times:check")
    )
    assert (found["avg@2"], found["checker_errors"]) == (0.75, 2)
    assert "sums.jsonl:2: the checker stopped: AssertionError" in capsys.readouterr().err


# Pairs -----------------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": f"what is {i} + 2 ?", "chosen": f" the answer is {i + 2}", "rejected": " 1 ." * (i % 4 + 1)}
    for i in range(9)
]


def test_pairs_are_ranked_by_the_probability_of_the_whole_response(
    loaded: Any, tokenizer: Any, model: str, write: Write
):
    found = evaluate(settings(model, write("pairs.jsonl", PAIRS), batch_size=4))
    margins, chosen, tokens = [], 0.0, 0
    for row in PAIRS:
        logp = []
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            start = len(tokenizer(row["prompt"])["input_ids"])
            of = loaded(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
            logp.append(of.gather(-1, torch.tensor(ids[start:])[:, None]).sum().item())
            tokens += len(ids) - start if side == "chosen" else 0
        margins.append(logp[0] - logp[1])
        chosen -= logp[0]
    assert 0 < sum(m > 0 for m in margins) < 9, "both cases are there"
    assert found["pairs"] == 9
    assert found["preference_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 9)
    assert found["preference_margin"] == pytest.approx(sum(margins) / 9, rel=1e-4)
    assert found["preference_margin_stderr"] == pytest.approx(standard_error(margins), rel=1e-4)
    assert found["nll_chosen"] == pytest.approx(chosen / tokens, rel=1e-4)
    limited = evaluate(settings(model, write("pairs.jsonl", PAIRS), limit=3))
    assert limited["preference_margin"] == pytest.approx(sum(margins[:3]) / 3, rel=1e-4)
    named = [{"prompt": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in PAIRS]
    again = settings(model, write("named.jsonl", named), prompt="prompt", chosen="good", rejected="bad")
    assert evaluate(again)["preference_margin"] == pytest.approx(found["preference_margin"])


def test_pairs_draw_no_responses(model: str, write: Write):
    with pytest.raises(ConfigFault, match="these are pairs"):
        evaluate(settings(model, write("pairs.jsonl", PAIRS), samples=1, checker="exact"))


# vLLM ------------------------------------------------------------------------------------------------

STAND_IN = """
import types
calls = []
class SamplingParams:
    def __init__(self, **settings): self.settings = settings
class LLM:
    def __init__(self, **settings): calls.append(("LLM", settings))
    def generate(self, prompts, params, use_tqdm=True):
        calls.append(("generate", prompts, [p.settings for p in params]))
        give = lambda i, n: types.SimpleNamespace(text=f"r{i} {n}", token_ids=(7, 8))
        return [
            types.SimpleNamespace(outputs=[give(i, n) for n in range(p.settings["n"])])
            for i, p in enumerate(params)
        ]
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    yield lambda: sys.modules["vllm"].calls
    sys.modules.pop("vllm", None)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_vllm_is_asked_for_the_same(
    temperature: float, vllm: Any, model: str, tokenizer: Any, sums: str, tmp_path: Path
):
    kept = tmp_path / "responses.jsonl"
    evaluate(
        settings(model, sums, limit=3, samples=2, engine="vllm", checker="exact", temperature=temperature,
                 top_p=0.9, max_new_tokens=5, stop=["x"], seed=3, dtype="bf16", responses=str(kept))
    )  # fmt: skip
    (_, engine), (_, prompts, params) = vllm()
    assert engine == {"model": model, "dtype": "bfloat16", "seed": 3, "trust_remote_code": False}
    texts = [f"what is {i} + {i * 3} ?" for i in range(3)]
    assert [p["prompt_token_ids"] for p in prompts] == [tokenizer(text)["input_ids"] for text in texts]
    count = 2 if temperature else 1
    assert params == [
        {"n": count, "temperature": temperature, "top_p": 0.9, "max_tokens": 5, "stop": ["x"],
         "seed": 3 + 2 * i, "skip_special_tokens": True}
        for i in range(3)
    ]  # fmt: skip
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [[r["text"] for r in line["responses"]] for line in lines] == [
        [f"r{i} {n if count == 2 else 0}" for n in range(2)] for i in range(3)
    ]


def test_vllm_that_is_not_there_is_said_before_anything_else(sums: str):
    if "vllm" in sys.modules:
        pytest.skip("vllm is installed")
    with pytest.raises(ConfigFault, match=r"^--engine vllm: vLLM is not installed: pip install vllm"):
        evaluate(settings("no such model", sums, samples=1, engine="vllm", checker="exact"))


def test_vllm_does_not_take_an_adapter(vllm: Any, sums: str, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigFault, match=r"is an adapter: merge it"):
        evaluate(settings(str(tmp_path), sums, samples=1, engine="vllm", checker="exact"))
