"""Everything that a rule reads of a token lies where the token is predicted, however rows are collated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, TrainingArguments
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from priority_dsl import compile_rule
from priority_dsl.integrations import IntegrationError, PriorityTrainer, with_stored
from priority_dsl.integrations.collate import ALIGNED, AlignedCollator, RowCollator
from priority_dsl.integrations.reads import EXAMPLE, Reads
from tests.integrations.conftest import make_rows, ordered, outcome, settings

Fresh = Callable[[], Any]
RULE = compile_rule(
    "column label: {pos, neg}; column marked: bool per token; weight = 1 if marked and label == neg"
)
READS = Reads.of(RULE, 0)


def left_padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = RowCollator()(rows)
    for line, row in enumerate(rows):
        for name in ("input_ids", "labels", "attention_mask"):
            batch[name][line] = batch[name][line].roll(batch[name].shape[1] - len(row["input_ids"]))
    return batch


def collators(tokenizer: Any) -> dict[str, Any]:
    return {
        "own": RowCollator(),
        "on the left": left_padded,
        "trl": DataCollatorForLanguageModeling(pad_token_id=0),
        "trl, to a multiple": DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8),
        "trl, padding free": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        "flattening": DataCollatorWithFlattening(),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }


def seen(batch: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the rule would read, token by token, in the order of the rows."""
    aligned = batch[ALIGNED]
    found = []
    for line, targets in enumerate(aligned.targets.tolist()):
        for place, target in enumerate(targets):
            if target != -100:
                assert batch["input_ids"][line, place + 1] == target
                labelled = aligned.columns["label"][line][place]
                example = aligned.examples[line, place].item()
                found.append((example, target, labelled, bool(aligned.columns["marked"][line, place])))
    return sorted(found, key=lambda token: token[0])


@given(st.lists(st.integers(0, 23), min_size=1, max_size=5, unique=True))
def test_every_collator_says_the_same(chosen: list[int]) -> None:
    data = make_rows()
    rows = [{**data[i], EXAMPLE: i} for i in sorted(chosen)]
    expected = [
        (row[EXAMPLE], row["input_ids"][t], row["label"], row["marked"][t])
        for row in rows
        for t in range(1, len(row["input_ids"]))
        if row["labels"][t] != -100
    ]
    tokenizer = test_every_collator_says_the_same.tokenizer  # type: ignore[attr-defined]
    for name, inner in collators(tokenizer).items():
        assert seen(AlignedCollator(inner, READS, "response")(rows)) == expected, name


@pytest.fixture(autouse=True)
def _tokenizer(tokenizer: Any) -> None:
    test_every_collator_says_the_same.tokenizer = tokenizer  # type: ignore[attr-defined]


@pytest.mark.parametrize("inner", [RowCollator(), DataCollatorForLanguageModeling(0, padding_free=True)])
def test_packed_rows_say_the_same(inner: Any, data: Dataset, fresh: Fresh) -> None:
    made = with_stored(data, RULE)
    packed = pack_dataset(made, 40)
    assert len(packed) < len(made)
    collate = AlignedCollator(inner, READS, "response")
    assert seen(collate([packed[i] for i in range(len(packed))])) == seen(collate([*made]))


def test_over_all_the_first_token_of_an_example_is_no_target(data: Dataset) -> None:
    rule = compile_rule("wit")
    packed = pack_dataset(with_stored(data, rule), 64)
    batch = AlignedCollator(RowCollator(), Reads.of(rule, 0), "all")([*packed])
    aligned = batch[ALIGNED]
    assert int((aligned.targets != -100).sum()) == sum(len(row["input_ids"]) - 1 for row in data)
    assert int(aligned.response.sum()) == sum(label != -100 for row in data for label in row["labels"][1:])


def test_rows_that_were_cut_are_refused(data: Dataset) -> None:
    rows = [data[i] for i in range(3)]

    def cutting(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: values[:, :4] for name, values in RowCollator()(rows).items()}

    with pytest.raises(IntegrationError, match="changed the token ids"):
        AlignedCollator(cutting, READS, "response")(rows)
    rows[1]["marked"] = rows[1]["marked"][:-1]
    with pytest.raises(IntegrationError, match=r"`marked` has \d+ values in a row of \d+ tokens"):
        AlignedCollator(RowCollator(), READS, "response")(rows)
    rows[1]["marked"] = [[0, 3], [4, 5]]
    with pytest.raises(IntegrationError, match="spans of characters"):
        AlignedCollator(RowCollator(), READS, "response")(rows)
    rows[1]["marked"], rows[1]["labels"] = [True] * len(rows[1]["input_ids"]), [*rows[1]["input_ids"][1:], 2]
    with pytest.raises(IntegrationError, match="must not be shifted"):
        AlignedCollator(RowCollator(), READS, "response")(rows)


def test_packed_rows_that_see_each_other_are_refused(data: Dataset) -> None:
    packed = pack_dataset(with_stored(data, RULE), 64)
    padded = DataCollatorForLanguageModeling(pad_token_id=0)  # a mask of ones, no positions
    with pytest.raises(IntegrationError, match="padding_free=True"):
        AlignedCollator(padded, READS, "response")([*packed])


def test_another_parameter_never_reads_what_was_stored(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    made = with_stored(data, compile_rule("prift_mass", tau=0.4), models={"ref": fresh()})
    arguments = TrainingArguments(**settings(tmp_path))
    PriorityTrainer(fresh(), arguments, train_dataset=made, rule=compile_rule("prift_mass", tau=0.4))
    with pytest.raises(IntegrationError, match="with_stored"):
        PriorityTrainer(fresh(), arguments, train_dataset=made, rule=compile_rule("prift_mass", tau=0.5))


def test_stored_values_are_those_of_live_models(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    rule = compile_rule("max(mass(ref), 0.1) * p_on")
    other = fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    stored = with_stored(data, rule, models={"ref": other}, batch_size=5)
    found = []
    for rows, models in ((stored, {}), (data, {"ref": other})):
        trainer = PriorityTrainer(
            fresh(),
            TrainingArguments(**settings(tmp_path, 2, max_steps=3)),
            train_dataset=ordered(rows, 3),
            rule=rule,
            models=models,
        )
        found.append(outcome(trainer))
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-6)
    assert found[0].log[0]["weight_mean"] == pytest.approx(found[1].log[0]["weight_mean"])


def test_values_of_the_whole_data_set(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """A threshold over the data set is one number, however it was read, and it needs the whole data set."""
    rule = compile_rule("top(nll_ref, 0.25, dataset)")
    made = [with_stored(data, rule, models={"ref": fresh()}, batch_size=n) for n in (1, 7)]
    (name,) = Reads.of(rule, 42).stored.values()
    assert [*made[0][name]] == [*made[1][name]]
    supervised = sum(label != -100 for row in data for label in row["labels"][1:])
    assert sum(map(sum, made[0][name])) == round(0.25 * supervised)
    with pytest.raises(IntegrationError, match="over the whole data set"):
        PriorityTrainer(
            fresh(),
            TrainingArguments(**settings(tmp_path)),
            train_dataset=data,
            rule=rule,
            models={"ref": fresh()},
        )


def test_keep_leaves_rows_out(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    rule = compile_rule("column label: {pos, neg}; keep = label == pos; weight = p_on")
    made = with_stored(data, rule)
    assert len(made) == sum(row["label"] == "pos" for row in data) < len(data)
    assert {row[EXAMPLE][0] for row in made} == {i for i, row in enumerate(data) if row["label"] == "pos"}
    arguments = TrainingArguments(**settings(tmp_path))
    PriorityTrainer(fresh(), arguments, train_dataset=made, rule=rule)
    with pytest.raises(IntegrationError, match="chooses rows by `keep`"):
        PriorityTrainer(fresh(), arguments, train_dataset=data, rule=rule)


def test_chance_does_not_depend_on_packing(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    rule = compile_rule("bernoulli(0.5)")
    made = with_stored(data, rule)
    shares = []
    for rows, size in ((made, 24), (pack_dataset(made, 64), 24)):
        trainer = PriorityTrainer(
            fresh(),
            TrainingArguments(**settings(tmp_path, max_steps=1, per_device_train_batch_size=size)),
            train_dataset=rows,
            rule=rule,
        )
        shares.append((outcome(trainer).losses, trainer.state.log_history[0]["weight_mean"]))
    assert shares[0][0] == pytest.approx(shares[1][0], abs=1e-5)
    assert shares[0][1] == pytest.approx(shares[1][1])
    packed = pack_dataset(data.select_columns(["input_ids", "labels"]), 64)
    with pytest.raises(IntegrationError, match="with_stored before that"):
        PriorityTrainer(fresh(), TrainingArguments(**settings(tmp_path)), train_dataset=packed, rule=rule)


def test_a_column_that_is_missing(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    rows = data.remove_columns("marked")
    with pytest.raises(IntegrationError, match="reads the column `marked`, which the training data"):
        PriorityTrainer(fresh(), TrainingArguments(**settings(tmp_path)), train_dataset=rows, rule=RULE)
    with pytest.raises(IntegrationError, match="reads the column `marked`, which the data set"):
        with_stored(rows, RULE)


def test_streams_and_lists(data: Dataset, fresh: Fresh, tmp_path: Path) -> None:
    """A list of rows is a data set; a stream trains too, unless the rule must know rows by number."""
    rule, apart = compile_rule("weight = p_on"), {"dispatch_batches": False}
    losses = []
    for rows in ([*ordered(data, 2)], ordered(data, 2), ordered(data, 2).to_iterable_dataset()):
        trainer = PriorityTrainer(
            fresh(),
            TrainingArguments(**settings(tmp_path, 2, max_steps=2, accelerator_config=apart)),
            train_dataset=rows,  # type: ignore[arg-type]
            rule=rule,
        )
        losses.append(outcome(trainer).losses)
    assert losses[0] == losses[1] == losses[2]
    stream = data.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    for config, message in ((apart, "a stream of rows without numbers"), (None, "'dispatch_batches': False")):
        with pytest.raises(IntegrationError, match=message):
            PriorityTrainer(
                fresh(),
                TrainingArguments(**settings(tmp_path, accelerator_config=config)),
                train_dataset=stream,  # type: ignore[arg-type]
                rule=compile_rule("bernoulli(0.5)"),
            )
