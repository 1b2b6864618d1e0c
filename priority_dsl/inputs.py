"""From what a caller gives (logits, targets, columns, ...) to the inputs of a loss graph, checked.

Letters: N positions of the call, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from priority_dsl import layout, pairing
from priority_dsl.checked import CheckedRule, Column
from priority_dsl.diagnostics import PriorityError, did_you_mean, failure
from priority_dsl.vocab_pass import Head

IGNORED = -100
ModelInput = Tensor | tuple[Tensor, Any]


@dataclass(frozen=True)
class Given:
    """What a caller gives beside logits and targets; without `columns`, nothing is known of pairs."""

    models: Mapping[str, ModelInput] = field(default_factory=dict)
    columns: Mapping[str, Any] | None = field(default_factory=dict)
    examples: Tensor | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    progress: float = 0.0
    epoch: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a rule: its tensors, flattened to N positions, before columns are bound."""

    rule: CheckedRule
    targets: Tensor  # as given
    valid: Tensor  # [N] bool
    segments: Tensor  # [N] the example of each token, numbered from 0
    examples: Tensor  # [N] the data-set row of each token: as given, else the row of the batch
    dtype: torch.dtype
    pairs: Tensor | None = None  # [N] the pair of each token, numbered from 0; `examples` as in `pairing`

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return 1 if self.targets.dim() < 2 else self.targets.numel() // max(1, self.targets.shape[-1])


def statistics_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float64 for float64 logits, else float32 (law 2)."""
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def as_logits(model: ModelInput) -> Tensor:
    """Logits `[..., V]`, from logits or from a pair (hidden, head)."""
    if isinstance(model, Tensor):
        return model
    hidden, head = model
    if isinstance(head, torch.nn.Module):
        return head(hidden)
    return Head.of(head).logits(hidden)


def model_logits(
    logits: Tensor | None,
    models: Mapping[str, ModelInput] | None,
    needed: Sequence[str],
    targets: Tensor,
    trained: Collection[str] = ("on",),
) -> dict[str, Tensor]:
    """The logits `[N, V]` of every needed model in the dtype of the statistics.

    Those of the `trained` model and its views keep their gradient.
    """
    given: dict[str, ModelInput] = dict(models or {})
    if logits is not None:
        given["on"] = logits
    missing = [name for name in needed if name not in given]
    if missing:
        raise failure(
            "PD501", f"the rule reads the model `{missing[0]}`, which is not given",
            help=did_you_mean(missing[0], given, f'pass models={{"{missing[0]}": logits}}'),
        )  # fmt: skip
    found = {name: as_logits(given[name]) for name in needed}
    found = {name: z if name in trained else z.detach() for name, z in found.items()}  # frozen is frozen
    dtype = statistics_dtype(list(found.values()))
    for name, z in found.items():
        if z.shape[:-1] != targets.shape:
            raise failure(
                "PD503", f"`{name}` has logits {tuple(z.shape)} for targets {tuple(targets.shape)}",
                help="logits are [..., V], targets [...]: row t predicts target t, so shift before the call",
            )  # fmt: skip
    return {name: z.reshape(-1, z.shape[-1]).to(dtype) for name, z in found.items()}


def call_of(
    rule: CheckedRule,
    targets: Tensor,
    examples: Tensor | None,
    dtype: torch.dtype = torch.float32,
    columns: Mapping[str, Any] | None = None,
) -> Call:
    """The layout of a call; shapes and dtypes of targets and examples are checked.

    Where `columns` are given and the rule reads pairs, a response is an example of its own.
    """
    for name, tensor in (("targets", targets), ("examples", examples)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.is_floating_point()):
            raise failure("PD503", f"`{name}` must be a tensor of integers", help="use torch.long")
    if examples is not None and examples.shape != targets.shape:
        raise failure(
            "PD503", f"`examples` has shape {tuple(examples.shape)}, the targets {tuple(targets.shape)}",
            help="give the data-set row of each token, shaped like the targets",
        )  # fmt: skip
    ids = layout.example_ids(targets, examples)
    call = Call(rule, targets, targets.reshape(-1) != IGNORED, layout.segments(ids), ids.long(), dtype)
    if columns is None or not rule.reads_pairs:
        return call
    if examples is None and targets.numel():
        raise failure(
            "PD510", "the call does not say which responses belong together",
            help="pass `examples=`, the data-set row of each token, which both responses of a pair share",
        )  # fmt: skip
    return _paired(call, columns)


def _paired(call: Call, columns: Mapping[str, Any]) -> Call:
    """The layout with the two responses of each data-set row as examples of their own; both must be there."""
    side = Column(pairing.COLUMN, "bool", "token", declared=False)
    chosen = _given(call, side, columns)
    numbers = pairing.numbered(call.examples, chosen)
    if not torch.compiler.is_compiling():
        counts = torch.stack([layout.lengths(call.segments, call.valid & of) for of in (chosen, ~chosen)])
        half = call.valid & (counts == 0).any(0)
        if bool(half.any()):
            row = int(call.examples[half][0])
            missing = "rejected" if bool(chosen[half][0]) else "chosen"
            raise failure(
                "PD510", f"the pair of data-set row {row} has no supervised token of its {missing} response",
                help="both responses of a pair belong into one call; leave out a pair that lacks one",
            )  # fmt: skip
    return replace(call, segments=layout.segments(numbers), examples=numbers, pairs=call.segments)


def check_targets(call: Call, logits: Mapping[str, Tensor]) -> None:
    """Refuse targets outside a vocabulary (read from the device, so not under torch.compile)."""
    if torch.compiler.is_compiling() or call.targets.numel() == 0:
        return
    highest, lowest = int(call.targets.max()), int(call.targets.masked_fill(call.targets == IGNORED, 0).min())
    for name, z in logits.items():
        if highest >= z.shape[-1] or lowest < 0:
            wrong = highest if highest >= z.shape[-1] else lowest
            raise failure(
                "PD506", f"a target is {wrong}, outside the {z.shape[-1]} logits of `{name}`",
                help="bind a model with the same tokenizer; ignored positions are -100",
            )  # fmt: skip


def number_inputs(call: Call, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of the batch or the data set as inputs: in the dtype of the statistics, where no integers."""
    device = call.targets.device
    return {n: t.to(device, call.dtype if t.is_floating_point() else t.dtype) for n, t in numbers.items()}


def run_inputs(
    call: Call, progress: float, epoch: int, seed: int, stored: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The inputs that need no column: layout, time, the seed and stored statistics."""
    if not -(2**63) <= seed < 2**63:
        raise failure(
            "PD503", f"the seed {seed} is not an integer of 64 bits", help="give one from 0 to 2**63-1"
        )
    device = call.targets.device

    def scalar(value: float) -> Tensor:
        return torch.full((), value, dtype=call.dtype, device=device)

    flat = call.targets.reshape(-1)
    inputs = {
        "one": scalar(1.0),
        "valid": call.valid,
        "segments": call.segments,
        "example_ids": call.examples,
        "targets": flat.masked_fill(~call.valid, 0).long(),
        "progress": scalar(progress),
        "epoch": scalar(epoch),
        "seed": torch.full((), seed, dtype=torch.int64, device=device),
        "position": layout.positions(call.segments, call.valid).to(call.dtype),
        "length": layout.lengths(call.segments, call.valid).to(call.dtype),
        **({} if call.pairs is None else {"pairs": call.pairs}),
    }
    for name, values in stored.items():
        tensor = torch.as_tensor(values, device=device)
        if tensor.shape != call.targets.shape:
            raise failure("PD503", f"the stored `{name}` has shape {tuple(tensor.shape)}, not the targets'")
        inputs[f"stored_{name}"] = (
            tensor.reshape(-1) if tensor.dtype == torch.bool else tensor.reshape(-1).to(call.dtype)
        )
    return inputs


# Columns ----------------------------------------------------------------------------------------


def column_inputs(call: Call, columns: Mapping[str, Any] | None, needed: Sequence[str]) -> dict[str, Tensor]:
    """The columns that a rule reads as `[N]` tensors: codes, booleans or numbers."""
    return {f"column_{name}": _given(call, call.rule.columns[name], columns or {}) for name in needed}


def _given(call: Call, column: Column, columns: Mapping[str, Any]) -> Tensor:
    if column.name not in columns:
        raise failure(
            "PD502", f"the rule reads the column `{column.name}`, which is not given",
            help=did_you_mean(column.name, columns, f"pass columns={{{_quoted(column.name)}: ...}}"),
        )  # fmt: skip
    return _column(call, column, columns[column.name])


def _quoted(name: str) -> str:
    """A name as Python writes it; that of a regex has quotation marks of its own."""
    return repr(name) if '"' in name else f'"{name}"'


def _column(call: Call, column: Column, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        shape, tensor = tuple(values.shape), values
    else:
        shape = _shape(column, values)
        tensor = torch.tensor([_scalar(column, v, i) for i, v in enumerate(_leaves(values))])
    flat = _spread(call, column, tensor.to(call.targets.device).reshape(-1), shape)
    return _typed(call, column, flat)


def _spread(call: Call, column: Column, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values to `[N]`: as they are where shaped like the targets, else repeated along their row."""
    rows, tokens = call.rows, call.targets.numel()
    per_row = len(shape) == 1 and shape[0] == rows and not (column.declared and column.extent == "token")
    if shape == tuple(call.targets.shape) and not (per_row and column.declared):
        return flat
    if per_row:
        _one_example_a_row(call, column)
        return flat.repeat_interleave(tokens // rows) if rows else flat[:0]
    raise failure(
        "PD503", f"the column `{column.name}` has shape {shape}, the targets {tuple(call.targets.shape)}",
        help=f"give one value per {column.extent if column.declared else 'token, or one per row'}",
    )  # fmt: skip


def _one_example_a_row(call: Call, column: Column) -> None:
    """Refuse one value a row where a row holds tokens of several examples (packed rows)."""
    if torch.compiler.is_compiling() or not call.rows or not call.targets.numel():
        return
    rows, valid = call.segments.reshape(call.rows, -1), call.valid.reshape(call.rows, -1)
    low = rows.masked_fill(~valid, rows.numel()).amin(-1, keepdim=True)
    if bool((valid & (rows != low)).any()):
        raise failure(
            "PD503", f"the column `{column.name}` has one value a row, but a row holds several examples",
            help="with packed rows, give it shaped like the targets",
        )  # fmt: skip


def _typed(call: Call, column: Column, flat: Tensor) -> Tensor:
    """A bool, a category's code or a number of the declared range; the first bad value is named."""
    if column.element == "category":
        if flat.is_floating_point() or flat.dtype == torch.bool:
            raise _wrong(column, "a category is text, or its index in the rule's list of values")
        return flat.long()
    if column.element == "bool":
        if not torch.compiler.is_compiling() and flat.dtype != torch.bool:
            _refuse(call, column, flat, (flat != 0) & (flat != 1), "not a bool (or 0 and 1)")
        return flat != 0
    numbers = flat.to(call.dtype)
    if not torch.compiler.is_compiling():
        low, high = column.range.low, column.range.high
        below = numbers <= low if column.range.low_open and math.isfinite(low) else numbers < low
        above = numbers >= high if column.range.high_open and math.isfinite(high) else numbers > high
        _refuse(call, column, numbers, below | above | ~numbers.isfinite(), f"not a number in {column.range}")
    return numbers


def _refuse(call: Call, column: Column, flat: Tensor, bad: Tensor, why: str) -> None:
    bad = bad & call.valid
    if bool(bad.any()):
        index = int(bad.long().argmax())
        width = max(1, call.targets.numel() // max(1, call.rows))
        value = flat[index].item()
        raise failure(
            "PD504", f"column `{column.name}` is {value:g} in row {index // width}, position {index % width}",
            help=f"{why}: mend the data, or declare the column otherwise",
        )  # fmt: skip


def _wrong(column: Column, why: str) -> PriorityError:
    return failure("PD504", f"the values of the column `{column.name}` do not fit: {why}")


def _shape(column: Column, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        return ()
    shapes = {_shape(column, v) for v in values}
    if len(shapes) > 1:
        raise _wrong(column, "its rows have different lengths")
    return (len(values), *next(iter(shapes), ()))


def _leaves(values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        return [values]
    return [leaf for value in values for leaf in _leaves(value)]


def _scalar(column: Column, value: Any, index: int) -> int | float | bool:
    """One value as a number; text becomes its place among the categories, -1 for one not named."""
    if value is None:
        raise _wrong(column, f"value {index} is missing")
    if column.element == "category":
        if column.closed and str(value) not in column.categories:
            raise _wrong(column, f"`{value}` is none of {', '.join(column.categories)}")
        return column.categories.index(str(value)) if str(value) in column.categories else -1
    if not isinstance(value, int | float):
        raise _wrong(column, f"value {index} is {value!r}, not a {column.element}")
    return value
