"""From a checked rule to its graphs: what the weights, a loss, a step or a pass over the data computes.

Shapes: N tokens, V vocabulary; logits_M [N, V] of model M, everything else [N] or 0-dimensional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Proxy

from priority_dsl.checked import CheckedRule, text
from priority_dsl.emitter import NLL_ON, Emitter, number_names
from priority_dsl.graphs import LossGraph
from priority_dsl.groups import spread_out
from priority_dsl.kinds import Element, Extent, Kind, Stage
from priority_dsl.normalform import by_surprise
from priority_dsl.plan import substituted
from priority_dsl.values import Value, walk


def compile_weights(
    rule: CheckedRule, stored: frozenset[str] = frozenset(), stepped: bool = False
) -> LossGraph:
    """The graph of the weights alone: one output, `[N]`."""
    emitter = Emitter(rule, stored, stepped=stepped)
    return emitter.finish(emitter.weights())


def compile_numbers(
    rule: CheckedRule, stored: frozenset[str] = frozenset()
) -> tuple[LossGraph, tuple[str, ...]]:
    """The graph of a whole step from its tokens' statistics: the numbers of its batch values, and names.

    The last output is the weights `[N]` where a denominator counts them, else ones.
    """
    emitter = Emitter(rule, stored, given=True)
    weights = emitter.weights()
    if rule.loss is not None:
        emitter.value(emitter.form(rule.loss), False)
    emitter.share()
    batches = [v for v in emitter.numbers if v.option("scope") == "batch"]
    names = tuple(name for v in batches for name in number_names(v))
    # Where no denominator counts the weights, what they alone read is not asked for.
    counted = weights if rule.normalize in ("kept", "weights") else emitter.valid.float()
    return emitter.finish(*(n for v in batches for n in emitter.numbers[v]), counted), names


def compile_columns(rule: CheckedRule, columns: Sequence[Value], statistics: frozenset[str]) -> LossGraph:
    """The graph of stored columns from the statistics that a pass kept: an output `[N]` a column."""
    emitter = Emitter(rule, statistics)
    outputs = []
    for column in columns:
        value = emitter.value(substituted(by_surprise(column), statistics), True)
        outputs.append(
            value.masked_fill(~emitter.valid, False if column.kind.element == Element.BOOL else 0.0)
        )
    return emitter.finish(*outputs)


def surveyed(columns: Sequence[Value]) -> list[Value]:
    """The reductions over the data set below some values, in the form that is computed, inner ones first."""
    return [v for v in walk(*map(by_surprise, columns)) if dict(v.options).get("scope") == "dataset"]


def compile_members(rule: CheckedRule, reduction: Value, statistics: frozenset[str]) -> LossGraph:
    """The graph of what a reduction over the data set goes over, from the statistics that a pass kept.

    Outputs x `[N]`, which of them count, data-set row and position of each, then the reduction's settings.
    """
    emitter = Emitter(rule, statistics)
    value = substituted(reduction, statistics)
    emitter.value(value, True)
    over = emitter.groups[value]
    x, *settings = (emitter.tensor(emitter.known[a, True]) for a in value.arguments)
    of_token = spread_out(x, emitter.valid)
    return emitter.finish(of_token, over.eligible, over.order.example, over.order.position, *settings)


def compile_keep(rule: CheckedRule, keep: Value, statistics: frozenset[str]) -> LossGraph:
    """The graph of which examples are kept, from the statistics that a pass kept: one output `[N]`."""
    emitter = Emitter(rule, statistics)
    kept = emitter.value(substituted(by_surprise(keep), statistics), True)
    segments: Any = emitter.input("segments")
    return emitter.finish((segments >= 0) & kept)


def compile_statistics(rule: CheckedRule, statistics: Sequence[Value], swept: bool = False) -> LossGraph:
    """The graph of statistics from logits: an output `[N]` a statistic; `swept` as in `Emitter`."""
    emitter = Emitter(rule, swept=swept)
    return emitter.finish(*(emitter.value(s, True).to(emitter.one.dtype) for s in statistics))


def compile_loss(rule: CheckedRule, stored: frozenset[str] = frozenset(), stepped: bool = False) -> LossGraph:
    """The graph of a step: outputs total (differentiable sum), weights, nll and loss of each token.

    `share` is an input: what each token's loss is multiplied by, 0 where ignored, 1 elsewhere unless
    `normalize = examples` divides.
    """
    emitter = Emitter(rule, stored, stepped=stepped)
    rows = Rows.of(emitter)
    total = rows.loss
    for statistic, flow in rows.flows.items():
        live, value = emitter.live[statistic], emitter.known[statistic, False]
        # The difference is 0 in value and carries the derivative. Nothing flows where flow is 0 (law 4), nor
        # where there is no derivative: `sqrt(kl(ref, on))` is 0 with an infinite slope where a run starts.
        nothing = (flow == 0) | ~flow.isfinite() | value.isinf()
        total = total + (live - value).masked_fill(nothing, 0.0) * flow.masked_fill(nothing, 0.0)
    return emitter.finish(total.sum(), rows.weights, rows.nll, rows.loss)


@dataclass(frozen=True)
class Rows:
    """What every graph of a step computes for each token `[N]`, and what flows to each statistic."""

    weights: Proxy
    nll: Proxy
    loss: Proxy
    flows: dict[Value, Any]

    @classmethod
    def of(cls, emitter: Emitter, known: frozenset[str] = frozenset()) -> Rows:
        """Written into a graph; `known` says which of `weights` and `share` come as inputs, finished."""
        rule = emitter.rule
        weights = emitter.input("stored_weights") if "weights" in known else emitter.weights()
        loss = emitter.form(rule.loss) if rule.loss is not None else _default_loss(rule, emitter, known)
        share = emitter.input("share") if "share" in known else emitter.share()
        of_token = (emitter.value(loss, False) * share).masked_fill(share == 0, 0.0)
        of_token.node._rename("loss_of_token")
        flows = emitter.derivatives(loss, share)
        for statistic, flow in flows.items():
            flow.node._rename("d_" + "_".join([statistic.word, *(text(m) for m in statistic.arguments)]))
        nll = emitter.value(NLL_ON, False).masked_fill(~emitter.valid, 0.0)
        return cls(weights, nll, of_token, flows)


def _default_loss(rule: CheckedRule, emitter: Emitter, known: frozenset[str]) -> Value:
    weight = emitter.form(rule.weight)
    detached = Value("weight", (weight,), (), weight.kind.detached())
    if "weights" in known:
        detached = Value(
            "stored",
            (),
            (("name", "weights"),),
            replace(detached.kind, extent=Extent.TOKEN, stage=Stage.FROZEN),
        )
    product = Kind(Extent.TOKEN, Element.NUMBER, weight.kind.range, Stage.ONLINE, True)
    return Value("multiply", (detached, NLL_ON), (), product)
