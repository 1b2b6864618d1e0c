"""What the benchmark of the fused loss measures: inputs, and losses of them, ours and plain cross-entropy.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from priority_dsl import compile_rule

LIVE = 0.34
BASELINE = "F.cross_entropy"
BASELINE_16 = "F.cross_entropy of logits.float()"
STATISTICS = "H_on + mass_on + rank_on + topk_entropy(on, 20) + pmax_on + margin_on + p_on"


@dataclass
class Inputs:
    """Hidden states `[N, D]`, a head `[V, D]`, targets `[N]` and which tokens a selection keeps."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    chosen: Tensor

    @classmethod
    def draw(
        cls, rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Inputs:
        torch.manual_seed(0)
        hidden = torch.randn(rows, width, device=device)
        head = torch.randn(vocabulary, width, device=device) / width**0.5
        chosen = torch.rand(rows, device=device) < LIVE
        targets = torch.randint(0, vocabulary, (rows,), device=device)
        return cls(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets, chosen)

    def wide(self, rows: int) -> Inputs:
        """The first rows in float64."""
        hidden, head = (t.detach().double().requires_grad_() for t in (self.hidden[:rows], self.head))
        return Inputs(hidden, head, self.targets[:rows], self.chosen[:rows])

    def first(self, rows: int) -> Inputs:
        """The first rows."""
        hidden, head = (t.detach().requires_grad_() for t in (self.hidden[:rows], self.head))
        return Inputs(hidden, head, self.targets[:rows], self.chosen[:rows])

    def step(self, loss: Callable[[Inputs], Tensor]) -> Callable[[], None]:
        """A loss with its gradients."""

        def run() -> None:
            loss(self).backward()
            self.hidden.grad = self.head.grad = None

        return run


@dataclass(frozen=True)
class Cost:
    """What a loss cannot do without: products of 2 N D V operations, and shares of the logits it goes over.

    `swept` times the logits are read for statistics, `graded` times read and written as their gradient.
    """

    products: float
    swept: float
    graded: float


@dataclass(frozen=True)
class Variant:
    """A loss of inputs, what its time may be as a share of the baseline's, and what it is, in words."""

    loss: Callable[[Inputs], Tensor]
    target: float | None = None
    same_as: str = ""  # a variant of which this is another way to compute the same
    cost: Cost | None = None


def fused(
    text: str,
    target: float | None = None,
    reads: Callable[[Inputs], dict] = lambda i: {},
    cost: Cost = Cost(3, 1, 1),
) -> Variant:
    """A rule of ours by its text."""
    rule = compile_rule(text)
    return Variant(lambda i: rule.fused_loss(i.hidden, i.head, i.targets, **reads(i)).mean, target, cost=cost)


def baselines(dtype: torch.dtype) -> dict[str, Variant]:
    """Plain cross-entropy on full logits; the first is what others are compared with.

    In 16 bits that is the one that trainers use, on logits in float32.
    """
    native = Variant(lambda i: cross_entropy(i.hidden @ i.head.T, i.targets))
    if dtype == torch.float32:
        return {BASELINE: native}
    widened = Variant(lambda i: cross_entropy((i.hidden @ i.head.T).float(), i.targets))
    return {BASELINE_16: widened, BASELINE: native}


def ours(pointwise: float, together: float, slack: float, top: float) -> dict[str, Variant]:
    """Our losses; targets of pointwise rules, of all statistics, above the counted products, of `top`."""
    return {
        "`sft`": fused("sft", pointwise),
        "`dft`": fused("dft", pointwise),
        "`weight = H_on`": fused("weight = H_on", pointwise),
        "seven statistics at once": fused(STATISTICS, together),
        f"selection that reads the model, {LIVE:.0%} live": fused(
            "column k: bool per token; weight = p_on > 2 or k",
            round((1 + 2 * LIVE) / 3 + slack, 2),
            lambda i: {"columns": {"k": i.chosen}},
            Cost(1 + 2 * LIVE, 1, LIVE),
        ),
        f"stored selection (`prift_mass`), {LIVE:.0%} live": fused(
            "prift_mass", round(LIVE + min(slack + 0.02, 0.03), 2),
            lambda i: {"stored": {"mass(ref) >= tau": i.chosen}}, Cost(3 * LIVE, LIVE, LIVE),
        ),
        "top half of the batch": fused("top(H_on, 0.5, batch)", top, cost=Cost(2.5, 1.5, 0.5)),
        "entropy bonus, gradient through H": fused("loss = nll_on - 0.1 * H_on"),
    }  # fmt: skip


def variants(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Variant]:
    """Baselines, ours and, on a GPU, ours without its kernels; targets are those of the device."""
    base = baselines(dtype)
    mine = ours(0.85, 0.90, 0.0, 0.75) if device == "cuda" else ours(0.90, 1.00, 0.03, 0.85)
    if device == "cuda":
        mine["`dft` by torch operations"] = without_kernels(fused("dft"))
    elif dtype != torch.float32:  # 16-bit products on a CPU tell little and take long
        mine = {name: replace(mine[name], target=1.00) for name in ("`sft`", "`dft`")}
        base.pop(BASELINE)
    mine["`sft`"] = replace(mine["`sft`"], same_as=next(iter(base)))
    return base | mine


def without_kernels(variant: Variant) -> Variant:
    """The same by torch operations on a GPU."""

    def loss(i: Inputs) -> Tensor:
        with mock.patch("priority_dsl.executor.has_kernels", return_value=False):
            return variant.loss(i)

    return Variant(loss, same_as="`dft`")
