"""`priority sweep` over tau on countdown, from the command line as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.precompute
from trainer.cli import main
from trainer.demo.countdown import right
from trainer.demo.files import write_files

Capture = pytest.CaptureFixture[str]
EVERY = ["--config", "countdown/base.yaml", "--eval-config", "countdown/eval.yaml", "--rule", "prift_mass",
         "--cache", "cache", "--output", "SWEEP", "--quiet"]  # fmt: skip


@pytest.fixture
def rows_through_frozen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each batch has that goes through frozen models before training."""
    seen: list[int] = []
    plain = trainer.precompute.statistics_of

    def counting(rule: Any, of: Any, models: Any, batch: Any, *rest: Any) -> Any:
        seen.append(len(batch.input_ids))
        return plain(rule, of, models, batch, *rest)

    monkeypatch.setattr(trainer.precompute, "statistics_of", counting)
    return seen


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Callable[..., dict[str, Any]]:
    """Runs a sweep on countdown and returns sweep.json."""
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> dict[str, Any]:
        code = main(["sweep", *EVERY, *words])
        assert code == 0, capsys.readouterr().err
        with capsys.disabled():
            print(f"\n{capsys.readouterr().out}")
        return json.loads(Path("SWEEP/sweep.json").read_text())

    return go


def test_a_small_sweep_over_tau(table: Callable[..., dict[str, Any]], rows_through_frozen: list[int]) -> None:
    write_files(Path("countdown"), seed=0, rows=128, problems=6)
    found = table("--grid", "tau=0,0.5", "--seeds", "0,1", "--epochs", "1")
    assert sum(rows_through_frozen) == 128 + 6, "one pass of the reference in all"
    assert [run["frozen"] for run in found["runs"]] == [134, 0, 0, 0]
    figures = found["rows"]["prift_mass tau=0.5"]["figures"]
    assert list(figures) == ["nll", "accuracy", "avg@32", "pass@4", "pass@16", "pass@32", "entropy", "kl"]
    assert all(figure["n"] == 2 and figure["half"] is not None for figure in figures.values())
    assert 0.05 < figures["avg@32"]["value"] < 0.7


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sweep_over_tau(table: Callable[..., dict[str, Any]], rows_through_frozen: list[int]) -> None:
    write_files(Path("countdown"), seed=0)
    found = table("--grid", "tau=0,0.25,0.5,0.75,1", "--seeds", "0,1,2")
    assert [bool(run["frozen"]) for run in found["runs"]] == [True] + 14 * [False]
    assert sum(rows_through_frozen) == found["runs"][0]["frozen"] <= 3000 + 192, "one pass in all"
    rows = found["rows"]
    avg = {label: row["figures"]["avg@32"] for label, row in rows.items()}
    assert all(figure["n"] == 3 for figure in avg.values())
    for tau in ("0.25", "0.5", "0.75", "1"):
        apart = rows[f"prift_mass tau={tau}"]["differences"]["avg@32"]
        assert apart["value"] - apart["half"] > 0.05, (
            "leaving out what ref finds unlikely leaves out the noise"
        )


def test_the_task_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--write", "task", "--rule", "dft"]) == 2
    assert main(["demo", "--write", "task"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"wrote task/{name}" for name in ("train.jsonl", "held_out.jsonl", "base", "base.yaml", "eval.yaml")
    ]
    rows = [json.loads(line) for line in Path("task/held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 192
    assert all(right(row["completion"], "", row) for row in rows)
    assert not right("1 + 1 = 2 ; 2 + 1 = 3", "", rows[0])
    with pytest.raises(ValueError, match="is not like"):
        right("", "", {"prompt": "what is 1 + 1 ?"})
    assert main(["demo", "--write", "task"]) == 2
    assert "task: is there already" in capsys.readouterr().err
