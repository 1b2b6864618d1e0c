"""The command `priority`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def priority(*words: str, capsys: Capture) -> tuple[int, str, str]:
    code = main(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_help_and_version(capsys: Capture):
    code, out, _ = priority("--help", capsys=capsys)
    assert code == 0
    assert all(f"  {name}" in out for name in COMMANDS)
    assert priority("--version", capsys=capsys)[1].startswith("priority ")
    assert priority(capsys=capsys)[0] == 2


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_every_help_ends_with_an_example(name: str, capsys: Capture):
    code, out, _ = priority(name, "--help", capsys=capsys)
    assert code == 0
    assert f"  priority {name}" in out.rstrip().splitlines()[-1]
    assert out.rstrip().splitlines()[-2] == "example:"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command `trian`; did you mean `priority train`?"),
        (["check"], "the following arguments are required: RULE"),
        (["check", "dft", "--stric"], "--stric: unknown flag; did you mean --strict?"),
        (["check", "dft", "--set", "tau"], "--set tau: must be NAME=NUMBER"),
        (["new", "2nd"], "2nd: a rule's name has letters"),
        (["test", "dft", "--against", "nowhere:f"], "--against nowhere:f: `nowhere` does not import"),
        (["test", "dft", "--against", "nowhere"], "--against nowhere: must be module:function"),
    ],
)
def test_usage_mistakes(words: list[str], message: str, capsys: Capture):
    code, _, err = priority(*words, capsys=capsys)
    assert code == 2
    assert err.startswith(f"error: {message}")


def test_check_says_what_a_rule_is(capsys: Capture):
    code, out, _ = priority("check", "mass(ref) >= tau", "-p_on", "--set", "tau=0.5", capsys=capsys)
    assert code == 2, "the second rule does not read tau"
    code, out, _ = priority("check", "mass(ref) >= tau", "--set", "tau=0.5", capsys=capsys)
    assert code == 0
    assert "hard selection (intrinsic), weights in {0, 1}, one per token" in out
    assert "models: on, ref" in out
    assert "parameters: tau = 0.5" in out


BROKEN = ["p_onn", "p_on *", "p_on ** (1/tau)", "mass >= 0.5", "p_on if p_on", "max(p_on", "kl(ref)",
          "1 if 2 else 3", "label == neg and", "param t = 2 in [0, 1]; weight = t"]  # fmt: skip


def test_check_reports_every_mistake_of_every_rule(capsys: Capture):
    code, out, err = priority("check", *BROKEN, capsys=capsys)
    assert code == 2
    assert out.count("error[PD") >= len(BROKEN)
    assert out.count("= help: ") >= len(BROKEN)
    assert "Traceback" not in out + err


def test_strict_makes_warnings_errors(capsys: Capture):
    signed = "-1 if label == neg"
    assert priority("check", signed, capsys=capsys)[0] == 0
    code, out, _ = priority("check", signed, "--strict", capsys=capsys)
    assert code == 2
    assert "error[PD401]" in out


def test_fmt_rewrites_files_and_prints_texts(tmp_path: Path, capsys: Capture):
    path = tmp_path / "r.rule"
    path.write_text("weight   = p_on**( 1/2 )  # half\n")
    assert priority("fmt", str(path), "--check", capsys=capsys)[:2] == (2, f"would reformat {path}\n")
    assert priority("fmt", str(path), "--stdout", capsys=capsys)[1].startswith("weight = p_on ** (1 / 2)")
    assert path.read_text().startswith("weight   =")
    assert priority("fmt", str(path), capsys=capsys)[:2] == (0, f"reformatted {path}\n")
    assert path.read_text().startswith("weight = p_on ** (1 / 2)")
    assert "# half" in path.read_text()
    assert priority("fmt", str(path), "--check", capsys=capsys)[:2] == (0, "")
    assert priority("fmt", "1+p_on", capsys=capsys)[1] == "1 + p_on\n"
    code, _, err = priority("fmt", "1+", capsys=capsys)
    assert code == 2
    assert "error[PD1" in err


def test_rules_lists_the_library(capsys: Capture):
    from priority_dsl import list_rules

    code, out, _ = priority("rules", capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(list_rules())
    assert "dft  " in out


def test_explain(capsys: Capture):
    code, out, _ = priority("explain", "prift_mass", "--set", "tau=0.25", capsys=capsys)
    assert code == 0
    assert "tau = 0.25" in out
    assert priority("explain", "p_onn", capsys=capsys)[0] == 2


def test_a_new_rule_passes_its_test_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.chdir(tmp_path)
    assert priority("new", "my_rule", capsys=capsys)[0] == 0
    assert priority("check", "my_rule.rule", "--strict", capsys=capsys)[0] == 0
    assert priority("fmt", "my_rule.rule", "--check", capsys=capsys)[0] == 0
    code, out, _ = priority("test", "my_rule.rule", "--against", "test_my_rule:by_hand", capsys=capsys)
    assert code == 0, out
    assert out.count("  ok    ") == 7
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_my_rule.py"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    code, _, err = priority("new", "my_rule", capsys=capsys)
    assert code == 2
    assert "exists already" in err


def test_a_changed_rule_fails_the_test_that_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.chdir(tmp_path)
    priority("new", "other_rule", capsys=capsys)
    path = Path("other_rule.rule")
    path.write_text(path.read_text().replace("max(p_on, floor)", "max(p_on ** 2, floor)"))
    code, out, _ = priority("test", "other_rule.rule", "--against", "test_other_rule:by_hand", capsys=capsys)
    assert code == 1
    assert "FAIL  equals test_other_rule:by_hand" in out
    assert out.count("  ok    ") == 6


def test_a_broken_promise_is_shown_with_its_batch(monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    import torch

    from priority_dsl.rule import CompiledRule

    monkeypatch.setattr(CompiledRule, "weights", lambda self, z, y, **_: torch.full(y.shape, 2.0))
    code, out, _ = priority("test", "dft", capsys=capsys)
    assert code == 1
    assert "  FAIL  weights are finite and in their range\n        a weight is 2.0, outside [0, 1]\n" in out
    assert "        Case(logits=" in out


def test_checking_a_rule_imports_no_torch():
    program = (
        "import sys; from trainer.cli import main; code = main(['check', 'mass(ref) >= 0.5']);"
        "print(code, [m for m in ('torch', 'transformers', 'accelerate', 'datasets') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 []"
    control = program.replace("from trainer.cli", "import torch; from trainer.cli")
    ran = subprocess.run([sys.executable, "-c", control], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 ['torch']", "the test itself can see an import"


def test_train_from_the_command_line(model: str, sums: str, tmp_path: Path, capsys: Capture):
    output = tmp_path / "run"
    words = ["train", "--model", model, "--data", sums, "--rule", "sg(p_on) ** (1/tau)", "--set", "tau=2",
             "--max-steps", "2", "--output", str(output), "--device", "cpu"]  # fmt: skip
    code, out, err = priority(*words, capsys=capsys)
    assert code == 0
    assert out == ""
    assert "data: 24 rows" in err
    assert [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()] == [1, 2]
    again = ["train", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    code, _, err = priority(*again, capsys=capsys)
    assert (code, err) == (0, "")
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "again"))
    assert first == second


def test_a_real_model_on_real_text(data_dir: Path, tmp_path: Path, capsys: Capture):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    model, data = str(data_dir / "models/stories260K"), str(data_dir / "eval/gsm8k_test.jsonl")
    words = ["train", "--model", model, "--data", data, "--rule", "mass(ref) >= 0.5", "--max-steps", "2"]
    words += ["--output", str(output), "--device", "cpu"]
    assert priority(*words, capsys=capsys)[0] == 0
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert 0.1 < lines[0]["weight_mean"] < 0.5
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == 260032
