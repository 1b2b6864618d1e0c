"""A head whose 'hidden states' are the logits themselves, so that the fused loss can be given any logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from priority_dsl.row_graphs import Fused
from priority_dsl.rule import CompiledRule
from priority_dsl.step import LossOutput
from priority_dsl.vocab_pass import Head
from priority_dsl.vocab_pass.heads import Pair


class Whole(Head):
    """The identity, also of infinite logits: its weight `[V, V]` serves the gradient alone."""

    @classmethod
    def of_size(cls, logits: Tensor) -> Whole:
        return cls(torch.eye(logits.shape[-1], dtype=logits.dtype))

    def fill(self, pairs: Sequence[Pair], out: Tensor) -> Tensor:
        return out.copy_(pairs[0][0])

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def in_two_passes(rule: CompiledRule) -> CompiledRule:
    """The rule with its fused loss in two passes, also where one would do."""
    from dataclasses import replace

    from priority_dsl.fused_plan import fused_plan

    rule = CompiledRule(rule.checked, rule.name)

    def fused(stored: frozenset[str] = frozenset(), stepped: bool = False, swept: bool = False) -> Fused:
        how = replace(fused_plan(rule.checked, stored), kind="two passes", known=frozenset())
        return Fused.of(rule.checked, how, stored, stepped, swept)

    rule._executor.fused = fused  # type: ignore[method-assign]
    return rule


def losses(
    rule: CompiledRule, logits: Tensor, targets: Tensor, rows: int | None, **given: Any
) -> tuple[LossOutput, LossOutput, Tensor, Tensor]:
    """Dense and fused outputs, and the gradient of each mean by the logits."""
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    dense = rule.loss(leaf, targets, **given)
    fused = rule.fused_loss(other, Whole.of_size(logits), targets, rows=rows, **given)
    return dense, fused, *(_gradient(out, z) for out, z in ((dense, leaf), (fused, other)))  # type: ignore[return-value]


def _gradient(out: LossOutput, logits: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(out.total, logits, allow_unused=True)
    return torch.zeros_like(logits) if g is None else g
