"""Which checkpoints stay: the last ones (--keep-last) and that of the best held-out figure (--keep-best)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainer.atomic import discard, write_file
from trainer.faults import RunFault, first_line
from trainer.objective import Figures

if TYPE_CHECKING:
    from trainer.prepare import Run

BEST = "best.json"


class HeldOut:
    """What measuring the held-out rows came to: the last figures, and the best plain nll with its step.

    The best is the lowest `eval_nll`, in nats a token, of --eval-data; of equal ones the first. It is the
    plain nll, not the rule's loss, which also falls where a rule merely gives less weight.
    """

    def __init__(self) -> None:
        self.figures: Figures | None = None
        self.best_step: int | None = None
        self.best_nll = float("inf")
        self.extra: list[int] = []  # steps that got a checkpoint only because they were the best then

    def take(self, step: int, figures: Figures) -> bool:
        """Remember a measurement; whether it is the best one so far."""
        self.figures = figures
        if figures.nll >= self.best_nll:
            return False
        self.best_step, self.best_nll = step, figures.nll
        return True

    def __str__(self) -> str:
        return f"held-out nll {self.best_nll:.4f} after step {self.best_step}"

    def state(self) -> dict[str, Any]:
        """As `Lasting` says."""
        if self.figures is None:
            return {}
        best = {"best_step": self.best_step, "best_nll": self.best_nll, "extra": self.extra}
        return {"figures": asdict(self.figures), **best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `Lasting` says."""
        if state:
            self.figures = Figures(**state["figures"])
            self.best_step, self.best_nll = state["best_step"], state["best_nll"]
            self.extra = state["extra"]


def keep_checkpoints(run: Run) -> None:
    """Write OUTPUT/best.json, and remove the checkpoints that --keep-last and --keep-best let go.

    Without --keep-last only the checkpoint of an earlier best goes, unless --save-steps asked for it. The
    main process calls this whenever a checkpoint has been written, and before the first step: a run that
    was killed on the way here makes up for it.
    """
    try:
        if run.config.keep_best:
            _write_best(run)
        for step in _let_go(run):
            discard(run.folder.checkpoint(step))
    except OSError as error:
        raise RunFault(
            f"{run.folder.checkpoints}: the checkpoints to keep cannot be settled: {first_line(error)}; "
            "the newest is whole. Mend that, then continue with --resume"
        ) from error


def _write_best(run: Run) -> None:
    """Write which checkpoint is the best, where that is not there yet; null where it was removed."""
    path, best = run.folder.path / BEST, run.measured.best_step
    if best is None:
        return
    there = f"checkpoints/step-{best}" if run.folder.checkpoint(best).is_dir() else None
    text = json.dumps({"step": best, "eval_nll": run.measured.best_nll, "checkpoint": there}) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_file(path, text)


def _let_go(run: Run) -> list[int]:
    """The steps whose checkpoints go."""
    config, steps, measured = run.config, run.folder.steps(), run.measured
    last = steps[-1:] if config.keep_last is None else steps[-config.keep_last :]
    kept = {*last, measured.best_step} if config.keep_best else {*last}
    may_go = steps if config.keep_last is not None else measured.extra
    return [step for step in steps if step in may_go and step not in kept]
