"""The loss of a rule from hidden states and a head: full logits are never held.

The rule's formula is known in the forward pass, so a chunk's gradient is taken while its logits are at hand,
and the gradients of hidden states and head are summed there; backward multiplies them by a scalar. Rows that
are ignored, or whose weight is known to be 0 beforehand, are dropped before the head's product; rows through
which nothing flows are dropped before the products of the gradient.

Letters: N positions of a call, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from priority_dsl.vocab_pass.call import Chunks, FusedCall
from priority_dsl.vocab_pass.gradients import Gradients
from priority_dsl.vocab_pass.heads import Head
from priority_dsl.vocab_pass.passes import Plan


def fused_total(plan: Plan, call: FusedCall, hidden: Tensor, head: Head) -> Tensor:
    """The total loss of a call, differentiable in hidden `[N, D]` and the parameters of the head."""
    pairs = head.pairs(hidden)
    return _Fused.apply(plan, call, head, head.bias, *(t for pair in pairs for t in pair))  # type: ignore[no-any-return]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, call: FusedCall, head: Head, bias: Tensor | None, *flat: Tensor
    ) -> Tensor:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        sums = Gradients.empty(pairs, bias, ctx.needs_input_grad[3:])
        with torch.no_grad():
            total = plan.run(call, Chunks(call, head, pairs), sums)
        ctx.save_for_backward(*sums.finished())
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, *flat)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        # The sums are as large as the head. They become the gradient in place, unless they are needed again.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        sums = ctx.saved_tensors
        scaled = [None if s is None else s * g if kept else s.mul_(g) for s in sums]
        return (
            None,
            None,
            None,
            *(None if s is None else s.to(d) for s, d in zip(scaled, ctx.dtypes, strict=True)),
        )
