"""A step is one sum over one denominator, however many micro-batches and processes it is spread over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from priority_dsl import compile_rule
from priority_dsl.integrations import PrioritySFTTrainer, PriorityTrainer, use_rule
from tests.integrations.conftest import ROWS, STEPS, Outcome, ordered, outcome, settings

Fresh = Callable[[], Any]
WHOLE_STEPS = {  # rules whose loss depends on all micro-batches of a step at once
    "tokens": "weight = p_on",
    "kept": "normalize = kept; weight = p_on > 0.002",
    "weights": "normalize = weights; weight = p_on",
    "none": "normalize = none; weight = p_on",
    "examples": "normalize = examples; weight = p_on",
    "groups": "column label: {pos, neg}; normalize = groups(label == neg); weight = p_on",
    "batch": "top(nll_on, 0.5, batch)",
    "mean of the batch": "H_on / max(mean(H_on, batch), 1e-6)",
    "chance": "bernoulli(0.5)",
    "progress": "progress + p_on",
}


def run(fresh: Fresh, data: Dataset, rule: str, folder: Path, accumulation: int, **others: Any) -> Outcome:
    trainer = PriorityTrainer(
        fresh(),
        TrainingArguments(**settings(folder, accumulation, max_steps=3, **others)),
        train_dataset=ordered(data, 3),
        rule=compile_rule(rule),
    )
    return outcome(trainer)


@pytest.mark.parametrize("name", WHOLE_STEPS)
def test_accumulation_changes_nothing(name: str, data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    one, four = (run(fresh, data, WHOLE_STEPS[name], tmp_path, accumulation) for accumulation in (1, 4))
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    assert four.norms == pytest.approx(one.norms, rel=1e-4)
    for figure in ("nll", "weight_mean", "weight_nonzero", "supervised_tokens"):
        assert [line[figure] for line in four.log] == pytest.approx([line[figure] for line in one.log])


def test_dropout_is_the_same_when_a_step_is_counted_first(
    data: Dataset, folder: Path, tmp_path: Path
) -> None:
    """The forward pass that only counts draws what the second one draws: what is kept is what trains."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.5)
    trainer = PriorityTrainer(
        model,
        TrainingArguments(**settings(tmp_path, 4, max_steps=2)),
        train_dataset=ordered(data, 2),
        rule=compile_rule(
            "normalize = kept; weight = p_on > 0.002; loss = weight * (1 + nll_on - sg(nll_on))"
        ),
    )
    # The loss is one for every token that is kept when it is computed, divided by those counted before.
    found = outcome(trainer)
    assert found.losses == pytest.approx([1.0, 1.0])
    assert all(0 < line["weight_nonzero"] < 1 for line in found.log)


def test_the_times_accumulation_bug_is_noticed(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """What others do, a mean of each micro-batch that nobody divides, has four times the gradient."""
    right = run(fresh, data, "1", tmp_path, 4)

    def wrong_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return compile_rule("1").loss(logits[:, :-1], inputs["labels"][:, 1:]).mean

    trainer = Trainer(
        fresh(),
        TrainingArguments(**settings(tmp_path, 4, max_steps=1)),
        train_dataset=ordered(data, 1).select_columns(["input_ids", "labels"]),
        data_collator=lambda rows: {
            "input_ids": torch.tensor([row["input_ids"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "attention_mask": torch.ones(len(rows), len(rows[0]["input_ids"]), dtype=torch.long),
        },
    )
    trainer.compute_loss = wrong_loss
    wrong = outcome(trainer)
    assert wrong.losses[0] == pytest.approx(4 * right.losses[0], rel=0.1)
    assert wrong.norms[0] > 3 * right.norms[0]


def test_trl_own_dft_is_ours(data: Dataset, fresh: Fresh, tokenizer: Any, tmp_path: Path) -> None:
    rows = ordered(data).select_columns(["input_ids", "labels"])
    theirs = SFTTrainer(
        fresh(),
        SFTConfig(**settings(tmp_path, 2, loss_type="dft")),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    ours = PrioritySFTTrainer(
        fresh(),
        SFTConfig(**settings(tmp_path, 2)),
        train_dataset=rows,
        processing_class=tokenizer,
        rule=compile_rule("dft"),
    )
    expected, found = outcome(theirs), outcome(ours)
    assert len(found.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4, abs=1e-5)


def test_a_trainer_that_is_there_already(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """`use_rule` on a plain Trainer is PriorityTrainer, whose unused columns were to be removed."""
    rule = "column label: {pos, neg}; weight = -0.5 if label == neg else p_on"
    arguments = settings(tmp_path, 2, max_steps=3)
    plain = Trainer(fresh(), TrainingArguments(**arguments), train_dataset=ordered(data, 3))
    assert plain.args.remove_unused_columns
    use_rule(plain, compile_rule(rule))
    found, expected = outcome(plain), run(fresh, data, rule, tmp_path, 2)
    assert found.losses == expected.losses
    assert found.log[0]["weight_negative"] > 0


def test_trl_prepares_text_as_ever(fresh: Fresh, tokenizer: Any, tmp_path: Path) -> None:
    """Rows of text, packed by TRL: a rule that reads no column needs nothing else."""
    texts = [f"what is {i} + {i} ? the answer is {2 * i}" for i in range(12)]
    rows = Dataset.from_dict({"prompt": [t[:16] for t in texts], "completion": [t[16:] for t in texts]})
    for packing in (False, True):
        arguments = settings(tmp_path, 2, max_steps=2, packing=packing, max_length=64)
        theirs = SFTTrainer(fresh(), SFTConfig(**arguments), train_dataset=rows, processing_class=tokenizer)
        ours = PrioritySFTTrainer(
            fresh(),
            SFTConfig(**arguments),
            train_dataset=rows,
            processing_class=tokenizer,
            rule=compile_rule("1"),
        )
        assert outcome(ours).losses == pytest.approx(outcome(theirs).losses, abs=1e-5)


@pytest.mark.parametrize("normalize", ["tokens", "kept", "weights", "none", "examples"])
def test_evaluation(normalize: str, data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """`eval_loss` is the plain nll of all tokens, whatever the batches; the rule's loss stands beside it."""
    rule = compile_rule(f"normalize = {normalize}; weight = p_on > 0.002")
    shown = []
    for batch_size in (1, 5, 24):
        arguments = settings(tmp_path, per_device_eval_batch_size=batch_size)
        trainer = PriorityTrainer(
            fresh(), TrainingArguments(**arguments), train_dataset=data, eval_dataset=data, rule=rule
        )
        shown.append(trainer.evaluate())
    model, nll, right = fresh().eval(), [], []
    totals, denominators = 0.0, 0.0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        out = rule.loss(logits, labels[:, 1:])
        asked = labels[:, 1:] != -100
        nll.append(-logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][asked])
        right.append((logits.argmax(-1) == ids[:, 1:])[asked])
        totals, denominators = totals + out.total.item(), denominators + out.denominator.item()
    for metrics in shown:
        assert metrics["eval_loss"] == pytest.approx(torch.cat(nll).mean().item(), abs=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx(torch.cat(right).float().mean().item())
        expected = totals if normalize == "none" else totals / denominators
        assert metrics["eval_weighted_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_a_rule_over_the_batch_shows_what_is_known(
    data: Dataset, fresh: Fresh, tmp_path: Path
) -> None:
    trainer = PriorityTrainer(
        fresh(),
        TrainingArguments(**settings(tmp_path)),
        train_dataset=data,
        eval_dataset={"a": data, "b": data.select(range(3))},
        rule=compile_rule("top(nll_on, 0.5, batch)"),
    )
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_accuracy"} <= metrics.keys()
    assert "eval_a_weighted_loss" not in metrics  # it would depend on the batches of the evaluation


def test_plain_nll_is_that_of_all_supervised_tokens(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """Also of those that a known weight of 0 leaves out of the loss, in the steps that are logged."""
    rule, plain = "column label: {pos, neg}; weight = 0 if label == neg else 1", "1"
    with_zeros, without = (run(fresh, data, text, tmp_path, 2) for text in (rule, plain))
    assert with_zeros.log[0]["nll"] == pytest.approx(without.losses[0], abs=1e-5)
    assert with_zeros.log[0]["weight_nonzero"] < 1
    assert len(without.losses) == 3
    assert ROWS > 1
