"""Early stopping: when it ends a run, what is kept then, and that a resumed run remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.train
from trainer.config import TrainConfig
from trainer.stopping import Stopping
from trainer.train import Outcome, train

Run = Callable[..., Outcome]


def stopping(patience: int | None, delta: float = 0.0) -> Stopping:
    measured: dict[str, Any] = {"eval_data": ("e",), "eval_steps": 1} if patience else {}
    return Stopping(
        TrainConfig(model="M", data=("D",), rule="sft", patience=patience, min_delta=delta, **measured)
    )


@pytest.mark.parametrize(
    ("patience", "delta", "nlls", "at"),
    [
        (2, 0.0, [3.0, 2.0, 2.0, 2.1, 1.0], 4),
        (1, 0.0, [3.0, 2.9, 2.8, 2.8], 4),
        (2, 0.5, [3.0, 2.8, 2.6, 1.0], 3),
        (2, 0.5, [3.0, 2.8, 2.4, 2.0, 2.0], 5),
        (3, 0.0, [3.0, 3.1, 3.2, 2.9, 3.0, 3.0], None),
        (None, 0.0, [3.0] * 9, None),
    ],
)
def test_it_counts_measurements_that_are_not_lower(
    patience: int | None, delta: float, nlls: list[float], at: int | None
):
    of = stopping(patience, delta)
    ends = [step for step, nll in enumerate(nlls, 1) if of.take(step, nll)]
    assert (ends[:1] or [None])[0] == at
    other = stopping(patience, delta)
    for step, nll in enumerate(nlls, 1):  # remembered after every measurement, through JSON
        again = stopping(patience, delta)
        again.restore(json.loads(json.dumps(other.state())))
        other = again
        assert other.take(step, nll) == (at is not None and step >= at) or step > (at or 99)


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    """Pushes the held-out rows away, so that every measurement is worse than the first."""

    def go(name: str, **options: Any) -> Outcome:
        settings = {
            "model": model, "data": sums, "rule": "-1", "max_steps": 8, "eval_data": sums, "eval_steps": 1,
            "learning_rate": 1e-2, "quiet": True, "device": "cpu", "output": str(tmp_path / name),
            "save_steps": 2, "patience": 2, **options,
        }  # fmt: skip
        return train(TrainConfig(**settings))

    return go


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]
    )


def test_a_run_ends_early(run: Run, capsys: pytest.CaptureFixture[str]):
    outcome = run("run", quiet=False)
    assert outcome.step == 3
    assert [line["step"] for line in lines(outcome)] == [1, 1, 2, 2, 3, 3]
    assert "stopped early: the held-out nll was" in (said := capsys.readouterr().err)
    assert "at step 1 and not lower in 2 measurements since" in said
    whole = lines(run("whole", patience=None))
    assert lines(outcome) == whole[:6], "the schedule follows the planned steps"
    assert torch.equal(weights(outcome.output), weights(outcome.output / "checkpoints" / "step-3"))


def test_the_best_stays_with_keep_best(run: Run):
    outcome = run("run", keep_best=True, keep_last=1)
    kept = {path.name for path in (outcome.output / "checkpoints").glob("step-*")}
    assert kept == {"step-1", "step-3"}


def test_a_resumed_run_remembers(run: Run, monkeypatch: pytest.MonkeyPatch):
    real = trainer.train.take_step

    def take_step(of: Any, now: Any, moment: Any, shown: bool) -> Any:
        if moment.step == 2:
            raise KeyboardInterrupt
        return real(of, now, moment, shown)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.train, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    resumed = run("parts", resume=True)
    assert resumed.step == 3, "one more measurement, not two"
    assert lines(resumed) == lines(run("straight"))
    assert run("parts", resume=True).step == 3, "it has ended, and ends at once"
    assert run("parts", resume=True, patience=4).step == 5
