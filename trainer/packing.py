"""Packing: several rows of an optimizer step in one line of a micro-batch, none of which sees another.

What is packed is decided within each step, so packing changes how a step is computed and never what it is.
A model is given positions that begin anew with each row, from which transformers makes a mask that keeps the
rows apart, sliding windows included; or that mask itself. Whether a model honours it is tried before the run.
Letters: B lines of a micro-batch, T positions of a line.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.faults import ConfigFault, first_line

# Of the largest logit, and of the precision of the logits where that is coarser.
LEAK = 1e-5  # what the rows before may change: experts add up in another order
ROUNDING = 1e-3  # what packing may change: two attentions on the same row differ by less
PROBE = (7, 9)  # tokens of the two rows that are tried
Mask = Literal["positions", "bool", "additive"]
MASKS: dict[str, tuple[Mask, ...]] = {"sdpa": ("positions", "bool"), "eager": ("positions", "additive")}


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows are packed: at most `room` positions a line and `lines` lines a micro-batch.

    `mask` says what keeps the rows of a line apart: what the model makes of the `positions`, or a mask that
    is given to it, true or 0 where a token is seen (`bool`, `additive`).
    """

    room: int
    lines: int
    mask: Mask = "positions"

    def inputs(self, lengths: Sequence[Sequence[int]], width: int) -> dict[str, Tensor]:
        """What a model reads beside token ids, for lines of rows with these lengths in positions.

        `position_ids` int64 `[B, T]`, 0 where padded, so that a padded token sees itself alone.
        """
        return _inputs(self.mask, lengths, width)


def bins_of(sizes: Sequence[int], room: int, least: int = 1) -> list[list[int]]:
    """Bins of the indices of `sizes`, the fullest first: few of them, none over `room`, as even as they come.

    There are `least` of them where the sizes allow. What is larger than `room` is alone. The bins depend on
    the arguments alone.
    """

    def fill(of: list[int]) -> int:
        return sum(sizes[i] for i in of)

    def longest(bins: list[list[int]]) -> int:
        return max(map(fill, bins))

    tight, least = _tight(sizes, room), min(least, len(sizes))
    choices = [tight, _even(sizes, max(len(tight), least))]
    allowed = [bins for bins in choices if len(bins) >= least and longest(bins) <= max(room, *sizes)]
    return sorted(min(allowed or [tight], key=longest), key=lambda of: (-fill(of), of))


def _tight(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Bins in which little is left: the largest go first, each where it leaves the least."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what is left in a bin and its number, in order
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(free, (sizes[i], -1))
        left, number = free.pop(at) if at < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        insort(free, (left - sizes[i], number))
    return bins


def _even(sizes: Sequence[int], count: int) -> list[list[int]]:
    """So many bins of about the same fill: the largest go first, each where there is the least."""
    bins: list[list[int]] = [[] for _ in range(count)]
    fills = [(0, number) for number in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fill, number = heappop(fills)
        bins[number].append(i)
        heappush(fills, (fill + sizes[i], number))
    return bins


def room_of(asked: int | None, sizes: Iterable[int], multiple: int) -> int:
    """The positions of a line: as `asked`, else what the longest of `sizes` takes, up to a multiple.

    Raises `ConfigFault` where a row, or both responses of a pair, are longer than what was asked.
    """
    longest = max(sizes)
    if asked is not None and asked < longest:
        raise ConfigFault(
            f"--packing-length {asked}: the longest row (of pairs: its two responses) takes {longest}; give "
            "at least as much, or shorten rows with --max-length"
        )
    return -(-longest // multiple) * multiple if asked is None else asked


def mask_for(model: Any) -> Mask:
    """What keeps the packed rows of a model apart; `ConfigFault` with the reason where nothing does.

    A mask is given only to a model without sliding windows, which would not be in it.
    """
    config = model.config.get_text_config()
    masks = MASKS.get(str(getattr(config, "_attn_implementation", None)), ("positions",))
    slides = getattr(config, "sliding_window", None) is not None or "layer_types" in config.to_dict()
    reasons = [why_not(model, mask) for mask in masks[: 1 if slides else None]]
    if None in reasons:
        return masks[reasons.index(None)]
    raise ConfigFault(f"--packing: {reasons[0]}; without the flag rows are padded, for the same numbers")


@torch.no_grad()
def why_not(model: Any, mask: Mask) -> str | None:
    """Why the rows of a line would not be apart in a model; None where they are, on two small rows.

    The second row must say what it says alone, whatever the first one is.
    """
    size = model.get_input_embeddings().weight.shape[0]
    first = PROBE[0]
    row = torch.arange(sum(PROBE), device=model.device).unsqueeze(0) % size
    other = torch.cat([(row[:, :first] + first) % size, row[:, first:]], dim=1)
    others = {name: value.to(model.device) for name, value in _inputs(mask, [PROBE], sum(PROBE)).items()}
    training = model.training
    model.eval()
    try:
        alone = model(input_ids=row[:, first:], use_cache=False).logits
        packed, changed = (
            model(input_ids=ids, use_cache=False, **others).logits[:, first:] for ids in (row, other)
        )
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(model).__name__} takes no packed rows ({first_line(error)})"
    finally:
        model.train(training)
    largest, coarse = alone.abs().max(), 8 * torch.finfo(alone.dtype).eps
    if not (changed - packed).abs().max() <= max(LEAK, coarse) * largest:
        return f"{type(model).__name__} lets a row see the row before it"
    if not (packed - alone).abs().max() <= max(ROUNDING, coarse) * largest:
        return f"{type(model).__name__} does not read a packed row as it reads the row alone"
    return None


def check_masks(models: Mapping[str, Any], mask: Mask) -> None:
    """Refuse a frozen model, by its name in the rule, that the mask of the trained model does not fit."""
    for name, model in models.items():
        if (reason := why_not(model, mask)) is not None:
            raise ConfigFault(f"--packing: the model `{name}`: {reason}; without the flag rows are padded")


def _inputs(mask: Mask, lengths: Sequence[Sequence[int]], width: int) -> dict[str, Tensor]:
    positions = torch.zeros(len(lengths), width, dtype=torch.long)
    numbers = torch.arange(1, width + 1).repeat(len(lengths), 1).neg()  # each padded token is alone
    for line, number, of_line in zip(positions, numbers, lengths, strict=True):
        start = 0
        for row, length in enumerate(of_line):
            line[start : start + length] = torch.arange(length)
            number[start : start + length] = row
            start += length
    if mask == "positions":
        return {"position_ids": positions}
    seen = (numbers.unsqueeze(-1) == numbers.unsqueeze(-2)).tril().unsqueeze(1)
    if mask == "additive":
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"position_ids": positions, "attention_mask": seen}
