"""What happens inside a model's forward pass, and the model that a run makes of the trained one.

Neither comes from logits: the trainer reads the attention in the forward pass and keeps the moving average; a
caller of the Python interface gives the first as a stored value under its text, the second as a model.
"""

from __future__ import annotations

from priority_dsl.kinds import UNIT
from priority_dsl.registry import REGISTRY, statistic
from priority_dsl.words import Average, Symbol


@statistic(
    range=UNIT,
    options={"prompt": Symbol("prompt")},
    example="attention(on, prompt)",
    differentiable=False,
    inside=True,
    source="ssToken, arXiv:2510.18250, and its official code",
)
def attention(m, prompt):
    """The sum of attention that a token, once read, pays to the earlier tokens outside the response.

    Of the model's last layer, the mean over its heads. No gradient flows through it.
    """


ema = Average(
    "ema", "models", "The moving average of the trained weights: starts as `on`; after each optimizer step "
    "it is R times itself + (1 - R) times `on`. R is a number or parameter in [0, 1].",
    "model slow = ema(0.99); weight = p(slow)",
)  # fmt: skip
REGISTRY.add(ema)
