"""The dry run: the weights that it shows are those of the first step, nothing is left, anyone can read it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from trainer.cli import main
from trainer.config import TrainConfig
from trainer.dryrun.memory import in_units, step_memory
from trainer.dryrun.rehearsal import rehearsal
from trainer.dryrun.report import dry_run
from trainer.dryrun.rowview import EDGE, MOST, Cell, cells_of, lines_of, pieces, show, weight_text
from trainer.faults import ConfigFault, DataFault
from trainer.train import train

Make = Callable[..., TrainConfig]
PAIRS = [
    {"prompt": f"what is {i} ?", "chosen": f" the answer is {i}", "rejected": " a dog ." * (1 + i % 3)}
    for i in range(12)
]


@pytest.fixture
def config(model: str, sums: str, tmp_path: Path) -> Make:
    def make(rule: str, **options: Any) -> TrainConfig:
        settings = {
            "model": model, "data": sums, "rule": rule, "batch_size": 4, "accumulation": 2, "device": "cpu",
            "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "quiet": True, **options,
        }  # fmt: skip
        return TrainConfig(**settings)

    return make


RULES = {
    "one model": "dft",
    "stored": "mass(ref) >= 0.5",
    "batch": "weight = (H_on / mean(H_on, batch)) ** 2",
    "chance": "weight = bernoulli(0.4)",
    "negative": "-1 if p_on < 0.003 else p_on ** 0.5",
    "prompt too": "over = all; weight = 1 if response else 0.5",
    "data set": "weight = nll_on > median(nll_ref, dataset)",
    "moving": "model slow = ema(0.9); weight = p_slow",
}


CASES = [(name, False) for name in RULES] + [("batch", True)]


@pytest.mark.parametrize(("name", "packing"), CASES)
def test_the_weights_shown_are_those_of_the_first_step(name: str, packing: bool, config: Make):
    rows = {"batch_size": 12} if name == "data set" else {"max_length": 40}  # all rows in the first step
    made = config(RULES[name], packing=packing, **rows)
    with rehearsal(made) as run:
        step = run.first_step()
        seen = run.look(step, len(step))
    over_all = name == "prompt too"
    live = [(one, [over_all or marked for marked in one.row.response[1:]]) for one in seen]
    weights = [w for one, marks in live for w, here in zip(one.weights, marks, strict=True) if here]
    plain = [n for one in seen for n, here in zip(one.nll, one.row.response[1:], strict=True) if here]
    line = json.loads((train(made.model_copy(update={"max_steps": 1})).output / "log.jsonl").read_text())
    assert sum(weights) / len(weights) == pytest.approx(line["weight_mean"], abs=1e-6)
    assert sum(w != 0 for w in weights) / len(weights) == pytest.approx(line["weight_nonzero"], abs=1e-6)
    assert len(plain) == line["supervised_tokens"]
    assert sum(plain) / len(plain) == pytest.approx(line["nll"], rel=1e-5)


def test_the_weights_of_dft_are_the_probabilities(config: Make, model: str):
    with rehearsal(config("dft")) as run:
        (seen,) = run.look(run.first_step(), 1)
    ids = torch.tensor(seen.row.ids)
    logits = AutoModelForCausalLM.from_pretrained(model)(ids[None]).logits[0, :-1]
    by_hand = logits.softmax(-1).gather(-1, ids[1:, None])[:, 0]
    marks = torch.tensor(seen.row.response[1:])
    torch.testing.assert_close(
        torch.tensor(seen.weights)[marks], by_hand[marks].detach(), rtol=1e-4, atol=1e-7
    )


def test_pairs(config: Make, write: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    dry_run(config("dpo", data=write("pairs.jsonl", PAIRS), show=2, dry_run=True))
    out = capsys.readouterr().out
    assert "the first 2 of 8 pairs of the first step" in out
    assert "the rule has a `loss` of its own" in out
    assert len(re.findall(r"pairs.jsonl:\d+ \((?:chosen|rejected)\), \d+ tokens", out)) == 4


def test_nothing_is_left(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = sorted(tmp_path.rglob("*"))
    dry_run(config("mass(ref) >= 0.5"))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(model: str, sums: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", "--model", model, "--data", sums, "--rule", "mass(ref) >= tau", "--set", "tau=0.3"]
    words += ["--output", str(tmp_path / "run"), "--epochs", "3", "--save-steps", "5", "--device", "cpu"]
    assert main([*words, "--eval-data", sums, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for said in [
        "the first 2 of 8 rows of the first step",
        "before     one pass of ref keeps mass(ref)",
        "9 steps of 8 rows (--batch-size 8 x --accumulation 1 x 1 process), 3 an epoch",
        "24 held-out rows are measured at the end",
        "optimizer (AdamW)",
        f"{tmp_path / 'run' / 'checkpoints'}: every 5 steps",
        "dry run: nothing was trained, nothing was written",
    ]:
        assert said in out, said
    assert "\x1b" not in out, "no colour where the output is no terminal"


def test_what_a_run_refuses_is_refused(config: Make, write: Callable[..., str], tmp_path: Path):
    with pytest.raises(DataFault, match="without a response"):
        dry_run(config("dft", data=write("bad.jsonl", [{"prompt": "a", "completion": ""}])))
    with pytest.raises(DataFault, match="without a response"):
        dry_run(config("dft", eval_data=write("bad.jsonl", [{"prompt": "a", "completion": ""}])))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigFault, match="is not empty"):
        dry_run(config("dft"))
    with pytest.raises(ConfigFault, match="dry_run"):
        train(config("dft", dry_run=True, output=str(tmp_path / "other")))


def test_what_models_say_of_all_rows_is_asked_of_the_first_step_alone(
    config: Make, capsys: pytest.CaptureFixture[str]
):
    dry_run(config("weight = nll_on > median(nll_ref, dataset)", quiet=False))
    captured = capsys.readouterr()
    assert "values of the data set: over 8 of 24 rows here, and over all of them in training" in captured.out
    assert "nll(ref): 8 rows through the frozen model" in captured.err
    assert "3 steps of 8 rows" in captured.out
    dry_run(config("keep = mean(nll_ref, example) > 0; weight = 1"))
    assert "at most 3 steps of 8 rows" in (out := capsys.readouterr().out)
    assert "`keep`: over 8 of 24 rows here" in out
    with pytest.raises(DataFault, match="--dry-run, on the rows of the first step alone: `keep`"):
        dry_run(config("keep = mean(nll_ref, example) > 1000; weight = 1"))


def test_a_narrow_terminal_and_one_without_colour(monkeypatch: pytest.MonkeyPatch):
    cells = [Cell(f"word{i}", (i % 5) / 2 - 0.5) for i in range(50)]
    for width in (12, 20, 33, 200):
        plain, coloured = io.StringIO(), io.StringIO()
        show(Console(file=plain, width=width), cells)
        show(Console(file=coloured, width=width, force_terminal=True, color_system="truecolor"), cells)
        lines = plain.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        words = " ".join(lines[::2]).split()
        weights = [float(w) for w in " ".join(lines[1::2]).split()]
        assert words == [cell.text for cell in cells]
        assert weights == [cell.weight for cell in cells]
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()).split() == plain.getvalue().split()
        assert "\x1b[1;35m" in coloured.getvalue(), "below 0 in magenta"


def test_wide_characters_stay_aligned():
    above, below = lines_of([Cell("答", 0.25), Cell("a", 1.0)], 80)
    assert above.plain == "答   a"
    assert below.plain == "0.25 1"


def test_a_terminal_of_ascii():
    above, below = lines_of([Cell("␣é"), Cell("b", 0.5)], 80, "ascii")
    assert above.plain.startswith(r"\u2423\xe9 b")
    assert below.plain.startswith(r"\xb7")


def test_long_rows_are_folded():
    ignored = 4 * EDGE
    cells = cells_of(["x"] * (ignored + 3), [None] * ignored + [1.0] * 3)
    assert len(cells) == 2 * EDGE + 1 + 3
    assert cells[EDGE].text == f"[... {ignored - 2 * EDGE} ignored tokens ...]"
    assert [cell.weight for cell in cells[-3:]] == [1.0] * 3
    long = cells_of(["x"] * (MOST + 7), [1.0] * (MOST + 7))
    assert long[-1].text == "[... 7 more tokens]"
    assert len(cells_of(["x"] * EDGE, [None] * EDGE)) == EDGE


@pytest.mark.parametrize(
    ("weight", "shown"),
    [(0.0, "0"), (1.0, "1"), (-1.0, "-1"), (0.5, "0.50"), (-0.25, "-0.25"), (2.0, "2.00"), (1e-9, "1e-9"),
     (0.999, "1.00"), (0.0049, "5e-3"), (12345.0, "1e4"), (float("nan"), "nan"), (float("inf"), "inf")],
)  # fmt: skip
def test_weights_in_a_few_characters(weight: float, shown: str):
    assert weight_text(weight) == shown


def test_tokens_are_readable(tokenizer: Any):
    ids = tokenizer("the fox\n\t😀 é")["input_ids"]
    shown = pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert shown[0] == "<s>"
    assert shown[-1] == "</s>"
    text = "".join(shown[1:-1])
    assert text.startswith("the␣fox↵⇥")
    raw = "".join(re.findall(r"<0x([0-9A-F]{2})>", text))
    assert raw.startswith("F09F9880"), "the bytes of an emoji that is several tokens"


def test_tokens_of_a_sentencepiece_model(data_dir: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260K")
    ids = tokenizer("Once upon\n😀")["input_ids"]
    shown = pieces(tokenizer, ids)
    assert shown[0] == "<s>"
    assert "".join(shown[1:]).replace("<0x0A>", "↵") == "␣Once␣upon↵<0xF0><0x9F><0x98><0x80>"


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_tokens_of_byte_level_models(name: str, data_dir: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / name)
    shown = pieces(tokenizer, tokenizer("Hello, wörld!\n\n🦊<|endoftext|>")["input_ids"])
    assert shown[0] == "Hello"
    assert "␣w" in "".join(shown)
    assert "↵↵" in "".join(shown)
    assert shown[-1] == "<|endoftext|>"


def test_the_parts_of_the_memory(config: Make, model: str):
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters()) * 4
    with rehearsal(config("model slow = ema(0.9); weight = p_slow * (kl(ref, on) > 0)")) as run:
        parts = {part.what.split(" (")[0].split(" of ")[0]: part for part in step_memory(run.run, 4, 20)}
        more = step_memory(run.run, 8, 20)
    assert parts["gradients"].size == size
    assert size <= parts["parameters"].size < 1.1 * size, "with buffers"
    assert parts["optimizer"].size == 2 * size
    assert parts["moving averages"].size == size
    assert parts["frozen models"].size == size
    assert parts["activations"].size > 4 * 20 * 16 * 4
    double = next(part for part in more if part.what.startswith("activations"))
    assert 1.6 < double.size / parts["activations"].size < 2.1
    assert not double.counted


def test_sizes_are_read_by_people():
    assert [in_units(n) for n in (12, 2048, 5 << 20, 3 << 30)] == [
        "12 bytes",
        "2.0 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]
