"""Words of the language that are not built yet: a rule that uses one is told so, with a place."""

from __future__ import annotations

from priority_dsl.registry import planned

_SCOPES = "scopes (the second half of the language)"
_VIEWS = "views, attention and pairs"

planned("scopes", _VIEWS, draws="n evaluations of the chance.")
planned(
    "text", _SCOPES,
    span="Whether a token is in a match of a regex.", after="Whether it is past the first match.",
    before="Whether it is before the first match.",
)  # fmt: skip
planned(
    "views", _VIEWS,
    ema="The moving average of the trained weights.",
)  # fmt: skip
planned("attention", _VIEWS, attention="The attention that a token pays to the prompt.")
