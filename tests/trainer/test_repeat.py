"""`priority train --from RUN`: the same bits again, and a word about everything that is not the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.records.manifest
import trainer.records.repeat
from priority_dsl import library
from trainer.cli import main

Capture = pytest.CaptureFixture[str]
RULE = 'param t = 0.5 in [0, 1]\nweight = rule("prift_mass", tau=t) * bernoulli(0.8) + 0.1 * rule("dft")'


@pytest.fixture
def place(model: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with MODEL, sums.jsonl and more.jsonl; the cache is in it too."""
    shutil.copytree(model, tmp_path / "MODEL")
    shutil.copy(sums, tmp_path / "more.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(place: Path, capsys: Capture) -> Callable[..., tuple[int, str]]:
    """`priority train` on the sums, three steps; exit code and what it says on standard error."""

    def go(*words: str) -> tuple[int, str]:
        code = main(["train", *words])
        return code, capsys.readouterr().err

    return go


FIRST = ["--model", "MODEL", "--data", "sums.jsonl", "--eval-data", "more.jsonl", "--device", "cpu",
         "--max-steps", "3", "--learning-rate", "1e-2", "--dtype", "fp32", "--accumulation", "2",
         "--batch-size", "2", "--weight-decay", "0.1", "--seed", "5", "--rule", RULE,
         "--set", "t=0.3", "--output", "RUN"]  # fmt: skip


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def manifest(folder: str = "RUN") -> dict[str, Any]:
    return json.loads(Path(folder, "manifest.json").read_text())


def test_the_same_run_again_bit_for_bit(run: Callable[..., tuple[int, str]], place: Path) -> None:
    assert run(*FIRST)[0] == 0
    assert run("--from", "RUN")[0] == 0
    assert weights("RUN-repeat") == weights("RUN")
    assert Path("RUN-repeat/rule.rule").read_text() == Path("RUN/rule.rule").read_text()
    assert run("--from=RUN-repeat", "--output", "THIRD", "--quiet") == (0, "")
    assert weights("THIRD") == weights("RUN"), "a repeated run can be repeated"
    lines = []
    for folder in ("RUN", "THIRD"):
        read = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
        lines.append([{name: v for name, v in line.items() if name != "seconds"} for line in read])
    assert lines[0] == lines[1]
    assert run("--from", "RUN", "--output", "OTHER", "--seed", "6")[0] == 0
    assert weights("OTHER") != weights("RUN"), "the test can see a difference"


def test_the_folder_says_what_the_run_was_made_of(run: Callable[..., tuple[int, str]], place: Path) -> None:
    assert run(*FIRST)[0] == 0
    known = manifest()
    assert known["models"]["model"]["name"] == "MODEL"
    assert known["data"][0]["digest"] == trainer.records.manifest.file_digest(Path("sums.jsonl"))
    assert known["directory"] == str(place)
    assert {"python", "torch", "transformers", "priority_dsl"} <= known["versions"].keys()
    assert known["machine"]["processes"] == 1
    assert known["computed"] == {"mass(ref)": 24}
    assert sorted(p.name for p in Path("RUN/rules").iterdir()) == ["dft.rule", "prift_mass.rule"]
    assert Path("RUN/rules/dft.rule").read_text() == library.resolve("dft").text


def test_it_is_repeated_from_another_place(
    run: Callable[..., tuple[int, str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*FIRST)[0] == 0
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert run("--from", "../RUN", "--output", "AGAIN")[0] == 0
    assert weights("AGAIN") == weights("../RUN")


def test_the_rule_is_the_runs_although_the_library_has_changed(
    run: Callable[..., tuple[int, str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*FIRST)[0] == 0
    changed = place / "rules"
    shutil.copytree(library.rules_folder(), changed)
    (changed / "dft.rule").write_text("weight = 1 - p_on\n")
    (changed / "prift_mass.rule").unlink()
    monkeypatch.setattr(library, "rules_folder", lambda: changed)
    assert run("--from", "RUN")[0] == 0
    assert weights("RUN-repeat") == weights("RUN")
    assert Path("RUN-repeat/rules/dft.rule").read_text() == Path("RUN/rules/dft.rule").read_text()
    assert run(*FIRST[:-1], "NEW")[0] == 2, "without --from the library is what it is now"


def test_changed_data_are_refused(run: Callable[..., tuple[int, str]], place: Path) -> None:
    assert run(*FIRST)[0] == 0
    with Path("sums.jsonl").open("a") as file:
        file.write('{"prompt": "one", "completion": " more"}\n')
    code, said = run("--from", "RUN")
    assert code == 2
    assert "--from: sums.jsonl is not what the run RUN read: its content has changed" in said
    assert not Path("RUN-repeat").exists()
    code, said = run("--from", "RUN", "--allow-changed")
    assert code == 0
    assert "its content has changed" in said
    code, said = run("--from", "RUN", "--data", "more.jsonl", "--output", "MORE")
    assert (code, weights("MORE")) == (0, weights("RUN")), "the same rows under another name are the same"
    assert "has changed" not in said
    Path("more.jsonl").write_text('{"prompt": "one", "completion": " more"}\n')
    assert "more.jsonl is not" in run("--from", "RUN", "--data", "sums.jsonl")[1], "held-out data too"


def test_a_changed_model_is_refused(
    run: Callable[..., tuple[int, str]], place: Path, other_model: str
) -> None:
    assert run(*FIRST)[0] == 0
    shutil.copy(Path(other_model, "model.safetensors"), "MODEL/model.safetensors")
    code, said = run("--from", "RUN")
    assert code == 2
    assert "--from: MODEL is not what the run RUN read" in said
    code, said = run("--from", "RUN", "--model", "MODEL")
    assert code == 0, "named by a flag, it is meant"
    assert "MODEL is not what" in said


def test_other_versions_and_threads_are_told(
    run: Callable[..., tuple[int, str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*FIRST)[0] == 0
    known = manifest()
    known["versions"]["torch"] = "1.0"
    known["machine"]["threads"] = 99
    Path("RUN/manifest.json").write_text(json.dumps(known))
    code, said = run("--from", "RUN")
    assert code == 0
    assert "torch was 1.0 and is" in said
    assert "threads: the run had 99, here it is" in said
    Path("RUN/manifest.json").unlink()
    assert "RUN has no manifest" in run("--from", "RUN", "--output", "AGAIN")[1]


def test_flags_go_over_the_run(run: Callable[..., tuple[int, str]], place: Path) -> None:
    assert run(*FIRST)[0] == 0
    assert run("--from", "RUN", "--rule", "sft", "--output", "SFT")[0] == 0, "tau of the old rule is left out"
    assert Path("SFT/rule.rule").read_text().endswith("weight = 1\n")
    assert not Path("SFT/rules").exists()
    assert run("--from", "RUN", "--set", "t=0.9", "--output", "NINE")[0] == 0
    assert Path("NINE/rule.rule").read_text().startswith("# run with --set t=0.9\n")
    assert weights("NINE") != weights("RUN")
    assert run("--from", "RUN", "--dry-run")[0] == 0
    assert not Path("RUN-repeat").exists()


def test_a_resumed_run_says_so(run: Callable[..., tuple[int, str]], place: Path) -> None:
    assert run(*FIRST, "--save-steps", "3")[0] == 0
    before = manifest()
    assert run(*FIRST, "--save-steps", "3", "--resume", "--max-steps", "4")[0] == 0
    after = manifest()
    assert len(after.pop("resumed")) == 1
    assert after == before
    assert run(*FIRST, "--resume", "--max-steps", "5", "--eval-data", "sums.jsonl")[0] == 0
    assert manifest()["eval_data"][-1]["source"] == "sums.jsonl", "a resumed run may measure other rows"
    assert run("--from", "RUN")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from"], "--from: a value is missing"),
        (["--from", "NONE"], "--from NONE: is not the folder of a run: it has no config.yaml"),
        (["--from", "RUN", "--config", "a.yaml"], "--from and --config: give one"),
        (["--allow-changed"], "--allow-changed needs --from"),
    ],
)
def test_mistakes(words: list[str], message: str, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(*words)
    assert (code, said.startswith(f"error: {message}")) == (2, True), said
