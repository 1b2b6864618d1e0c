"""The statistics of a model at a token, and how a loss is put together: by hand in torch, for the twins.

Nothing here imports priority_dsl. Logits are [B, T, V], targets [B, T] (-100 is ignored), results float64
[B, T]. What weights are made of is detached; `nll`, `cross_entropy` and the second model of `kl` are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor, float]
IGNORED = -100

# Statistics -------------------------------------------------------------------------------------


def log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def at_target(values: Tensor, targets: Tensor) -> Tensor:
    """The entry of the target, that of token 0 where there is none (masked later)."""
    return values.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return -at_target(log_probabilities(logits), targets)


@torch.no_grad()
def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    return at_target(log_probabilities(logits), targets)


@torch.no_grad()
def probability(logits: Tensor, targets: Tensor) -> Tensor:
    return at_target(torch.softmax(logits.double(), dim=-1), targets)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(torch.softmax(logits.double(), dim=-1)).sum(-1)


@torch.no_grad()
def entropy_of_most_likely(logits: Tensor, k: int) -> Tensor:
    """The entropy of the k most likely tokens after they are made to sum to one."""
    kept = logits.double().topk(min(int(k), logits.shape[-1]), dim=-1).values
    return torch.special.entr(torch.softmax(kept, dim=-1)).sum(-1)


@torch.no_grad()
def mass_with_ties(logits: Tensor, targets: Tensor) -> Tensor:
    """The probability of everything no likelier than the target: one minus what is strictly likelier."""
    z = logits.double()
    likelier = z > at_target(z, targets).unsqueeze(-1)
    return 1 - (torch.softmax(z, dim=-1) * likelier).sum(-1)


@torch.no_grad()
def mass_without_ties(logits: Tensor, targets: Tensor) -> Tensor:
    """The probability of the target and of everything strictly less likely."""
    z = logits.double()
    less_likely = z < at_target(z, targets).unsqueeze(-1)
    return (torch.softmax(z, dim=-1) * less_likely).sum(-1) + probability(logits, targets)


@torch.no_grad()
def rank_of_each(logits: Tensor) -> Tensor:
    """For each token of the vocabulary: one plus the number of tokens with a larger logit."""
    z = logits.double()
    return 1 + (z.unsqueeze(-2) > z.unsqueeze(-1)).sum(-1).double()


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum over v of teacher(v) log student(v), over the tokens that the teacher allows; differentiable."""
    p = torch.softmax(teacher.detach().double(), dim=-1)
    log_q = torch.where(p > 0, log_probabilities(student), 0.0)
    return -(p * log_q).sum(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b), the gradient through b alone."""
    return cross_entropy(a, b) - entropy(a)


# Endings ----------------------------------------------------------------------------------------


def product(weights: Tensor, loss: Tensor) -> Tensor:
    """weights * loss, exactly zero where the weight is zero, also where the loss is infinite."""
    return torch.where(weights == 0, 0.0, weights.detach() * torch.where(weights == 0, 0.0, loss))


def finish(weights: Tensor, loss: Tensor, targets: Tensor) -> Result:
    """Zero where ignored; divided by the number of supervised tokens, whatever their weights."""
    supervised = targets != IGNORED
    weights = weights.detach().double().expand(targets.shape)
    return torch.where(supervised, weights, 0.0), torch.where(supervised, loss, 0.0), float(supervised.sum())


def weighted_nll(weights: Tensor, logits: Tensor, targets: Tensor) -> Result:
    """The ending of nearly every rule: weight times cross-entropy, over the number of supervised tokens."""
    return finish(weights, product(weights, nll(logits, targets)), targets)


def per_token(column: Any, targets: Tensor) -> Tensor:
    return torch.as_tensor(column).reshape(targets.shape).double()


def per_example(column: Any) -> Tensor:
    return torch.as_tensor(column).double().reshape(-1, 1)
