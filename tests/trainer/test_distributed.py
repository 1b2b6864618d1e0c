"""Two processes train as one does. gloo on a CPU, started by torchrun; each rank writes what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer.config import TrainConfig
from trainer.train import train

WORKER = """
import json, os, sys
import torch
from trainer.config import TrainConfig
from trainer.train import train

torch.set_num_threads(1)
for settings in json.loads(sys.argv[1]):
    outcome = train(TrainConfig(**settings))
    rank = int(os.environ["RANK"])
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    seen = {"rank": rank, "world": world, "step": outcome.step}
    open(f"{settings['output']}.rank{rank}.json", "w").write(json.dumps(seen))
"""

RUNS = {
    "tokens": {"rule": "mass(ref) >= 0.5"},
    # counts of the whole step need another forward
    "weights": {"rule": "weight = p_on; normalize = weights"},
    "examples": {"rule": "weight = p_on; normalize = examples"},
    "average": {"rule": "model slow = ema(0.5); weight = p(slow)"},
    "views": {
        "rule": "weight = attention(on, prompt) * p(unprompted(on)) * p(perturbed(on, 5)); "
        "normalize = weights"
    },
    "a frozen model that stays loaded": {"rule": "asft"},
    "dense": {"rule": "dft", "loss": "dense"},
    "tied embeddings": {"rule": "dft"},
    "a stream": {"rule": "dft", "streaming": True, "shuffle_buffer": 5},
    "checkpointed activations": {"rule": "dft", "checkpoint_activations": True},
}


def torchrun(settings: list[dict], folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    words = ["--standalone", "--nproc_per_node", "2", str(script), json.dumps(settings)]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_two_processes_give_the_numbers_of_one_on_full_logits(
    model: str, make_folder: Callable[..., str], write: Callable[..., str], tmp_path: Path
):
    tied = make_folder(tmp_path / "tied", seed=2, tie_word_embeddings=True)
    rows = [
        {"prompt": f"what is {i} ?", "completion": " 1" * (1 + i % 6)} for i in range(13)
    ]  # a short last step
    shared = {
        "model": model,
        "data": [write("rows.jsonl", rows)],
        "eval_data": [write("held.jsonl", rows[:5])],
        "max_steps": 3,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "device": "cpu",
        "quiet": True,
    }
    two = [
        {
            **shared,
            **options,
            "model": tied if name == "tied embeddings" else model,
            "output": str(tmp_path / name),
            "batch_size": 2,
            "accumulation": 2,
        }
        for name, options in RUNS.items()
    ]
    ran = torchrun(two, tmp_path)
    for settings in two:
        output = Path(settings["output"])
        # The exit code says little: gloo sometimes aborts after all is written. Each rank's file says all.
        for rank in (0, 1):
            seen = (
                json.loads(Path(f"{output}.rank{rank}.json").read_text()) if output.exists() else ran.stderr
            )
            assert seen == {"rank": rank, "world": 2, "step": 3}
        whole = {"batch_size": 8, "accumulation": 1, "loss": "dense", "checkpoint_activations": False}
        alone = train(TrainConfig(**{**settings, **whole, "output": f"{output}-alone"}))
        logs = [
            [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (output, alone.output)
        ]
        for both in zip(*logs, strict=True):
            one, other = ({k: v for k, v in line.items() if k != "seconds"} for line in both)
            assert one == pytest.approx(other, abs=1e-5)
        torch.testing.assert_close(weights(output), weights(alone.output), rtol=0, atol=1e-6)
        states = {path.name for path in (output / "checkpoints/step-3").glob("random-*")}
        assert states == {"random-0.pt", "random-1.pt"}


def weights(folder: Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in loaded.parameters()])


def test_a_run_with_fewer_processes_than_were_started_is_refused(
    model: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trainer import sharding
    from trainer.faults import ConfigFault

    train(TrainConfig(model=model, data=sums, rule="1", max_steps=1, output=str(tmp_path / "a"), quiet=True))
    monkeypatch.setenv("WORLD_SIZE", "2")  # the state of accelerate is there already: it finds one process
    with pytest.raises(ConfigFault, match="2 processes were started but 1 found each other"):
        sharding.make_accelerator(TrainConfig(model=model, data=sums, rule="1"))
