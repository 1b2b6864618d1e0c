"""A model that FSDP2 shards over two processes has the gradients of one process on full logits.

gloo on a CPU mesh, started by torchrun; accelerate's own FSDP2 needs a GPU. Each rank writes what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from priority_dsl import compile_rule
from tests.trainer.families import make
from tests.trainer.test_families import a_batch
from trainer.batches import Batch
from trainer.trained import Call, Trained

ROWS = 4
RULE = "weight = p_on ** 0.5; normalize = kept"
CASES: dict[str, dict[str, Any]] = {
    "the head in the root's group": {"name": "llama"},
    "tied embeddings": {"name": "llama tied"},
    "soft cap, tied": {"name": "gemma2, soft cap"},
    "the head in a group of its own": {"name": "llama", "apart": True},
    "bias, in a group of its own": {"name": "phi, bias", "apart": True},
    "frozen head": {"name": "llama", "frozen_head": True},
    "checkpointed activations": {"name": "llama", "checkpointed": True},
}

WORKER = """
import json, sys
import torch
from tests.trainer.test_sharded import of_this_process

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for place, case in enumerate(json.loads(sys.argv[1])):
    of_this_process(case, f"{sys.argv[2]}/{place}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def build(case: dict[str, Any]) -> Any:
    from trainer.models import checkpoint_activations

    model = make(case["name"]).train()
    if case.get("frozen_head"):
        model.get_output_embeddings().weight.requires_grad_(False)
    if case.get("checkpointed"):
        checkpoint_activations(model)
    return model


def part(batch: Batch, rows: slice) -> Batch:
    from dataclasses import replace

    names = ("input_ids", "targets", "response", "examples")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


def of_this_process(case: dict[str, Any], file: str) -> None:
    """Two steps of SGD on this process's rows of the sharded model; writes losses and whole gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh, model = init_device_mesh("cpu", (world,)), build(case)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    if case.get("apart"):
        fully_shard(model.get_output_embeddings(), mesh=mesh)
    step = fully_shard(Trained(model, compile_rule(RULE), fused=True, bf16=False), mesh=mesh)
    sharded = all(isinstance(p, DTensor) for p in step.parameters())
    mine = part(a_batch(ROWS), slice(rank * ROWS // world, (rank + 1) * ROWS // world))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, gradients = [], []
    for _ in range(2):
        with torch.no_grad():
            seen = step(Call(mine, {"examples": mine.examples}), counting=True).all_reduce()
        found = step(Call(mine, {"examples": mine.examples}, seen))
        (found.mean * world).backward()
        losses.append(float(found.mean.detach()))
        gradients.append(whole_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"losses": losses, "gradients": gradients}, f"{file}.rank{rank}.pt")
    Path(f"{file}.rank{rank}.json").write_text(json.dumps({"world": world, "sharded": sharded}))


def whole_gradients(model: Any) -> dict[str, torch.Tensor]:
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}


def of_one_process(case: dict[str, Any]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The same two steps on all rows and full logits."""
    model, batch = build(case), a_batch(ROWS)
    step = Trained(model, compile_rule(RULE), fused=False, bf16=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, gradients = [], []
    for _ in range(2):
        found = step(Call(batch, {"examples": batch.examples}))
        found.mean.backward()
        losses.append(float(found.mean.detach()))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run all cases."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "worker.py").write_text(WORKER)
    words = ["--standalone", "--nproc_per_node", "2", str(folder / "worker.py")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, json.dumps([*CASES.values()]), str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_sharded_gradients_are_those_of_one_process_on_full_logits(case: str, ran: Path):
    place = ran / str([*CASES].index(case))
    for rank in (0, 1):  # the exit code says little: gloo sometimes aborts after all is written
        seen = Path(f"{place}.rank{rank}.json")
        assert seen.exists(), (ran / "stderr").read_text()[-3000:]
        assert json.loads(seen.read_text()) == {"world": 2, "sharded": True}
    found = [torch.load(f"{place}.rank{rank}.pt") for rank in (0, 1)]
    losses, gradients = of_one_process(CASES[case])
    shared = [sum(pair) for pair in zip(*(f["losses"] for f in found), strict=True)]
    assert shared == pytest.approx(losses, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3, "the first step has changed the model"
    for expected, *got in zip(gradients, *(f["gradients"] for f in found), strict=True):
        largest = max(float(g.abs().max()) for g in expected.values())
        for ours in got:
            assert ours.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * largest)
