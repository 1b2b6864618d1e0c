"""Two runs at once in one folder: the second is refused, and nothing remains of the first one's lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from trainer.alone import Lock
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.faults import ConfigFault
from trainer.folder import RunFolder

ENDLESS = 1_000_000
HELD = "another process is writing a run into it; wait until it ends, or name another folder"


@pytest.fixture
def words(model: str, sums: str, tmp_path: Path) -> list[str]:
    """A run that goes on until it is killed."""
    how = {
        "model": model, "data": sums, "rule": "dft", "output": tmp_path / "run", "save-steps": 2,
        "keep-last": 2, "max-steps": ENDLESS, "schedule": "constant", "warmup": 0, "learning-rate": 1e-4,
        "device": "cpu",
    }  # fmt: skip
    return ["train", "--quiet", *(f"--{name}={value}" for name, value in how.items())]


@pytest.fixture
def running(words: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """That run in a process of its own, some steps on its way."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, "-m", "trainer", *words], env=env, stderr=said)
    try:
        until = time.monotonic() + 120
        while not steps(tmp_path / "run") > 3:
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < until, "the run does not begin"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_second_run_is_refused_while_the_first_one_lives(
    running: subprocess.Popen[bytes],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    config = (folder / "config.yaml").read_bytes()
    for more in ([], ["--resume"], ["--overwrite"], ["--output=./run"]):
        assert main([*words, *more]) == 2
        assert HELD in capsys.readouterr().err
    assert main([*words, "--resume", "--dry-run"]) == 0, "it writes nothing"
    assert (folder / "config.yaml").read_bytes() == config
    before = steps(folder)
    while steps(folder) < before + 3:
        assert running.poll() is None, "the first run goes on"
        time.sleep(0.05)

    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not [path for path in folder.rglob("*") if "lock" in path.name]
    newest = max(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
    capsys.readouterr()
    assert main([*words, "--resume", f"--max-steps={newest + 2}"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, newest + 3))
    assert main([*words, "--overwrite", "--max-steps=1"]) == 0, "the one before let the folder go"


@pytest.fixture
def folder(model: str, sums: str, tmp_path: Path) -> Any:
    """The output folder of a run, as a process sees it."""
    settings = {"model": model, "data": [sums], "rule": "dft", "output": str(tmp_path / "new" / "run")}
    return lambda **more: RunFolder(TrainConfig(**settings, **more))


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_runs_that_begin_together_in_a_folder_that_is_not_there(folder: Any, how: dict[str, bool]):
    with folder(**how).alone() as late:
        late.check()
        with folder().alone() as early:
            early.check()
            early.open("dft")
            with pytest.raises(ConfigFault, match="another process is writing a run"):
                late.open("dft")
        with pytest.raises(ConfigFault, match="another run has begun in it meanwhile"):
            late.open("dft")
        assert (late.path / "log.jsonl").exists()
    with folder(overwrite=True).alone() as again:
        again.open("dft")


def test_a_folder_that_is_replaced_is_locked_anew(folder: Any):
    first, second = folder(), folder()
    first.path.mkdir(parents=True)
    with ExitStack() as held:
        held.enter_context(first.alone())
        first.path.rmdir()
        first.open("dft")
        with pytest.raises(ConfigFault, match="another process"):
            held.enter_context(second.alone())


def test_only_the_main_process_locks(folder: Any, monkeypatch: pytest.MonkeyPatch):
    folder().path.mkdir(parents=True)
    with folder().alone():
        monkeypatch.setenv("RANK", "1")
        with folder().alone() as other:
            assert other.path.is_dir()


def test_a_lock_that_a_child_has_inherited_is_let_go(tmp_path: Path):
    with Lock(tmp_path, "a run") as lock:
        assert lock._descriptor is not None
        assert not os.get_inheritable(lock._descriptor), "no program that the run starts has it"
        inherited = os.dup(lock._descriptor)  # as after a fork
    try:
        with Lock(tmp_path, "a run"):
            pass
    finally:
        os.close(inherited)


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, None])
def test_where_there_are_no_locks_a_run_goes_without(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if code is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:

        def refuses(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", refuses)
    with Lock(tmp_path, "a run") as one, Lock(tmp_path, "a run") as other:
        assert not one.take()
        assert not other.take()


def test_a_second_sweep_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tmp_path / "base.yaml"
    base.write_text(f"model: {words[2].partition('=')[2]}\ndata: [{words[3].partition('=')[2]}]\n")
    sweep = ["sweep", "--config", str(base), "--rules", "sft", "--output", str(tmp_path / "sweep"), "--quiet"]
    (tmp_path / "sweep").mkdir()
    with Lock(tmp_path / "sweep", "a sweep"):
        assert main(sweep) == 2
    assert "another process is writing a sweep into it" in capsys.readouterr().err
    assert not list((tmp_path / "sweep").iterdir())
