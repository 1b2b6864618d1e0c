"""What stops a run, and what it leaves: full disks, vanished files, losses not finite, explosions."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.train as story
from tests.trainer.killing import Killer
from tests.trainer.test_distributed import torchrun
from tests.trainer.test_resume import files, log, state, steps
from trainer.checkpoints import check_whole
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.faults import RunFault
from trainer.health import PATIENCE, ROOM, Health
from trainer.train import Outcome, train

Run = Callable[..., Outcome]
COLUMN = "column noise: number; "


@pytest.fixture
def settings(model: str, sums: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": model, "data": [sums], "rule": "mass(ref) >= 0.2", "device": "cpu", "learning_rate": 1e-2,
        "max_steps": 6, "save_steps": 2, "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache"),
    }  # fmt: skip


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Run:
    def go(name: str = "run", **options: Any) -> Outcome:
        own = {"output": str(tmp_path / name), "quiet": True}
        return train(TrainConfig(**{**settings, **own, **options}))

    return go


def weights(folder: Path) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]
    )


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same model, bit for bit, and the same log."""
    assert files(one) == files(other)
    assert [{**line, "seconds": 0} for line in log(one)] == [{**line, "seconds": 0} for line in log(other)]


# A full disk ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    made = Killer(tmp_path_factory.mktemp("killer"))
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of its own of so many bytes; called again, it gets another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def of(size: int) -> Path:
        again = ["-o", f"remount,size={size}"] if place.is_mount() else ["-o", f"size={size}"]
        made = subprocess.run(
            ["mount", "-t", "tmpfs", *again, "tmpfs", str(place)], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip("only root may mount a disk of its own")
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    yield of
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "shares",
    [(2.6,), pytest.param((0.3, 0.5, 0.9, 1.2, 1.6, 2.1, 3.4, 6.05, 6.3, 6.9), marks=pytest.mark.slow)],
    ids=["one size", "many sizes"],
)
def test_a_full_disk_stops_the_run_and_costs_nothing(
    shares: tuple[float, ...],
    run: Run,
    settings: dict[str, Any],
    killer: Killer,
    disk: Callable[[int], Path],
):
    """Each size of the disk is full at another file of another checkpoint, or at the trained model."""
    whole = run("whole", save_steps=1)
    size = sum(p.stat().st_size for p in (whole.output / "checkpoints" / "step-1").iterdir())
    stopped = set()
    for share in shares:
        folder = disk(int(size * share)) / "run"
        own = {**settings, "output": str(folder), "save_steps": 1}
        first = killer.run(own)
        assert first.code == 1, f"{share}: {first.said}"
        assert "No space left on device" in first.said, first.said
        assert "Traceback" not in first.said
        checkpoints = folder / "checkpoints"
        for name in steps(folder) if checkpoints.exists() else []:
            check_whole(checkpoints / name)
        stopped.add(len(list(checkpoints.glob("step-*"))))
        said = first.said.splitlines()[-1]
        assert "step " in said or "the trained model" in said or "cannot be written" in said
        disk(size * 20)
        assert killer.run({**own, "resume": True}).code == 0
        same_run(folder, whole.output)
        shutil.rmtree(folder)
    assert len(stopped) >= min(4, len(shares)), "it stopped at different places"


LIMIT = """
import resource
import {module} as place
call = place.{name}
def limited(*given, **named):
    if {when}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    return call(*given, **named)
place.{name} = limited
"""
# What is being written when no file may grow any more, beyond so many bytes, and what is said of it.
FULL = {
    "optimizer": (
        {"module": "trainer.train", "name": "save_checkpoint", "when": "given[1] == 4", "size": 100_000},
        "step 4: the checkpoint .*step-4 cannot be written: .*; the checkpoint .*step-2 is whole",
    ),
    "model": (
        {"module": "trainer.train", "name": "save_checkpoint", "when": "given[1] == 4", "size": 20_000},
        "step 4: the checkpoint .*step-4 cannot be written: .*; the checkpoint .*step-2 is whole",
    ),
    "log": (
        {"module": "trainer.train", "name": "step_line", "when": "given[1].step == 3", "size": 1000},
        "step 4: the log .*log.jsonl cannot be written: .*File too large",
    ),
    "cache": (
        {"module": "trainer.precompute", "name": "statistics_of", "when": "True", "size": 1200},
        "--cache .*cache: cannot be written: .*File too large.*",
    ),
    "trained model": (
        {"module": "trainer.train", "name": "save_model", "when": "True", "size": 20_000},
        "the trained model cannot be written into .*; the checkpoint .*step-6 is whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] if what == "optimizer" else []) for what in FULL]
)
def test_a_file_that_cannot_grow_stops_the_run(
    what: str, run: Run, settings: dict[str, Any], killer: Killer, tmp_path: Path
):
    values, message = FULL[what]
    patch = LIMIT.format(**values)
    own = {**settings, "output": str(tmp_path / "full")}
    ran = killer.run(own, patch=patch)
    assert ran.code == 1, ran.said
    assert "Traceback" not in ran.said
    assert re.search(message, ran.said), ran.said
    assert killer.run({**own, "resume": True}).code == 0
    same_run(tmp_path / "full", run("whole").output)


# Files that vanish ---------------------------------------------------------------------------------


def vanishing(patch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """Have something vanish before a step, counted from 1."""
    update = story.update

    def vanishes(run: Any, at: int) -> float:
        if at + 1 == step:
            what()
        return update(run, at)

    patch.setattr(story, "update", vanishes)


def test_a_log_that_vanishes_stops_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vanishing(monkeypatch, 3, (tmp_path / "run" / "log.jsonl").unlink)
    with pytest.raises(RunFault, match=r"step 3: the log .* cannot be written: .*No such file"):
        run()
    check_whole(tmp_path / "run" / "checkpoints" / "step-2")


def test_an_output_folder_that_vanishes_stops_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vanishing(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(RunFault, match=r"step 2: the checkpoint .*step-2 cannot be written: .*No such file"):
        run(log_steps=6)
    assert not (tmp_path / "run").exists()


def test_data_and_cache_may_vanish_when_they_have_been_read(
    run: Run, tmp_path: Path, sums: str, monkeypatch: pytest.MonkeyPatch
):
    whole = run("whole")

    def gone() -> None:
        Path(sums).unlink()
        shutil.rmtree(tmp_path / "cache")

    vanishing(monkeypatch, 2, gone)
    same_run(run().output, whole.output)


# Explosions ----------------------------------------------------------------------------------------

PUSHED = {
    "rule": "-1",
    "learning_rate": 3.0,
    "warmup": 0,
    "schedule": "constant",
    "max_steps": 60,
    "save_steps": 1,
    "keep_last": 1,
}


def test_a_run_that_explodes_is_stopped(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(
        RunFault, match=r"^step \d+: the run explodes: .* in the rows .*sums\.jsonl:\d+"
    ) as stop:
        run(**PUSHED)
    lines = log(tmp_path / "run")
    limit = max(lines[0]["nll"], math.log(320)) + ROOM
    above = [line["step"] for line in lines if line["nll"] > limit]
    assert above == list(range(lines[-1]["step"] - PATIENCE + 1, lines[-1]["step"] + 1))
    assert str(stop.value).startswith(f"step {lines[-1]['step']}:")
    # The newest checkpoint is from before, though the explosion went on for longer than --keep-last.
    assert steps(tmp_path / "run") == [f"step-{above[0] - 1}"]
    check_whole(tmp_path / "run" / "checkpoints" / f"step-{above[0] - 1}")


def test_the_limit_can_be_set_and_switched_off(run: Run, tmp_path: Path):
    ended = run("off", **PUSHED, max_nll=0)
    assert ended.step == 60
    with pytest.raises(RunFault, match=r"above 7\.0 for 10 lines of the log"):
        run("low", **{**PUSHED, "learning_rate": 0.1}, max_nll=7)


def test_an_explosion_survives_a_resume(run: Run, tmp_path: Path):
    with pytest.raises(RunFault, match="explodes") as straight:
        run("straight", **{**PUSHED, "save_steps": 50})
    run("parts", **{**PUSHED, "max_steps": 2})
    with pytest.raises(RunFault, match="explodes") as resumed:
        run("parts", **PUSHED, resume=True)
    assert str(resumed.value) == str(straight.value)


def test_a_model_that_begins_badly_does_not_explode(
    run: Run, make_folder: Callable[..., str], tmp_path: Path
):
    bad = make_folder(tmp_path / "bad", seed=0, initializer_range=1.0)
    outcome = run(model=bad, rule="1", learning_rate=1e-4, max_steps=12, save_steps=12)
    assert log(outcome.output)[0]["nll"] > 2 * math.log(320)


SIGNED = {
    "forgetting_table": "-1 if label == neg else 1",
    "mild": "-0.3 if label == neg else 1",
    "asymmetric": "-0.5 * p_on if label == neg else 1",
}


@pytest.mark.parametrize("rule", SIGNED.values(), ids=SIGNED)
def test_signed_rules_in_normal_use_do_not_explode(rule: str, run: Run, write: Callable[..., str]):
    rows = [
        {"prompt": f"what is {i} ?", "completion": f" it is {i}", "label": "neg" if i % 4 == 0 else "pos"}
        for i in range(24)
    ]
    outcome = run(
        data=write("signed.jsonl", rows), rule=rule, learning_rate=2e-3, max_steps=40, save_steps=40
    )
    assert outcome.step == 40


def test_health_counts_lines_in_a_row() -> None:
    health = Health(TrainConfig(model="m", data="d", rule="1"), 1000)
    health.follow(1, 2.0, ["a:1"])
    assert health.limit == pytest.approx(math.log(1000) + ROOM)
    for step in range(PATIENCE - 1):
        health.follow(step, 99.0, ["a:1"])
    assert not health.well
    health.follow(20, 3.0, ["a:1"])
    assert health.well
    again = Health(TrainConfig(model="m", data="d", rule="1"), 1000)
    again.restore(json.loads(json.dumps(health.state())))
    for step in range(PATIENCE - 1):
        again.follow(step, 99.0, ["a:1"])
    with pytest.raises(RunFault, match=r"step 30: the run explodes: .* in the rows a:1;"):
        again.follow(30, 99.0, ["a:1"])


# Steps that are not finite -------------------------------------------------------------------------


@pytest.fixture
def noisy(write: Callable[..., str]) -> str:
    """Thirty-two rows; one of those in the first, the third and the last step divides by 0."""
    from trainer.batches import step_rows

    first, _, third, last = step_rows(32, 8, seed=0, epoch=0)
    zero = {first[3], third[5], last[0]}
    rows = [
        {"prompt": f"what is {i} ?", "completion": f" it is {i}", "noise": 0.0 if i in zero else 1.0}
        for i in range(32)
    ]
    return write("noisy.jsonl", rows)


def test_a_step_that_is_not_finite_stops_the_run_unless_it_is_skipped(
    run: Run, noisy: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    words = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k not in ("data", "rule")]
    words += ["--data", noisy, "--rule", COLUMN + "weight = p_on / noise", "--quiet"]
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert "step 1: the rule stopped in the rows" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("loss", ["fused", "dense"])
@pytest.mark.parametrize("layout", [{"batch_size": 8}, {"batch_size": 2, "accumulation": 4}], ids=str)
@pytest.mark.parametrize("normalize", ["tokens", "weights"])
def test_a_skipped_step_changes_nothing_but_the_schedule(
    normalize: str, layout: dict[str, int], loss: str, run: Run, noisy: str, monkeypatch: pytest.MonkeyPatch
):
    rule = f"{COLUMN}model slow = ema(0.5); weight = p(slow) / noise; normalize = {normalize}"
    options = {"data": noisy, "rule": rule, "loss": loss, "max_steps": 4, "save_steps": 1, **layout}
    seen: list[tuple[int, bool]] = []
    taking = story.take_step

    def looking(of: Any, now: Any, moment: Any, shown: bool) -> dict[str, Any]:
        def held() -> list[torch.Tensor]:
            states = [v for s in of.optimizer.state.values() for v in s.values()]
            slow = [p for average in of.moving.models.values() for p in average.model.parameters()]
            return [t.detach().clone() for t in (*of.policy.parameters(), *states, *slow)]

        before = held()
        line = taking(of, now, moment, shown)
        after = held()
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        seen.append((moment.step + 1, same))
        assert all(p.grad is None for p in of.policy.parameters())
        return line

    monkeypatch.setattr(story, "take_step", looking)
    outcome = run(skip_non_finite=True, **options)
    assert seen == [(1, True), (2, False), (3, True), (4, True)]
    lines = log(outcome.output)
    assert [line.get("skipped") for line in lines] == [1, None, 2, 3]
    assert all("noisy.jsonl:" in line["reason"] for line in lines if "skipped" in line)
    monkeypatch.undo()
    clean = run("clean", **{**options, "data": clean_of(noisy)})
    assert lines[1]["learning_rate"] == log(clean.output)[1]["learning_rate"], "the schedule goes on"
    assert torch.isfinite(weights(outcome.output)).all()


def clean_of(noisy: str) -> str:
    path = Path(noisy).with_name("clean.jsonl")
    path.write_text(Path(noisy).read_text().replace('"noise": 0.0', '"noise": 1.0'))
    return str(path)


def test_skipped_steps_survive_a_resume(run: Run, noisy: str):
    options = {
        "data": noisy,
        "rule": COLUMN + "weight = p_on / noise",
        "skip_non_finite": True,
        "save_steps": 1,
    }
    options |= {"schedule": "constant", "warmup": 0}
    straight = run("straight", max_steps=8, **options)
    run("parts", max_steps=3, **options)
    resumed = run("parts", max_steps=8, resume=True, **options)
    same_run(resumed.output, straight.output)
    counts = [line["skipped"] for line in log(resumed.output) if "skipped" in line]
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) >= 4, "some of them after the checkpoint"


def test_a_gradient_that_is_not_finite_is_skipped_or_names_the_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clip = story.clip

    def bursts(trained: Any, *rest: Any) -> float:
        bursts.calls += 1
        if bursts.calls == 3:
            for parameter in trained.parameters():
                parameter.grad.fill_(float("inf"))
        return clip(trained, *rest)

    bursts.calls = 0
    monkeypatch.setattr(story, "clip", bursts)
    with pytest.raises(
        RunFault, match=r"step 3: the gradient is not finite .*\(the rows of the step: .*jsonl:\d+"
    ):
        run()
    before = state(tmp_path / "run" / "checkpoints")
    assert steps(tmp_path / "run") == ["step-2"]
    bursts.calls = 0
    outcome = run("skipped", skip_non_finite=True)
    assert [line.get("skipped") for line in log(outcome.output)] == [None, None, 1, None, None, None]
    assert torch.isfinite(weights(outcome.output)).all()
    assert state(tmp_path / "run" / "checkpoints") == before


def test_a_dead_run_is_not_skipped_for_ever(run: Run, sums: str, tmp_path: Path, write: Callable[..., str]):
    rows = [{"prompt": "a", "completion": f" {i}", "noise": 0.0} for i in range(16)]
    options = {
        "data": write("dead.jsonl", rows),
        "rule": COLUMN + "weight = 1 / noise",
        "skip_non_finite": True,
    }
    with pytest.raises(RunFault, match=rf"(?s)^step {PATIENCE}: .*{PATIENCE} steps in a row were not finite"):
        run(max_steps=50, batch_size=2, save_steps=50, **options)
    assert [line["skipped"] for line in log(tmp_path / "run")] == list(range(1, PATIENCE))


def test_two_processes_skip_the_same_steps(run: Run, settings: dict[str, Any], noisy: str, tmp_path: Path):
    rule = COLUMN + "weight = p_on / noise; normalize = weights"
    options = {"data": [noisy], "rule": rule, "skip_non_finite": True, "max_steps": 4, "quiet": True}
    two = {**settings, **options, "output": str(tmp_path / "two"), "batch_size": 2, "accumulation": 2}
    ran = torchrun([two], tmp_path)
    assert (tmp_path / "two" / "finished.json").exists(), ran.stderr
    alone = run("alone", **options)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone.output), rtol=0, atol=1e-5)
    counts = [[line.get("skipped") for line in log(folder)] for folder in (tmp_path / "two", alone.output)]
    assert counts == [[1, None, 2, 3]] * 2
