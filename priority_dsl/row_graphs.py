"""The graphs of the fused loss: rules over rows of logits, with the gradient of the logits in closed form.

The registry says of each statistic what flows to its row of logits, as a few numbers a row (`RowGradient`);
these are added up over the statistics, and what flows to a view goes on to the model below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Proxy

from priority_dsl.checked import CheckedRule, text
from priority_dsl.compiler import Rows, compile_statistics, compile_weights
from priority_dsl.emitter import NLL_ON, ON, Emitter
from priority_dsl.fused_plan import FusedPlan
from priority_dsl.graphs import LossGraph
from priority_dsl.kinds import Element
from priority_dsl.plan import statistics_of
from priority_dsl.registry import REGISTRY, RowGradient, View, leaf
from priority_dsl.values import Value, walk
from priority_dsl.vocab_pass.gradients import logit_gradient
from priority_dsl.vocab_pass.passes import OnePass, RowsGraph, TwoPasses
from priority_dsl.vocabulary.rows import SweptRow, exponentials, total

_logit_gradient = leaf(logit_gradient)


@dataclass(frozen=True)
class Fused:
    """The fused loss of a rule, compiled: its plan, and what is known without logits, where it is.

    `weights` and `share` are graphs with one output `[N]`; `plan` runs the rest.
    """

    plan: OnePass | TwoPasses
    weights: LossGraph | None
    share: LossGraph | None

    @classmethod
    def of(
        cls, rule: CheckedRule, how: FusedPlan, stored: frozenset[str], stepped: bool, swept: bool = False
    ) -> Fused:
        """Compiled as planned; `stored` and `stepped` as in `compile_loss`, `swept` as in `Emitter`."""
        compiled = _one_pass if how.kind == "one pass" else _two_passes
        share = Emitter(rule, stored, stepped=stepped)
        return cls(
            compiled(rule, how, stored, stepped, swept),
            compile_weights(rule, stored, stepped) if "weights" in how.known else None,
            share.finish(share.share()) if "share" in how.known else None,
        )

    @property
    def graphs(self) -> list[LossGraph]:
        """Every graph, for the names of what they read."""
        return [*self.plan.graphs, *(g for g in (self.weights, self.share) if g is not None)]


def _one_pass(
    rule: CheckedRule, how: FusedPlan, stored: frozenset[str], stepped: bool, swept: bool
) -> OnePass:
    emitter = Emitter(rule, stored, stepped=stepped, swept=swept)
    rows = Rows.of(emitter, how.known)
    values = {statistic: emitter.known[statistic, False] for statistic in rows.flows}
    return OnePass(_finished(emitter, [rows.weights, rows.nll, rows.loss], rows.flows, values))


def _two_passes(
    rule: CheckedRule, how: FusedPlan, stored: frozenset[str], stepped: bool, swept: bool
) -> TwoPasses:
    given = Emitter(rule, stored, given=True, stepped=stepped)
    rows = Rows.of(given, how.known)
    flowing = tuple(rows.flows)
    values = [given.known[statistic, False] for statistic in flowing]
    on_tokens = given.finish(rows.weights, rows.nll, rows.loss, *rows.flows.values(), *values)
    names = {n.removeprefix("statistic_") for n in on_tokens.inputs if n.startswith("statistic_")}
    forms = [given.form(root) for root in rule.roots]
    read = {text(v): v for v in (NLL_ON, *statistics_of(forms)) if text(v) in names}
    emitter = Emitter(rule, stored, stepped=stepped, swept=swept)
    flows = {v: emitter.input(f"flow_{i}") for i, v in enumerate(flowing)}
    found = {v: emitter.input(f"value_{i}") for i, v in enumerate(flowing)}
    return TwoPasses(
        compile_statistics(rule, list(read.values()), swept),
        tuple(f"statistic_{name}" for name in read),
        on_tokens,
        len(flowing),
        _finished(emitter, [], flows, found),
    )


def _finished(
    emitter: Emitter, outputs: list[Proxy], flows: Mapping[Value, Any], values: Mapping[Value, Any]
) -> RowsGraph:
    """The graph with these outputs, then which rows are live, what a row's gradient is made of, its parts."""
    live, parts = _gradient(emitter, flows, values)
    z = emitter.logits(ON)
    fields = tuple(name for name in RowGradient._fields if getattr(parts, name) is not None)
    of_row: list[Any] = [exponentials(z), total(z)]
    if emitter.swept:
        row = SweptRow.of(z, emitter.input("targets"))
        of_row = [row.top, row.total, row.target]
    found = [live, *of_row, *(getattr(parts, name) for name in fields)]
    return RowsGraph(emitter.finish(*outputs, *found), fields, emitter.swept)


def _gradient(
    emitter: Emitter, flows: Mapping[Value, Any], values: Mapping[Value, Any]
) -> tuple[Any, RowGradient]:
    """Which rows anything flows through, and the gradient of the trained model's logits.

    Nothing flows through an infinite value or slope (law 4), as in `compile_loss`.
    """
    live: Any = emitter.valid & False
    parts: dict[Value, RowGradient] = {}
    for statistic, flow in flows.items():
        word, value = REGISTRY.statistic(statistic.word), values[statistic]
        nothing = (flow == 0) | ~flow.isfinite() | value.isinf()
        g, value = flow.masked_fill(nothing, 0.0), value.masked_fill(nothing, 0.0)
        live = live | ~nothing
        logits = [emitter.logits(model) for model in statistic.arguments]
        assert word.row_gradient is not None, statistic.word
        found: Any = word.row_gradient(g, value, *logits, emitter.input("targets"), **dict(statistic.options))
        for model, part in zip(statistic.arguments, (found,) if word.models == 1 else found, strict=True):
            if model.kind.gradient:
                parts[model] = _plus(parts.get(model, RowGradient()), part)
    for view in reversed(list(walk(*parts))):  # what reads comes before what is read
        if view in parts and view != ON:
            for model, part in _through(emitter, view, parts.pop(view)):
                parts[model] = _plus(parts.get(model, RowGradient()), part)
    return live, parts.get(ON, RowGradient())


def _through(emitter: Emitter, view: Value, parts: RowGradient) -> list[tuple[Value, RowGradient]]:
    """What flows to a view's models when these parts flow to the view."""
    word, z = REGISTRY.words[view.word], emitter.logits(view)
    assert isinstance(word, View), view.word
    assert word.row_gradient is not None, view.word
    dz = _logit_gradient(z, exponentials(z), total(z), emitter.input("targets"), parts)
    is_model = [a.kind.element == Element.MODEL for a in view.arguments]
    seen = zip(view.arguments, is_model, strict=True)
    found = word.row_gradient(dz, *(emitter.logits(a) if m else emitter.value(a, True) for a, m in seen))
    models = [a for a, m in zip(view.arguments, is_model, strict=True) if m]
    each = zip(models, (found,) if len(models) == 1 else found, strict=True)
    return [(model, RowGradient(added=g)) for model, g in each if model.kind.gradient]


def _plus(a: RowGradient, b: RowGradient) -> RowGradient:
    return RowGradient(*(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)))
