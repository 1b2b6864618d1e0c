"""Statistics of a model, numbers of a step, chance, and how a loss is put together: by hand, for the twins.

Nothing here imports priority_dsl. Logits are [B, T, V], targets [B, T] (-100 is ignored), results float64
[B, T]. What weights are made of is detached; `nll`, `cross_entropy` and the second model of `kl` are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
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


# Many tokens ------------------------------------------------------------------------------------


def supervised(targets: Tensor) -> Iterator[tuple[int, int]]:
    """Where the supervised tokens are: row of the batch, place in the row."""
    return ((b, t) for b, t in (targets != IGNORED).nonzero().tolist())


def how_many(share: float, count: int, down: bool = False) -> int:
    """A share of a count as a person reads it (0.07 of 100 is 7), rounded up, or `down`."""
    exact = Decimal(repr(float(share))) * count
    return math.floor(exact) if down else math.ceil(exact)


def largest(values: Tensor, targets: Tensor, rows: Sequence[int], share: float, down: bool = False) -> Tensor:
    """Which tokens are the largest share of all: of equals the earlier by data-set row, then place."""
    order = sorted(supervised(targets), key=lambda at: (-values[at].item(), rows[at[0]], at[1]))
    kept = torch.zeros(targets.shape, dtype=torch.bool)
    for at in order[: how_many(share, len(order), down)]:
        kept[at] = True
    return kept


def largest_examples(values: Sequence[float], share: float, down: bool = False) -> list[bool]:
    """Which examples are the largest share of all, of equals the earlier."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = order[: how_many(share, len(order), down)]
    return [i in kept for i in range(len(values))]


def mean_of(values: Tensor, targets: Tensor) -> float:
    """The mean over the supervised tokens; 0 where there are none."""
    found = [values[at].item() for at in supervised(targets)]
    return math.fsum(found) / len(found) if found else 0.0


def means_of_examples(values: Tensor, targets: Tensor) -> list[float]:
    """The mean of each row that has supervised tokens."""
    rows = sorted({b for b, _ in supervised(targets)})
    return [mean_of(values[b : b + 1], targets[b : b + 1]) for b in rows]


# Chance -----------------------------------------------------------------------------------------


def drawn(seed: int, epoch: int, rows: Sequence[int], targets: Tensor, call: int) -> Tensor:
    """The numbers in [0, 1) that a call draws: a hash of its keys, splitmix64 key by key, its upper 24 bits.

    The keys are the seed, the epoch, the data-set row, the place among the row's supervised tokens, and
    which of the rule's drawing calls it is, from 1.
    """
    numbers = torch.zeros(targets.shape, dtype=torch.float64)
    seen: dict[int, int] = {}
    for b, t in supervised(targets):
        place = seen[b] = seen.get(b, -1) + 1
        state = 0
        for key in (seed, epoch, rows[b], place, call):
            state = _splitmix64(state ^ (key & MASK))
        numbers[b, t] = (state >> 40) / 2**24
    return numbers


MASK = 2**64 - 1


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


# Endings ----------------------------------------------------------------------------------------


def product(weights: Tensor, loss: Tensor) -> Tensor:
    """weights * loss, exactly zero where the weight is zero, also where the loss is infinite."""
    return torch.where(weights == 0, 0.0, weights.detach() * torch.where(weights == 0, 0.0, loss))


def finish(weights: Tensor, loss: Tensor, targets: Tensor) -> Result:
    """Zero where ignored; divided by the number of supervised tokens, whatever their weights."""
    counted = targets != IGNORED
    weights = weights.detach().double().expand(targets.shape)
    return torch.where(counted, weights, 0.0), torch.where(counted, loss, 0.0), float(counted.sum())


def weighted_nll(weights: Tensor, logits: Tensor, targets: Tensor) -> Result:
    """The ending of nearly every rule: weight times cross-entropy, over the number of supervised tokens."""
    return finish(weights, product(weights, nll(logits, targets)), targets)


def over_kept(result: Result) -> Result:
    """The same, divided by the tokens whose weight is not zero."""
    weights, loss, _ = result
    return weights, loss, float((weights != 0).sum())


def per_token(column: Any, targets: Tensor) -> Tensor:
    return torch.as_tensor(column).reshape(targets.shape).double()


def per_example(column: Any) -> Tensor:
    return torch.as_tensor(column).double().reshape(-1, 1)
