"""The folder of a run: who may write into it, its checkpoints, and how a run continues from the newest one.

OUTPUT/config.yaml, rule.rule and log.jsonl are there from the start, OUTPUT/checkpoints/step-N as the run
goes, the trained model with its tokenizer directly in OUTPUT at the end.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from trainer.config import TrainConfig
from trainer.faults import ConfigFault, RunFault, first_line
from trainer.runlog import LOG_NAME

if TYPE_CHECKING:
    from trainer.prepare import Run

MARK = "# the config of a run of `priority train`"  # first line of config.yaml: the folder is a run's
# What a resumed run may change: where and how it reports, how long it goes on, how a step is computed.
MAY_CHANGE = {
    "output", "resume", "overwrite", "quiet", "log_steps", "save_steps", "eval_data", "eval_steps",
    "device", "max_steps", "epochs", "batch_size", "accumulation", "cache", "strict", "loss",
    "checkpoint_activations", "patience", "min_delta", "tracker", "project", "run_name", "dry_run", "show",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Position:
    """Where a checkpoint stands, and what must be the same for the run to go on as if it had not stopped.

    `rows` is the number of rows of an optimizer step over all micro-batches and processes.
    """

    step: int
    planned: int
    rows: int
    data: str


class RunFolder:
    """The output folder of a run."""

    def __init__(self, config: TrainConfig):
        self.path = Path(config.output)
        self._config = config

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self) -> None:
        """Refuse a folder that this run must not write into; nothing is changed yet."""
        if self.path.is_file():
            raise ConfigFault(f"--output {self.path}: is a file; a run needs a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
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
            self._check_config()

    def open(self, rule: str) -> None:
        """Make the folder of the run, in place of an old one under --overwrite, with config and rule."""
        try:
            if self._config.overwrite and self._is_run():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_dump(
                self._config.model_dump(mode="json"), sort_keys=False, allow_unicode=True
            )
            (self.path / "config.yaml").write_text(f"{MARK}\n{settings}", encoding="utf-8")
            (self.path / "rule.rule").write_text(rule.rstrip("\n") + "\n", encoding="utf-8")
            (self.path / LOG_NAME).touch()
        except OSError as error:
            raise ConfigFault(f"--output {self.path}: cannot be written: {first_line(error)}") from error

    def newest(self) -> Path | None:
        """The checkpoint with the highest step, None without one; an unfinished one has another name."""
        found = [
            (int(m[1]), p)
            for p in self.checkpoints.glob("step-*")
            if (m := re.fullmatch(r"step-(\d+)", p.name))
        ]
        return max(found)[1] if found else None

    def _is_run(self) -> bool:
        try:
            return (self.path / "config.yaml").read_text(encoding="utf-8").startswith(MARK)
        except (OSError, UnicodeDecodeError):
            return False

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

    def _check_config(self) -> None:
        try:
            saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigFault(f"{self.path}/config.yaml: cannot be read: {first_line(error)}") from error
        now = self._config.model_dump(mode="json")
        changed = [name for name in now if name not in MAY_CHANGE and saved.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise ConfigFault(
                f"--resume: `{name}` was {saved.get(name)!r} in {self.path} and is {now[name]!r} now; "
                "a run continues as it began (its length, its reports and how a step is spread may change)"
            )


def save_checkpoint(run: Run, step: int) -> None:
    """Write OUTPUT/checkpoints/step-N; the folder gets its name when it is complete.

    Every process calls this: random states are kept for each of them, everything else once.
    """
    accelerator, main = run.accelerator, run.accelerator.is_main_process
    final = run.folder.checkpoints / f"step-{step}"
    partial = run.folder.checkpoints / f"partial-{step}"
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(_random_state(), partial / f"random-{accelerator.process_index}.pt")
    if main:
        accelerator.unwrap_model(run.policy).save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        torch.save(run.optimizer.state_dict(), partial / "optimizer.pt")
        torch.save(run.schedule.state_dict(), partial / "schedule.pt")
        run.moving.save(partial)
        (partial / "position.json").write_text(json.dumps(asdict(replace(run.start, step=step))))
    accelerator.wait_for_everyone()
    if main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    accelerator.wait_for_everyone()


def read_position(checkpoint: Path) -> Position:
    """Where a checkpoint stands; `RunFault` where it is damaged."""
    try:
        return Position(**json.loads((checkpoint / "position.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, error) from error


def restore(checkpoint: Path, optimizer: Any, schedule: Any, rank: int, device: torch.device) -> None:
    """Load optimizer, schedule and random state of a checkpoint; the model's weights are loaded apart."""
    try:
        optimizer.load_state_dict(
            torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
        )
        schedule.load_state_dict(torch.load(checkpoint / "schedule.pt", weights_only=True))
        own = checkpoint / f"random-{rank}.pt"
        if own.exists():  # absent where the run goes on with more processes
            state = torch.load(own, weights_only=True)
            torch.set_rng_state(state["cpu"])
            if state["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"][0])
    except Exception as error:  # a damaged file raises what its format raises
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Path, error: Exception) -> RunFault:
    return RunFault(
        f"{checkpoint}: the checkpoint is damaged ({first_line(error)}); "
        "remove it to continue from the one before it"
    )


def _random_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }
