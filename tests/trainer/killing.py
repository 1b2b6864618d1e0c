"""Runs of `priority train` that are killed with SIGKILL at a chosen moment, for `test_resume.py`.

`Killer` starts this file as a process that has imported everything and forks a child for each run, which then
takes a second and not ten. A run is killed after some time, or at its n-th *instant*: a call of the file
system in its folders, or a file that is only half written.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KILLED = -signal.SIGKILL
CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
PHASES = ("open", "cache", "log", "checkpoint", "model")


@dataclass(frozen=True)
class Ran:
    """What became of a run: its exit code (negative: the signal), what it said, and its instants.

    `seconds` are those of computing, which do not depend on what else the machine does, `began` those until
    the output folder was made.
    """

    code: int
    seconds: float
    began: float
    said: str
    instants: list[list[str]]

    def of(self, phase: str) -> list[int]:
        """The numbers of the instants of a phase."""
        return [n for n, (when, _) in enumerate(self.instants) if when == phase]


class Killer:
    """The process that forks runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(
        self,
        settings: dict[str, Any],
        after: float | None = None,
        instant: int | None = None,
        patch: str = "",
    ) -> Ran:
        """Run with some settings, killed after so many seconds of computing, at an instant, or not at all.

        `patch` is Python that the run executes first.
        """
        path = self._folder / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        job = {"config": str(path), "output": settings["output"], "cache": settings.get("cache", "/nowhere")}
        job |= {"after": after, "instant": instant, "folder": str(self._folder), "patch": patch}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Instants:
    """Counts the instants of a run in its own process, and kills it at one of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.seen: list[list[str]] = []
        self.began = 0.0
        self._last = job["instant"]
        self._folders = (job["output"], job["cache"])
        self._phase = ""

    def tick(self, what: str, torn: str | None = None) -> None:
        """An instant; `torn` is a file whose end is not there yet: half of it, of a log half a line."""
        if not self._phase:
            return
        if len(self.seen) == self._last:
            if torn is not None:
                size = os.path.getsize(torn)
                os.truncate(torn, size - 40 if torn.endswith(".jsonl") else size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append([self._phase, what])
        if self._phase == "open":
            self.began = time.process_time()

    def audit(self, event: str, values: tuple[Any, ...]) -> None:
        """Take calls of the file system for instants; relative names are those of a tree being removed."""
        if event not in CALLS or not isinstance(values[0], str | os.PathLike):
            return
        path = os.fspath(values[0])
        if event == "open" and not (values[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(path, str) and (path.startswith(self._folders) or not os.path.isabs(path)):
            self.tick(f"{event} {os.path.basename(path)}")

    def within(self, phase: str, owner: Any, name: str) -> None:
        """Have a function be a phase of the run."""
        call: Callable[..., Any] = getattr(owner, name)

        def during(*given: Any, **named: Any) -> Any:
            before, self._phase = self._phase, phase
            try:
                return call(*given, **named)
            finally:
                self._phase = before

        setattr(owner, name, during)

    def writer(self, owner: Any, name: str, file: Callable[..., Any]) -> None:
        """Have a function that writes a file give two instants: before, and with half of the file there."""
        call: Callable[..., Any] = getattr(owner, name)

        def writing(*given: Any, **named: Any) -> Any:
            self.tick(f"{name} {os.path.basename(str(file(*given)))}")
            result = call(*given, **named)
            self.tick(f"half of {os.path.basename(str(file(*given)))}", torn=str(file(*given)))
            return result

        setattr(owner, name, writing)


def watch(instants: Instants) -> None:
    """Look at all that a run writes."""
    import transformers.modeling_utils as modeling

    import trainer.cache as cache
    import trainer.checkpoints as checkpoints
    import trainer.folder as folder
    import trainer.moving as moving
    import trainer.prepare as preparing
    import trainer.runlog as runlog
    import trainer.train as story

    instants.writer(modeling, "safe_save_file", lambda tensors, path, *_: path)
    instants.writer(moving, "save_file", lambda tensors, path, *_: path)
    instants.writer(checkpoints, "_save", lambda value, path: path)
    instants.writer(checkpoints, "_write", lambda path, value: path)
    instants.writer(runlog.RunLog, "write", lambda log, line: log.path)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        instants.tick("fsync")
        fsync(descriptor)

    os.fsync = synced
    instants.within("log", runlog.RunLog, "write")
    instants.within("open", runlog.RunLog, "cut")
    instants.within("open", folder.RunFolder, "open")
    instants.within("open", preparing, "write_summary")
    instants.within("open", preparing, "write_manifest")
    instants.within("cache", cache.Entry, "write")
    instants.within("checkpoint", story, "save_checkpoint")
    instants.within("checkpoint", story, "settle_checkpoints")
    instants.within("model", story, "save_model")
    sys.addaudithook(instants.audit)


def child(job: dict[str, Any]) -> int:
    """A run in a process of its own."""
    said = os.open(Path(job["folder"]) / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    exec(job["patch"], {})
    instants = Instants(job)
    watch(instants)
    from trainer.cli import main

    code = main(["train", "--config", job["config"]])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(job["folder"], "instants").write_text(json.dumps([instants.began, instants.seen]))
    return code


def awaited(number: int, seconds: float) -> bool:
    """Wait until a child has computed for so long; whether it still lives then."""
    clock = (~number << 3) | 2  # the child's own clock, which stands still while others have the processor
    while time.clock_gettime(clock) < seconds:
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return True


def ran(job: dict[str, Any]) -> dict[str, Any]:
    """Fork a run, kill it in time, and tell what became of it."""
    seen = Path(job["folder"], "instants")
    seen.unlink(missing_ok=True)
    number = os.fork()
    if number == 0:
        code = 70
        try:
            code = child(job)
        finally:
            os._exit(code)
    if job["after"] is not None and awaited(number, job["after"]):
        os.kill(number, signal.SIGKILL)
    _, status, used = os.wait4(number, 0)
    start, instants = json.loads(seen.read_text()) if seen.exists() else (0.0, [])
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": used.ru_utime + used.ru_stime,
        "began": start,
        "said": Path(job["folder"], "said").read_text(errors="replace"),
        "instants": instants,
    }


def main() -> None:
    """Import what runs need, without computing anything: a fork then has no threads to lose."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import trainer.cli
    import trainer.train  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(ran(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
