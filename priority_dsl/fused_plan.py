"""How the fused loss runs a rule: in one pass over the vocabulary or in two, and why.

    one pass     a token's weight and what flows from its loss are known while its logits are at hand:
                 logits, then the two products of the gradient, for live tokens
    two passes   the loss of a token reads other tokens (a rank in the batch, a mean over the example): the
                 statistics of all tokens first, then the rule on them, then the logits of live tokens anew
    autograd     what flows to a view or a statistic has no closed form: autograd on full logits, as in `loss`

Before any of them, what is known without logits is computed: a token whose weight is 0 then is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from priority_dsl.checked import CheckedRule, text
from priority_dsl.normalform import normal_form
from priority_dsl.plan import substituted
from priority_dsl.registry import REGISTRY, Function, Reading, Statistic, View
from priority_dsl.values import Value, carrying, walk
from priority_dsl.words import Chance

Kind = Literal["one pass", "two passes", "autograd"]

# What is no word of the registry and reads its own token alone.
_LEAVES = frozenset({"constant", "param", "column", "stored", "model", "sg", "weight", "indicator", "is_in"})


@dataclass(frozen=True)
class FusedPlan:
    """The plan of the fused loss: `known` are those of `weights` and `share` that need no logits."""

    kind: Kind
    why: str
    known: frozenset[str]


def fused_plan(rule: CheckedRule, stored: frozenset[str] = frozenset()) -> FusedPlan:
    """The plan of a checked rule when the values named in `stored` come from outside."""
    params = {name: p.value for name, p in rule.params.items()}

    def form(value: Value) -> Value:
        return substituted(normal_form(value, params), stored)

    weight, groups = form(rule.weight), [form(v) for g in rule.groups for v in (g.member, g.count)]
    loss = None if rule.loss is None else form(rule.loss)
    known = {name for name, of in (("weights", [weight]), ("share", groups)) if not _read_models(of)}
    computed = [] if loss is None else [loss]
    computed += [] if "weights" in known else [weight]
    computed += [] if "share" in known else groups
    together = next((v for v in walk(*computed) if not _by_itself(v)), None)
    opaque = None if loss is None else next((v for v in carrying(loss) if not _has_gradient(v)), None)
    if opaque is not None:
        kind, why = "autograd", f"`{text(opaque)}` has no closed gradient"
    elif together is not None:
        kind, why = "two passes", f"`{text(together)}` reads more than its own token"
    elif "weights" in known and loss is None:
        kind, why = "one pass", "weights are known before any logits, tokens of weight 0 are dropped"
    else:
        kind, why = (
            "one pass",
            "weights are known with the logits, tokens without gradient cost a third",
        )
    return FusedPlan(kind, why, frozenset(known))


def _read_models(values: Iterable[Value]) -> bool:
    return any(isinstance(REGISTRY.get(v.word), Statistic) for v in walk(*values))


def _by_itself(value: Value) -> bool:
    """Whether a value reads its own token alone, as far as its own word goes."""
    word = REGISTRY.get(value.word)
    return value.word in _LEAVES or isinstance(word, (Function, Statistic, Reading, View, Chance))


def _has_gradient(value: Value) -> bool:
    word = REGISTRY.get(value.word)
    return not isinstance(word, (Statistic, View)) or word.row_gradient is not None
