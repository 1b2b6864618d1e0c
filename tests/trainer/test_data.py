"""Rows become ids, masks, roles and columns that are aligned with the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from priority_dsl import compile_rule
from trainer.batches import IGNORED, Spread, collate, micro_batches, step_rows
from trainer.chat import Turn
from trainer.columns import ColumnReader, check_categories
from trainer.config import TrainConfig
from trainer.data import Example, Examples, Reader, mark_tokens
from trainer.faults import DataFault

END = 2  # </s>


@pytest.fixture
def read(model: str, tokenizer: Any, write: Callable[..., str]):
    """Reads rows under a rule into examples."""

    def from_rows(
        rows: list[dict[str, Any]], rule: str = "1", limit: int | None = None, **options: Any
    ) -> Examples:
        config = TrainConfig(model=model, data=write("rows.jsonl", rows), rule=rule, **options)
        compiled = compile_rule(rule)
        columns = ColumnReader(compiled.columns)
        reader = Reader(config, tokenizer, 320, limit, columns, roles="role" in compiled.requires.columns)
        found = reader.read(config.data)
        check_categories(compiled.columns, [row.columns for row in found.rows])
        return found

    return from_rows


def words(example: Example, tokenizer: Any) -> str:
    """The supervised tokens as text."""
    return tokenizer.decode([i for i, marked in zip(example.ids, example.response, strict=True) if marked])


LAYOUTS = {
    "prompt/completion": ({"prompt": "what is 1 ?", "completion": " the answer"}, "what is 1 ? the answer"),
    "question/answer": ({"question": "what is 1 ?", "answer": "the answer"}, "what is 1 ?\nthe answer"),
    "instruction": ({"instruction": "add", "output": "the answer"}, "add\nthe answer"),
    "instruction/input": (
        {"instruction": "add", "input": "1 + 2", "output": "the answer"},
        "add\n\n1 + 2\nthe answer",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_response_is_supervised_with_its_end_token(layout: str, read: Any, tokenizer: Any):
    row, text = LAYOUTS[layout]
    example = read([row]).rows[0]
    assert example.ids == [*tokenizer(text)["input_ids"], END], "tokenised once, whole, and ended"
    assert words(example, tokenizer).strip() == "the answer</s>"
    assert example.response[-1], "the end token is supervised"
    assert example.roles == ["assistant" if marked else "user" for marked in example.response]


def test_text_rows_are_all_response(read: Any, tokenizer: Any):
    example = read([{"text": "once upon a time"}]).rows[0]
    assert words(example, tokenizer) == "<s>once upon a time</s>"


def test_an_end_token_that_the_text_brings_is_not_doubled(read: Any):
    example = read([{"prompt": "a", "completion": " b</s>"}]).rows[0]
    assert example.ids.count(END) == 1
    assert example.response[-1]


def test_other_names_and_another_separator(read: Any, tokenizer: Any):
    row = {"task": "add", "solution": "7", "text": "not this"}
    example = read([row], prompt="task", completion="solution", separator=" : ").rows[0]
    assert tokenizer.decode(example.ids) == "<s>add : 7</s>"


def test_chat_puts_prompt_and_response_through_the_template(read: Any, tokenizer: Any):
    example = read([{"question": "what is 1 ?", "answer": "the answer"}], chat=True).rows[0]
    assert words(example, tokenizer) == "the answer<|im_end|>"
    assert tokenizer.decode(example.ids).startswith("<|im_start|>user\nwhat is 1 ?<|im_end|>")


def test_a_token_belongs_to_the_response_when_its_characters_reach_into_it():
    offsets = [(0, 0), (0, 2), (2, 5), (5, 7)]  # a begin token without characters, one across the border at 4
    response, roles = mark_tokens(offsets, [Turn(0, 4, "user"), Turn(4, 7, "assistant", True)])
    assert response == [False, False, True, True]
    assert roles == ["user", "user", "assistant", "assistant"]


def test_alignment_with_targets_by_hand(read: Any):
    rows = [
        {
            "input_ids": [5, 6, 7, 8],
            "labels": [-100, -100, 7, 8],
            "noise": [0.5, 0.25, 0.125, 1.0],
            "label": "neg",
        },
        {"input_ids": [9, 10, 11], "labels": [-100, 10, 11], "noise": [2.0, 3.0, 4.0], "label": "pos"},
    ]
    rule = (
        "column noise: number per token; column label: {pos, neg}; weight = -noise if label == neg else noise"
    )
    examples = read(rows, rule).rows
    batch = collate(examples, "response", ["noise", "label", "response"])
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 10, 0]]
    assert batch.targets.tolist() == [[IGNORED, 7, 8], [10, 11, IGNORED]]
    assert batch.columns["noise"] == [[0.25, 0.125, 1.0], [3.0, 4.0, 4.0]]
    assert batch.columns["label"] == ["neg", "pos"]
    assert batch.columns["response"] == [[False, True, True], [True, True, False]]
    assert batch.response.tolist() == batch.columns["response"]
    assert batch.examples.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch.tokens == 7
    weights = compile_rule(rule).weights(
        torch.zeros(2, 3, 20), batch.targets, columns=batch.columns, examples=batch.examples
    )
    assert weights.tolist() == [[0.0, -0.125, -1.0], [3.0, 4.0, 0.0]]


def test_over_all_takes_every_real_token_but_the_first(read: Any):
    examples = read([{"prompt": "a b c", "completion": " d"}, {"prompt": "a", "completion": " d"}]).rows
    batch = collate(examples, "all", [])
    for row, example in zip(batch.targets.tolist(), examples, strict=True):
        assert [y for y in row if y != IGNORED] == example.ids[1:]
    assert batch.response.sum() < (batch.targets != IGNORED).sum()


def test_roles_follow_the_target(read: Any):
    talk = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    batch = collate(read([talk], "role == assistant").rows, "all", ["role"])
    response = batch.response[0].tolist()
    assert any(response)
    assert all(
        role == "assistant" for role, marked in zip(batch.columns["role"][0], response, strict=True) if marked
    )
    assert batch.columns["role"][0][0] == "user"


LONG = [
    {"prompt": "a", "completion": " b"},
    {"prompt": "a", "completion": " b" * 30},
    {"prompt": "a " * 30, "completion": " b"},
]


def test_long_rows_are_truncated_counted_and_left_out_without_a_response(read: Any):
    found = read(LONG, limit=10)
    assert [len(row.ids) for row in found.rows] == [5, 10]
    assert (found.total, found.truncated, found.dropped, found.emptied) == (3, 1, 0, 1)
    assert str(found).startswith("2 rows, 15 tokens, 11 of them supervised, at most 10 in a row; ")
    assert "; 1 row over 10 tokens truncated; 1 row dropped" in str(found)
    assert [row.index for row in found.rows] == [0, 1]


def test_long_rows_are_dropped_and_counted(read: Any):
    found = read(LONG, limit=10, too_long="drop")
    assert [row.index for row in found.rows] == [0]
    assert (found.total, found.truncated, found.dropped, found.emptied) == (3, 0, 2, 0)


def test_per_token_columns_are_truncated_with_the_row(read: Any):
    row = {"input_ids": [5, 6, 7, 8], "noise": [0.0, 1.0, 2.0, 3.0]}
    example = read([row], "column noise: number per token; weight = noise", limit=3).rows[0]
    assert example.columns["noise"] == [0.0, 1.0, 2.0]


def test_csv_columns_are_read_as_what_they_are_declared(model: str, tokenizer: Any, tmp_path: Any):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,good,score\na, b,true,0.5\na, b,False,2\n")
    rule = compile_rule("column good: bool; column score: number; weight = score if good else 0")
    config = TrainConfig(model=model, data=str(path), rule="1")
    found = Reader(config, tokenizer, 320, None, ColumnReader(rule.columns)).read(config.data)
    assert [row.columns for row in found.rows] == [
        {"good": True, "score": 0.5},
        {"good": False, "score": 2.0},
    ]


def test_a_misspelt_category_is_refused_and_the_known_ones_listed(read: Any):
    rows = [{"prompt": "a", "completion": " b", "label": label} for label in ("positive", "negative")]
    with pytest.raises(DataFault, match=r"column `label` is never `neg` in the data.*: negative, positive"):
        read(rows, "-1 if label == neg else 1")
    assert len(read(rows, "-1 if label == negative else 1").rows) == 2
    assert (
        len(read(rows[:1], "column label: {positive, negative}; weight = -1 if label == negative").rows) == 1
    )


def test_the_order_of_rows_depends_on_seed_and_epoch_only():
    flat = [i for step in step_rows(10, 4, seed=1, epoch=0) for i in step]
    assert sorted(flat) == list(range(10))
    assert flat == [i for step in step_rows(10, 1, seed=1, epoch=0) for i in step]
    assert flat != [i for step in step_rows(10, 4, seed=1, epoch=1) for i in step]
    assert flat != [i for step in step_rows(10, 4, seed=2, epoch=0) for i in step]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_of_a_step_is_in_one_micro_batch_of_one_process(processes: int, read: Any):
    rows = read([{"prompt": "a", "completion": f" {i}"} for i in range(7)]).rows
    shares = [
        micro_batches(rows, Spread(2, accumulation=2, processes=processes, rank=rank), "response", ())
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1, "processes take the same number of micro-batches"
    live = [batch for share in shares for batch in share if batch.tokens]
    assert sorted(place for batch in live for place in batch.places) == sorted(row.place for row in rows)
    blank = [batch for share in shares for batch in share if not batch.tokens]
    assert all((batch.targets == IGNORED).all() and not batch.response.any() for batch in blank)
