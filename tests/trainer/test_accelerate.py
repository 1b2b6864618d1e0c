"""Runs under accelerate's own config: FSDP2 and ZeRO over two processes train as one process does.

accelerate shards only over GPUs; the worker tells it that this group of CPU processes (gloo, torchrun) may
be sharded too. Everything after that, from sharding to saving, is accelerate's and torch's own. Each rank
writes what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.sharding
from trainer.config import TrainConfig
from trainer.faults import ConfigFault
from trainer.sharding import make_accelerator
from trainer.train import train

WORKER = """
import json, os, sys
import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer.config import TrainConfig
from trainer.faults import Fault
import trainer.train

made = accelerate.state.AcceleratorState.__init__

def sharded_on_a_cpu(self, *args, fsdp_plugin=None, **named):
    made(self, *args, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def part(parameter):
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel(), parameter.numel()
    held = getattr(parameter, "ds_tensor", parameter)  # ZeRO's parts from stage 3 on
    return held.numel(), getattr(parameter, "ds_numel", held.numel())

accelerate.state.AcceleratorState.__init__ = sharded_on_a_cpu
accelerate.state.PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
prepare, runs = trainer.train.prepare, []
trainer.train.prepare = lambda *of, **more: runs.append(prepare(*of, **more)) or runs[-1]
torch.set_num_threads(1)
for settings in json.loads(sys.argv[1]):
    said = {}
    try:
        outcome = trainer.train.train(TrainConfig(**settings))
        own, whole = map(sum, zip(*map(part, runs.pop().objective.trained.parameters())))
        said = {"step": outcome.step, "part": own / whole}
    except Fault as fault:
        said = {"fault": str(fault)}
    said["world"] = torch.distributed.get_world_size()
    open(f"{settings['output']}.rank{os.environ['RANK']}.json", "w").write(json.dumps(said))
torch.distributed.barrier()
"""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_BUILD_OPS": "0"}
RUNS: dict[str, dict[str, Any]] = {
    "weights of the step": {"rule": "weight = p_on ** 0.1; normalize = weights"},
    "stored": {"rule": "weight = mass(ref)"},
    "a frozen model that stays loaded": {"rule": "loss = nll_on + kl(ref, on)"},
    "tied embeddings": {"rule": "p_on ** 0.1"},
    "dense": {"rule": "p_on ** 0.1", "loss": "dense"},
    "checkpointed activations": {"rule": "p_on ** 0.1", "checkpoint_activations": True},
    "a view": {"rule": "(p_on * p(unprompted(on))) ** 0.1"},
    "adapter, the base online": {"rule": "loss = nll_on + kl(ref, on)", "lora": 4},
    "adapter, the base counted": {
        "rule": "weight = p_ref ** 0.1; normalize = weights",
        "lora": 4,
        "online_reference": True,
    },
    "adapter, stored": {"rule": "weight = mass(ref)", "lora": 4, "lora_targets": "q_proj,lm_head"},
}
FEW = ("weights of the step", "tied embeddings", "adapter, the base online")
REFUSED: dict[str, dict[str, Any]] = {
    "average": {"rule": "model slow = ema(0.5); weight = p(slow)"},
    "attention": {"rule": "attention(on, prompt)"},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (path for path in folder.glob("*.safetensors"))
    return load_file(file)


def log_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.fixture
def settings(model: str, make_folder: Callable[..., str], write: Callable[..., str], tmp_path: Path) -> Any:
    """The settings of some cases, each with an output of its own."""
    tied = make_folder(tmp_path / "tied", seed=2, tie_word_embeddings=True)
    rows = [{"prompt": f"what is {i} ?", "completion": " 1" * (1 + i % 6)} for i in range(13)]
    shared = {
        "data": [write("rows.jsonl", rows)], "eval_data": [write("held.jsonl", rows[:5])], "max_steps": 4,
        "learning_rate": 1e-3, "clip": 0.5, "device": "auto", "quiet": True, "batch_size": 2,
        "accumulation": 2, "cache": str(tmp_path / "cache"),
    }  # fmt: skip

    def of(cases: dict[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        models = {name: tied if name == "tied embeddings" else model for name in cases}
        return [
            {**shared, **options, "model": models[name], "output": str(tmp_path / name), **more}
            for name, options in cases.items()
        ]

    return of


def assert_as_alone(several: list[dict[str, Any]], errors: str, part: float = 0.5) -> None:
    """Runs that two processes made, each with a part of the weights, against runs of one process."""
    for settings in several:
        output = Path(settings["output"])
        for rank in (0, 1):  # the exit code says little: gloo sometimes aborts after all is written
            file = Path(f"{output}.rank{rank}.json")
            seen = json.loads(file.read_text()) if file.exists() else errors
            assert seen == {"world": 2, "step": 4, "part": pytest.approx(part, abs=0.1)}, output.name
        whole = {"batch_size": 8, "accumulation": 1, "checkpoint_activations": False, "save_steps": None}
        alone = train(TrainConfig(**{**settings, **whole, "output": f"{output}-alone", "device": "cpu"}))
        for one, other in zip(log_of(output), log_of(alone.output), strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5), output.name
            assert one.get("grad_norm", 1.0) > 0.01, "something is trained"
        found, expected = weights(output), weights(alone.output)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def assert_refused(names: Iterable[str], folder: Path, message: str) -> None:
    for name in names:
        assert message in json.loads((folder / f"{name}.rank1.json").read_text())["fault"]


def fsdp2(cases: dict[str, dict[str, Any]], settings: Any, tmp_path: Path) -> None:
    several = settings(cases, save_steps=2)
    (again,) = settings({"again": RUNS["adapter, stored"]}, save_steps=2, eval_data=(), schedule="constant")
    halves = [{**again, "max_steps": 2, "warmup": 0.0}, {**again, "warmup": 0.0, "resume": True}]
    straight = {**again, "warmup": 0.0, "output": str(tmp_path / "straight")}
    ran = torchrun([*several, *settings(REFUSED), *halves, straight], tmp_path, FSDP2)
    assert_as_alone(several, ran.stderr[-3000:])
    assert_refused(REFUSED, tmp_path, "it needs the whole weights")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "straight")
    for key, value in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "again")[key], value), "resumed, to the bit"


def test_fsdp2_gives_the_numbers_of_one_process(settings: Any, tmp_path: Path):
    fsdp2({name: RUNS[name] for name in FEW}, settings, tmp_path)


@pytest.mark.slow
def test_fsdp2_gives_the_numbers_of_one_process_for_all(settings: Any, tmp_path: Path):
    fsdp2(RUNS, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["3", "2", "1"])
def test_deepspeed_gives_the_numbers_of_one_process(stage: str, settings: Any, tmp_path: Path):
    pytest.importorskip("deepspeed")
    several = settings(RUNS)
    refused = {"saving": {"rule": "1", "save_steps": 2}, "skipping": {"rule": "1", "skip_non_finite": True}}
    environment = {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    ran = torchrun([*several, *settings(REFUSED), *settings(refused)], tmp_path, environment)
    assert_as_alone(several, ran.stderr[-3000:], 0.5 if stage == "3" else 1.0)
    assert_refused(REFUSED, tmp_path, "it needs the whole weights")
    assert_refused(["saving"], tmp_path, "--save-steps: no checkpoints under DeepSpeed")
    assert_refused(["skipping"], tmp_path, "--skip-non-finite: DeepSpeed takes its step before")


def torchrun(
    settings: list[dict[str, Any]], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    (folder / "worker.py").write_text(WORKER)
    words = ["--standalone", "--nproc_per_node", "2", str(folder / "worker.py"), json.dumps(settings)]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, **environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, and NO is what it runs here"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, and NO is what it runs here"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision bf16: set it to no; --dtype bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: leave it out; --compile"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set it to 1; --accumulation says"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm: processes share rows here"),
    ],
)
def test_what_accelerate_would_pass_over_is_refused(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(trainer.sharding, "Accelerator", Plain)
    with pytest.raises(ConfigFault, match=message):
        make_accelerator(TrainConfig(model="M", data="d", rule="1", device="cpu"))


class Plain:
    """An accelerator as accelerate makes it of one CPU process, whatever its config asks for."""

    num_processes = 1

    def __init__(self, cpu: bool) -> None:
        from accelerate.utils import DistributedType

        self.distributed_type = DistributedType.NO
