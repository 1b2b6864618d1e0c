"""What a model tells at a token: torch bodies on logits `z [N, V]` and targets `y [N]`, and their oracles.

Bodies are centred (`d = z - max`), so that a large offset of the logits costs no digits, and read the
target's logit from the same buffer as its row. Those that read a `Row` need what one sweep over it tells.
Two-model statistics look at the logits that both have.

Shapes: z a b d e [N, V], y and results [N]. Oracles: z a b lists of floats, y an index.
"""

from __future__ import annotations

import math

from priority_dsl.kinds import BOOLEAN, NONNEGATIVE, UNIT, Element, Range
from priority_dsl.registry import Choice, Count, RowGradient, statistic
from priority_dsl.vocabulary.rows import (
    Row,
    at_target,
    centred,
    compared,
    exponentials,
    finite,
    largest,
    log_probabilities,
    ordered,
    others,
    placed,
    probabilities,
    shared,
    total,
    widened,
)

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
    row=Row,
    range=NONNEGATIVE,
    oracle=_surprise,
    row_gradient=lambda g, nll, z, y: RowGradient(spread=g, target=-g),
    source="Shannon 1948; the loss of plain fine-tuning",
)
def nll(row):
    """The negative log-likelihood of the target in nats; inf where its logit is -inf."""
    return row.total.log() - (row.target - row.top)


@statistic(
    row=Row,
    range=UNIT,
    oracle=lambda z, y: _softmax(z)[y],
    row_gradient=lambda g, p, z, y: RowGradient(spread=-g * p, target=g * p),
    source="DFT's weight; PriFT, arXiv:2606.09396, for a frozen model",
)
def p(row):
    """The probability that the model gives to the target."""
    return (-nll.of_row(row)).exp()


@statistic(
    row=Row,
    range=Range(-math.inf, 0.0),
    oracle=lambda z, y: -_surprise(z, y),
    row_gradient=lambda g, logp, z, y: RowGradient(spread=-g, target=g),
)
def logp(row):
    """The log-probability of the target in nats; -inf where its logit is -inf."""
    return -nll.of_row(row)


@statistic(
    row=Row,
    range=NONNEGATIVE,
    oracle=lambda z, y: _entropy(z),
    alias="H",
    row_gradient=lambda g, entropy, z, y: RowGradient(spread=-g * entropy, centred=-g),
    source="Shannon 1948",
)
def entropy(row):
    """The entropy of the model's distribution in nats."""
    return row.total.log() - row.moment / row.total


def _topk_gradient(g, entropy, z, y, k):
    top, index = largest(z, k)[0], largest(z, k)[1]
    log_q = finite(centred(top)) - total(top).log().unsqueeze(-1)
    amounts = probabilities(top) * (log_q + entropy.unsqueeze(-1)) * -g.unsqueeze(-1)
    return RowGradient(added=placed(z, index, amounts))


@statistic(
    range=lambda k: Range(0.0, math.log(k)),
    options={"k": Count()},
    example="topk_entropy(on, 20)",
    row_gradient=_topk_gradient,
    oracle=lambda z, y, k: _entropy(sorted(z, reverse=True)[:k]),
    source="EAFT's gate, as its released code has it: renormalised, k at most V",
)
def topk_entropy(z, y, k):
    """The entropy in nats of the k most likely tokens, renormalised; k is clamped to the vocabulary."""
    return entropy.body(largest(z, k)[0], y)


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


def _mass_gradient(g, mass, z, y, ties):
    if ties == "include":
        return RowGradient(spread=-g * mass, below=g)
    e, s = exponentials(z), total(z)
    less = e * compared(z, "<", at_target(z, y)) * (g / s).unsqueeze(-1)
    return RowGradient(spread=-g * mass, target=g * at_target(e, y).squeeze(-1) / s, added=less)


@statistic(
    row=Row,
    range=UNIT,
    options={"ties": Choice(("include", "exclude"))},
    oracle=_mass_oracle,
    row_gradient=_mass_gradient,
    source="PriFT, arXiv:2606.09396, Eq. (3); ties=exclude is its released code",
)
def mass(row, ties):
    """The probability of all tokens whose logit is not above the target's; exactly 1 where none is above.

    `ties=exclude` counts the strictly less likely tokens and the target itself.
    """
    if ties == "exclude":
        return ((row.under + row.level) / row.total).clamp(max=1.0)
    likeliest = row.target == row.top  # cheaper than asking whether any is above
    return (row.upto / row.total).clamp(max=1.0).masked_fill(likeliest, 1.0)


@statistic(row=Row, range=Range(1.0, math.inf), oracle=_rank, differentiable=False)
def rank(row):
    """1 + the number of tokens strictly more likely than the target."""
    return row.above + 1.0


def _ranks(descending):
    """The rank of each entry of rows in descending order; the first of equals has that of all."""
    index = descending.new_ones(descending.shape).cumsum(-1)
    first_of_ties = (descending < descending.roll(1, -1)).to(descending.dtype)  # the last is never above
    return (index * first_of_ties).clamp(min=1.0).cummax(-1).values


def _expected_rank_gradient(g, expected, z, y):
    descending, index = ordered(z)[0], ordered(z)[1]
    amounts = probabilities(descending) * (_ranks(descending) - expected.unsqueeze(-1)) * g.unsqueeze(-1)
    return RowGradient(added=placed(z, index, amounts))


@statistic(
    range=Range(1.0, math.inf),
    oracle=lambda z, y: math.fsum(p * _rank(z, v) for v, p in enumerate(_softmax(z))),
    row_gradient=_expected_rank_gradient,
    source="after RankTuner: the rank that the model expects of a token drawn from itself",
)
def expected_rank(z, y):
    """The mean rank of a token drawn from the model: sum of p(v) * rank(v); ranks are held fixed."""
    descending = ordered(z)[0]
    return (exponentials(descending) * _ranks(descending)).sum(-1).div(total(descending)).clamp(min=1.0)


def _pmax_gradient(g, pmax, z, y):
    top = (z == z.amax(-1, keepdim=True)).to(z.dtype)
    return RowGradient(spread=-g * pmax, added=top * (g * pmax / top.sum(-1)).unsqueeze(-1))


@statistic(
    row=Row,
    range=Range(0.0, 1.0, low_open=True),
    oracle=lambda z, y: max(_softmax(z)),
    row_gradient=_pmax_gradient,
)
def pmax(row):
    """The probability of the most likely token; tied tokens share the derivative."""
    return row.peak / row.total


def _margin_gradient(g, margin, z, y):
    rivals = (others(z, y) == others(z, y).amax(-1, keepdim=True)).to(z.dtype)
    return RowGradient(target=g, added=rivals * (-g / rivals.sum(-1)).unsqueeze(-1))


@statistic(
    row=Row,
    oracle=lambda z, y: z[y] - max((v for i, v in enumerate(z) if i != y), default=-math.inf),
    row_gradient=_margin_gradient,
)
def margin(row):
    """The target's logit minus the best other logit; inf in a vocabulary of one token."""
    return row.target - row.rival


# Two models -------------------------------------------------------------------------------------


def _cross_oracle(a: list[float], b: list[float], y: int) -> float:
    a, b = _common(a, b)
    return math.fsum(p * _surprise(b, v) for v, p in enumerate(_softmax(a)) if p > 0)


def _kl_oracle(a: list[float], b: list[float], y: int) -> float:
    a, b = _common(a, b)
    gaps = [p * (_surprise(b, v) - _surprise(a, v)) for v, p in enumerate(_softmax(a)) if p > 0]
    return max(0.0, math.fsum(gaps)) if not any(math.isinf(g) for g in gaps) else math.inf


def _mean_under(a, x):
    """The mean of x `[N, V]` under the distribution of a, inf where a has a token at which x is inf.

    The infinity is filled in at the end: where nothing flows back, 0 times it would still be no number.
    """
    infinite = (x.isinf() & (exponentials(a) > 0)).any(-1)
    mean = (exponentials(a) * _counted(a, x)).sum(-1) / total(a)
    return mean.masked_fill(infinite, math.inf)


def _counted(a, x):
    """x where a has a chance and it is finite, else 0."""
    return x.masked_fill((exponentials(a) == 0) | x.isinf(), 0.0)


def _mean_gradient(g, mean, a, b, x):
    """For the mean under a of x, which falls with log p(b): p of a times x above its mean, and q of b - p.

    What x gains with log p(a), as the divergence does, has mean 0 under a.
    """
    a_, b_ = shared(a, b)
    p, q, g = probabilities(a_), probabilities(b_), g.unsqueeze(-1)
    by_a = p * (_counted(a_, x) - mean.unsqueeze(-1)) * g
    return RowGradient(added=widened(by_a, a)), RowGradient(added=widened((q - p) * g, b))


def _gap(a, b):
    """log p(a) - log p(b) of each token that both have."""
    a, b = shared(a, b)
    return log_probabilities(a) - log_probabilities(b)


def _surprises(a, b):
    """-log p(b) of each token that both have."""
    a, b = shared(a, b)
    return -log_probabilities(b)


@statistic(
    models=2,
    range=NONNEGATIVE,
    oracle=_kl_oracle,
    row_gradient=lambda g, kl, a, b, y: _mean_gradient(g, kl, a, b, _gap(a, b)),
    source="Kullback and Leibler 1951",
)
def kl(a, b, y):
    """KL(a ‖ b) in nats; inf where a has a token that b excludes."""
    return _mean_under(shared(a, b)[0], _gap(a, b)).clamp(min=0.0)


@statistic(
    models=2,
    range=NONNEGATIVE,
    oracle=_cross_oracle,
    row_gradient=lambda g, cross, a, b, y: _mean_gradient(g, cross, a, b, _surprises(a, b)),
)
def cross_entropy(a, b, y):
    """The cross-entropy of b under the distribution of a in nats: the loss of distilling a into b."""
    return _mean_under(shared(a, b)[0], _surprises(a, b))


@statistic(
    row=Row,
    models=2,
    oracle=lambda a, b, y: _surprise(b, y) - _surprise(a, y),
    row_gradient=lambda g, ratio, a, b, y: (
        RowGradient(spread=-g, target=g), RowGradient(spread=g, target=-g),
    ),
    example="logratio(on, ref)",
)  # fmt: skip
def logratio(a, b):
    """logp(a) - logp(b) of the target in nats, each over the model's whole vocabulary."""
    return nll.of_row(b) - nll.of_row(a)


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
    a, b = shared(a, b)
    top = b.gather(-1, a.argmax(-1, keepdim=True))
    return (b > top).sum(-1) < k


__all__ = [
    "cross_entropy", "entropy", "expected_rank", "kl", "logp", "logratio", "margin", "mass", "nll", "p",
    "pmax", "rank", "same_top", "topk_entropy",
]  # fmt: skip
