"""The checkpoints of a run: how one is written and proved whole, and how a run continues from it.

OUTPUT/checkpoints/step-N has the model with its tokenizer, the optimizer, the schedule, the random state of
each process, the moving averages, what else must survive (`Lasting`), and a list of its files. It gets its
name when all of it is on disk, so a checkpoint that has its name is whole. Nothing in it is unpickled:
tensors are safetensors, the rest is JSON or read by torch with `weights_only`.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator

from trainer.atomic import partial_of, publish_folder, start_folder
from trainer.faults import Fault, RunFault, first_line
from trainer.saving import write_model
from trainer.sharding import is_sharded, load_optimizer, optimizer_state

if TYPE_CHECKING:
    from trainer.folder import RunFolder
    from trainer.prepare import Run

POSITION, PROGRESS, FILES = "position.json", "progress.json", "files.json"
CHUNK = 1 << 24  # bytes read at once for a checksum


@dataclass(frozen=True, slots=True)
class Position:
    """Where a checkpoint stands, and what must be the same for the run to go on as if it had not stopped.

    `rows` is the number of rows of an optimizer step over all micro-batches and processes.
    """

    step: int
    planned: int
    rows: int
    data: str


class Lasting(Protocol):
    """What a part of a run remembers from step to step and a resumed run must know again: a few numbers.

    To join, stand in `Run.lasting` under a name of your own (see the end of `prepare`): each checkpoint then
    has your `state()` in its progress.json, and a resumed run hands it to `restore` before its first step.
    A checkpoint is written after the step's line of the log and after the held-out rows were measured.
    """

    def state(self) -> dict[str, Any]:
        """All that is remembered, as a value that JSON holds; a float comes back bit for bit."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; not called where the checkpoint has nothing under the name."""
        ...


def save_checkpoint(run: Run, step: int) -> None:
    """Write OUTPUT/checkpoints/step-N; the folder gets its name when it is complete and on disk.

    Every process calls this: random states are kept for each of them, everything else once. Raises
    `RunFault` where it cannot be written; the checkpoints before it are as they were.
    """
    accelerator, main = run.accelerator, run.accelerator.is_main_process
    final = run.folder.checkpoint(step)
    partial = partial_of(final)
    with told(f"step {step}: the checkpoint {final} cannot be written", run.folder, final, main):
        if main:
            run.log.sync()
            final.parent.mkdir(exist_ok=True)
            start_folder(final)
        accelerator.wait_for_everyone()
        _save(_random_state(), partial / f"random-{accelerator.process_index}.pt")
        write_model(run, partial)
        optimizer = optimizer_state(run.objective.trained, run.optimizer, accelerator)
        if main:
            _save(optimizer, partial / "optimizer.pt")
            _save(run.schedule.state_dict(), partial / "schedule.pt")
            run.moving.save(partial)
            _write(partial / PROGRESS, {name: part.state() for name, part in run.lasting.items()})
            _write(partial / POSITION, asdict(replace(run.start, step=step)))
        accelerator.wait_for_everyone()
        if main:
            _write(partial / FILES, _files(partial))
            publish_folder(final)
        accelerator.wait_for_everyone()


def check_whole(checkpoint: Path) -> None:
    """`RunFault` naming the file where a checkpoint is not what was written: the one place that looks."""
    try:
        known = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))["files"]
        for name, (size, checksum) in known.items():
            path = checkpoint / name
            if not path.is_file():
                raise _damaged(checkpoint, f"{name} is missing")
            if path.stat().st_size != size or _checksum(path) != checksum:
                raise _damaged(checkpoint, f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(checkpoint, f"{FILES}: {first_line(error)}") from error


def read_position(checkpoint: Path) -> Position:
    """Where a checkpoint stands; `RunFault` where it is damaged."""
    try:
        return Position(**json.loads((checkpoint / POSITION).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, first_line(error)) from error


def restore(checkpoint: Path, trained: Any, optimizer: Any, schedule: Any, accelerator: Accelerator) -> None:
    """Load optimizer, schedule and random state of a checkpoint; the model's weights are loaded apart."""
    try:
        # Shards are spread from the whole state, which need not fit on one device.
        device = torch.device("cpu") if is_sharded(accelerator) else accelerator.device
        state = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
        load_optimizer(trained, optimizer, state, accelerator)
        schedule.load_state_dict(torch.load(checkpoint / "schedule.pt", weights_only=True))
        own = checkpoint / f"random-{accelerator.process_index}.pt"
        if own.exists():  # absent where the run goes on with more processes
            _set_random_state(torch.load(own, weights_only=True))
    except Fault:
        raise
    except Exception as error:  # a damaged file raises what its format raises
        raise _damaged(checkpoint, first_line(error)) from error


def restore_lasting(checkpoint: Path, lasting: Mapping[str, Lasting]) -> None:
    """Hand each part of the run what it remembered at a checkpoint."""
    try:
        known = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        for name, part in lasting.items():
            if name in known:
                part.restore(known[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(checkpoint, f"{PROGRESS}: {first_line(error)}") from error


def _damaged(checkpoint: Path, reason: str) -> RunFault:
    return RunFault(
        f"{checkpoint}: the checkpoint is damaged ({reason}); "
        "remove it to continue from the one before it, or from the start where there is none"
    )


@contextmanager
def told(what: str, folder: RunFolder, final: Path, main: bool) -> Iterator[None]:
    """Turn what stops the writing of a folder into a `RunFault` that says `what`, and give its room back."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:  # every file format raises its own
        reason = _reason(error)
        if main:
            shutil.rmtree(partial_of(final), ignore_errors=True)
        newest = folder.newest()
        kept = "there is no checkpoint yet" if newest is None else f"the checkpoint {newest} is whole"
        raise RunFault(f"{what}: {reason}; {kept}. Mend that, then continue with --resume") from error


def _reason(error: BaseException) -> str:
    """Why a file could not be written; writers of archives hide what the system said."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return first_line(seen or error)


def _save(value: Any, path: Path) -> None:
    with path.open("wb") as file:  # of our own: its error says what the system said
        torch.save(value, file)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _files(folder: Path) -> dict[str, Any]:
    """The size in bytes and the checksum of each file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"files": {str(p.relative_to(folder)): [p.stat().st_size, _checksum(p)] for p in files}}


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
