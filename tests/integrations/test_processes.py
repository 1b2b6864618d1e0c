"""Two processes (gloo on a CPU, started by torchrun) train and evaluate as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

from priority_dsl import compile_rule
from priority_dsl.integrations import PrioritySFTTrainer, PriorityTrainer
from tests.integrations.conftest import make_rows, ordered, outcome, settings

RULES = {
    "plain": "weight = p_on",
    "kept": "normalize = kept; weight = p_on > 0.002",
    "examples": "normalize = examples; weight = p_on",
    "batch": "top(nll_on, 0.5, batch)",
    "adapter": "asft",
    "trl": "normalize = weights; weight = p_on",
}


def train_and_evaluate(name: str, model: str, folder: str, processes: int) -> dict[str, Any]:
    """Three steps of four rows, two micro-batches a process, and an evaluation of an odd number of rows."""
    data = Dataset.from_list(make_rows(13))
    trained: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if name == "adapter":
        torch.manual_seed(11)
        trained = get_peft_model(
            trained, LoraConfig(r=4, init_lora_weights=False, task_type=TaskType.CAUSAL_LM)
        )
    arguments = settings(
        Path(folder), 2, max_steps=3, per_device_train_batch_size=2 // processes, per_device_eval_batch_size=2
    )
    shared: dict[str, Any] = {
        "train_dataset": ordered(data, 3), "eval_dataset": data, "rule": compile_rule(RULES[name])
    }  # fmt: skip
    if name == "trl":
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainer: Any = PrioritySFTTrainer(
            trained, SFTConfig(**arguments), processing_class=tokenizer, **shared
        )
    else:
        trainer = PriorityTrainer(trained, TrainingArguments(**arguments), **shared)
    assert trainer.accelerator.num_processes == processes
    found = outcome(trainer)
    figures = ("nll", "weight_mean", "weight_nonzero", "supervised_tokens")
    metrics = trainer.evaluate()
    shown = ("eval_loss", "eval_accuracy", "eval_weighted_loss", "eval_supervised_tokens")
    return {
        "losses": found.losses,
        "norms": found.norms,
        "figures": [[line[figure] for figure in figures] for line in found.log],
        "metrics": [metrics[figure] for figure in shown if figure in metrics],
        "sums": [parameter.double().sum().item() for parameter in found.parameters.values()],
    }


def main(model: str, folder: str) -> None:
    """What each process of torchrun does: every rule, and what it saw in a file of its own."""
    seen = {name: train_and_evaluate(name, model, folder, 2) for name in RULES}
    rank = os.environ["RANK"]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    script = tmp_path / "worker.py"
    script.write_text("import sys\nfrom tests.integrations.test_processes import main\nmain(*sys.argv[1:])\n")
    words = ["--standalone", "--nproc_per_node", "2", str(script), str(folder), str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    # The exit code says little: gloo sometimes aborts after all is written. Each rank's file says all.
    files = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), ran.stderr
    ranks = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for name in RULES:
        alone = train_and_evaluate(name, str(folder), str(tmp_path), 1)
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(alone["losses"], abs=1e-5), name
            assert rank[name]["norms"] == pytest.approx(alone["norms"], rel=1e-4), name
            assert rank[name]["metrics"] == pytest.approx(alone["metrics"], abs=1e-5), name
            assert rank[name]["sums"] == pytest.approx(alone["sums"], abs=1e-3), name
            for mine, whole in zip(rank[name]["figures"], alone["figures"], strict=True):
                assert mine == pytest.approx(whole, abs=1e-5), name
