"""Checkpoints that are whole or not there, what stays of them, and a folder that a finished run keeps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.atomic
import trainer.train as story
from trainer.checkpoints import FILES, _files, check_whole
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.faults import ConfigFault, Fault, RunFault
from trainer.train import Outcome, train

Run = Callable[..., Outcome]


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    """Trains on the sums; `name` is the output folder."""

    def go(name: str = "run", rule: str = "dft", **options: Any) -> Outcome:
        settings = {"max_steps": 4, "learning_rate": 1e-2, "quiet": True, "device": "cpu", **options}
        paths = {"model": model, "data": sums, "output": str(tmp_path / name)}
        return train(TrainConfig(**{**paths, "rule": rule, **settings}))

    return go


def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Have the next run stop before it completes a step, counted from 1."""
    update = story.update

    def stops(run: Any, at: int) -> float:
        if at + 1 == step:
            raise KeyboardInterrupt
        return update(run, at)

    patch.setattr(story, "update", stops)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The time and the bytes of each file, and the time of each folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted((folder, *folder.rglob("*")))
    }


def steps(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# A finished run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [{}, {"save_steps": 2}], ids=["without checkpoints", "with checkpoints"])
def test_a_finished_run_that_is_resumed_changes_nothing(
    saved: dict[str, int], run: Run, model: str, sums: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = run(eval_data=sums, **saved)
    before = state(first.output)
    words = ["train", "--model", model, "--data", sums, "--rule", "dft", "--output", str(first.output)]
    words += ["--learning-rate", "1e-2", "--device", "cpu", "--eval-data", sums, "--resume"]
    words += [f"--save-steps={n}" for n in saved.values()]
    assert main([*words, "--max-steps", "4"]) == 0
    said = capsys.readouterr()
    assert f"{first.output}: the run is finished, after step 4; nothing was changed" in said.err
    assert state(first.output) == before
    # Of the same length in other words; now the rows are read first.
    assert main([*words, "--max-steps", "3", "--batch-size", "2", "--accumulation", "4", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert state(first.output) == before
    Path(sums).unlink()
    again = run(eval_data=sums, resume=True, **saved)
    assert (again.step, again.evaluation) == (4, first.evaluation)
    assert first.evaluation is not None
    assert state(first.output) == before


def test_a_finished_run_goes_on_when_it_is_to_be_longer(run: Run):
    options = {"schedule": "constant", "warmup": 0, "save_steps": 2}
    straight = run("straight", max_steps=6, **options)
    run("parts", **options)
    resumed = run("parts", max_steps=6, resume=True, **options)
    assert resumed.step == 6
    assert files(resumed.output) == files(straight.output)
    assert json.loads((resumed.output / "finished.json").read_text())["step"] == 6


def test_a_run_that_goes_on_is_not_finished(run: Run, monkeypatch: pytest.MonkeyPatch):
    run(save_steps=2)
    stop_at(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(max_steps=8, save_steps=2, resume=True)
    monkeypatch.undo()
    resumed = run(save_steps=2, max_steps=8, resume=True)
    assert resumed.step == 8
    assert len(log(resumed.output)) == 8


def test_a_model_that_was_removed_is_written_again(run: Run):
    first = run(save_steps=2)
    (first.output / "model.safetensors").unlink()
    run(save_steps=2, resume=True)
    assert (first.output / "model.safetensors").exists()
    assert len(log(first.output)) == 4


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of the trained model and its tokenizer."""
    found = json.loads((folder / "finished.json").read_text())["files"]
    assert "model.safetensors" in found
    return {name: (folder / name).read_bytes() for name in found}


# Starting where there is nothing -------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["missing", "empty", "leftover"])
def test_resume_starts_where_there_is_nothing(folder: str, run: Run, tmp_path: Path):
    if folder != "missing":
        (tmp_path / "run").mkdir()
    if folder == "leftover":  # of a run that was killed while it wrote its first file
        (tmp_path / "run" / ".partial-config.yaml").write_text("# the con")
    resumed = run(resume=True)
    assert resumed.step == 4
    assert not list(resumed.output.glob(".partial-*"))
    assert files(resumed.output) == files(run("other").output)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_killed_while_it_replaces_another_is_still_a_run(
    resumes: bool, run: Run, monkeypatch: pytest.MonkeyPatch
):
    first = run(save_steps=2)
    remove, removed = trainer.folder.remove, []

    def killed(path: Path) -> None:
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path.name)
        remove(path)

    monkeypatch.setattr(trainer.folder, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        run(overwrite=True)
    monkeypatch.undo()
    assert len(removed) == 3
    assert (first.output / "config.yaml").exists()
    options = {"resume": True} if resumes else {"overwrite": True}
    assert files(run(**options).output) == files(run("other").output)


def test_leftovers_of_a_killed_run_are_removed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(save_steps=2)
    monkeypatch.undo()
    output = tmp_path / "run"
    for name in ("checkpoints/.partial-step-3", "checkpoints/.partial-old-step-1", ".partial-model"):
        (output / name).mkdir()
        (output / name / "model.safetensors").write_bytes(b"half")
    (output / ".partial-log.jsonl").write_text("{")
    run(save_steps=2, resume=True)
    assert steps(output) == ["step-2", "step-4"]
    assert not list(output.glob(".partial-*"))


# What is on disk, and when -------------------------------------------------------------------------


def test_everything_is_on_disk_before_it_gets_its_name(run: Run, monkeypatch: pytest.MonkeyPatch):
    """fsync of every file and of the folder, then the rename, then fsync of the folder around."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def moved(call: Callable[..., Any]) -> Callable[..., Any]:
        def moving(path: Path, target: Any) -> Any:
            events.append(("rename", str(path)))
            names = [path, *path.rglob("*")] if path.is_dir() else [path]
            unsynced = {str(name) for name in names} - {name for what, name in events if what == "fsync"}
            assert not unsynced or ".partial-old" in str(target), "not on disk yet"
            return call(path, target)

        return moving

    if not Path("/proc/self/fd").exists():
        pytest.skip("the files behind descriptors are not to be seen here")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", moved(rename))
    monkeypatch.setattr(Path, "replace", moved(replace))
    output = run(max_steps=1, save_steps=1).output.resolve()
    place = events.index(("rename", str(output / "checkpoints" / ".partial-step-1")))
    assert ("fsync", str(output / "log.jsonl")) in events[:place], (
        "a checkpoint never knows more than the log"
    )
    assert ("fsync", str(output / "checkpoints")) in events[place:]
    names = [Path(path).name for what, path in events if what == "rename"]
    assert names[:2] == [".partial-config.yaml", ".partial-rule.rule"]
    model = names[names.index("chat_template.jinja") :]
    assert "model.safetensors" in model[: model.index("config.json")], "the config comes last"
    assert names[-1] == ".partial-finished.json", "and then the mark"


def test_a_folder_with_files_of_two_models_is_no_model(run: Run, monkeypatch: pytest.MonkeyPatch):
    output = run(save_steps=2).output
    replace, moved = Path.replace, []

    def killed(path: Path, target: Any) -> Path:
        if path.name in ("model.safetensors", "tokenizer.json"):
            if moved:
                raise KeyboardInterrupt
            moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(save_steps=2, max_steps=6, resume=True)
    monkeypatch.undo()
    assert moved == ["model.safetensors"]
    assert not (output / "config.json").exists()
    assert run(save_steps=2, max_steps=6, resume=True).step == 6
    assert (output / "config.json").exists()


class Memory:
    """Something that lasts: what it was given at each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def restore(self, state: Any) -> None:
        self.seen = state["seen"]


def test_what_lasts_comes_back(run: Run, monkeypatch: pytest.MonkeyPatch):
    import trainer.prepare as preparing

    parts: list[Memory] = []
    health = preparing.Health

    class Joined(health):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            parts.append(Memory())

        def state(self) -> dict[str, Any]:
            parts[-1].seen.append(0.1 + len(parts[-1].seen))
            return {**super().state(), "memory": parts[-1].state()}

        def restore(self, state: Any) -> None:
            super().restore(state)
            parts[-1].restore(state["memory"])

    monkeypatch.setattr(preparing, "Health", Joined)
    run(save_steps=2)
    run(save_steps=2, max_steps=8, resume=True)
    assert parts[-1].seen == [0.1, 1.1, 2.1, 3.1]


# Which checkpoints stay ----------------------------------------------------------------------------


def test_only_the_last_checkpoints_are_kept(run: Run):
    assert steps(run(save_steps=1, keep_last=2, max_steps=5).output) == ["step-4", "step-5"]
    assert steps(run("b", save_steps=2, keep_last=1, max_steps=5).output) == ["step-5"]


def test_the_best_checkpoint_is_kept_and_named(run: Run, sums: str, monkeypatch: pytest.MonkeyPatch):
    figures = dict(zip(range(1, 7), [3.0, 1.0, 2.0, 1.0, 0.5, 4.0], strict=True))
    measured = story.evaluate

    def told(of: Any, moment: Any) -> Any:
        found = measured(of, moment)
        return type(found)(**{**{k: getattr(found, k) for k in found.__slots__}, "nll": figures[moment.step]})

    monkeypatch.setattr(story, "evaluate", told)
    options = {"eval_data": sums, "eval_steps": 1, "keep_best": True}
    best = {"step": 5, "eval_nll": 0.5, "checkpoint": "checkpoints/step-5"}
    for name, saving, expected in (
        ("alone", {}, ["step-5"]),
        ("regular", {"save_steps": 2}, ["step-2", "step-4", "step-5", "step-6"]),
        ("few", {"save_steps": 2, "keep_last": 1}, ["step-5", "step-6"]),
    ):
        output = run(name, max_steps=6, **options, **saving).output
        assert steps(output) == expected
        assert json.loads((output / "best.json").read_text()) == best
    first = run("two", max_steps=4, **options).output
    assert json.loads((first / "best.json").read_text())["step"] == 2, "of equal ones the first"
    # The best so far survives: step 5 is better than 2, 6 is not; 5 takes the place of 2.
    resumed = run("two", max_steps=6, resume=True, **options).output
    assert steps(resumed) == ["step-5"]
    assert json.loads((resumed / "best.json").read_text()) == best
    for step in (3, 4, 5, 6):
        figures[step] = 9.0
    again = run("three", max_steps=3, save_steps=1, **options).output
    run("three", max_steps=6, save_steps=1, resume=True, **options)
    assert json.loads((again / "best.json").read_text())["step"] == 2, "later ones are worse than before"


MISTAKES = {
    "keep_last": ({"keep_last": 2}, "--keep-last needs --save-steps"),
    "keep_best alone": ({"keep_best": True}, "--keep-best needs --eval-steps and --eval-data"),
    "keep_best without steps": (
        {"keep_best": True, "eval_data": "x.jsonl"},
        "--keep-best needs --eval-steps",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_would_be_ignored_is_refused(case: str):
    options, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        TrainConfig(model="m", data="d.jsonl", rule="1", **options)


# Damage and malice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "emptied", "one bit", "removed"])
def test_a_damaged_file_of_a_checkpoint_is_named(how: str, run: Run, tmp_path: Path):
    checkpoint = run(save_steps=2, max_steps=2).output / "checkpoints" / "step-2"
    check_whole(checkpoint)
    kept = tmp_path / "kept"
    shutil.copytree(checkpoint, kept)
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        if how == "removed":
            path.unlink()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            path.write_bytes({"truncated": data[:middle], "emptied": b"", "one bit": flipped}[how])
        if path.name == FILES and how == "one bit":
            with pytest.raises(RunFault, match="step-2: the checkpoint is damaged"):
                check_whole(checkpoint)
        else:
            with pytest.raises(
                RunFault, match=rf"step-2: the checkpoint is damaged \({path.name}.*remove it"
            ):
                run(save_steps=2, resume=True)
        path.write_bytes(data)
    assert run(save_steps=2, resume=True).step == 4


def test_the_way_out_of_a_damaged_checkpoint_works(run: Run):
    straight = run("straight", save_steps=2, max_steps=6)
    output = run(save_steps=2, max_steps=6).output
    shutil.rmtree(output / "checkpoints" / "step-6")
    (output / "model.safetensors").unlink()
    (output / "checkpoints" / "step-4" / "optimizer.pt").write_bytes(b"no")
    with pytest.raises(RunFault, match="step-4: the checkpoint is damaged"):
        run(save_steps=2, max_steps=6, resume=True)
    shutil.rmtree(output / "checkpoints" / "step-4")
    assert files(run(save_steps=2, max_steps=6, resume=True).output) == files(straight.output)
    assert [line["step"] for line in log(output)] == [1, 2, 3, 4, 5, 6]


class Malice:
    """What a pickle can do when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["optimizer.pt", "schedule.pt", "random-0.pt", "average-slow.weights"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_in_a_checkpoint_is_refused_and_not_run(
    form: str, name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], sums: str, model: str
):
    mark = tmp_path / "executed"
    rule = "model slow = ema(0.5); weight = p(slow)"
    checkpoint = run(rule=rule, save_steps=2, max_steps=2).output / "checkpoints" / "step-2"
    if form == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Malice(mark)))
    else:
        torch.save({"cpu": Malice(mark)}, checkpoint / name)
    listed = checkpoint / FILES
    listed.unlink()
    listed.write_text(json.dumps(_files(checkpoint)))  # whoever can write the one can write the other
    words = ["train", "--model", model, "--data", sums, "--rule", rule, "--output", str(tmp_path / "run")]
    words += [
        "--max-steps",
        "4",
        "--learning-rate",
        "1e-2",
        "--device",
        "cpu",
        "--save-steps",
        "2",
        "--resume",
    ]
    assert main([*words, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "step-2" in said
    assert "damaged" in said
    assert "Traceback" not in said
    assert not mark.exists()
    if form == "torch":
        torch.load(checkpoint / name, weights_only=False)
    else:
        pickle.loads((checkpoint / name).read_bytes())
    assert mark.exists(), "it would have been executed"


def test_malicious_weights_are_refused_and_not_run(run: Run, tmp_path: Path):
    mark = tmp_path / "executed"
    checkpoint = run(save_steps=2, max_steps=2).output / "checkpoints" / "step-2"
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Malice(mark)}, checkpoint / "pytorch_model.bin")
    (checkpoint / FILES).unlink()
    (checkpoint / FILES).write_text(json.dumps(_files(checkpoint)))
    with pytest.raises(Fault, match="step-2: its weights are pickled"):
        run(save_steps=2, resume=True)
    assert not mark.exists()


def test_a_folder_that_holds_something_else_is_not_resumed(run: Run, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigFault, match="holds no run"):
        run(resume=True)
