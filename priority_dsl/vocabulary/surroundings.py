"""What a token, its row or the run tells without a model: order, time."""

from __future__ import annotations

import math

from priority_dsl.kinds import NONNEGATIVE, UNIT, Extent, Range, Stage
from priority_dsl.registry import Verdict, function, reading

position = reading(
    "position", "order", "The place of a token among the supervised tokens of its example, from 0.",
    "1 if position < 32 else 0.5", range=NONNEGATIVE,
)  # fmt: skip
length = reading(
    "length", "order", "The number of supervised tokens of the example.", "1 / length",
    extent=Extent.EXAMPLE, range=Range(1.0, math.inf),
)  # fmt: skip
progress = reading(
    "progress", "time", "Completed optimizer steps over planned optimizer steps: from 0, never 1.",
    "1 if progress < 0.5 else p_on", extent=Extent.RUN, stage=Stage.RUN,
    range=Range(0.0, 1.0, high_open=True), given="call",
)  # fmt: skip
epoch = reading(
    "epoch", "time", "The number of the pass over the data, from 0.", "1 if epoch == 0 else p_on",
    extent=Extent.RUN, stage=Stage.RUN, range=NONNEGATIVE, given="call",
)  # fmt: skip


def _ramp(x: float, a: float, b: float) -> float:
    return 1.0 if x >= b else 0.0 if x <= a else (x - a) / (b - a)


def _upside_down(x: Range, a: Range, b: Range) -> Verdict:
    return "certain" if a.low > b.high else None


@function(
    group="time", implicit=("progress",), range=lambda x, a, b: UNIT, oracle=_ramp,
    example="ramp(0.1, 0.5) * p_on", hazard=_upside_down, danger="ramp that ends before it starts",
)  # fmt: skip
def ramp(progress, a, b):
    """A schedule over the run: 0 up to a, 1 from b, linear between; a step where a is b."""
    return ((progress - a) / (b - a)).masked_fill(progress <= a, 0.0).masked_fill(progress >= b, 1.0)
