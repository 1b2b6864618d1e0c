"""`priority sweep`: what is run, that nothing is computed twice, what a failure does, and the table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.precompute
import trainer.sweep.run
from trainer.cli import main
from trainer.faults import RunFault
from trainer.train import train

Capture = pytest.CaptureFixture[str]
Sweep = Callable[..., int]


@pytest.fixture
def sweep(model: str, sums: str, tmp_path: Path) -> Sweep:
    """`priority sweep` on the sums, two steps a run, into tmp_path/sweep with a cache of its own."""

    def go(*words: str) -> int:
        base = ["--model", model, "--data", sums, "--eval-data", sums, "--device", "cpu", "--max-steps", "2",
                "--learning-rate", "1e-2", "--cache", str(tmp_path / "cache"),
                "--output", str(tmp_path / "sweep")]  # fmt: skip
        return main(["sweep", *base, *words])

    return go


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that goes through frozen models before training."""
    seen: list[int] = []
    plain = trainer.precompute.statistics_of

    def counting(rule: Any, of: Any, models: Any, batch: Any, *rest: Any) -> Any:
        seen.append(len(batch.input_ids))
        return plain(rule, of, models, batch, *rest)

    monkeypatch.setattr(trainer.precompute, "statistics_of", counting)
    return seen


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


GRID = ["--rule", "prift_mass", "--grid", "tau=0,0.5", "--seeds", "0,1"]


def test_the_reference_runs_once_for_all_values_and_seeds(
    sweep: Sweep, forwards: list[int], tmp_path: Path, capsys: Capture
) -> None:
    assert sweep(*GRID, "--max-steps", "3", "--quiet") == 0
    shown = capsys.readouterr().out
    assert sum(forwards) == 24, "each of the 24 rows once, held out or not"
    assert "Frozen models: 24 rows in 1 of 4 runs" in shown
    runs = found(tmp_path / "sweep")["runs"]
    assert [(run["label"], run["seed"]) for run in runs] == [
        (f"prift_mass tau={tau}", seed) for tau in ("0", "0.5") for seed in (0, 1)
    ]
    assert [run["frozen"] for run in runs] == [24, 0, 0, 0]
    nll = {(run["label"], run["seed"]): run["figures"]["nll"] for run in runs}
    assert len(set(nll.values())) == 4, "every run is another one"


def test_runs_are_those_of_priority_train(sweep: Sweep, tmp_path: Path, model: str, sums: str) -> None:
    from trainer.config import TrainConfig

    assert sweep("--rule", "prift_mass", "--grid", "tau=0.2", "--seeds", "3", "--quiet") == 0
    settings = {"model": model, "data": (sums,), "eval_data": (sums,), "device": "cpu", "quiet": True,
                "max_steps": 2, "learning_rate": 1e-2, "rule": "prift_mass", "set": {"tau": 0.2}}  # fmt: skip
    alone = train(TrainConfig(**settings, seed=3, output=str(tmp_path / "alone")))
    ours = tmp_path / "sweep" / "prift_mass-tau=0.2" / "seed-3"
    assert (ours / "model.safetensors").read_bytes() == (alone.output / "model.safetensors").read_bytes()
    assert alone.evaluation is not None
    figures = found(tmp_path / "sweep")["runs"][0]["figures"]
    assert figures == {"nll": alone.evaluation.nll, "accuracy": alone.evaluation.accuracy}


def test_a_sweep_that_stopped_goes_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    trained: list[str] = []

    def stops(config: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.output)
        return train(config)

    monkeypatch.setattr(trainer.sweep.run, "train", stops)
    assert sweep(*GRID, "--quiet") == 130
    assert not (tmp_path / "sweep" / "sweep.md").exists()

    def counts(config: Any) -> Any:
        trained.append(config.output)
        return train(config)

    monkeypatch.setattr(trainer.sweep.run, "train", counts)
    capsys.readouterr()
    assert sweep(*GRID, "--list") == 0
    shown = capsys.readouterr().out
    assert shown.count("finished ") == 2
    assert "4 runs, 2 to do" in shown
    assert sweep(*GRID, "--quiet") == 0
    assert len(trained) == len(set(trained)) == 4, "no run twice"
    first = found(tmp_path / "sweep")
    assert sweep(*GRID, "--quiet") == 0
    assert len(trained) == 4
    assert found(tmp_path / "sweep") == first
    assert sweep(*GRID, "--quiet", "--overwrite") == 0
    assert len(trained) == 8
    again = found(tmp_path / "sweep")
    assert [run["figures"] for run in again["runs"]] == [run["figures"] for run in first["runs"]]


def test_a_run_that_fails_is_told_and_the_others_go_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fails(config: Any) -> Any:
        if config.set == {"tau": 0.5} and config.seed == 0:
            raise RunFault("step 2: the loss is not finite")
        if config.set == {"tau": 0.0}:
            raise MemoryError("no memory")
        return train(config)

    monkeypatch.setattr(trainer.sweep.run, "train", fails)
    assert sweep(*GRID, "--quiet") == 1
    shown = capsys.readouterr()
    assert "[3/4] prift_mass tau=0.5 seed 0: failed: step 2: the loss is not finite" in shown.err
    assert "failed: MemoryError: no memory" in shown.err
    assert "1 (1 failed)" in shown.out
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| prift_mass tau=0.5 | 1 (1 failed) |" in table
    assert "| prift_mass tau=0 | 0 (2 failed) | - | - |" in table
    assert "- prift_mass tau=0.5 seed 0: step 2: the loss is not finite" in table
    monkeypatch.setattr(trainer.sweep.run, "train", train)
    assert sweep(*GRID, "--quiet") == 0, "the failed runs, and they alone, are run again"
    assert "failed" not in (tmp_path / "sweep" / "sweep.md").read_text()


def test_rules_and_settings_are_axes_too(sweep: Sweep, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.rule").write_text("param t = 1\nweight = p_on ** t\n")
    words = ["--rules", "sft", str(tmp_path / "mine.rule"), "-p_on + 1", "--grid", "t=1,2",
             "--grid", "learning_rate=1e-3,1e-2", "--list"]  # fmt: skip
    assert sweep(*words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in shown[:-1]] == [
        f"{rule} learning_rate={rate} seed 0"
        for rule in ("sft", "mine t=1", "mine t=2", "-p_on + 1")
        for rate in ("1e-3", "1e-2")
    ]
    assert not (tmp_path / "sweep").exists(), "--list writes nothing"
    assert len({line.split("  ")[-2] for line in shown[:-1]}) == 8, "a folder each"


def test_a_file_of_sweep_settings(sweep: Sweep, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("rules: [sft, prift_mass]\ngrid: {tau: [0.1, 0.2], weight_decay: 0.1}\nseeds: [0, 1]\n")
    assert sweep("--config", str(file), "--list") == 0
    assert "6 runs, 6 to do" in capsys.readouterr().out
    base = tmp_path / "base.yaml"
    base.write_text("rule: dft\nseed: 7\n")
    assert sweep("--config", str(base), "--list") == 0
    assert "dft seed 7" in capsys.readouterr().out
    assert sweep("--config", str(base), "--rules", "sft", "--seeds", "1", "--list") == 0
    assert "sft seed 1" in capsys.readouterr().out


MISTAKES = {
    "no rule": ([], "--rules is missing"),
    "both": (["--rule", "sft", "--rules", "dft"], "--rule and --rules: give one"),
    "dry run": (["--rule", "sft", "--dry-run"], "--dry-run shows a single run; --list"),
    "push": (["--rule", "sft", "--push-to-hub", "a/b"], "--push-to-hub: a sweep has many models"),
    "both seeds": (["--rule", "sft", "--seed", "1", "--seeds", "0"], "--seed and --seeds: give one"),
    "seed twice": (["--rule", "sft", "--seeds", "1,1"], "--seeds: a seed is given twice"),
    "value twice": ([*GRID[:2], "--grid", "tau=0,0"], "--grid tau: a value is given twice"),
    "rule twice": (["--rules", "sft", "sft"], "--rules: two of them are called sft"),
    "misspelt rule": (["--rules", "sft", "dtf"], "error[PD201]: the library has no rule `dtf`"),
    "misspelt axis": ([*GRID[:2], "--grid", "tua=0,1"], "--grid tua: no rule has such a parameter"),
    "no number": ([*GRID[:2], "--grid", "tau=0,x"], "--grid tau=x: a parameter of a rule is a number"),
    "out of range": ([*GRID[:2], "--grid", "tau=0,2"], "error[PD307]: the value given for `tau` is 2"),
    "bad setting": (["--rule", "sft", "--grid", "learning_rate=0"], "--grid learning_rate=0: input"),
    "own axis": (["--rule", "sft", "--grid", "seed=0,1"], "--grid seed: --seeds names the seeds"),
    "set for none": (["--rules", "sft", "dft", "--set", "tau=1"], "--set tau: no rule of the sweep reads it"),
    "baseline": ([*GRID, "--baseline", "dft"], "--baseline dft: no such run; they are prift_mass tau=0,"),
    "k without checker": (["--rule", "sft", "--k", "1"], "--k needs --checker"),
    "eval config": (["--rule", "sft", "--eval-config", "none.yaml"], "--eval-config none.yaml: cannot"),
    "seed word": (["--rule", "sft", "--seeds", "a"], "--seeds 0: input should be a valid integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_before_anything_runs(
    case: str, sweep: Sweep, tmp_path: Path, capsys: Capture
) -> None:
    words, message = MISTAKES[case]
    assert sweep(*words) == 2
    said = capsys.readouterr().err
    assert said.removeprefix("error: ").startswith(message), said
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_holds_something_else_is_left_alone(
    sweep: Sweep, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("mine")
    assert sweep(*GRID, "--overwrite") == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "sweep").iterdir()] == ["thesis.txt"]


def test_other_settings_in_the_same_folder_are_refused(sweep: Sweep, capsys: Capture) -> None:
    words = ["--rule", "sft", "--quiet"]
    assert sweep(*words) == 0
    assert sweep(*words, "--clip", "2") == 2
    assert "`clip` was 1.0" in capsys.readouterr().err


def test_samples_are_checked_and_become_columns(sweep: Sweep, tmp_path: Path) -> None:
    settings = tmp_path / "eval.yaml"
    settings.write_text("max_new_tokens: 4\nlimit: 3\ntemperature: 0.7\n")
    words = ["--rules", "sft", "dft", "--samples", "2", "--checker", "exact", "--k", "1", "2"]
    assert sweep(*words, "--eval-config", str(settings), "--quiet") == 0
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == ["sft", "dft"]
    assert {"nll", "accuracy", "avg@2", "pass@1", "pass@2"} <= set(lines[0])
    before = json.loads((tmp_path / "sweep" / "sft" / "seed-0" / "figures.json").read_text())
    assert before["asked"]["measured"]["limit"] == 3
    settings.write_text("max_new_tokens: 5\nlimit: 2\n")
    assert sweep(*words, "--eval-config", str(settings), "--quiet") == 0
    after = json.loads((tmp_path / "sweep" / "sft" / "seed-0" / "figures.json").read_text())
    assert after["asked"]["measured"]["limit"] == 2, "measured anew"
    assert after["asked"]["run"] == before["asked"]["run"], "not trained anew"


def test_processes_are_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep("--rule", "sft") == 2
    assert "a sweep runs in one process" in capsys.readouterr().err
