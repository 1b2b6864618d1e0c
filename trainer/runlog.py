"""What a run tells: a JSON line a step in OUTPUT/log.jsonl, notes and a progress bar on standard error."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
        if self._main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")

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
        kept = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["step"] <= last_step:
                kept.append(text)
        self.path.write_text("".join(text + "\n" for text in kept), encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
