"""Words of the language that are not built yet: a rule that uses one is told so, with a place."""

from __future__ import annotations

from priority_dsl.registry import planned

_VIEWS = "views, attention and pairs"

planned("scopes", _VIEWS, draws="n evaluations of the chance.")
