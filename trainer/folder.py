"""The folder of a run: who may write into it, and when the run in it is finished.

OUTPUT/config.yaml, rule.rule and log.jsonl are there from the start, OUTPUT/checkpoints/step-N as the run
goes, the trained model with its tokenizer directly in OUTPUT at the end, and last of all finished.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from trainer.alone import Lock
from trainer.atomic import PARTIAL, leftovers, remove, write_file
from trainer.config import TrainConfig
from trainer.faults import ConfigFault, first_line
from trainer.objective import Figures
from trainer.runlog import LOG_NAME

MARK = "# the config of a run of `priority train`"  # first line of config.yaml: the folder is a run's
FINISHED = "finished.json"
# What a resumed run may change: where and how it reports, how long it goes on, how a step is computed.
MAY_CHANGE = {
    "output", "resume", "overwrite", "quiet", "log_steps", "save_steps", "eval_data", "eval_steps",
    "device", "max_steps", "epochs", "batch_size", "accumulation", "cache", "strict", "loss",
    "packing", "packing_length", "pad_to_multiple",
    "checkpoint_activations", "compile", "compile_backend",
    "patience", "min_delta", "tracker", "project", "run_name", "dry_run", "show",
    "keep_last", "keep_best", "max_nll", "skip_non_finite", "push_to_hub", "hub_private",
}  # fmt: skip
# What of it decides how many steps there are.
LENGTH = {"max_steps", "epochs", "batch_size", "accumulation", "patience", "min_delta"}


class Finished(Exception):
    """The run in the output folder is finished, and nothing is left to do: not a fault.

    `step` is its last step, `evaluation` its last held-out figures by name, None where nothing was measured.
    """

    def __init__(self, path: Path, step: int, evaluation: dict[str, Any] | None):
        super().__init__(
            f"{path}: the run is finished, after step {step}; nothing was changed. "
            "With a larger --epochs or --max-steps it goes on"
        )
        self.step = step
        self.evaluation = evaluation


class RunFolder:
    """The output folder of a run."""

    def __init__(self, config: TrainConfig):
        self.path = Path(config.output)
        self._config = config
        self._lock: Lock | None = None

    @contextmanager
    def alone(self) -> Iterator[RunFolder]:
        """Inside, no other run may write into the folder; `ConfigFault` where one does already.

        The main process has it for all. A folder that is not there yet is locked by `open`.
        """
        if os.environ.get("RANK", "0") != "0":
            yield self
            return
        with Lock(self.path, "a run") as self._lock:
            yield self

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self) -> None:
        """Refuse a folder that this run must not write into; nothing is changed yet.

        Raises `Finished` where --resume finds a finished run of these very settings.
        """
        if self.path.is_file():
            raise ConfigFault(f"--output {self.path}: is a file; a run needs a folder")
        if not self.path.exists() or all(p.name.startswith(PARTIAL) for p in self.path.iterdir()):
            return
        if not self._is_run() and (self._config.resume or self._config.overwrite):
            flag = "--resume" if self._config.resume else "--overwrite"
            raise ConfigFault(
                f"--output {self.path}: holds no run of `priority train`, so {flag} does not touch it"
            )
        if not self._config.resume and not self._config.overwrite:
            raise ConfigFault(
                f"--output {self.path}: is not empty; --resume continues the run in it, "
                "--overwrite replaces it"
            )
        if self._config.overwrite:
            self._keep_inputs()
        if self._config.resume:
            self._keep_inside()
            changed = self._check_config()
            if not changed & LENGTH:
                self.check_finished(0)

    def check_finished(self, planned: int) -> None:
        """Raise `Finished` where the run in the folder has ended, of no fewer than `planned` steps."""
        try:
            known = json.loads((self.path / FINISHED).read_text(encoding="utf-8"))
            there = all((self.path / name).exists() for name in known["files"])
            step, until, evaluation = int(known["step"]), int(known["planned"]), known["evaluation"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if self._config.resume and there and until >= planned:
            raise Finished(self.path, step, evaluation)

    def open(self, rule: str) -> None:
        """Make the folder of the run, in place of an old one under --overwrite, with config and rule."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is not None and self._lock.take() and self._is_run():
                raise ConfigFault(f"--output {self.path}: another run has begun in it meanwhile")
            if self._config.overwrite and self._is_run():
                self._empty()
            for path in (*leftovers(self.path), *leftovers(self.checkpoints)):
                remove(path)
            (self.path / FINISHED).unlink(missing_ok=True)
            settings = yaml.safe_dump(
                self._config.model_dump(mode="json"), sort_keys=False, allow_unicode=True
            )
            write_file(self.path / "config.yaml", f"{MARK}\n{settings}")
            write_file(self.path / "rule.rule", rule.rstrip("\n") + "\n")
            (self.path / LOG_NAME).touch()
        except OSError as error:
            raise ConfigFault(f"--output {self.path}: cannot be written: {first_line(error)}") from error

    def finish(self, step: int, planned: int, files: list[str], evaluation: Figures | None) -> None:
        """Say that the run is finished and its model written; the last thing that a run does."""
        figures = None if evaluation is None else asdict(evaluation)
        known = {"step": step, "planned": planned, "files": files, "evaluation": figures}
        write_file(self.path / FINISHED, json.dumps(known, indent=1) + "\n")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; an unfinished one has another name."""
        names = (re.fullmatch(r"step-(\d+)", p.name) for p in self.checkpoints.glob("step-*"))
        return sorted(int(m[1]) for m in names if m)

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, there or not."""
        return self.checkpoints / f"step-{step}"

    def newest(self) -> Path | None:
        """The checkpoint with the highest step, None without one."""
        steps = self.steps()
        return self.checkpoint(steps[-1]) if steps else None

    def _is_run(self) -> bool:
        try:
            return (self.path / "config.yaml").read_text(encoding="utf-8").startswith(MARK)
        except (OSError, UnicodeDecodeError):
            return False

    def _empty(self) -> None:
        """Remove the old run; its config goes last, so that a run killed here is still known as one."""
        for path in sorted(self.path.iterdir(), key=lambda p: p.name == "config.yaml"):
            remove(path)

    def _keep_inside(self) -> None:
        """Refuse a folder in which a link leads elsewhere: a run writes into its own folder alone."""
        here = self.path.resolve()
        for folder, folders, files in os.walk(here):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink() and here not in path.resolve().parents:
                    raise ConfigFault(
                        f"--output {self.path}: {path.relative_to(here)} is a link that leads out of the "
                        "folder, into which --resume would write; put what it names in its place"
                    )

    def _keep_inputs(self) -> None:
        """Refuse to replace a folder that holds what this run reads."""
        config, here = self._config, self.path.resolve()
        read = (config.model, config.rule, *config.data, *config.eval_data, *config.bind.values())
        for source in (*read, *([config.cache] if config.cache is not None else [])):
            try:
                inside = here in (Path(source).resolve(), *Path(source).resolve().parents)
            except (OSError, ValueError):  # a rule text is no path
                continue
            if inside and Path(source).exists():
                raise ConfigFault(
                    f"--overwrite would delete {source}, which this run reads; choose another --output"
                )

    def _check_config(self) -> set[str]:
        """The settings that are others than those of the run in the folder; refuses one that may not be."""
        try:
            saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigFault(f"{self.path}/config.yaml: cannot be read: {first_line(error)}") from error
        if not isinstance(saved, dict):
            raise ConfigFault(f"{self.path}/config.yaml: holds no settings")
        now = self._config.model_dump(mode="json")
        changed = [name for name in now if saved.get(name) != now[name]]
        fixed = [name for name in changed if name not in MAY_CHANGE]
        if fixed:
            name = fixed[0]
            raise ConfigFault(
                f"--resume: `{name}` was {saved.get(name)!r} in {self.path} and is {now[name]!r} now; "
                "a run continues as it began (its length, its reports and how a step is spread may change)"
            )
        return set(changed)
