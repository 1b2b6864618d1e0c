"""When a run must stop by itself: it explodes, or too many of its steps in a row are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import TrainConfig
from trainer.faults import NotFinite, RunFault, shown_rows

PATIENCE = 10
"""Lines of the log in a row above the limit that stop a run, and steps in a row that may be skipped."""
ROOM = 10.0
"""How far above its start, or a uniform guess, the plain nll may be: nats a token."""


class Health:
    """Watches the plain nll and the steps that were skipped.

    A loss with negative weights has no lower bound: pushed long enough, the model gives nothing to the tokens
    of the data, and the loss falls for ever while everything is lost. A run *explodes* when the plain nll of
    its training tokens stays above a limit for PATIENCE lines of the log. The limit is --max-nll, by default
    ROOM nats above the nll of the first line or of a uniform guess, whichever is higher; 0 means none. Rows
    that a rule pushes away have a high nll by intent, which this leaves room for.
    """

    def __init__(self, config: TrainConfig, vocabulary: int) -> None:
        self.skipped = 0
        self._limit = config.max_nll
        self._uniform = math.log(max(vocabulary, 1))
        self._first: float | None = None
        self._above = 0
        self._in_a_row = 0

    @property
    def limit(self) -> float:
        """The highest healthy plain nll, nats a token; infinite where there is none."""
        if self._limit is not None:
            return self._limit or math.inf
        return math.inf if self._first is None else max(self._first, self._uniform) + ROOM

    @property
    def well(self) -> bool:
        """Whether the last line of the log was below the limit: only then is a checkpoint worth its room."""
        return self._above == 0

    def follow(self, step: int, nll: float, places: Sequence[str]) -> None:
        """Take in a line of the log, of completed steps `step`; `RunFault` where the run explodes."""
        if self._first is None:
            self._first = nll
        self._above = self._above + 1 if nll > self.limit else 0
        if self._above < PATIENCE:
            return
        raise RunFault(
            f"step {step}: the run explodes: the plain nll is {nll:.1f} nats a token and was above "
            f"{self.limit:.1f} for {PATIENCE} lines of the log (first {self._first:.2f}, a uniform guess "
            f"{self._uniform:.2f}), last in the rows {shown_rows(places)}; bound negative weights, lower "
            "--learning-rate, or set --max-nll (0: never stop). No checkpoint was written meanwhile"
        )

    def skip(self, step: int, reason: NotFinite) -> None:
        """Count a skipped step; `RunFault` after PATIENCE of them in a row."""
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= PATIENCE:
            raise RunFault(f"{reason}\n{PATIENCE} steps in a row were not finite (--skip-non-finite)")

    def passed(self) -> None:
        """A step was finite."""
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """As `Lasting` says."""
        return {
            "first": self._first, "above": self._above, "skipped": self.skipped, "in_a_row": self._in_a_row,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `Lasting` says."""
        self._first, self._above = state["first"], state["above"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
