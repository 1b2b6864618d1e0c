"""A compiled rule: what users hold. Weights, loss and counts of a call, and what the checker knows.

Shapes: logits [..., V], targets [...], results like targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from priority_dsl import inputs, layout
from priority_dsl.checked import CheckedRule, Column, ModelDeclaration, Regime, Requires
from priority_dsl.compiler import (
    LossGraph,
    compile_columns,
    compile_loss,
    compile_statistics,
    compile_weights,
)
from priority_dsl.diagnostics import failure
from priority_dsl.kinds import Range, Stage
from priority_dsl.plan import Pass, Plan, plan
from priority_dsl.printer import format_rule
from priority_dsl.registry import REGISTRY, Reading
from priority_dsl.step import LossOutput, Step
from priority_dsl.vocab_pass import Head, sweep


class CompiledRule:
    """A rule that computes. Made by `compile_rule`; immutable."""

    def __init__(self, checked: CheckedRule, name: str | None = None) -> None:
        self.checked = checked
        self.name = name
        self._graphs: dict[tuple[str, frozenset[str]], LossGraph] = {}
        self._passes: dict[Pass, LossGraph] = {}

    # What the checker knows ---------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The canonical text of the rule."""
        return format_rule(self.checked.tree)

    @property
    def params(self) -> dict[str, float]:
        """The parameter values in force."""
        return {name: p.value for name, p in self.checked.params.items()}

    @property
    def models(self) -> dict[str, ModelDeclaration]:
        """The declared models beside `on` and `ref`."""
        return dict(self.checked.models)

    @property
    def columns(self) -> dict[str, Column]:
        """The data-set columns that the rule reads, without `role` and `response`."""
        read = self.checked.requires.columns
        return {n: c for n, c in self.checked.columns.items() if n in read and not _is_reading(n)}

    @property
    def requires(self) -> Requires:
        """The names of the models, statistics and columns that the rule reads."""
        return self.checked.requires

    @property
    def regime(self) -> Regime:
        """The regime of the taxonomy, derived."""
        return self.checked.regime

    @property
    def range(self) -> Range:
        """The values that a weight can take."""
        return self.checked.range

    @property
    def over(self) -> Literal["response", "all"]:
        """Which tokens the targets hold: the response's, or every real token but the first."""
        return self.checked.over

    @property
    def observes_model(self) -> bool:
        """Whether the denominator of a step depends on what models say, so that counting needs logits."""
        reads = self.checked.weight.kind.stage >= Stage.FROZEN and self.checked.weight.kind.stage != Stage.RUN
        return self.checked.normalize in ("kept", "weights") and reads

    @cached_property
    def plan(self) -> Plan:
        """What is computed once before training, what training reads, which models stay loaded."""
        return plan(self.checked)

    @cached_property
    def graph(self) -> GraphModule:
        """The loss graph (torch.fx) over dense logits."""
        return self._graph("loss", frozenset()).module

    @property
    def code(self) -> str:
        """The Python source of the loss graph."""
        return self.graph.code

    def explain(self) -> str:
        """What the rule is, as text."""
        from priority_dsl.explain import explain_rule

        return explain_rule(self.checked)

    def __repr__(self) -> str:
        return f"<rule {self.name or self.text!r}: {self.regime}>"

    def __reduce__(self):
        return (CompiledRule, (self.checked, self.name))

    # Computing ----------------------------------------------------------------------------------

    def weights(
        self,
        logits: Tensor | None,
        targets: Tensor,
        *,
        models: Mapping[str, inputs.ModelInput] | None = None,
        columns: Mapping[str, Any] | None = None,
        examples: Tensor | None = None,
        stored: Mapping[str, Any] | None = None,
        progress: float = 0.0,
        epoch: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """The weight of each target, detached: float32 (float64 for float64 logits), 0 where ignored.

        `logits [..., V]` predict `targets [...]` (-100 ignored) and may be None where the rule reads no
        `on`. `models` maps names to logits or (hidden, head); `columns` to values per token or per row;
        `examples` says which data-set row a token belongs to (default: one a row of the batch); `stored`
        maps statistics (`mass(ref)`) to values like targets, read instead of computed. Empty input gives
        an empty tensor. PriorityError: PD501 model missing, PD502 column missing, PD503 shapes, PD504
        column values, PD505 a weight that is not finite, PD506 target outside the vocabulary.
        """
        with torch.no_grad():
            graph, bound, _ = self._bind(
                "weights", logits, targets, models, columns, examples, stored, progress, epoch
            )
            result = graph(bound)[0].reshape(targets.shape)
        self._check_finite(result)
        return result

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        models: Mapping[str, inputs.ModelInput] | None = None,
        columns: Mapping[str, Any] | None = None,
        examples: Tensor | None = None,
        stored: Mapping[str, Any] | None = None,
        progress: float = 0.0,
        epoch: int = 0,
        seed: int = 0,
        step: Step | None = None,
    ) -> LossOutput:
        """The loss of a call; arguments and errors as in `weights`.

        Gradient flows from `total` (and `mean`) into `logits` and nowhere else. `step` holds the counts of
        the whole optimizer step (`observe`); without it the call is the whole step. A batch without a
        supervised token has total 0 with a graph.
        """
        graph, bound, call = self._bind(
            "loss", logits, targets, models, columns, examples, stored, progress, epoch
        )
        share, counted = call.valid.to(call.dtype), step
        if self.checked.normalize == "examples":
            counted = step or self._count(call)
            share = share / (bound["length"] * counted.examples).clamp(min=1).to(call.dtype)
        total, weights, nll, losses = graph({**bound, "share": share})
        weights = weights.detach().reshape(targets.shape)
        self._check_finite(weights)
        counted = counted or self._count(call, weights.reshape(-1))
        return LossOutput(
            total,
            self._denominator(counted, call.dtype),
            weights,
            nll.detach().reshape(targets.shape),
            losses.detach().reshape(targets.shape),
        )

    def observe(
        self,
        logits: Tensor | None,
        targets: Tensor,
        *,
        models: Mapping[str, inputs.ModelInput] | None = None,
        columns: Mapping[str, Any] | None = None,
        examples: Tensor | None = None,
        stored: Mapping[str, Any] | None = None,
        progress: float = 0.0,
        epoch: int = 0,
        seed: int = 0,
    ) -> Step:
        """The counts of a micro-batch, to be added over the step; arguments and errors as in `weights`.

        `logits` may be None unless `observes_model`: where the denominator counts tokens or examples,
        only the targets are read.
        """
        with torch.no_grad():
            if self.checked.normalize not in ("kept", "weights"):
                return self._count(inputs.call_of(self.checked, targets, examples))
            graph, bound, call = self._bind(
                "weights", logits, targets, models, columns, examples, stored, progress, epoch
            )
            return self._count(call, graph(bound)[0])

    # Before training ----------------------------------------------------------------------------

    def statistics(
        self, of: Pass, models: Mapping[str, tuple[Tensor, Any]], targets: Tensor, *, rows: int | None = None
    ) -> dict[str, Tensor]:
        """The statistics of a pass of `plan`, by name, like the targets and 0 where ignored.

        `models` maps each model of the pass to (hidden `[..., D]`, head), a head being an `nn.Linear`, a
        weight `[V, D]` or a `Head`. float32 (float64 for float64 hidden states), detached; a bool is 0 or
        1. `rows` is the size of a chunk; the full logits are never held.
        """
        graph = self._statistics_graph(of)
        heads = {n: (h.reshape(-1, h.shape[-1]), Head.of(head)) for n, (h, head) in models.items()}
        call = inputs.call_of(self.checked, targets, None)
        flat = call.targets.reshape(-1).masked_fill(~call.valid, 0)

        def evaluate(logits: dict[str, Tensor], targets_N: Tensor) -> Sequence[Tensor]:
            inputs.check_targets(replace(call, targets=targets_N), logits)
            one = next(iter(logits.values())).new_ones(())
            bound = {"one": one, "valid": targets_N >= 0, "targets": targets_N}
            return graph({**bound, **{f"logits_{n}": z for n, z in logits.items()}})

        values = sweep(evaluate, heads, flat, call.valid, rows)
        return {name: v.reshape(targets.shape) for name, v in zip(of.names, values, strict=True)}

    def stored_columns(
        self,
        targets: Tensor,
        *,
        statistics: Mapping[str, Tensor],
        columns: Mapping[str, Any] | None = None,
        examples: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The stored columns of `plan` by name, from the statistics of its passes: what `stored=` takes.

        Like the targets: bool or float32, 0 (false) where ignored. Errors as in `weights`.
        """
        if not self.plan.stored:
            return {}
        graph = self._columns_graph(frozenset(statistics))
        call = inputs.call_of(self.checked, targets, examples)
        call = replace(call, dtype=inputs.statistics_dtype(list(statistics.values())))
        bound: dict[str, Any] = inputs.run_inputs(call, 0.0, 0, statistics)
        names = [n.removeprefix("column_") for n in graph.inputs if n.startswith("column_")]
        bound.update(inputs.column_inputs(call, columns, names))
        with torch.no_grad():
            values = [v.reshape(targets.shape) for v in graph(bound)]
        return {column.name: value for column, value in zip(self.plan.stored, values, strict=True)}

    # Inside -------------------------------------------------------------------------------------

    def _graph(self, what: Literal["loss", "weights"], stored: frozenset[str]) -> LossGraph:
        key = (what, stored)
        if key not in self._graphs:
            build = compile_loss if what == "loss" else compile_weights
            self._graphs[key] = build(self.checked, stored)
        return self._graphs[key]

    def _swept(
        self,
        targets: Tensor,
        models: Mapping[str, inputs.ModelInput],
        columns: Mapping[str, Any] | None,
        examples: Tensor | None,
        stored: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The stored columns computed here and now, where frozen models come as (hidden, head).

        The same sweep as before training, so that on the same batch both give the same bits.
        """
        pairs = {n: m for n, m in models.items() if not isinstance(m, Tensor)}
        needed = {name for p in self.plan.passes for name in p.models}
        if not needed or not needed <= set(pairs) or all(c.name in stored for c in self.plan.stored):
            return {}
        statistics: dict[str, Tensor] = {}
        for of in self.plan.passes:
            statistics.update(self.statistics(of, {n: pairs[n] for n in of.models}, targets))
        return self.stored_columns(targets, statistics=statistics, columns=columns, examples=examples)

    def _statistics_graph(self, of: Pass) -> LossGraph:
        if of not in self._passes:
            self._passes[of] = compile_statistics(self.checked, of.statistics)
        return self._passes[of]

    def _columns_graph(self, statistics: frozenset[str]) -> LossGraph:
        key = ("columns", statistics)
        if key not in self._graphs:
            values = [column.value for column in self.plan.stored]
            self._graphs[key] = compile_columns(self.checked, values, statistics)
        return self._graphs[key]

    def _bind(
        self,
        what: Literal["loss", "weights"],
        logits: Tensor | None,
        targets: Tensor,
        models: Mapping[str, inputs.ModelInput] | None,
        columns: Mapping[str, Any] | None,
        examples: Tensor | None,
        stored: Mapping[str, Any] | None,
        progress: float,
        epoch: int,
    ) -> tuple[LossGraph, dict[str, Any], inputs.Call]:
        """The graph, its inputs and the layout of a call."""
        given = {**self._swept(targets, models or {}, columns, examples, stored or {}), **(stored or {})}
        known = self.requires.statistics | {column.name for column in self.plan.stored}
        read = {n: v for n, v in given.items() if n in known}
        graph = self._graph(what, frozenset(read))
        call = inputs.call_of(self.checked, targets, examples)
        needed = [n.removeprefix("logits_") for n in graph.inputs if n.startswith("logits_")]
        tensors = inputs.model_logits(logits, models, needed, targets)
        seen = [*tensors.values(), *([logits] if isinstance(logits, Tensor) else [])]
        if seen:
            call = replace(call, dtype=inputs.statistics_dtype(seen))
        inputs.check_targets(call, tensors)
        bound: dict[str, Any] = inputs.run_inputs(call, progress, epoch, read)
        names = [n.removeprefix("column_") for n in graph.inputs if n.startswith("column_")]
        bound.update(inputs.column_inputs(call, columns, names))
        bound.update(
            {f"logits_{n}": z.masked_fill(~call.valid.unsqueeze(-1), 0.0) for n, z in tensors.items()}
        )
        return graph, bound, call

    def _count(self, call: inputs.Call, weights: Tensor | None = None) -> Step:
        kept = None if weights is None else (weights != 0).sum()
        size = None if weights is None else weights.detach().abs().sum()
        return Step(call.valid.sum(), layout.count_examples(call.segments, call.valid), kept, size)

    def _denominator(self, step: Step, dtype: torch.dtype) -> Tensor:
        match self.checked.normalize:
            case "tokens":
                count = step.tokens
            case "kept":
                count = step.kept
            case "weights":
                count = step.weights
            case _:  # examples divides inside, none divides by nothing
                count = torch.ones_like(step.tokens)
        if count is None:
            raise failure(
                "PD507", f"`step` has no counts for `normalize = {self.checked.normalize}`",
                help="make it with `observe` of this rule",
            )  # fmt: skip
        return count.detach().to(dtype)

    def _check_finite(self, weights: Tensor) -> None:
        if torch.compiler.is_compiling() or bool(weights.isfinite().all()):
            return
        index = int((~weights.isfinite()).reshape(-1).long().argmax())
        width = max(1, weights.shape[-1]) if weights.dim() else 1
        value = weights.reshape(-1)[index].item()
        raise failure(
            "PD505",
            f"a weight is {value}: rule `{self.name or self.text.strip()}`, example {index // width}, "
            f"position {index % width}",
            help="bound the expression with clip, max or min; `check` warns where a range is not safe",
        )


def _is_reading(name: str) -> bool:
    return isinstance(REGISTRY.get(name), Reading)
