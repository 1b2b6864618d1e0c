"""Chance and schedules in a run: the same draws for any layout, over processes, and after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from priority_dsl.vocabulary.chance import drawn
from tests.trainer.test_distributed import torchrun, weights
from trainer.config import TrainConfig
from trainer.train import Outcome, train

RULES = {
    "tokens": "bernoulli(0.5)",
    "examples": "normalize = kept; weight = bernoulli(0.5, example)",  # counts need the same draws
    "all": "bernoulli(p_on ** 0.05) * ramp(0, 0.5) + uniform(example) * (epoch == 1)",
}
Run = Callable[..., Outcome]


@pytest.fixture
def shared(model: str, write: Callable[..., str]) -> dict[str, Any]:
    """Thirteen rows, so that the last step of an epoch is a short one; three epochs of two steps."""
    rows = [{"prompt": f"what is {i} ?", "completion": " 1" * (1 + i % 6)} for i in range(13)]
    return {
        "model": model, "data": [write("rows.jsonl", rows)], "epochs": 3, "learning_rate": 1e-4,
        "schedule": "constant", "warmup": 0, "device": "cpu", "quiet": True, "seed": 5,
    }  # fmt: skip


@pytest.fixture
def run(shared: dict[str, Any], tmp_path: Path) -> Run:
    def go(name: str, rule: str, **options: Any) -> Outcome:
        settings = {**shared, "batch_size": 8, **options, "rule": rule, "output": str(tmp_path / name)}
        return train(TrainConfig(**settings))

    return go


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one: Path, other: Path) -> None:
    """Assert that two runs saw the same weights and end with the same parameters."""
    for both in zip(log(one), log(other), strict=True):
        assert both[0] == pytest.approx(both[1], rel=1e-6, abs=1e-5)
    # AdamW makes of a gradient near 0 a step of the rate, 1e-4, times its rounding.
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=5e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_accumulation_changes_no_draw(rule: str, run: Run):
    whole = run("whole", rule)
    same(whole.output, run("parts", rule, batch_size=2, accumulation=4).output)
    means = [line["weight_mean"] for line in log(whole.output)]
    assert len(set(means)) > 3, "epochs and steps draw anew"
    other = run("seed", rule, seed=6)
    assert means != [line["weight_mean"] for line in log(other.output)]
    assert (weights(other.output) - weights(whole.output)).abs().max() > 1e-4


def test_two_processes_draw_as_one(shared: dict[str, Any], run: Run, tmp_path: Path):
    two = [
        {**shared, "rule": rule, "output": str(tmp_path / f"two-{name}"), "batch_size": 2, "accumulation": 2}
        for name, rule in RULES.items()
    ]
    ran = torchrun(two, tmp_path)
    for name, settings in zip(RULES, two, strict=True):
        output = Path(settings["output"])
        for rank in (0, 1):
            told = Path(f"{output}.rank{rank}.json")
            seen = json.loads(told.read_text()) if told.exists() else ran.stderr
            assert seen == {"rank": rank, "world": 2, "step": 6}
        same(output, run(f"one-{name}", RULES[name]).output)


def test_the_draws_of_a_run_are_those_of_the_data_set_rows(run: Run):
    """All rows in one step: the mean weight is that of rows 0 to 12, epoch by epoch."""
    lines = log(run("all", "weight = uniform(example)", batch_size=13, epochs=2).output)
    lengths = [1 + i % 6 + 1 for i in range(13)]  # the end token is supervised too
    for epoch, line in enumerate(lines):
        assert line["supervised_tokens"] == sum(lengths)
        wanted = [drawn(5, epoch, row, 0, (1,)) * n for row, n in enumerate(lengths)]
        assert line["weight_mean"] == pytest.approx(sum(wanted) / sum(lengths), abs=1e-6)


def test_keep_draws_once(run: Run):
    """The same rows in every epoch: those that are drawn in epoch 0."""
    lines = log(run("keep", "keep = bernoulli(0.5, example); weight = 1", batch_size=13, epochs=2).output)
    kept = [row for row in range(13) if drawn(5, 0, row, 0, (1,)) < 0.5]
    assert 0 < len(kept) < 13
    assert [line["supervised_tokens"] for line in lines] == [sum(2 + i % 6 for i in kept)] * 2


@pytest.mark.parametrize("spread", [{"batch_size": 8}, {"batch_size": 2, "accumulation": 4}], ids=str)
def test_a_resumed_run_draws_as_if_it_had_not_stopped(
    spread: dict[str, int], run: Run, monkeypatch: pytest.MonkeyPatch
):
    import trainer.train as story

    def stops(run_: Any, step: int) -> float:
        if step == 4:  # in the middle of an epoch, one step past the checkpoint
            raise KeyboardInterrupt
        return update(run_, step)

    update = story.update
    straight = run("straight", RULES["all"])
    monkeypatch.setattr(story, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        run("broken", RULES["all"], save_steps=3)
    monkeypatch.setattr(story, "update", update)
    resumed = run("broken", RULES["all"], save_steps=3, resume=True, **spread)
    same(resumed.output, straight.output)
    if spread["batch_size"] == 8:
        assert log(resumed.output) == log(straight.output)


def test_a_schedule_follows_completed_steps(run: Run):
    lines = log(run("ramp", "weight = ramp(0.25, 0.75)", epochs=4).output)  # eight steps
    wanted = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [line["weight_mean"] for line in lines] == pytest.approx(wanted)
    lines = log(run("never", "weight = progress < 1", epochs=4).output)
    assert [line["weight_mean"] for line in lines] == [1.0] * 8
