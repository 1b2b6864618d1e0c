"""Parts of what a model tells at a token, which bodies share; the compiler computes equal parts once.

Shapes: z descending a b [N, V], y [N], index amounts [N, k].
"""

from __future__ import annotations

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
