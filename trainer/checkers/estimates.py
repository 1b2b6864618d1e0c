"""Avg@k and Pass@k of samples, and the standard error of a mean over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a correct one.

    `correct` of `samples` are correct: 1 - C(samples - correct, k) / C(samples, k), the unbiased estimator,
    counted in whole numbers and rounded once. Raises ValueError unless 0 <= correct <= samples and
    1 <= k <= samples. Source: Chen et al., arXiv:2107.03374, Eq. (1).
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass_at_k needs 0 <= correct <= samples and 1 <= k <= samples, not {samples, correct, k}"
        )
    every = math.comb(samples, k)
    return (every - math.comb(samples - correct, k)) / every


def mean_pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Pass@k over problems, each with its number of correct samples; 0 without a problem. k = 1 is Avg."""
    return sum(pass_at_k(samples, c, k) for c in correct) / max(len(correct), 1)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None of fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
