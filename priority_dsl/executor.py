"""The graphs of a rule, made when first needed, and what they are fed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from priority_dsl import inputs
from priority_dsl.binding import bindings, bound_names
from priority_dsl.checked import CheckedRule, text
from priority_dsl.compiler import (
    compile_columns,
    compile_loss,
    compile_numbers,
    compile_statistics,
    compile_weights,
    surveyed,
)
from priority_dsl.diagnostics import failure
from priority_dsl.fused_plan import fused_plan
from priority_dsl.graphs import LossGraph
from priority_dsl.normalform import normal_form
from priority_dsl.plan import Pass, Plan, plan, statistics_of
from priority_dsl.row_graphs import Fused
from priority_dsl.step import Gathered
from priority_dsl.survey import Rows
from priority_dsl.values import Value
from priority_dsl.vocab_pass import Head, sweep
from priority_dsl.vocab_pass.call import FusedCall
from priority_dsl.vocab_pass.sweep import has_kernels

What = Literal["loss", "weights", "columns"]


@dataclass(frozen=True)
class Bound:
    """A graph, the inputs of a call by name (`[N]` or 0-dimensional, logits `[N, V]`) and its layout."""

    graph: LossGraph
    inputs: dict[str, Any]
    call: inputs.Call


class Executor:
    """Runs the graphs of one checked rule."""

    def __init__(self, checked: CheckedRule) -> None:
        self.checked = checked
        # Made now: the first call may be traced by torch.compile, which cannot make them.
        self.plan: Plan = plan(checked)
        readable = checked.requires.statistics | {column.name for column in self.plan.stored}
        readable |= {text(v) for v in surveyed([column.value for column in self.plan.stored])}
        self._readable = readable
        # What is bound of the trained model: itself, and its views in forward passes of their own.
        self.trained = {"on"} | {n for n, v in bindings(*checked.roots).items() if v.kind.gradient}
        self._graphs: dict[tuple[What, frozenset[str], bool], LossGraph] = {}
        self._numbers: dict[frozenset[str], tuple[LossGraph, tuple[str, ...]]] = {}
        self._passes: dict[tuple[Pass, bool], LossGraph] = {}
        self._fused: dict[tuple[frozenset[str], bool, bool], Fused] = {}
        self.graph("loss")

    def graph(self, what: What, stored: frozenset[str] = frozenset(), stepped: bool = False) -> LossGraph:
        """The graph of the loss, the weights, or the stored columns, when these values come from outside.

        `stepped` says that the numbers of the batch do too.
        """
        key = (what, stored, stepped)
        if key not in self._graphs:
            match what:
                case "loss":
                    self._graphs[key] = compile_loss(self.checked, stored, stepped)
                case "weights":
                    self._graphs[key] = compile_weights(self.checked, stored, stepped)
                case "columns":
                    values = [column.value for column in self.plan.stored]
                    self._graphs[key] = compile_columns(self.checked, values, stored)
        return self._graphs[key]

    def bind(
        self,
        what: What,
        logits: Tensor | None,
        targets: Tensor,
        given: inputs.Given,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> Bound:
        """The graph, its inputs and the layout of a call on dense logits; `numbers` are those of its step."""
        stored = self._stored(targets, given)
        graph = self.graph(what, frozenset(stored), numbers is not None)
        bound = self._dense(graph, logits, targets, given, stored)
        bound.inputs.update(numbers or {})
        self._all_known(replace(bound, inputs={**bound.inputs, "share": None}))
        return bound

    def _dense(
        self,
        graph: LossGraph,
        logits: Tensor | None,
        targets: Tensor,
        given: inputs.Given,
        stored: Mapping[str, Any],
    ) -> Bound:
        """A graph bound to dense logits."""
        needed = [n.removeprefix("logits_") for n in graph.inputs if n.startswith("logits_")]
        tensors = inputs.model_logits(logits, given.models, needed, targets, self.trained)
        seen = [*tensors.values(), *([logits] if isinstance(logits, Tensor) else [])]
        bound = self.bound(graph, targets, given, stored, seen)
        inputs.check_targets(bound.call, tensors)
        outside = ~bound.call.valid.unsqueeze(-1)
        bound.inputs.update({f"logits_{n}": z.masked_fill(outside, 0.0) for n, z in tensors.items()})
        return bound

    def bound(
        self,
        graph: LossGraph,
        targets: Tensor,
        given: inputs.Given,
        stored: Mapping[str, Any],
        seen: Sequence[Tensor],
    ) -> Bound:
        """The inputs that are no logits; `seen` are tensors that decide the dtype of the statistics."""
        call = inputs.call_of(self.checked, targets, given.examples, columns=given.columns)
        if seen:
            call = replace(call, dtype=inputs.statistics_dtype(seen))
        bound: dict[str, Any] = inputs.run_inputs(call, given.progress, given.epoch, given.seed, stored)
        names = [n.removeprefix("column_") for n in graph.inputs if n.startswith("column_")]
        bound.update(inputs.column_inputs(call, given.columns, names))
        self._inside_given(graph, stored)
        return Bound(graph, bound, call)

    def _inside_given(self, graph: LossGraph, stored: Mapping[str, Any]) -> None:
        """Refuse a call without what is read inside a model's forward pass, which no logits tell."""
        read = sorted(n for n in self.checked.requires.statistics if f"stored_{n}" in graph.inputs)
        missing = [name for name in read if name not in stored]
        if missing:
            raise failure(
                "PD501", f"the rule reads `{missing[0]}`, which is not given",
                help=f'pass stored={{"{missing[0]}": values}}, a number for each target',
            )  # fmt: skip

    def bind_fused(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        given: inputs.Given,
        rows: int | None,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Fused, FusedCall, Bound]:
        """A fused call in chunks of `rows`: the graphs, their inputs but `share`, the rows to be computed.

        Rows whose weight is 0 whatever the trained model says are not computed, where the loss is the
        default one.
        """
        stored = self._stored(targets, given)
        fused = self.fused(frozenset(stored), numbers is not None, has_kernels(hidden.device))
        read = dict.fromkeys(n for g in fused.graphs for n in g.inputs)
        names = {n.removeprefix("logits_") for n in read if n.startswith("logits_")} - {"on"}
        pairs = {n: m for n, m in given.models.items() if n in names and not isinstance(m, Tensor)}
        dense = inputs.model_logits(None, given.models, sorted(names - set(pairs)), targets)
        every = replace(fused.graphs[0], inputs=tuple(read))
        bound = self.bound(every, targets, given, stored, [hidden, *dense.values()])
        bound.inputs.update(numbers or {})
        index = bound.call.valid
        if fused.weights is not None:
            bound.inputs["stored_weights"] = fused.weights(bound.inputs)[0]
            index = index & (bound.inputs["stored_weights"] != 0) if self.checked.loss is None else index
        inputs.check_targets(bound.call, {"on": head.weight.T, **dense})
        heads = {n: (h.detach().reshape(-1, h.shape[-1]), Head.of(w)) for n, (h, w) in pairs.items()}
        return fused, FusedCall(bound.inputs, heads, dense, index.nonzero().squeeze(-1), rows), bound

    def fused(
        self, stored: frozenset[str] = frozenset(), stepped: bool = False, swept: bool = False
    ) -> Fused:
        """The graphs of the fused loss when these values come from outside, `swept` as in an `Emitter`."""
        key = (stored, stepped, swept)
        if key not in self._fused:
            self._fused[key] = Fused.of(self.checked, fused_plan(self.checked, stored), *key)
        return self._fused[key]

    # The whole step -----------------------------------------------------------------------------

    def observed(self, stored: frozenset[str]) -> list[Value]:
        """The statistics that the numbers of a step are made of, where these values come from outside."""
        graph, _ = self._numbers_of(stored)
        names = {n.removeprefix("statistic_") for n in graph.inputs if n.startswith("statistic_")}
        forms = [normal_form(root, self.params) for root in self.checked.roots]
        return [v for v in statistics_of(forms) if text(v) in names]

    def gather(self, logits: inputs.ModelInput | None, targets: Tensor, given: inputs.Given) -> Gathered:
        """What the numbers of a step are made of, for the tokens of a micro-batch."""
        stored = self._stored(targets, given)
        graph, _ = self._numbers_of(frozenset(stored))
        statistics = self.observed(frozenset(stored))
        values = self._values_of(statistics, logits, targets, given)
        # The dtype is the one that the loss will have: what is compared with a threshold must equal it.
        said = logits[0] if isinstance(logits, tuple) else logits
        known = [said] if said is not None else [v for v in stored.values() if isinstance(v, Tensor)]
        bound = self.bound(graph, targets, given, stored, [*values.values(), *known])
        bound.inputs.update({f"statistic_{name}": v.reshape(-1) for name, v in values.items()})
        kept = {*graph.inputs, "valid", "segments", "example_ids", "position"}
        found = {name: t for name, t in bound.inputs.items() if name in kept}
        return Gathered(found, frozenset(stored), named=given.examples is not None)

    def _values_of(
        self,
        statistics: Sequence[Value],
        logits: inputs.ModelInput | None,
        targets: Tensor,
        given: inputs.Given,
    ) -> dict[str, Tensor]:
        """Statistics of a micro-batch by name, like the targets: in chunks where every model is a pair."""
        models = dict(given.models)
        if logits is not None:
            models["on"] = logits
        read = sorted(bound_names(*statistics))
        of = Pass(tuple(read), tuple(statistics))
        if not all(isinstance(models.get(n), tuple) for n in read):
            models = {n: inputs.as_logits(m) for n, m in models.items() if n in read}
        return self.statistics(of, models, targets) if statistics else {}

    def numbers(self, gathered: Gathered) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The numbers of a step by name, and its weights and which of them are of supervised tokens `[N]`."""
        graph, names = self._numbers_of(gathered.stored)
        whole = gathered.in_order()
        *numbers, weights = graph(whole)
        return dict(zip(names, numbers, strict=True)), weights, whole["valid"]

    def _numbers_of(self, stored: frozenset[str]) -> tuple[LossGraph, tuple[str, ...]]:
        if stored not in self._numbers:
            self._numbers[stored] = compile_numbers(self.checked, stored)
        return self._numbers[stored]

    @property
    def params(self) -> dict[str, float]:
        """The parameter values in force."""
        return {name: p.value for name, p in self.checked.params.items()}

    # Before training ----------------------------------------------------------------------------

    def statistics(
        self,
        of: Pass,
        models: Mapping[str, inputs.ModelInput],
        targets: Tensor,
        rows: int | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The statistics of a pass, by name; see `CompiledRule.statistics`."""
        read = {name: (stored or {})[name] for name in of.inside}
        if read:
            swept = Pass(of.models, tuple(s for s in of.statistics if text(s) not in read))
            known = self.statistics(swept, models, targets, rows) if swept.statistics else {}
            ignored = targets == inputs.IGNORED
            known.update({n: torch.as_tensor(v).masked_fill(ignored, 0.0) for n, v in read.items()})
            return {name: known[name] for name in of.names}
        dense = any(isinstance(model, Tensor) for model in models.values())
        graph = self._pass(of, swept=not dense and has_kernels(targets.device))
        if dense:
            bound = self._dense(graph, None, targets, inputs.Given(models, columns=None), {})
            values = (v.masked_fill(~bound.call.valid, 0.0) for v in graph(bound.inputs))
            return {name: v.reshape(targets.shape) for name, v in zip(of.names, values, strict=True)}
        heads = {n: (h.reshape(-1, h.shape[-1]), Head.of(head)) for n, (h, head) in models.items()}  # type: ignore[misc]
        call = inputs.call_of(self.checked, targets, None)

        def evaluate(logits: dict[str, Tensor], targets_N: Tensor) -> Sequence[Tensor]:
            inputs.check_targets(replace(call, targets=targets_N), logits)
            one = next(iter(logits.values())).new_ones(())
            bound = {"one": one, "valid": targets_N >= 0, "targets": targets_N}
            return graph({**bound, **{f"logits_{n}": z for n, z in logits.items()}})

        flat = targets.reshape(-1).masked_fill(~call.valid, 0)
        values = sweep(evaluate, heads, flat, call.valid, rows)
        return {name: v.reshape(targets.shape) for name, v in zip(of.names, values, strict=True)}

    def _pass(self, of: Pass, swept: bool) -> LossGraph:
        if (of, swept) not in self._passes:
            self._passes[of, swept] = compile_statistics(self.checked, of.statistics, swept)
        return self._passes[of, swept]

    def stored_columns(self, rows: Rows, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored columns by name; see `CompiledRule.stored_columns`."""
        stored = self.plan.stored
        if not stored:
            return {}
        graph = self.graph("columns", frozenset(rows.statistics))
        with torch.no_grad():
            values = self.over_rows(graph, rows, numbers)
        return {c.name: v.reshape(rows.targets.shape) for c, v in zip(stored, values, strict=True)}

    def over_rows(self, graph: LossGraph, rows: Rows, numbers: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """A graph on rows of which passes kept the statistics; PD509 where one, or a number, is missing."""
        statistics = {n: t for n, t in rows.statistics.items() if f"stored_{n}" in graph.inputs}
        given = inputs.Given(columns=rows.columns, examples=rows.examples, seed=rows.seed)
        bound = self.bound(graph, rows.targets, given, statistics, list(rows.statistics.values()))
        bound.inputs.update(inputs.number_inputs(bound.call, numbers))
        self._all_known(bound)
        return graph(bound.inputs)

    def _all_known(self, bound: Bound) -> None:
        missing = [name for name in bound.graph.inputs if name not in bound.inputs]
        if missing:
            what = missing[0].removeprefix("logits_").removeprefix("statistic_")
            what = re.sub(r"\[\d\]$", "", what)
            raise failure(
                "PD509", f"`{what}` is not known",
                help=f'a call does not see the whole data set: pass stored={{"{what}": ...}}, or the numbers '
                "of `rule.survey` to `rule.stored_columns`",
            )  # fmt: skip

    def _stored(self, targets: Tensor, given: inputs.Given) -> dict[str, Any]:
        """The stored values that a call reads: as given, else swept here where models come as pairs."""
        return {
            n: v for n, v in {**self._swept(targets, given), **given.stored}.items() if n in self._readable
        }

    def _swept(self, targets: Tensor, given: inputs.Given) -> dict[str, Tensor]:
        """The stored columns computed here and now, where frozen models come as (hidden, head).

        The same sweep as before training, so that on the same batch both give the same bits.
        """
        pairs = {n: m for n, m in given.models.items() if not isinstance(m, Tensor)}
        needed = {name for p in self.plan.passes for name in p.models}
        if not needed or not needed <= set(pairs) or all(c.name in given.stored for c in self.plan.stored):
            return {}
        if self.plan.surveys:
            return {}  # numbers of the data set come from outside, and with them the columns that need them
        statistics: dict[str, Tensor] = {}
        for of in self.plan.passes:
            if not set(of.inside) <= set(given.stored):
                return {}
            pass_models = {n: pairs[n] for n in of.models}
            statistics.update(self.statistics(of, pass_models, targets, stored=given.stored))
        rows = Rows(targets, statistics, given.columns or {}, given.examples, given.seed)
        return self.stored_columns(rows, {})
