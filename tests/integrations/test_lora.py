"""Under PEFT the adapter alone is trained, and `ref` is the same model with the adapter switched off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import TrainingArguments
from trl import SFTConfig

import trainer.opening
from priority_dsl import compile_rule
from priority_dsl.integrations import IntegrationError, PrioritySFTTrainer, PriorityTrainer, with_stored
from tests.integrations.conftest import (
    RATE,
    ROWS,
    RULES,
    SEED,
    STEPS,
    Outcome,
    assert_same,
    ordered,
    outcome,
    rule_of,
    settings,
)  # fmt: skip
from trainer.config import TrainConfig
from trainer.train import train

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)


def adapted(model: Any) -> Any:
    """A model with an adapter: always the same random numbers."""
    torch.manual_seed(11)
    return get_peft_model(model, LORA)


@pytest.fixture
def ours_adapted(
    folder: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Outcome]:
    """What `priority train` makes of a rule when the model that it loads has an adapter inside."""
    load = trainer.opening.load_model
    made: list[Any] = []

    def load_adapted(source: str, **options: Any) -> Any:
        made.append(adapted(load(source, **options)))
        return made[-1].get_base_model()

    monkeypatch.setattr(trainer.opening, "load_model", load_adapted)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(name: str) -> Outcome:
        text, params = RULES[name]
        output = tmp_path / name
        train(
            TrainConfig(
                model=str(folder), data=(str(path),), rule=text, set=params, output=str(output),
                cache=str(tmp_path / "cache"), max_steps=STEPS, batch_size=ROWS, learning_rate=RATE,
                schedule="constant", warmup=0, seed=SEED, quiet=True, device="cpu",
            )
        )  # fmt: skip
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        losses, norms = [line["loss"] for line in log], [line["grad_norm"] for line in log]
        return Outcome(losses, norms, log, {n: p.detach() for n, p in made[-1].named_parameters()})

    return run


@pytest.mark.parametrize("name", RULES)
def test_adapters(
    name: str,
    data: Dataset,
    fresh: Callable[[], Any],
    tokenizer: Any,
    ours_adapted: Callable[[str], Outcome],
    tmp_path: Path,
) -> None:
    rule, rows = rule_of(name), data
    if rule.plan.stored:  # what the adapted model says with its adapter switched off is what it said before
        rows = with_stored(data, rule, models={"ref": adapted(fresh())})
    expected = ours_adapted(name)
    before = {n: p.clone() for n, p in adapted(fresh()).named_parameters()}
    moved = {n for n, p in expected.parameters.items() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)

    plain = PriorityTrainer(
        adapted(fresh()), TrainingArguments(**settings(tmp_path, 4)), train_dataset=ordered(rows), rule=rule
    )
    assert_same(outcome(plain), expected)
    sft = PrioritySFTTrainer(
        adapted(fresh()),
        SFTConfig(**settings(tmp_path)),
        train_dataset=ordered(rows),
        processing_class=tokenizer,
        rule=rule,
    )
    assert_same(outcome(sft), expected)


def test_stored_columns_do_not_see_the_adapter(data: Dataset, fresh: Callable[[], Any]) -> None:
    model = adapted(fresh())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    rule = compile_rule("weight = p_ref")
    (name,) = (column.name for column in rule.plan.stored)
    seen, plain = (with_stored(data, rule, models={"ref": m})[name] for m in (model, fresh()))
    assert list(seen) == list(plain)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_prompt_tuning_is_refused(data: Dataset, fresh: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(fresh(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(IntegrationError, match="tokens of its own before each row"):
        PriorityTrainer(
            model, TrainingArguments(**settings(tmp_path)), train_dataset=data, rule=compile_rule("dft")
        )


HEAD = {"target_modules": ["lm_head", "q_proj"], "task_type": TaskType.CAUSAL_LM, "r": 4}


@pytest.mark.parametrize("name", ["asft", "prift_mass"])
def test_an_adapter_on_the_head_is_part_of_the_fused_loss(
    name: str, data: Dataset, fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(**options: Any) -> Outcome:
        torch.manual_seed(11)
        model = get_peft_model(fresh(), LoraConfig(**HEAD))
        rows = with_stored(data, rule, models={"ref": fresh()}) if rule.plan.stored else data
        arguments = TrainingArguments(**settings(tmp_path, 4))
        return outcome(PriorityTrainer(model, arguments, train_dataset=ordered(rows), rule=rule, **options))

    rule = rule_of(name)
    fused = trained()
    using = "priority_dsl.integrations.using.why_whole"
    monkeypatch.setattr(using, lambda model: "this test holds full logits")
    assert_same(fused, trained(full_logits=True))


def test_an_adapter_on_the_head_with_dropout_is_refused(
    data: Dataset, fresh: Callable[[], Any], tmp_path: Path
) -> None:
    model = get_peft_model(fresh(), LoraConfig(**HEAD, lora_dropout=0.1))
    with pytest.raises(IntegrationError, match=r"adapter on its output layer has dropout.* full_logits=True"):
        PriorityTrainer(
            model, TrainingArguments(**settings(tmp_path)), train_dataset=data, rule=compile_rule("dft")
        )
