"""What a model tells at a token: torch bodies on logits `z [N, V]` and targets `y [N]`, and their oracles.

Bodies are centred (`d = z - max`), so that a large offset of the logits costs no digits, and read the
target's logit from the same buffer as its row. Two-model statistics look at the logits that both have.

Shapes: z a b d e [N, V], y and results [N]. Oracles: z a b lists of floats, y an index.
"""

from __future__ import annotations

import math

from priority_dsl.kinds import BOOLEAN, NONNEGATIVE, UNIT, Element, Range
from priority_dsl.registry import Choice, Count, RowGradient, leaf, statistic

# Parts that several bodies share; the compiler computes equal parts once -----------------------


def centred(z):
    """`z - max z`; the maximum is held fixed, which changes no derivative of a softmax."""
    return z - z.amax(-1, keepdim=True).detach()


def total(z):
    """`sum exp(z - max)`, `[N]`, at least 1."""
    return centred(z).exp().sum(-1)


def at_target(z, y):
    """The target's entry of each row, `[N, 1]`."""
    return z.gather(-1, y.unsqueeze(-1))


def log_probabilities(z):
    """The log-softmax, `[N, V]`."""
    return centred(z) - total(z).log().unsqueeze(-1)


@leaf
def largest(z, k):
    """The k largest entries of each row, all of them where the row is shorter."""
    return z.topk(min(k, z.shape[-1]), dim=-1).values


def _shared(a, b):
    """Both rows cut to the logits that both models have."""
    return a[..., : b.shape[-1]], b[..., : a.shape[-1]]


def _mean_under(a, x):
    """The mean of x `[N, V]` under the distribution of a, inf where a has a token at which x is inf.

    The infinity is filled in at the end: where nothing flows back, 0 times it would still be no number.
    """
    e = centred(a).exp()
    infinite = (x.isinf() & (e > 0)).any(-1)
    mean = (e * x.masked_fill((e == 0) | x.isinf(), 0.0)).sum(-1) / total(a)
    return mean.masked_fill(infinite, math.inf)


# Their oracles ----------------------------------------------------------------------------------


def _softmax(z: list[float]) -> list[float]:
    top = max(z)
    weights = [math.exp(v - top) for v in z]
    return [w / math.fsum(weights) for w in weights]


def _surprise(z: list[float], v: int) -> float:
    """`-log softmax(z)[v]`."""
    top = max(z)
    return math.log(math.fsum(math.exp(u - top) for u in z)) - (z[v] - top)


def _entropy(z: list[float]) -> float:
    return math.fsum(p * -math.log(p) for p in _softmax(z) if p > 0)


def _rank(z: list[float], v: int) -> float:
    return 1.0 + sum(u > z[v] for u in z)


def _common(a: list[float], b: list[float]) -> tuple[list[float], list[float]]:
    size = min(len(a), len(b))
    return a[:size], b[:size]


# One model --------------------------------------------------------------------------------------


@statistic(
    range=NONNEGATIVE,
    oracle=_surprise,
    row_gradient=lambda g, nll: RowGradient(spread=g, target=-g),
    source="Shannon 1948; the loss of plain fine-tuning",
)
def nll(z, y):
    """The negative log-likelihood of the target in nats; inf where its logit is -inf."""
    return total(z).log() - at_target(centred(z), y).squeeze(-1)


@statistic(
    range=UNIT,
    oracle=lambda z, y: _softmax(z)[y],
    row_gradient=lambda g, p: RowGradient(spread=-g * p, target=g * p),
    source="DFT's weight; PriFT, arXiv:2606.09396, for a frozen model",
)
def p(z, y):
    """The probability that the model gives to the target."""
    return (-nll.body(z, y)).exp()


@statistic(
    range=Range(-math.inf, 0.0),
    oracle=lambda z, y: -_surprise(z, y),
    row_gradient=lambda g, logp: RowGradient(spread=-g, target=g),
)
def logp(z, y):
    """The log-probability of the target in nats; -inf where its logit is -inf."""
    return -nll.body(z, y)


@statistic(
    range=NONNEGATIVE,
    oracle=lambda z, y: _entropy(z),
    alias="H",
    row_gradient=lambda g, entropy: RowGradient(spread=-g * entropy, centred=-g),
    source="Shannon 1948",
)
def entropy(z, y):
    """The entropy of the model's distribution in nats."""
    d = centred(z)
    e, s = d.exp(), total(z)
    return s.log() - (e * d.masked_fill(e == 0, 0.0)).sum(-1) / s


@statistic(
    range=lambda k: Range(0.0, math.log(k)),
    options={"k": Count()},
    example="topk_entropy(on, 20)",
    oracle=lambda z, y, k: _entropy(sorted(z, reverse=True)[:k]),
    source="EAFT's gate, as its released code has it: renormalised, k at most V",
)
def topk_entropy(z, y, k):
    """The entropy in nats of the k most likely tokens, renormalised; k is clamped to the vocabulary."""
    return entropy.body(largest(z, k), y)


def _mass_oracle(z: list[float], y: int, ties: str) -> float:
    if _rank(z, y) == 1 and ties == "include":
        return 1.0
    chances = _softmax(z)
    below = math.fsum(q for v, q in zip(z, chances, strict=True) if v < z[y])
    level = (
        chances[y]
        if ties == "exclude"
        else math.fsum(q for v, q in zip(z, chances, strict=True) if v == z[y])
    )
    return min(1.0, below + level)


@statistic(
    range=UNIT,
    options={"ties": Choice(("include", "exclude"))},
    oracle=_mass_oracle,
    source="PriFT, arXiv:2606.09396, Eq. (3); ties=exclude is its released code",
)
def mass(z, y, ties):
    """The probability of all tokens whose logit is not above the target's; exactly 1 where none is above.

    `ties=exclude` counts the strictly less likely tokens and the target itself.
    """
    z_y, e, s = at_target(z, y), centred(z).exp(), total(z)
    if ties == "exclude":
        less = (e * (z < z_y)).sum(-1)
        return ((less + at_target(e, y).squeeze(-1)) / s).clamp(max=1.0)
    share = ((e * (z <= z_y)).sum(-1) / s).clamp(max=1.0)  # a product is twice as fast as masked_fill
    likeliest = at_target(centred(z), y).squeeze(-1) >= 0.0  # cheaper than asking whether any is above
    return share.masked_fill(likeliest, 1.0)


@statistic(range=Range(1.0, math.inf), oracle=_rank, differentiable=False)
def rank(z, y):
    """1 + the number of tokens strictly more likely than the target."""
    return (z > at_target(z, y)).sum(-1).to(z.dtype) + 1.0


@statistic(
    range=Range(1.0, math.inf),
    oracle=lambda z, y: math.fsum(p * _rank(z, v) for v, p in enumerate(_softmax(z))),
    source="after RankTuner: the rank that the model expects of a token drawn from itself",
)
def expected_rank(z, y):
    """The mean rank of a token drawn from the model: sum of p(v) * rank(v); ranks are held fixed."""
    ordered = z.sort(-1, descending=True).values
    e = (ordered - z.amax(-1, keepdim=True).detach()).exp()
    index = ordered.new_ones(ordered.shape).cumsum(-1)
    first_of_ties = (ordered < ordered.roll(1, -1)).to(z.dtype)  # the first entry is never below the last
    ranks = (index * first_of_ties).clamp(min=1.0).cummax(-1).values
    return ((e * ranks).sum(-1) / e.sum(-1)).clamp(min=1.0)


@statistic(range=Range(0.0, 1.0, low_open=True), oracle=lambda z, y: max(_softmax(z)))
def pmax(z, y):
    """The probability of the most likely token; tied tokens share the derivative."""
    d = centred(z)
    return d.amax(-1).exp() / d.exp().sum(-1)


@statistic(
    oracle=lambda z, y: z[y] - max((v for i, v in enumerate(z) if i != y), default=-math.inf),
)
def margin(z, y):
    """The target's logit minus the best other logit; inf in a vocabulary of one token."""
    others = z.scatter(-1, y.unsqueeze(-1), -math.inf)
    return at_target(z, y).squeeze(-1) - others.amax(-1)


# Two models -------------------------------------------------------------------------------------


def _cross_oracle(a: list[float], b: list[float], y: int) -> float:
    a, b = _common(a, b)
    return math.fsum(p * _surprise(b, v) for v, p in enumerate(_softmax(a)) if p > 0)


def _kl_oracle(a: list[float], b: list[float], y: int) -> float:
    a, b = _common(a, b)
    gaps = [p * (_surprise(b, v) - _surprise(a, v)) for v, p in enumerate(_softmax(a)) if p > 0]
    return max(0.0, math.fsum(gaps)) if not any(math.isinf(g) for g in gaps) else math.inf


@statistic(models=2, range=NONNEGATIVE, oracle=_kl_oracle, source="Kullback and Leibler 1951")
def kl(a, b, y):
    """KL(a ‖ b) in nats; inf where a has a token that b excludes."""
    a, b = _shared(a, b)
    return _mean_under(a, log_probabilities(a) - log_probabilities(b)).clamp(min=0.0)


@statistic(models=2, range=NONNEGATIVE, oracle=_cross_oracle)
def cross_entropy(a, b, y):
    """The cross-entropy of b under the distribution of a in nats: the loss of distilling a into b."""
    a, b = _shared(a, b)
    return _mean_under(a, -log_probabilities(b))


@statistic(models=2, oracle=lambda a, b, y: _surprise(b, y) - _surprise(a, y), example="logratio(on, ref)")
def logratio(a, b, y):
    """logp(a) - logp(b) of the target in nats, each over the model's whole vocabulary."""
    return nll.body(b, y) - nll.body(a, y)


def _same_top_oracle(a: list[float], b: list[float], y: int, k: int) -> float:
    a, b = _common(a, b)
    return float(_rank(b, a.index(max(a))) <= k)


@statistic(
    models=2,
    element=Element.BOOL,
    range=BOOLEAN,
    options={"k": Count(1)},
    example="same_top(on, ref, k=5)",
    oracle=_same_top_oracle,
    differentiable=False,
)
def same_top(a, b, y, k):
    """Whether a's most likely token (the first of equals) has fewer than k tokens above it in b."""
    a, b = _shared(a, b)
    top = b.gather(-1, a.argmax(-1, keepdim=True))
    return (b > top).sum(-1) < k


__all__ = [
    "cross_entropy", "entropy", "expected_rank", "kl", "logp", "logratio", "margin", "mass", "nll", "p",
    "pmax", "rank", "same_top", "topk_entropy",
]  # fmt: skip
