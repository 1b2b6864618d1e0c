"""Views: a model made from another.

Bodies take and return logits `[N, V]`. A view that `reads_anew` has no body on logits: the model reads other
input in a forward pass of its own, which the trainer makes and a caller binds by the view's text.
"""

from __future__ import annotations

import math

from priority_dsl.kinds import Range
from priority_dsl.registry import Verdict, view
from priority_dsl.vocabulary.rows import shared, widened


def _not_positive(t: Range) -> Verdict:
    return "certain" if t.high <= 0 else "possible" if t.low < 0 or t.contains(0.0) else None


@view(
    example="nll(tempered(on, 2))",
    wants=("model", "number"),
    hazard=_not_positive,
    danger="temperature of 0 or less",
    row_gradient=lambda dz, m, t: dz / t,
    oracle=lambda z, t: [v / t for v in z],
)
def tempered(m, t):
    """The model at temperature t: its logits divided by t."""
    return m / t


def _contrast_oracle(a: list[float], b: list[float]) -> list[float]:
    return [x if math.isinf(x) or math.isinf(y) else 2 * x - y for x, y in zip(a, b, strict=False)]


def _contrast_gradient(dz, a, b):
    """A token's 2a - b where both are finite, a's own logit elsewhere."""
    near, far = shared(a, b)
    both = (~(near.isinf() | far.isinf())).to(dz.dtype)
    return widened(dz * (1.0 + both), a), widened(-dz * both, b)


@view(
    example="nll(contrast(on, ref))",
    wants=("model", "model"),
    row_gradient=_contrast_gradient,
    oracle=_contrast_oracle,
    source="after contrastive decoding, Li et al., arXiv:2210.15097",
)
def contrast(a, b):
    """What a says beyond b: logits 2a - b over the tokens that both have.

    A token that a excludes is excluded; for one that b alone excludes, a's own logit stands.
    """
    a, b = shared(a, b)
    return a + (a - b).masked_fill(a.isinf() | b.isinf(), 0.0)


@view(example="nll(unprompted(ref))", wants=("model",), reads_anew=True)
def unprompted(m):
    """The model that reads the response without its prompt.

    It reads the begin token and then the response tokens of the row, all turns of the assistant in order; the
    end token stands in where the tokenizer has no begin token. So the first response token is predicted too.
    """


@view(
    example="column clean_prompt: text; nll(reading(ref, clean_prompt))",
    wants=("model", "text"),
    reads_anew=True,
)
def reading(m, column):
    """The model that reads the same response after the prompt in that text column.

    The other prompt stands where the row's own did (in its place in a chat template, before its separator);
    the response keeps its token ids.
    """


@view(
    example="nll(perturbed(ref, 5))",
    wants=("model", "number"),
    reads_anew=True,
    draws=True,
    source="after NEFTune, arXiv:2310.05914; T-SHIRT, arXiv:2506.01317",
)
def perturbed(m, scale):
    """The model on input embeddings with even noise in [-scale, scale] / sqrt(length * width).

    `length` is the number of tokens of the example as it is read, `width` the number of an embedding's
    entries. Each call draws apart, each epoch anew.
    """
