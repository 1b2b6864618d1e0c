"""What a step of training needs of memory, as an estimate by its parts. Bytes; a process by itself.

Parameters, gradients, optimizer, averages and frozen models are counted. What the layers keep for the
backward pass is counted too, on tensors without values (torch's FakeTensor) as long as the longest
micro-batch; the kernels of a device may keep somewhat more or less. What is missing: what the allocator
wastes, and the program itself. Against peaks measured on a CPU the sum was right within 15 %, and with
checkpointed activations, of which little is left, within a factor of 2 (tests/trainer/test_memory.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from priority_dsl.integrations.heads import hidden_states
from priority_dsl.vocab_pass.sweep import CHUNK_BYTES, LEAST
from trainer.models import checkpoint_activations

if TYPE_CHECKING:
    from trainer.prepare import Run

ADAM = 2  # moving averages of AdamW, as large as what is trained
DENSE = 4  # times that full logits are there at once: themselves, in float32, their softmax, their gradient


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the memory: its bytes, and whether they are counted or an estimate."""

    what: str
    size: int
    counted: bool = True


def step_memory(run: Run, lines: int, width: int) -> list[Part]:
    """The parts of the memory of a step whose largest micro-batch is `[lines, width]`; together the peak."""
    policy = run.policy
    trained = _bytes(p for p in policy.parameters() if p.requires_grad)
    held = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    frozen = {id(s.model): s.model for s in run.objective.frozen.values()}
    averages = {id(a.model) for a in run.moving.models.values()}
    others = [m for key, m in frozen.items() if key not in averages]
    apart = [p for m in others for p in m.parameters() if p.untyped_storage().data_ptr() not in held]
    parts = [
        Part("parameters", _bytes(policy.parameters()) + _bytes(policy.buffers())),
        Part("gradients", trained),
        Part("optimizer (AdamW)", ADAM * trained),
    ]
    if run.moving.rates:
        names = ", ".join(run.moving.rates)
        parts.append(Part(f"moving averages ({names})", len(run.moving.rates) * trained))
    if others:
        parts.append(Part(f"frozen models ({len(others)})", _bytes(apart)))
    parts.append(
        Part(f"activations of {lines} x {width} tokens", activations(run, lines, width), counted=False)
    )
    parts.append(Part(_head_name(run), head(run, lines * width), counted=False))
    return parts


def activations(run: Run, lines: int, width: int) -> int:
    """The bytes that the layers keep of a micro-batch `[lines, width]` for the backward pass."""
    policy, tokens = run.policy, lines * width
    config = policy.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    checkpointed = run.config.checkpoint_activations
    if checkpointed:
        with warnings.catch_warnings():  # its newer name is not in every version of transformers 5
            warnings.simplefilter("ignore", FutureWarning)
            policy.gradient_checkpointing_disable()
    try:
        kept = _saved(policy, lines, width, run.config.dtype == "bf16")
    except Exception:  # a model whose forward pass reads values
        size = 2 if run.config.dtype == "bf16" else 4
        kept = 17 * size * layers * hidden * tokens  # as of a plain transformer block
    if not checkpointed:
        return kept
    checkpoint_activations(policy)
    # One layer with the gradients of what it keeps, and the inputs of all layers.
    return 2 * kept // layers + 4 * layers * hidden * tokens


def head(run: Run, tokens: int) -> int:
    """The bytes of the output layer's work on a micro-batch: a chunk of logits, or all of them."""
    rows, hidden = run.policy.get_output_embeddings().weight.shape
    models = 1 + len(run.rule.plan.kept)
    if not _fused(run):
        return 4 * DENSE * tokens * rows
    kind = run.accelerator.device.type if run.accelerator.device.type in LEAST else "cpu"
    chunk = min(tokens, max(LEAST[kind], CHUNK_BYTES[kind] // (4 * rows)))
    return 4 * (models * chunk * rows + rows * hidden + tokens * hidden)


def _fused(run: Run) -> bool:
    return run.accelerator.unwrap_model(run.objective.trained).fused


def _head_name(run: Run) -> str:
    return "output layer, by chunks" if _fused(run) else "output layer, full logits"


def _saved(policy: Any, lines: int, width: int, bf16: bool) -> int:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    seen: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no storage is freed and its number used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    device = policy.get_input_embeddings().weight.device
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        read = mode.fake_tensor_converter.from_real_tensor
        own = {read(mode, p).untyped_storage()._cdata for p in policy.parameters()}
        ids = torch.zeros(lines, width, dtype=torch.long, device=device)
        held.append(hidden_states(policy, ids))
    return sum(size for storage, size in seen.items() if storage not in own)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of tensors that share their memory once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def in_units(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
