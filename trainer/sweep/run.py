"""The runs of a sweep, one after another; a run that is finished and measured is not repeated."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priority_dsl import PriorityError
from trainer.alone import Lock
from trainer.config import TrainConfig
from trainer.evaluate import evaluate
from trainer.faults import ConfigFault, Fault, first_line
from trainer.folder import Finished, RunFolder
from trainer.records.manifest_file import read_manifest
from trainer.runlog import LOG_NAME
from trainer.sweep.config import SweepConfig
from trainer.sweep.plan import Planned
from trainer.train import train

RESULT = "figures.json"  # in the folder of a run: what came of it, and of which settings
MARK = "# a sweep of `priority sweep`"
REPORTS = {"output", "resume", "overwrite", "quiet", "cache"}  # of a run's config, what changes no result


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run: its figures by name, how long it took, or why it failed.

    `frozen` counts the rows that went through frozen models for it, those that the cache knew left out;
    `before` says that an earlier call finished it.
    """

    label: str
    seed: int
    figures: dict[str, float]
    seconds: float = 0.0
    error: str = ""
    frozen: int = 0
    before: bool = False


def run_all(config: SweepConfig, planned: Sequence[Planned], tell: Callable[[str], None]) -> list[Result]:
    """Run what is left to do; a run that fails is told, and the others go on.

    Raises `ConfigFault` before anything runs where a folder holds something else, or a run with other
    settings, or another process is writing one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigFault("a sweep runs in one process; its runs on several are `priority train` by torchrun")
    with Lock(Path(config.output), "a sweep") as lock:
        open_folder(config, lock)
        return _run_all(config, planned, tell)


def _run_all(config: SweepConfig, planned: Sequence[Planned], tell: Callable[[str], None]) -> list[Result]:
    for run in planned:
        if finished(run) is None or config.overwrite:
            with suppress(Finished):  # trained, and still to be measured
                RunFolder(_config(run, config)).check()
    results = []
    for number, run in enumerate(planned, 1):
        result = None if config.overwrite else finished(run)
        result = result or _run(run, config)
        results.append(result)
        tell(f"[{number}/{len(planned)}] {run.name}: {_said(result)}")
        gc.collect()
    return results


def open_folder(config: SweepConfig, lock: Lock) -> None:
    """Make the folder of the sweep, or refuse one that holds something else."""
    folder = Path(config.output)
    marker = folder / "sweep.yaml"
    if folder.is_file():
        raise ConfigFault(f"--output {folder}: is a file; a sweep needs a folder")
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ConfigFault(f"--output {folder}: holds no sweep; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        marker.write_text(f"{MARK}\n{config.as_yaml()}", encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"--output {folder}: cannot be written: {first_line(error)}") from error


def finished(run: Planned) -> Result | None:
    """The result of a run that was finished and measured with these settings; None where it is to be done."""
    try:
        known = json.loads((Path(run.config.output) / RESULT).read_text(encoding="utf-8"))
        if known["asked"] == _asked(run):
            return Result(
                run.label, run.seed, known["figures"], known["seconds"], frozen=_frozen(run), before=True
            )
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off while it was written
        pass
    return None


def _run(run: Planned, sweep: SweepConfig) -> Result:
    """Train and measure; a failure is a result too."""
    began = time.perf_counter()
    try:
        train(_config(run, sweep))
        figures = measured(run)
    except (Fault, PriorityError) as error:
        return Result(run.label, run.seed, {}, time.perf_counter() - began, str(error))
    except Exception as error:  # out of memory, a disk that is full: the other runs may go on
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Result(run.label, run.seed, {}, time.perf_counter() - began, reason)
    seconds = round(time.perf_counter() - began, 2)
    path = Path(run.config.output) / RESULT
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"figures": figures, "seconds": seconds, "asked": _asked(run)}, indent=1))
    partial.replace(path)
    return Result(run.label, run.seed, figures, seconds, frozen=_frozen(run))


def _frozen(run: Planned) -> int:
    known = read_manifest(Path(run.config.output)) or {}
    return sum(known.get("computed", {}).values())


def _config(run: Planned, sweep: SweepConfig) -> TrainConfig:
    """The run's config as it is trained now: a run that was begun goes on."""
    begun = (Path(run.config.output) / "config.yaml").exists()
    how = {"resume": begun and not sweep.overwrite, "overwrite": sweep.overwrite}
    return run.config.model_copy(update=how)


def measured(run: Planned) -> dict[str, float]:
    """The figures of a trained model: those of an evaluation, else what its log ends with."""
    if run.measuring is not None:
        found = evaluate(run.measuring)
        return {name: float(value) for name, value in found.items() if _compared(name, value)}
    text = (Path(run.config.output) / LOG_NAME).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    held_out = [line for line in lines if "eval_nll" in line]
    if held_out:
        names = ("nll", "accuracy", "preference_accuracy", "preference_margin")  # the last two of pairs
        return {name: held_out[-1][f"eval_{name}"] for name in names if f"eval_{name}" in held_out[-1]}
    return {"train nll": [line for line in lines if "nll" in line][-1]["nll"]}


def _compared(name: str, value: Any) -> bool:
    """Whether a figure is worth a column: not what another says, nor an error over rows, nor a count."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and name not in ("tokens", "perplexity") and not name.endswith("_stderr")


def _asked(run: Planned) -> dict[str, Any]:
    """All settings that decide a run's figures, as JSON has them."""
    settings = {k: v for k, v in run.config.model_dump(mode="json").items() if k not in REPORTS}
    measuring = None if run.measuring is None else run.measuring.model_dump(mode="json", exclude={"model"})
    return {"run": settings, "measured": measuring}


def _said(result: Result) -> str:
    if result.error:
        return f"failed: {result.error}"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
    return f"{shown} ({'finished before' if result.before else f'{result.seconds:.0f} s'})"
