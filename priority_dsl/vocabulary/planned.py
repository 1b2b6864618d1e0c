"""Words of the language that are not built yet: a rule that uses one is told so, with a place."""

from __future__ import annotations

from priority_dsl.registry import planned

_SCOPES = "scopes (the second half of the language)"
_VIEWS = "views, attention and pairs"

planned(
    "reductions", _SCOPES,
    sum="The sum over a scope.", mean="The mean over a scope.", median="The median over a scope.",
    std="The standard deviation over a scope.", count="How many in a scope.",
    quantile="A quantile over a scope.", minmax="x scaled to [0, 1] over a scope.",
    zscore="x centred and scaled over a scope.", top="The largest share of a scope.",
    bottom="The smallest share of a scope.",
)  # fmt: skip
planned(
    "scopes", _SCOPES,
    example="The example.", batch="The optimizer step.", dataset="The data set.",
    chunk="k tokens from position 0 on.", window="2k+1 tokens around.", draws="n evaluations of the chance.",
)  # fmt: skip
planned("order", _SCOPES, suffix_sum="The sum from the token to the end of its example.")
planned(
    "text", _SCOPES,
    span="Whether a token is in a match of a regex.", after="Whether it is past the first match.",
    before="Whether it is before the first match.",
)  # fmt: skip
planned("chance", _SCOPES, uniform="A number drawn from [0, 1).", bernoulli="A draw that is 1 with chance q.")
planned("composition", _SCOPES, rule="Another rule's weight.")
planned(
    "views", _VIEWS,
    unprompted="The response without its prompt.", reading="The response after another prompt.",
    perturbed="Noise on the input embeddings.", contrast="Logits 2a - b.",
    ema="The moving average of the trained weights.",
)  # fmt: skip
planned("attention", _VIEWS, attention="The attention that a token pays to the prompt.")
planned(
    "pairs", _VIEWS, chosen="A value of the chosen response.", rejected="A value of the rejected response."
)
