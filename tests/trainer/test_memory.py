"""The estimate of memory of the dry run against a measured peak. Slow: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WITHIN = {"checkpointed": 2.0}  # the factor between estimate and measurement, either way; of others 1.25
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 512,
}  # fmt: skip
# The peak of the resident memory of a process above what it holds before a model is loaded.
PROGRAM = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from trainer.config import TrainConfig
from trainer.dryrun.memory import step_memory
from trainer.objective import Moment
from trainer.dryrun.rehearsal import rehearsal
from trainer.train import take_step

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

given = json.loads(sys.argv[1])
before = resident()
with rehearsal(TrainConfig(**given)) as made:
    largest = max((b for step in made.micro_batches() for b in step), key=lambda b: b.size)
    parts = step_memory(made.run, largest.lines, largest.width)
    for _ in range(2):
        take_step(made.run, next(made.run.order.steps(0)), Moment(0, 0.0, 0), True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak - before, {part.what: part.size for part in parts}]))
"""
CASES: dict[str, dict[str, Any]] = {
    "fused": {},
    "dense": {"loss": "dense"},
    "checkpointed": {"checkpoint_activations": True},
    "a second model": {"rule": "weight = p_on; loss = weight * nll_on + 0.05 * kl(ref, on)"},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_measured_peak(
    name: str, make_folder: Callable[..., str], write: Callable[..., str], tmp_path: Path
):
    model = make_folder(tmp_path / "model", seed=0, **SHAPE)
    rows = [{"prompt": "what is it ?", "completion": " the answer is 7 ." * 100} for _ in range(8)]
    given = {
        "model": model, "data": [write("rows.jsonl", rows)], "rule": "dft", "device": "cpu", "quiet": True,
        "output": str(tmp_path / "run"), **CASES[name],
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(given)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, parts = json.loads(done.stdout.splitlines()[-1])
    estimate = sum(parts.values())
    print(f"\n{name}: measured {measured >> 20} MiB, estimate {estimate >> 20} MiB, {parts}")
    within = WITHIN.get(name, 1.25)
    assert measured / within < estimate < measured * within
