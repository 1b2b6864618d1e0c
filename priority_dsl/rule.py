"""A compiled rule: what users hold. Weights, loss and counts of a call, and what the checker knows.

Shapes: logits [..., V], targets [...], results like targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from priority_dsl import inputs, normalizing
from priority_dsl.beforehand import Beforehand, Read
from priority_dsl.checked import CheckedRule
from priority_dsl.described import Described
from priority_dsl.diagnostics import failure
from priority_dsl.executor import Executor
from priority_dsl.fused_plan import fused_plan
from priority_dsl.inputs import Given
from priority_dsl.plan import Pass, Plan
from priority_dsl.step import LossOutput, Step
from priority_dsl.survey import Rows
from priority_dsl.vocab_pass import Head
from priority_dsl.vocab_pass.fused import fused_total


class CompiledRule(Described):
    """A rule that computes. Made by `compile_rule`; immutable."""

    def __init__(self, checked: CheckedRule, name: str | None = None) -> None:
        super().__init__(checked)
        self.name = name
        self._executor = Executor(checked)
        self._beforehand = Beforehand(self._executor)

    # How it computes ----------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What is computed once before training, what training reads, which models stay loaded."""
        return self._executor.plan

    @property
    def graph(self) -> GraphModule:
        """The loss graph (torch.fx) over dense logits."""
        return self._executor.graph("loss").module

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
        logits: inputs.ModelInput | None,
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
        `on`, or a pair (hidden `[..., D]`, head), whose logits are then never held whole. `models` maps
        names to logits or (hidden, head); `columns` to values per token or per row; `examples` says which
        data-set row a token belongs to, integers like targets (default: its row of the batch; needed where
        the rule is about pairs, whose responses share a row and are told apart by the column `chosen`);
        `stored` maps statistics (`mass(ref)`) to values like targets, read instead of computed. What the
        rule draws depends on `seed` (an integer of 64 bits), `epoch`, the data-set row and the token's place
        among its supervised tokens, and on nothing else. Empty input gives an empty tensor.
        PriorityError: PD501 model missing, PD502 column missing, PD503 shapes, PD504 column values, PD505 a
        weight that is not finite, PD506 target outside the vocabulary, PD510 half a pair.
        """
        with torch.no_grad():
            if isinstance(on := _on(logits, models), tuple):
                return self.fused_loss(
                    *on, targets, models=models, columns=columns, examples=examples, stored=stored,
                    progress=progress, epoch=epoch, seed=seed,
                ).weights  # fmt: skip
            given = Given(models or {}, columns or {}, examples, stored or {}, progress, epoch, seed)
            bound = self._executor.bind("weights", on, targets, given)
            result = bound.graph(bound.inputs)[0].reshape(targets.shape)
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
        given = Given(models or {}, columns or {}, examples, stored or {}, progress, epoch, seed)
        numbers, step = self._settled(step)
        bound = self._executor.bind("loss", logits, targets, given, numbers)
        share, counted = normalizing.share(self.checked, bound, step)
        total, weights, nll, losses = bound.graph({**bound.inputs, "share": share})
        results = [t.detach() for t in (weights, nll, losses)]
        return self._output(bound.call, targets, total, results, counted)

    def fused_loss(
        self,
        hidden: Tensor,
        head: Head | torch.nn.Linear | Tensor,
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
        rows: int | None = None,
    ) -> LossOutput:
        """The loss of a call from hidden states `[..., D]` and a head; `[..., V]` is never held.

        `head` is an `nn.Linear`, a weight `[V, D]`, or a `priority_dsl.vocab_pass.Head` (bias, scale, soft
        cap, low-rank adapters). The same numbers as `loss` on their product; gradient flows into `hidden`
        and the parameters of the head. Where stored values, columns or the run make a weight 0 before any
        logits, the token's nll is not computed and is 0 in the output. `rows` is the size of a chunk
        (default: what suits the device and the vocabulary). Other arguments and errors as in `loss`, which
        computes a rule with `trained_views` on full logits.
        """
        head = Head.of(head)
        if fused_plan(self.checked).kind == "autograd":
            return self.loss(
                head.logits(hidden), targets, models=models, columns=columns, examples=examples,
                stored=stored, progress=progress, epoch=epoch, seed=seed, step=step,
            )  # fmt: skip
        given = Given(models or {}, columns or {}, examples, stored or {}, progress, epoch, seed)
        flat = hidden.reshape(-1, hidden.shape[-1])
        numbers, step = self._settled(step)
        fused, run, bound = self._executor.bind_fused(flat.detach(), head, targets, given, rows, numbers)
        run.inputs["share"], counted = normalizing.share(self.checked, bound, step)
        if fused.share is not None:
            run.inputs["share"] = fused.share(run.inputs)[0]
        total = fused_total(fused.plan, run, flat, head)
        return self._output(bound.call, targets, total, run.results(), counted)

    def observe(
        self,
        logits: inputs.ModelInput | None,
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
        """What a micro-batch adds to its step; arguments and errors as in `weights`.

        `logits` may be None unless `observes_on`, `models` empty unless `observes_model`: where only tokens
        or examples are counted, only the targets are read. A value of the batch is computed from the
        statistics of all tokens of the step, so it does not depend on how they were spread; its ties
        need `examples` where the step has several micro-batches (PD508).
        """
        with torch.no_grad():
            if self.checked.batches:
                given = Given(models or {}, columns or {}, examples, stored or {}, progress, epoch, seed)
                gathered = self._executor.gather(logits, targets, given)
                counted = normalizing.count(
                    self.checked, inputs.call_of(self.checked, targets, examples, columns=columns or {})
                )
                return replace(counted, gathered=gathered)
            if self.checked.normalize not in ("kept", "weights"):
                return normalizing.count(
                    self.checked, inputs.call_of(self.checked, targets, examples, columns=columns or {})
                )
            if isinstance(on := _on(logits, models), tuple):
                weights = self.weights(
                    on, targets, models=models, columns=columns, examples=examples, stored=stored,
                    progress=progress, epoch=epoch, seed=seed,
                )  # fmt: skip
                return normalizing.count(
                    self.checked,
                    inputs.call_of(self.checked, targets, examples, columns=columns or {}),
                    weights.reshape(-1),
                )
            given = Given(models or {}, columns or {}, examples, stored or {}, progress, epoch, seed)
            bound = self._executor.bind("weights", on, targets, given)
            return normalizing.count(self.checked, bound.call, bound.graph(bound.inputs)[0])

    # Before training ----------------------------------------------------------------------------

    def statistics(
        self,
        of: Pass,
        models: Mapping[str, inputs.ModelInput],
        targets: Tensor,
        *,
        rows: int | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The statistics of a pass of `plan`, by name, like the targets and 0 where ignored.

        `models` maps each model (or view that reads anew) of the pass to (hidden `[..., D]`, head), a head
        being an `nn.Linear`, a weight `[V, D]` or a `Head`, whose full logits are then never held; or to
        logits. float32 (float64 for float64 input), detached; a bool is 0 or 1. `rows` is the size of a
        chunk. `stored`
        has the values of what is read inside a forward pass (`of.inside`).
        """
        return self._executor.statistics(of, models, targets, rows, stored)

    def survey(self, read: Read, *, keep: bool = False) -> dict[str, Tensor]:
        """The numbers of the values over the data set, by name: for `stored_columns`, with `keep` for `kept`.

        `read()` starts a reading of the data set and gives its rows in batches (`priority_dsl.survey.Rows`:
        targets, the statistics of the plan's passes, columns, examples). It is called several times; one
        batch is held at a time. The numbers are exact and do not depend on the batches: 0-dimensional
        tensors, float64, integer or bool. Empty where the rule reads nothing over the data set.
        """
        return self._beforehand.survey(read, keep)

    def kept(self, rows: Rows, numbers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Which examples `keep` leaves, bool like the targets; all where the rule has no `keep`.

        `rows` has the statistics of the passes in `plan.keep`; `numbers` come from `survey(..., keep=True)`.
        PriorityError: PD509 where they are missing, and as in `weights`.
        """
        return self._beforehand.kept(rows, numbers or {})

    def stored_columns(
        self,
        targets: Tensor,
        *,
        statistics: Mapping[str, Tensor],
        columns: Mapping[str, Any] | None = None,
        examples: Tensor | None = None,
        seed: int = 0,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The stored columns of `plan` by name, from the statistics of its passes: what `stored=` takes.

        Like the targets: bool or float32, 0 (false) where ignored. `numbers` are those of the data set
        (`survey`), needed where the rule reads any (PD509). Other errors as in `weights`.
        """
        rows = Rows(targets, statistics, columns or {}, examples, seed)
        return self._executor.stored_columns(rows, numbers or {})

    # Inside -------------------------------------------------------------------------------------

    def _settled(self, step: Step | None) -> tuple[dict[str, Tensor] | None, Step | None]:
        """The numbers of a step's batch values, and the step with all of its counts."""
        if step is None or not self.checked.batches:
            return None, step
        if step.gathered is None:
            raise failure(
                "PD507", "`step` has no values of the batch", help="make it with `observe` of this rule"
            )  # fmt: skip
        known = step.gathered.settled
        if not known:
            with torch.no_grad():
                known["numbers"], weights, valid = self._executor.numbers(step.gathered)
            known["kept"], known["weights"] = (weights[valid] != 0).sum(), weights[valid].abs().sum()
        return known["numbers"], replace(step, kept=known["kept"], weights=known["weights"])

    def _output(
        self, call: inputs.Call, targets: Tensor, total: Tensor, results: Sequence[Tensor], step: Step | None
    ) -> LossOutput:
        """The output of a call from its total and its weights, nll and losses `[N]`."""
        weights, nll, losses = (t.reshape(targets.shape) for t in results)
        self._check_finite(weights)
        counted = step or normalizing.count(self.checked, call, weights.reshape(-1))
        return LossOutput(
            total, normalizing.denominator(self.checked, counted, call.dtype), weights, nll, losses
        )

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


def _on(
    logits: inputs.ModelInput | None, models: Mapping[str, inputs.ModelInput] | None
) -> inputs.ModelInput | None:
    """What the trained model says, given as the logits or among the models."""
    return logits if logits is not None else (models or {}).get("on")
