"""What a run tells: a JSON line a step in OUTPUT/log.jsonl, notes and a progress bar on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.atomic import sync, write_file
from trainer.faults import RunFault, first_line

LOG_NAME = "log.jsonl"


def tell(text: str) -> None:
    """Say something on standard error."""
    print(text, file=sys.stderr)


def silent(text: str) -> None:
    """Say nothing."""


class RunLog:
    """The log of a run. Only the main process writes; the others keep silent.

    `path` is OUTPUT/log.jsonl; lines are appended and flushed at once, so that a run that stops keeps them.
    """

    def __init__(self, output: Path, main: bool, quiet: bool):
        self.path = output / LOG_NAME
        self._main = main
        self._quiet = quiet
        self._shown = main and not quiet and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._followers: list[Callable[[Mapping[str, Any]], None]] = []

    def start(self, done: int, total: int) -> None:
        """Open the progress bar where standard error is a terminal."""
        self._bar = tqdm(initial=done, total=total, unit="step", disable=not self._shown, dynamic_ncols=True)

    def bar(self, total: int, unit: str) -> tqdm:
        """A progress bar of its own, for work before the first step."""
        return tqdm(total=total, unit=unit, unit_scale=True, disable=not self._shown, dynamic_ncols=True)

    def note(self, text: str) -> None:
        """Say something on standard error, above the bar."""
        if self._main and not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def write(self, line: dict[str, Any]) -> None:
        """Append one JSON line to the log; numbers that are not finite become null, which JSON has."""
        if not self._main:
            return
        line = {name: _finite(value) for name, value in line.items()}
        try:
            # Not "a", which would begin anew a log that vanished.
            with self.path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunFault(
                f"step {line['step']}: the log {self.path} cannot be written: {first_line(error)}; "
                "the checkpoints so far are whole. Mend that, then continue with --resume"
            ) from error
        for follower in self._followers:
            follower(line)

    def follow(self, follower: Callable[[Mapping[str, Any]], None]) -> None:
        """Hand every line that is written from now on to `follower` too, in the main process."""
        self._followers.append(follower)

    def sync(self) -> None:
        """Force what was written to disk, so that a checkpoint never knows more steps than the log."""
        if self._main:
            sync(self.path)

    def advance(self, line: dict[str, Any] | None) -> None:
        """Move the progress bar a step on and show the figures of a line of the log beside it."""
        if self._bar is not None:
            self._bar.update()
        if self._bar is not None and line is not None:
            self._bar.set_postfix_str(f"nll {line['nll']:.4f}, loss {line['loss']:.4f}", refresh=False)

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def cut(self, last_step: int) -> None:
        """Drop the lines after `last_step`, which a resumed run writes anew, and an unfinished line."""
        if not self._main or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_file(self.path, "".join(line for line in lines if _until(line, last_step)))


def _until(text: str, last_step: int) -> bool:
    """Whether a line of the log is whole and of a step that is not after `last_step`."""
    try:
        return text.endswith("\n") and json.loads(text)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
