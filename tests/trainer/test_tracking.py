"""Trackers: each has what log.jsonl has, value by value, also of a run that failed or was resumed."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

import trainer.train
from trainer.config import TrainConfig
from trainer.faults import ConfigFault, RunFault
from trainer.tracking import FILE_NAME, PROJECT
from trainer.train import Outcome, train

Lines = list[dict[str, Any]]
Run = Callable[..., Outcome]
SUMMARY = ("final_", "best_")


class Recorder(GeneralTracker):
    """A tracker that remembers what it was told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.lines: Lines = []
        self.config: dict[str, Any] = {}
        self.calls: list[str] = []
        self.fails_at = fails_at

    @property
    def tracker(self) -> Recorder:
        return self

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.lines.append({"step": step, **values})

    def finish(self) -> None:
        self.calls.append("finish")

    @property
    def of_log(self) -> Lines:
        return [line for line in self.lines if not any(n.startswith(SUMMARY) for n in line)]


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    def go(name: str, *trackers: GeneralTracker, **options: Any) -> Outcome:
        settings = {
            "model": model, "data": sums, "rule": "dft", "max_steps": 4, "eval_data": sums, "eval_steps": 2,
            "learning_rate": 1e-2, "quiet": True, "device": "cpu", "output": str(tmp_path / name),
            "save_steps": 2, "schedule": "constant", **options,
        }  # fmt: skip
        return train(TrainConfig(**settings), trackers=trackers)

    return go


def log_of(outcome: Outcome | Path) -> Lines:
    folder = outcome if isinstance(outcome, Path) else outcome.output
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(lines: Iterable[dict[str, Any]]) -> Lines:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Killed(BaseException):
    """Stands in for a process that ends between two steps."""


@pytest.fixture
def killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that dies before step 4, one step after its checkpoint at step 2."""

    def go(name: str, *trackers: GeneralTracker, **options: Any) -> Outcome:
        real = trainer.train.update

        def update(of: Any, step: int) -> Any:
            if step == 3:
                raise Killed
            return real(of, step)

        with monkeypatch.context() as patched:
            patched.setattr(trainer.train, "update", update)
            with pytest.raises(Killed):
                run(name, *trackers, **options)
        return Outcome(Path(options.get("output", "")), 3, None)

    return go


def test_a_tracker_gets_every_line_of_the_log(run: Run):
    seen = Recorder()
    outcome = run("run", seen)
    assert seen.of_log == log_of(outcome)
    assert [("eval_nll" in line, line["step"]) for line in seen.of_log] == [
        (False, 1), (False, 2), (True, 2), (False, 3), (False, 4), (True, 4),
    ]  # fmt: skip
    assert seen.calls == ["start", "finish"]


def test_the_config_and_the_summary(run: Run):
    seen = Recorder()
    lines = log_of(run("run", seen, rule="mass(ref) >= tau", set={"tau": 0.3}))
    told = seen.config
    assert told["set.tau"] == 0.3
    assert told["rule_text"] == "mass(ref) >= tau\n" or told["rule_text"].strip() == "mass(ref) >= tau"
    assert "hard" in told["regime"]
    assert told["learning_rate"] == 1e-2
    assert told["planned_steps"] == 4
    assert all(isinstance(value, bool | int | float | str) for value in told.values())
    (summary,) = [line for line in seen.lines if "final_step" in line]
    measured = [line for line in lines if "eval_nll" in line]
    assert summary["step"] == summary["final_step"] == 4
    assert summary["final_nll"] == lines[-2]["nll"]
    assert summary["final_eval_nll"] == measured[-1]["eval_nll"]
    assert summary["best_eval_nll"] == min(line["eval_nll"] for line in measured)


def test_a_run_that_fails_finishes_its_trackers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = trainer.train.update

    def update(of: Any, step: int) -> Any:
        if step == 2:
            raise RunFault("step 3: no more")
        return real(of, step)

    monkeypatch.setattr(trainer.train, "update", update)
    seen = Recorder()
    with pytest.raises(RunFault):
        run("run", seen)
    assert seen.calls == ["start", "finish"]
    assert seen.lines == log_of(tmp_path / "run"), "and no summary of a run that did not end"


def test_a_tracker_that_fails_stops_no_run(run: Run, capfd: pytest.CaptureFixture[str]):
    broken, seen = Recorder(fails_at=2), Recorder()
    outcome = run("run", broken, seen, quiet=False)
    assert [line["step"] for line in broken.lines] == [1]
    assert seen.of_log == log_of(outcome)
    assert "--tracker recorder: no network; the run goes on without it" in capfd.readouterr().err


def test_a_resumed_run_goes_on_in_the_same_tracker(run: Run, killed: Run):
    seen = Recorder()
    killed("run", seen)
    assert seen.lines[-1]["step"] == 3, "one step after the checkpoint"
    outcome = run("run", seen, resume=True)
    assert timeless(seen.of_log) == timeless(log_of(outcome)), "every line once, in order"


def test_a_tracker_that_joins_a_resumed_run_gets_what_it_missed(run: Run, killed: Run):
    killed("run")
    seen = Recorder()
    outcome = run("run", seen, resume=True)
    assert seen.of_log == log_of(outcome)
    again = Recorder()
    again.name = "another"
    assert run("run", again, resume=True, max_steps=5).step == 5
    assert again.of_log == log_of(outcome)


def test_a_missing_package_is_named_before_anything_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigFault, match=r"--tracker trackio: .* pip install 'priority_dsl\[trackio\]'"):
        run("run", tracker="trackio", model="nowhere/at-all")


def test_names_of_trackers(model: str):
    config = TrainConfig(model=model, data=("d",), rule="sft", tracker="wandb, tensorboard,wandb")
    assert config.tracker == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match="should be 'wandb', 'tensorboard' or 'trackio'"):
        TrainConfig(model=model, data=("d",), rule="sft", tracker="wandbb")


# the real packages


def same(found: Lines, log: Lines, rel: float) -> None:
    """The lines of a tracker, by step and kind, are those of the log, name by name and value by value."""
    assert [(line["step"], "eval_nll" in line) for line in found] == [
        (line["step"], "eval_nll" in line) for line in log
    ]
    for one, other in zip(found, log, strict=True):
        assert set(one) == set(other)
        for name in set(other) - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=rel, abs=1e-12), (name, one["step"])


def parted(by_step: dict[int, dict[str, Any]]) -> Lines:
    """Values by step as lines: those of the step, then those of the held-out rows."""
    lines = []
    for step, values in sorted(by_step.items()):
        plain = {k: v for k, v in values.items() if not k.startswith(("eval_", *SUMMARY))}
        measured = {k: v for k, v in values.items() if k.startswith("eval_")}
        lines += [{"step": step, **part} for part in (plain, measured) if part]
    return lines


def of_tensorboard(folder: Path) -> Lines:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict[int, dict[str, Any]] = {}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        assert len({event.step for event in events}) == len(events), f"a step of {tag} is there twice"
        for event in events:
            found.setdefault(event.step, {})[tag] = event.value
    return parted(found)


def test_tensorboard(run: Run, killed: Run, tmp_path: Path):
    pytest.importorskip("tensorboard")
    outcome = run("run", tracker="tensorboard", run_name="mine")
    same(of_tensorboard(outcome.output / "tensorboard" / "mine"), log_of(outcome), rel=1e-6)  # float32
    killed("parts", tracker="tensorboard")
    outcome = run("parts", tracker="tensorboard", resume=True)
    same(of_tensorboard(outcome.output / "tensorboard" / "parts"), log_of(outcome), rel=1e-6)


def records(data: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of an offline file: the log format of LevelDB behind a header of 7 bytes."""
    whole, at = b"", header
    while at + header <= len(data):
        if block - at % block < header:  # the rest of a block is filled up
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += header
        whole += data[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def of_wandb(folder: Path, run: str, runs: int = 1) -> tuple[Lines, dict[str, Any], int | None]:
    """What the offline files of a run hold: lines, config and exit code. Another process writes them."""
    for _ in range(60):
        files = sorted(folder.rglob(f"offline-run-*/run-{run}.wandb"), key=lambda p: p.stat().st_mtime_ns)
        ended = [path for path in files if any(r.HasField("exit") for r in parsed(path))]
        if len(ended) == runs == len(files):
            break
        time.sleep(0.5)
    assert len(ended) == runs == len(files)
    found: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    code = None
    for record in [record for path in files for record in parsed(path)]:
        values = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name, value in values.items():
            if not name.startswith("_"):
                step = int(record.history.step.num or values["_step"])
                assert name not in found.setdefault(step, {}), f"{name} of step {step} twice"
                found[step][name] = value
        for update in [*record.config.update, *record.run.config.update]:
            config[update.key] = json.loads(update.value_json)
        code = record.exit.exit_code if record.HasField("exit") else code
    return parted(found), config, code


def parsed(path: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in records(path.read_bytes())]


def test_wandb(run: Run, killed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def told(name: str) -> str:
        return json.loads((tmp_path / name / FILE_NAME).read_text())["wandb"]["id"]

    outcome = run("run", tracker="wandb", project="p", run_name="mine")
    lines, config, code = of_wandb(tmp_path, told("run"))
    same(lines, log_of(outcome), rel=1e-12)
    assert config["learning_rate"] == 1e-2
    assert "soft" in config["regime"]
    assert code == 0
    killed("parts", tracker="wandb")
    before = told("parts")
    assert of_wandb(tmp_path, before)[2] == 1, "wandb knows that the run stopped"
    outcome = run("parts", tracker="wandb", resume=True)
    assert told("parts") == before
    same(of_wandb(tmp_path, before, runs=2)[0], log_of(outcome), rel=1e-12)


def of_trackio(folder: Path, name: str) -> Lines:
    import trackio.sqlite_storage as storage

    found: dict[int, dict[str, Any]] = {}
    path = storage.SQLiteStorage.get_project_db_path(PROJECT)
    assert folder in Path(path).parents
    with sqlite3.connect(path) as base:
        rows = base.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,))
        for step, text in rows:
            for key, value in json.loads(text).items():
                assert key not in found.setdefault(step, {}), f"{key} of step {step} twice"
                found[step][key] = value
    return parted(found)


TRACKIO = """
import sys; sys.path.insert(0, {root!r})
from tests.trainer.test_tracking import *
"""


def test_trackio(run: Run, killed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    for module in (storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    outcome = run("run", tracker="trackio")
    same(of_trackio(tmp_path, "run"), log_of(outcome), rel=1e-12)
    killed("parts", tracker="trackio")
    outcome = run("parts", tracker="trackio", resume=True)
    same(of_trackio(tmp_path, "parts"), log_of(outcome), rel=1e-12)
