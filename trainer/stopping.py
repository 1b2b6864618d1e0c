"""Early stopping: a run ends when its held-out nll has not become lower for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainConfig


class Stopping:
    """Counts the measurements of --eval-steps since the plain held-out nll was last lower by --min-delta.

    The schedule follows the planned steps all the same. What is saved at the end is the model as it is then;
    the checkpoint of the best measurement stays with --keep-best.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._patience, self._delta = config.patience, config.min_delta
        self._lowest: float | None = None
        self._step = 0
        self._waited = 0

    @property
    def due(self) -> bool:
        """Whether the run ends here."""
        return self._patience is not None and self._waited >= self._patience

    def take(self, step: int, nll: float) -> bool:
        """Take in a measurement after `step` steps, nats a token; whether the run ends here."""
        if self._lowest is None or nll < self._lowest - self._delta:
            self._lowest, self._step, self._waited = nll, step, 0
        else:
            self._waited += 1
        return self.due

    def __str__(self) -> str:
        by = f" by {self._delta:g}" if self._delta else ""
        often = f"{self._waited} measurement" + ("s" if self._waited != 1 else "")
        return (
            f"stopped early: the held-out nll was {self._lowest:.4f} at step {self._step} and not lower{by} "
            f"in {often} since (--patience {self._patience}; --resume with a larger one goes on)"
        )

    def state(self) -> dict[str, Any]:
        """As `Lasting` says."""
        return {"lowest": self._lowest, "step": self._step, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `Lasting` says."""
        self._lowest, self._step, self._waited = state["lowest"], state["step"], state["waited"]
