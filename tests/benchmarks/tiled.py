"""A product in bfloat16 whose sums are taken in float32 a tile of the vocabulary at a time.

It holds what `hidden @ head.T` holds, and is what makes the memory of a baseline measurable on a CPU without
16-bit instructions, where that product takes an hour.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 4096  # columns of the logits


class TiledProduct(torch.autograd.Function):
    """`hidden [N, D] @ head [V, D].T` and its gradients, each in the dtype of its operand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden, head)
        logits = hidden.new_empty(len(hidden), len(head))
        for start in range(0, len(head), TILE):
            logits[:, start : start + TILE] = hidden.float() @ head[start : start + TILE].float().T
        return logits

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden, head = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        to_head = torch.empty_like(head)
        for start in range(0, len(head), TILE):
            part = gradient[:, start : start + TILE].float()
            to_hidden.addmm_(part, head[start : start + TILE].float())
            to_head[start : start + TILE] = part.T @ hidden.float()
        return to_hidden.to(hidden.dtype), to_head
