"""A rule trains the same model in `priority train`, in Trainer and in TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments
from trl import SFTConfig, pack_dataset

from priority_dsl.integrations import PrioritySFTTrainer, PriorityTrainer, with_stored
from tests.integrations.conftest import ROWS, RULES, Outcome, assert_same, ordered, outcome, rule_of, settings

Fresh = Callable[[], Any]


def prepared(name: str, data: Dataset, fresh: Fresh) -> Dataset:
    """The rows as a run visits them, with what the frozen model says where the rule stores it."""
    rule = rule_of(name)
    stored = bool(rule.plan.stored)
    return ordered(with_stored(data, rule, models={"ref": fresh()}) if stored else data)


def packed(data: Dataset, rows: int) -> Dataset:
    """Each `rows` consecutive rows in one: the micro-batches of a run, whatever packing does inside them."""
    parts = [data.select(range(i, i + rows)) for i in range(0, len(data), rows)]
    made = concatenate_datasets([pack_dataset(part, 256) for part in parts])
    assert len(made) == len(parts)
    return made


def models_of(name: str, fresh: Fresh) -> dict[str, Any]:
    """The frozen models that training still needs."""
    return {kept: fresh() for kept in rule_of(name).plan.kept}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_trainer(
    name: str, accumulation: int, data: Dataset, fresh: Fresh, ours: Callable[[str], Outcome], tmp_path: Path
) -> None:
    trainer = PriorityTrainer(
        fresh(),
        TrainingArguments(**settings(tmp_path, accumulation)),
        train_dataset=prepared(name, data, fresh),
        rule=rule_of(name),
        models=models_of(name, fresh),
    )
    assert_same(outcome(trainer), ours(name))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_sft_trainer(
    name: str,
    accumulation: int,
    data: Dataset,
    fresh: Fresh,
    tokenizer: Any,
    ours: Callable[[str], Outcome],
    tmp_path: Path,
) -> None:
    trainer = PrioritySFTTrainer(
        fresh(),
        SFTConfig(**settings(tmp_path, accumulation)),
        train_dataset=prepared(name, data, fresh),
        processing_class=tokenizer,
        rule=rule_of(name),
        models=models_of(name, fresh),
    )
    assert_same(outcome(trainer), ours(name))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_trainer_on_packed_rows(
    name: str, accumulation: int, data: Dataset, fresh: Fresh, ours: Callable[[str], Outcome], tmp_path: Path
) -> None:
    rule = rule_of(name)
    rows = ordered(with_stored(data, rule, models={"ref": fresh()}))
    trainer = PriorityTrainer(
        fresh(),
        TrainingArguments(**settings(tmp_path, accumulation, per_device_train_batch_size=1)),
        train_dataset=packed(rows, ROWS // accumulation),
        rule=rule,
        models=models_of(name, fresh),
    )
    assert_same(outcome(trainer), ours(name))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_sft_trainer_on_packed_rows(
    name: str,
    accumulation: int,
    data: Dataset,
    fresh: Fresh,
    tokenizer: Any,
    ours: Callable[[str], Outcome],
    tmp_path: Path,
) -> None:
    rule = rule_of(name)
    rows = ordered(with_stored(data, rule, models={"ref": fresh()}))
    unpacked = {"padding_free": True, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = PrioritySFTTrainer(
        fresh(),
        SFTConfig(**settings(tmp_path, accumulation, per_device_train_batch_size=1, **unpacked)),
        train_dataset=packed(rows, ROWS // accumulation),
        processing_class=tokenizer,
        rule=rule,
        models=models_of(name, fresh),
    )
    assert_same(outcome(trainer), ours(name))
