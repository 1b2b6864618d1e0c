"""What a loss is divided by: the share of each token, the counts of a step, its denominator (`normalize`)."""

from __future__ import annotations

import torch
from torch import Tensor

from priority_dsl import inputs, layout, pairing
from priority_dsl.checked import CheckedRule
from priority_dsl.diagnostics import failure
from priority_dsl.executor import Bound
from priority_dsl.step import Step


def share(checked: CheckedRule, bound: Bound, step: Step | None) -> tuple[Tensor, Step | None]:
    """What each token's loss is multiplied by, and the counts where they are known already.

    A loss per example counts at the first supervised token of its example, one per pair at that of the
    chosen response.
    """
    part = bound.call.valid.to(bound.call.dtype)
    divisor = bound.inputs["length"]
    if checked.of_pairs:
        part = part * pairing.is_chosen(bound.call.examples)
    if checked.of_examples or checked.of_pairs:
        part, divisor = part * (bound.inputs["position"] == 0), torch.ones_like(divisor)
    if checked.normalize != "examples":
        return part, step
    counted = step or count(checked, bound.call)
    return part / (divisor * counted.examples).clamp(min=1).to(part.dtype), counted


def count(checked: CheckedRule, call: inputs.Call, weights: Tensor | None = None) -> Step:
    """The counts of a call; of its weights `[N]` too where they are given."""
    kept = None if weights is None else (weights != 0).sum()
    size = None if weights is None else weights.detach().abs().sum()
    terms = call.pairs if checked.of_pairs and call.pairs is not None else call.segments
    return Step(call.valid.sum(), layout.count_examples(terms, call.valid), kept, size)


def denominator(checked: CheckedRule, step: Step, dtype: torch.dtype) -> Tensor:
    """What the whole step divides its total by, 0-dimensional; PD507 where the step did not count it."""
    match checked.normalize:
        case "tokens":
            counted = step.tokens
        case "terms":
            counted = step.examples
        case "kept":
            counted = step.kept
        case "weights":
            counted = step.weights
        case _:  # examples and groups divide inside, none divides by nothing
            counted = torch.ones_like(step.tokens)
    if counted is None:
        raise failure(
            "PD507", f"`step` has no counts for `normalize = {checked.normalize}`",
            help="make it with `observe` of this rule",
        )  # fmt: skip
    return counted.detach().to(dtype)
