"""Views: a model made from another. Bodies take and return logits `[N, V]`."""

from __future__ import annotations

from priority_dsl.kinds import Range
from priority_dsl.registry import Verdict, view


def _not_positive(t: Range) -> Verdict:
    return "certain" if t.high <= 0 else "possible" if t.low < 0 or t.contains(0.0) else None


@view(
    example="nll(tempered(on, 2))",
    wants=("model", "number"),
    hazard=_not_positive,
    danger="temperature of 0 or less",
    oracle=lambda z, t: [v / t for v in z],
)
def tempered(m, t):
    """The model at temperature t: its logits divided by t."""
    return m / t
