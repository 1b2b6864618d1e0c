"""The loss of a rule from hidden states and a head, chunk by chunk: full logits are never held.

The rule's formula is known in the forward pass, so a chunk's gradient is taken while its logits are at hand,
and the gradients of hidden states and head are summed there; backward multiplies them by a scalar. Rows that
are ignored, or whose weight is known to be 0 beforehand, are dropped before the head's product; rows through
which nothing flows are dropped before the products of the gradient.

Letters: N positions of a call, R rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from priority_dsl.compiler import LossGraph
from priority_dsl.registry import REGISTRY, RowGradient
from priority_dsl.values import Value
from priority_dsl.vocab_pass.heads import Head
from priority_dsl.vocab_pass.sweep import ROWS, block_rows


@dataclass
class FusedCall:
    """One fused call: what it reads, and, once it has run, what it found.

    `rows` and `whole` are the rule's graphs without and with autograd, `flowing` the statistics that carry
    gradient; `inputs` the graphs' inputs but the logits, `[N]` or 0-dimensional; `heads` other models that
    stay loaded as hidden states `[N, D]` and head, `dense` those given as logits `[N, V]`; `index` the rows
    to compute. Results are `[N]`, 0 in rows that were not computed.
    """

    rows: LossGraph
    whole: LossGraph
    flowing: Sequence[Value]
    inputs: dict[str, Tensor]
    heads: Mapping[str, tuple[Tensor, Head]]
    dense: Mapping[str, Tensor]
    index: Tensor
    size: int | None = None
    found: list[tuple[Tensor, ...]] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """Whether every statistic that carries gradient reads the trained model alone and in closed form."""
        return all(
            REGISTRY.statistic(v.word).row_gradient is not None and v.arguments[0].word == "model"
            for v in self.flowing
        )

    def chunks(self) -> Sequence[Tensor]:
        """The rows to compute in chunks; one chunk at least, so that an empty call has its dtypes."""
        size = self.size or ROWS.get(self.index.device.type, ROWS["cpu"])
        return self.index.split(size) if self.index.numel() else (self.index,)

    def bound(self, chunk: Tensor) -> dict[str, Tensor]:
        """The inputs of the graphs for a chunk of rows, but the logits of the trained model."""
        bound = {name: t[chunk] if t.dim() else t for name, t in self.inputs.items()}
        bound.update({f"logits_{n}": z[chunk] for n, z in self.dense.items()})
        bound.update({f"logits_{n}": head.logits(h[chunk]) for n, (h, head) in self.heads.items()})
        return bound

    def results(self) -> list[Tensor]:
        """Weights, nll and losses of all positions `[N]`."""
        values = [torch.cat(parts) for parts in zip(*self.found, strict=True)]
        n = self.inputs["valid"].numel()
        return [v.new_zeros(n).index_copy_(0, self.index, v) for v in values]


def fused_total(call: FusedCall, hidden: Tensor, head: Head) -> Tensor:
    """The total loss of a call, differentiable in hidden `[N, D]` and the head's weight and bias."""
    return _Fused.apply(hidden, head.weight, head.bias, head, call)  # type: ignore[no-any-return]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, call: FusedCall
    ) -> Tensor:
        sums = _Gradients.zeros(head, hidden, weight, bias, ctx.needs_input_grad)
        chunk_loss = _closed_form if call.closed else _by_autograd
        total = call.inputs["one"] * 0.0
        for chunk in call.chunks():
            total = total + chunk_loss(call, chunk, hidden, sums)
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        sums = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if s is None else (s * g).to(dtype) for s, dtype in sums), None, None


@dataclass
class _Gradients:
    """Sums over chunks, the head's in float32 or wider; None for what needs no gradient."""

    head: Head
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
    ) -> _Gradients:
        """Nothing yet, for those of hidden, weight and bias that need a gradient."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return cls(
            head,
            torch.zeros_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=wide) if needed[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None,
        )

    @property
    def any(self) -> bool:
        """Whether a gradient is needed at all."""
        return any(t is not None for t in (self.hidden, self.weight, self.bias))

    def add(self, rows: Tensor, hidden_R: Tensor, dz: Tensor) -> None:
        """Add some rows: their hidden states `[R, D]` and the gradient `[R, V]` of the bare product."""
        operand = _product_dtype(hidden_R, self.head.weight)
        dz = dz.to(operand)
        if self.hidden is not None:
            self.hidden.index_copy_(0, rows, (dz @ self.head.weight.to(operand)).to(self.hidden.dtype))
        if self.weight is not None and self.weight.dtype == operand:
            self.weight.addmm_(dz.T, hidden_R.to(operand))
        elif self.weight is not None:
            self.weight += dz.T @ hidden_R.to(operand)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which the head's product runs: autocast's where it is on."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _closed_form(call: FusedCall, chunk: Tensor, hidden: Tensor, sums: _Gradients) -> Tensor:
    """The loss of a chunk; its gradient from what flows to each statistic, written over the logits.

    The product is made for the whole chunk, elementwise work in blocks that stay in the cache. The gradient
    of the live rows moves up to the first rows of `z`, which nobody reads any more.
    """
    hidden_R = hidden[chunk]
    z = sums.head.logits(hidden_R)
    total, live, done = call.inputs["one"] * 0.0, [], 0
    for start in range(0, max(1, len(chunk)), size := block_rows(z)):
        block = slice(start, start + size)
        loss, rows = _block(call, chunk[block], z[block], z[done:], sums)
        total, done = total + loss, done + rows.numel()
        live.append(rows + start)
    if done == len(chunk) > 0:
        sums.add(chunk, hidden_R, z)
    elif done:
        rows = torch.cat(live)
        sums.add(chunk[rows], hidden_R[rows], z[:done])
    return total


def _block(
    call: FusedCall, rows_N: Tensor, z: Tensor, out: Tensor, sums: _Gradients
) -> tuple[Tensor, Tensor]:
    """The loss of a block and its live rows, the gradient of whose bare product goes to the top of `out`."""
    weights, nll, losses, e, s, *rest = call.rows({**call.bound(rows_N), "logits_on": z})
    call.found.append((weights, nll, losses))
    nothing = rows_N.new_zeros(0)
    if not sums.any or not rows_N.numel():
        return losses.sum(), nothing
    live, flows, values = _live(nll, rest[: len(call.flowing)], rest[len(call.flowing) :])
    rows = live.nonzero().squeeze(-1)
    if not rows.numel():
        return losses.sum(), nothing
    if rows.numel() < live.numel():
        z, rows_N, nll, e, s = z[rows], rows_N[rows], nll[rows], e[rows], s[rows]
        flows, values = [f[rows] for f in flows], [v[rows] for v in values]
    parts = [
        REGISTRY.statistic(v.word).row_gradient(flow, value)  # type: ignore[misc]
        for v, flow, value in zip(call.flowing, flows, values, strict=True)
    ]
    out, y = out[: rows.numel()], call.inputs["targets"][rows_N]
    if sums.head.cap is None:
        _logit_gradient(z, e, s, y, nll, _sum(parts), out)
        if sums.head.scale != 1.0:
            out.mul_(sums.head.scale)
    else:  # the cap's slope reads the logits, on which `out` may lie
        _logit_gradient(z, e, s, y, nll, _sum(parts), e)
        out.copy_(sums.head.through(e, z))
    return losses.sum(), rows


def _live(
    nll: Tensor, flows: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The rows through which something flows; nothing does through an infinite value or slope."""
    closed = [(f == 0) | ~f.isfinite() | v.isinf() for f, v in zip(flows, values, strict=True)]
    live = ~torch.stack(closed).all(0) if closed else torch.zeros_like(nll, dtype=torch.bool)
    flows = [f.masked_fill(c, 0.0) for f, c in zip(flows, closed, strict=True)]
    values = [v.masked_fill(c, 0.0) for v, c in zip(values, closed, strict=True)]
    return live & nll.isfinite(), flows, values


def _sum(parts: Sequence[RowGradient]) -> RowGradient:
    """The numbers of several statistics added."""
    columns = [[t for t in column if t is not None] for column in zip(*parts, strict=True)]
    return RowGradient(*(sum(column[1:], start=column[0]) if column else None for column in columns))


def _logit_gradient(
    z: Tensor, e: Tensor, s: Tensor, y: Tensor, nll: Tensor, parts: RowGradient, out: Tensor
) -> None:
    """Write the gradient `[R, V]` of the rows' loss by their logits into `out`, which may lie on `e` or `z`.

    p_v is `e_v / s`, and log p_v `(z_v - z_y) - nll`: exact at any offset of the logits.
    """
    scale = s.new_zeros(len(s), 1) if parts.spread is None else (parts.spread / s).unsqueeze(-1)
    z_y = z.gather(-1, y.unsqueeze(-1))
    if parts.centred is not None:
        log_p = (z - z_y).sub_(nll.unsqueeze(-1)).masked_fill_(e == 0, 0.0)
        scale = log_p.mul_((parts.centred / s).unsqueeze(-1)).add_(scale)
    if parts.below is not None:
        scale = scale + (parts.below / s).unsqueeze(-1) * (z <= z_y)
    torch.mul(e, scale, out=out)
    if parts.target is not None:
        out.scatter_add_(-1, y.unsqueeze(-1), parts.target.unsqueeze(-1))


def _by_autograd(call: FusedCall, chunk: Tensor, hidden: Tensor, sums: _Gradients) -> Tensor:
    """The loss of a chunk; its gradient by autograd of the statistics on the chunk's logits."""
    z = sums.head.logits(hidden[chunk]).detach()
    with torch.set_grad_enabled(sums.any):
        z.requires_grad_(sums.any)
        total, weights, nll, losses = call.whole({**call.bound(chunk), "logits_on": z})
    call.found.append((weights.detach(), nll.detach(), losses.detach()))
    if sums.any and chunk.numel():
        (dz,) = torch.autograd.grad(total, z)
        rows = (dz != 0).any(-1).nonzero().squeeze(-1)
        if rows.numel():
            z, dz, chunk = z.detach()[rows], dz[rows], chunk[rows]
            sums.add(chunk, hidden[chunk], sums.head.through(dz, z))
    return total.detach()
