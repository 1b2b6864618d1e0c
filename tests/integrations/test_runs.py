"""What else people switch on: bfloat16, activation checkpointing, saving and going on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from priority_dsl import compile_rule
from priority_dsl.integrations import PrioritySFTTrainer, PriorityTrainer, with_stored
from tests.integrations.conftest import ordered, outcome, settings

Fresh = Callable[[], Any]


def test_bfloat16(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """The forward pass in bfloat16 under autocast: nearly the same losses, statistics in float32."""
    found = []
    for bf16 in (False, True):
        trainer = PriorityTrainer(
            fresh(),
            TrainingArguments(**settings(tmp_path, 2, max_steps=3, bf16=bf16)),
            train_dataset=ordered(data, 3),
            rule=compile_rule("asft"),
            models={"ref": fresh()},
        )
        found.append(outcome(trainer))
        assert trainer.model.dtype == torch.float32
    assert found[0].losses == pytest.approx(found[1].losses, rel=0.02)
    assert found[0].losses != found[1].losses


def test_the_defaults_of_trl(data: Dataset, fresh: Fresh, tokenizer: Any, tmp_path: Path) -> None:
    """SFTConfig switches activation checkpointing on: the same numbers as without."""
    found = []
    for checkpointing in (False, True):
        arguments = settings(tmp_path, 2, max_steps=3)
        config = SFTConfig(**arguments)
        config.gradient_checkpointing = checkpointing
        trainer = PrioritySFTTrainer(
            fresh(),
            config,
            train_dataset=ordered(data, 3).select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            rule=compile_rule("dft"),
        )
        found.append(outcome(trainer).losses)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_run_goes_on_where_it_stopped(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """Progress and chance are those of the whole run; the model loads without this package."""
    rule = compile_rule("bernoulli(0.25 + 0.5 * progress) * mass(ref)")
    rows = with_stored(data, rule, models={"ref": fresh()})

    def made(**others: Any) -> PriorityTrainer:
        arguments = settings(tmp_path, 2, max_steps=8, save_strategy="steps", save_steps=5, **others)
        return PriorityTrainer(fresh(), TrainingArguments(**arguments), train_dataset=rows, rule=rule)

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    logs = [
        {line["step"]: (line["loss"], line["weight_mean"]) for line in t.state.log_history if "loss" in line}
        for t in (whole, again)
    ]
    assert set(logs[1]) == set(range(1, 9))
    assert [logs[1][step] for step in (6, 7, 8)] == [pytest.approx(logs[0][step]) for step in (6, 7, 8)]
    whole.save_model(str(tmp_path / "saved"))
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in whole.model.named_parameters())


def test_the_model_is_what_it_was_for_others(fresh: Fresh, data: Dataset, tmp_path: Path) -> None:
    """Without `priority` the forward pass is the model's own, and it generates."""
    model, plain = fresh(), fresh()
    ids = torch.tensor([data[0]["input_ids"]])
    PriorityTrainer(
        model, TrainingArguments(**settings(tmp_path)), train_dataset=data, rule=compile_rule("dft")
    )
    both = [m.eval()(input_ids=ids, labels=ids) for m in (model, plain)]
    assert torch.equal(both[0].logits, both[1].logits)
    assert both[0].loss == both[1].loss
    assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, plain)))
