"""How a model ranks two responses to the same prompt, of which one was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from priority_dsl.integrations.heads import plain_figures, take_apart
from trainer.batches import IGNORED, collate
from trainer.config import RowConfig
from trainer.data import Example
from trainer.layouts import LAYOUTS
from trainer.rows import Row, open_rows
from trainer.runlog import tell


def reads_pairs(config: RowConfig) -> bool:
    """Whether the data are pairs: --chosen says so, or the first row fits no other layout."""
    if config.chosen is not None:
        return True
    row = next((row for row in open_rows(config.data[0]) if isinstance(row, Row)), None)
    if row is None or config.completion is not None:
        return False
    pair = {"chosen", "rejected"} <= row.fields.keys() or "input_ids_chosen" in row.fields
    return pair and not any(all(name in row.fields for name in layout.fields) for layout in LAYOUTS)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The log-probability of both responses of each pair, nats summed over the response, and their tokens."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    tokens: int

    @property
    def margins(self) -> list[float]:
        """log p(chosen) - log p(rejected) of each pair, nats."""
        return [a - b for a, b in zip(self.chosen, self.rejected, strict=True)]


def rank(
    model: Any,
    rows: Sequence[Example],
    *,
    batch_size: int = 32,
    bf16: bool = False,
    say: Callable[[str], None] = tell,
) -> Ranked:
    """Measure a model on the examples of pairs, the chosen one first, without holding full logits."""
    logp, tokens = [0.0] * len(rows), 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    parts = take_apart(model, bf16, say)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = collate([rows[i] for i in some], "response", ()).to(model.device)
            live = batch.targets != IGNORED
            nll, _ = plain_figures(*parts(batch.input_ids), batch.targets, live)
            for i, total in zip(some, nll.double().sum(-1).tolist(), strict=True):
                logp[i] = -total
            tokens += int(live.sum())
    return Ranked(tuple(logp[0::2]), tuple(logp[1::2]), tokens)
