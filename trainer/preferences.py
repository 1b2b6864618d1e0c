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

ROUNDING = 1e-5  # of a sum of float32 statistics, relative


def reads_pairs(config: RowConfig) -> bool:
    """Whether the data are pairs: --chosen says so, or the first row fits no other layout."""
    if config.chosen is not None:
        return True
    row = next((row for row in open_rows(config.data[0]) if isinstance(row, Row)), None)
    if row is None or config.completion is not None:
        return False
    pair = {"chosen", "rejected"} <= row.fields.keys() or "input_ids_chosen" in row.fields
    return pair and not any(all(name in row.fields for name in layout.fields) for layout in LAYOUTS)


def ranking(nll: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pair, whether its chosen response is the likelier one, and by how much: the margin in nats.

    `nll [2 * pairs]` is the plain one of each response, summed over its tokens, the chosen one first. The
    margin is log p(chosen) - log p(rejected). Neither is likelier where it is no more than rounding, which
    else would decide about two responses that are the same.
    """
    chosen, rejected = nll[0::2], nll[1::2]
    margins = rejected - chosen
    return margins > ROUNDING * (chosen + rejected), margins


@dataclass(frozen=True, slots=True)
class Ranked:
    """Pairs as `ranking` has them, the chosen responses' log-probability in nats, and the tokens of both."""

    preferred: tuple[bool, ...]
    margins: tuple[float, ...]
    chosen: tuple[float, ...]
    tokens: int


def rank(
    model: Any,
    rows: Sequence[Example],
    *,
    batch_size: int = 32,
    bf16: bool = False,
    say: Callable[[str], None] = tell,
) -> Ranked:
    """Measure a model on the examples of pairs, the chosen one first, without holding full logits."""
    totals, tokens = torch.zeros(len(rows), dtype=torch.float64), 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    parts = take_apart(model, bf16, say)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = collate([rows[i] for i in some], "response", ()).to(model.device)
            live = batch.targets != IGNORED
            nll, _ = plain_figures(*parts(batch.input_ids), batch.targets, live)
            totals[some] = nll.double().sum(-1).cpu()
            tokens += int(live.sum())
    preferred, margins = ranking(totals)
    chosen = tuple((-totals[0::2]).tolist())
    return Ranked(tuple(preferred.tolist()), tuple(margins.tolist()), chosen, tokens)
