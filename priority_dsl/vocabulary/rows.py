"""Parts of what a model tells at a token, which bodies share; the compiler computes equal parts once.

Shapes: z descending a b [N, V], y [N], index amounts [N, k].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from priority_dsl.registry import leaf


def centred(z):
    """`z - max z`; the maximum is held fixed, which changes no derivative of a softmax."""
    return z - z.amax(-1, keepdim=True).detach()


@leaf
def exponentials(z):
    """`exp(z - max z)`, `[N, V]`, written once over the difference."""
    return centred(z).exp_()


def total(z):
    """`sum exp(z - max)`, `[N]`, at least 1."""
    return exponentials(z).sum(-1)


def probabilities(z):
    """The softmax, `[N, V]`."""
    return exponentials(z) / total(z).unsqueeze(-1)


def at_target(z, y):
    """The target's entry of each row, `[N, 1]`."""
    return z.gather(-1, y.unsqueeze(-1))


def log_probabilities(z):
    """The log-softmax, `[N, V]`."""
    return centred(z) - total(z).log().unsqueeze(-1)


def finite(d):
    """Centred logits where those whose exponential is 0 are no longer infinite, so that 0 times them is 0."""
    return d.clamp(min=-1000.0)


@leaf
def largest(z, k):
    """The k largest entries of each row and their places, all of them where the row is shorter."""
    return tuple(z.topk(min(k, z.shape[-1]), dim=-1))


@leaf
def ordered(z):
    """The entries of each row from the largest to the smallest, and their places."""
    return tuple(z.sort(-1, descending=True))


@leaf
def placed(z, index, amounts):
    """Zeros `[N, V]` but for the amounts `[N, k]` at their places."""
    return z.new_zeros(z.shape).scatter_(-1, index, amounts)


@leaf
def compared(z, is_, z_y):
    """A comparison of each entry with the target's, as 1 and 0 in the dtype of z; no gradient.

    As numbers it is four times as fast as as truth values.
    """
    import torch

    out = torch.empty_like(z, requires_grad=False)
    return {"<=": torch.le, "<": torch.lt, ">": torch.gt}[is_](z.detach(), z_y.detach(), out=out)


def shared(a, b):
    """Both rows cut to the logits that both models have."""
    return a[..., : b.shape[-1]], b[..., : a.shape[-1]]


@leaf
def widened(dz, z):
    """A gradient of the first logits of z as one of all of them."""
    import torch

    return torch.nn.functional.pad(dz, (0, z.shape[-1] - dz.shape[-1]))


def others(z, y):
    """The row with -inf in place of the target's logit."""
    return z.scatter(-1, y.unsqueeze(-1), -math.inf)


class Row:
    """What one look at each row of logits tells, `[N]` each, as tensor operations with a derivative.

    Below, e is exp(z - top).
    """

    def __init__(self, z, y):
        self.z, self.y = z, y

    @property
    def top(self):
        """The largest logit, held fixed."""
        return self.z.amax(-1, keepdim=True).detach().squeeze(-1)

    @property
    def total(self):
        """The sum of e, at least 1."""
        return total(self.z)

    @property
    def target(self):
        """The target's logit."""
        return at_target(self.z, self.y).squeeze(-1)

    @property
    def moment(self):
        """The sum of e * (z - top), at most 0."""
        return (exponentials(self.z) * finite(centred(self.z))).sum(-1)

    @property
    def upto(self):
        """The sum of e where z is not above the target's."""
        return self._summed("<=")

    @property
    def under(self):
        """The sum of e where z is below the target's."""
        return self._summed("<")

    @property
    def above(self):
        """How many logits are above the target's."""
        return compared(self.z, ">", at_target(self.z, self.y)).sum(-1)

    @property
    def rival(self):
        """The largest logit that is not the target's own, -inf where there is none."""
        return others(self.z, self.y).amax(-1)

    @property
    def level(self):
        """The target's e."""
        return at_target(exponentials(self.z), self.y).squeeze(-1)

    @property
    def peak(self):
        """The largest e, 1, with the derivative of the top's."""
        return (self.z.amax(-1) - self.z.amax(-1).detach()).exp()

    def _summed(self, is_):
        return (exponentials(self.z) * compared(self.z, is_, at_target(self.z, self.y))).sum(-1)


class SweptRow(NamedTuple):
    """A `Row` from the kernel that reads each logit once; without derivative."""

    top: Any
    total: Any
    target: Any
    moment: Any
    upto: Any
    under: Any
    above: Any
    rival: Any

    @classmethod
    def of(cls, z, y):
        """That of logits and targets; in a graph, what is not used is not computed (`swept_alone`)."""
        found = swept(z, y)
        return cls(*(found[i] for i in range(len(cls._fields))))

    @property
    def level(self):
        """The target's e."""
        return (self.target - self.top).exp()

    @property
    def peak(self):
        """The largest e, 1."""
        return (self.top - self.top).exp()


@leaf
def swept(z, y, *needs):
    """The fields of a `SweptRow` from one sweep, None for those that are not among `needs` (default: all)."""
    from priority_dsl.vocab_pass.kernels import sweep_rows

    return sweep_rows(z, y, needs or SweptRow._fields)


def swept_alone(graph):
    """Make each sweep of a finished `torch.fx` graph compute what the graph uses of it, and no more."""
    for node in graph.nodes:
        if node.target is swept:
            used = sorted(user.args[1] for user in node.users)
            node.args = (*node.args[:2], *(SweptRow._fields[i] for i in used))
