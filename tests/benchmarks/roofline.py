"""How fast this device can be at all, measured in the same run: plain products and plain copies.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.benchmarks.losses import Cost, Inputs

LOGIT = 4  # bytes: logits are float32
REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """Seconds of one product of vocabulary size, and bytes a second that a copy reads and writes."""

    product: float
    bandwidth: float
    logits: int
    itemsize: int

    @classmethod
    def measured(
        cls, given: Inputs, clock: Callable[[Callable[[], object]], tuple[float, float]]
    ) -> Roofline:
        """Of the device of some inputs: `hidden @ head.T`, and a copy as large as 1 GiB or their logits."""
        hidden, head = given.hidden.detach(), given.head.detach()
        count = len(hidden) * len(head)
        source = torch.empty(min(count, 1 << 28), device=hidden.device)
        target = torch.empty_like(source)
        product = _median(clock, lambda: hidden @ head.T)
        copy = _median(clock, lambda: target.copy_(source))
        return cls(product, 2 * source.nbytes / copy, count, hidden.element_size())

    def least(self, cost: Cost) -> float:
        """The seconds that nothing with this cost can go below, products and rows one after the other."""
        moved = self.logits * (cost.swept * LOGIT + cost.graded * (LOGIT + self.itemsize))
        return cost.products * self.product + moved / self.bandwidth

    def __str__(self) -> str:
        return f"a product takes {self.product * 1e3:.2f} ms, a copy moves {self.bandwidth / 1e9:.0f} GB/s"


def _median(clock: Callable[[Callable[[], object]], tuple[float, float]], run: Callable[[], object]) -> float:
    run()
    return statistics.median(clock(run)[0] for _ in range(REPEATS))
