"""Statistics of frozen models in one sweep over chunks of rows; full logits are never held.

Ignored rows are dropped before the head's product. Letters: N positions, D hidden, V vocabulary,
K statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from priority_dsl.vocab_pass.heads import Head

# Rows of a chunk: as many as these bytes of logits hold, and not fewer than LEAST, whose products run well.
# Memory goes with the vocabulary, not with D: the head's gradient is read and written once a chunk. On a GPU
# both are estimates.
CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}
LEAST = {"cpu": 256, "cuda": 2048}
BLOCK_BYTES = 2 << 20  # of logits that elementwise work passes over again and again

# What is larger than anything freed before glibc takes from fresh pages, whose faults cost more than the
# arithmetic on a block. A tensor of this size, the largest that counts, freed once makes it keep such memory.
STEADY_BYTES = 31 << 20

Evaluate = Callable[[dict[str, Tensor], Tensor], Sequence[Tensor]]


def sweep(
    evaluate: Evaluate,
    models: Mapping[str, tuple[Tensor, Head]],
    targets: Tensor,
    valid: Tensor,
    rows: int | None = None,
) -> list[Tensor]:
    """Evaluate statistics on chunks of the supervised rows.

    `models` maps a name to hidden states `[N, D]` and its head; `targets [N]` index the vocabulary
    wherever `valid [N]`. `evaluate(logits, targets)` gets the logits `[rows, V]` of a chunk by model and
    returns K tensors `[rows]`. Returns K tensors `[N]`, 0 where ignored, detached; zeros where nothing is
    supervised.
    """
    steady_heap()
    index = valid.nonzero().squeeze(-1)
    widest = max(head.weight.shape[0] for _, head in models.values())
    found: list[Sequence[Tensor]] = []
    with torch.no_grad():
        for chunk in even_chunks(index, rows, widest):
            logits = {name: head.logits(hidden[chunk]) for name, (hidden, head) in models.items()}
            size = min(block_rows(z) for z in logits.values())
            for start in range(0, max(1, len(chunk)), size):
                block = slice(start, start + size)
                found.append(evaluate({name: z[block] for name, z in logits.items()}, targets[chunk[block]]))
        values = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return [v.new_zeros(targets.shape).index_copy_(0, index, v) for v in values]


@cache
def steady_heap() -> None:
    """Make the C library keep the memory of a block for the next one; once a process, no page is touched."""
    torch.empty(STEADY_BYTES, dtype=torch.uint8)


def even_chunks(index: Tensor, rows: int | None, vocabulary: int, itemsize: int = 4) -> Sequence[Tensor]:
    """Row numbers in chunks of about one size, at most `rows` (default: what suits the device).

    One chunk at least, so that an empty call has its dtypes.
    """
    kind = index.device.type if index.device.type in LEAST else "cpu"
    most = rows or max(LEAST[kind], CHUNK_BYTES[kind] // (max(1, vocabulary) * itemsize))
    count = -(-index.numel() // most)
    return index.split(-(-index.numel() // count)) if count else (index,)


def block_rows(z: Tensor) -> int:
    """Rows of a block: as many as stay in a CPU's cache, all of them elsewhere."""
    if z.device.type != "cpu":
        return max(1, len(z))
    return max(1, BLOCK_BYTES // (z.shape[-1] * z.element_size()))


def has_kernels(device: torch.device) -> bool:
    """Whether rows of logits on a device have kernels of their own: on a GPU, where Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None
