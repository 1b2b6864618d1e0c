"""Preference rows: how they are read, that responses stay together, and that a run trains what it should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from priority_dsl import compile_rule
from tests.trainer.test_distributed import torchrun, weights
from trainer.batches import Spread, collate, micro_batches, step_examples
from trainer.cli import main
from trainer.columns import ColumnReader
from trainer.config import EvalConfig, RowConfig, TrainConfig
from trainer.data import Examples, Reader
from trainer.evaluate import evaluate
from trainer.faults import ConfigFault, DataFault
from trainer.train import train

DPO = (
    "param beta = 0.1; let d = sum(logratio(on, ref), example); "
    "loss = -log_sigmoid(beta * (chosen(d) - rejected(d)))"
)
Write = Callable[..., str]


def sums_row(i: int, **more: Any) -> dict[str, Any]:
    """A question with a right and a wrong answer of different lengths."""
    right, wrong = f" the answer is {4 * i}" + " ." * (i % 5), f" the answer is {i}" + " !" * (i % 3)
    return {"prompt": f"what is {i} + {3 * i} ?", "chosen": right, "rejected": wrong, **more}


@pytest.fixture
def read(tokenizer: Any, write: Write) -> Callable[..., Examples]:
    def of(rows: list[dict[str, Any]], rule: str = DPO, limit: int | None = None, **config: Any) -> Examples:
        compiled = compile_rule(rule)
        settings = RowConfig(model="unused", data=(write("rows.jsonl", rows),), **config)
        columns = ColumnReader(compiled.columns)
        reader = Reader(settings, tokenizer, 320, limit, columns, pairs=compiled.checked.reads_pairs)
        return reader.read(settings.data)

    return of


def supervised(examples: Examples, tokenizer: Any) -> list[str]:
    return [
        tokenizer.decode([i for i, marked in zip(row.ids, row.response, strict=True) if marked])
        for row in examples.rows
    ]


# Reading ----------------------------------------------------------------------------------------


def test_a_row_is_two_examples_with_one_index(read: Callable[..., Examples], tokenizer: Any) -> None:
    found = read([sums_row(2), sums_row(3)])
    assert [(row.index, row.chosen) for row in found.rows] == [(0, True), (0, False), (1, True), (1, False)]
    assert supervised(found, tokenizer)[:2] == [" the answer is 8 . .</s>", " the answer is 2 ! !</s>"]
    assert [row.place.split("/")[-1] for row in found.rows[:2]] == [
        "rows.jsonl:1 (chosen)",
        "rows.jsonl:1 (rejected)",
    ]
    assert str(found).startswith("2 pairs, ")
    shared = tokenizer("what is 2 + 6 ?")["input_ids"]
    assert all(row.ids[: len(shared)] == shared for row in found.rows[:2])


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "one ?"}, "<s>one ?"),
        ({"question": "one ?"}, "<s>one ?\n"),
        ({"instruction": "one ?", "input": "two", "output": "three"}, "<s>one ?\n\ntwo\n"),
        ({"instruction": "one ?", "input": ""}, "<s>one ?\n"),
    ],
)
def test_where_the_prompt_of_a_pair_is(
    fields: dict[str, str], prompt: str, read: Callable[..., Examples], tokenizer: Any
) -> None:
    found = read([{**fields, "chosen": " yes", "rejected": " no"}])
    assert [tokenizer.decode(row.ids) for row in found.rows] == [f"{prompt} yes</s>", f"{prompt} no</s>"]
    assert supervised(found, tokenizer) == [" yes</s>", " no</s>"]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("user", "one ?"), said("assistant", "what ?"), said("user", "one !")]
FROM = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]},
        {"chosen": [*ASKED, said("assistant", "yes")], "rejected": [*ASKED, said("assistant", "no")]},
        {
            "prompt": "one ?",
            "chosen": [*ASKED, said("assistant", "yes")],
            "rejected": [*ASKED, said("assistant", "no")],
        },
        {"messages": ASKED, "chosen": said("assistant", "yes"), "rejected": said("assistant", "no")},
        {"messages": ASKED, "chosen": "yes", "rejected": "no"},
        {
            "conversations": [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in ASKED],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
    ids=["explicit", "whole conversations", "prompt repeated", "one message", "texts", "from and value"],
)
def test_messages_as_responses(row: dict[str, Any], read: Callable[..., Examples], tokenizer: Any) -> None:
    found = read([row])
    assert supervised(found, tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    assert tokenizer.decode(found.rows[0].ids).count("<|im_start|>") == 4


def test_a_response_of_several_messages(read: Callable[..., Examples], tokenizer: Any) -> None:
    more = [said("assistant", "yes"), said("user", "sure ?"), said("assistant", "yes")]
    found = read([{"chosen": [*ASKED, *more], "rejected": [*ASKED, said("assistant", "no")]}])
    assert supervised(found, tokenizer) == ["yes<|im_end|>yes<|im_end|>", "no<|im_end|>"]


def test_other_names_of_the_fields(read: Callable[..., Examples], tokenizer: Any) -> None:
    row = {"ask": "one ?", "good": " yes", "bad": " no"}
    found = read([row], prompt="ask", chosen="good", rejected="bad")
    assert supervised(found, tokenizer) == [" yes</s>", " no</s>"]


def test_tokenised_pairs(read: Callable[..., Examples]) -> None:
    row = {
        "input_ids_chosen": [1, 5, 6, 7], "labels_chosen": [-100, -100, 6, 7], "s_chosen": [0, 0, 0.5, 1],
        "input_ids_rejected": [1, 5, 8], "labels_rejected": [-100, -100, 8], "s_rejected": [0, 0, 0.25],
    }  # fmt: skip
    rule = "column s: number per token; let d = sum(s * nll_on, example); loss = chosen(d) - rejected(d)"
    found = read([row, row], rule)
    assert [(row.ids, row.response, row.chosen) for row in found.rows[2:]] == [
        ([1, 5, 6, 7], [False, False, True, True], True),
        ([1, 5, 8], [False, False, True], False),
    ]
    assert [row.columns["s"] for row in found.rows[:2]] == [[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.25]]


def test_columns_per_example_and_per_pair(read: Callable[..., Examples]) -> None:
    rule = (
        "column h: bool; column source: category; column gap: number per pair; "
        "let factor = 1 if chosen(source == web) else 2; "
        "loss = (chosen(h) - rejected(h) + gap) * chosen(sum(nll_on, example)) * factor"
    )
    rows = [
        sums_row(1, h_chosen=True, h_rejected=False, gap=0.5, source_chosen="web", source_rejected="book"),
        sums_row(2, h_chosen=False, h_rejected=True, gap=1, source_chosen="book", source_rejected="book"),
    ]
    found = read(rows, rule)
    assert [row.columns["h"] for row in found.rows] == [True, False, False, True]
    assert [row.columns["gap"] for row in found.rows] == [0.5, 0.5, 1.0, 1.0]
    assert [row.columns["source"] for row in found.rows] == ["web", "book", "book", "book"]


def test_an_undeclared_column_is_of_what_the_row_has_it_of(read: Callable[..., Examples]) -> None:
    rule = DPO.replace("sum(", "sum((2 if source == web else 1) * ")
    both = read([sums_row(1, source="web"), sums_row(2, source="book")], rule)
    assert [row.columns["source"] for row in both.rows] == ["web", "web", "book", "book"]
    each = read([sums_row(1, source_chosen="web", source_rejected="book")], rule)
    assert [row.columns["source"] for row in each.rows] == ["web", "book"]


def test_a_pair_is_cut_or_dropped_as_one(read: Callable[..., Examples]) -> None:
    rows = [sums_row(i) for i in range(12)]
    whole = read(rows)
    lengths = [max(len(a.ids), len(b.ids)) for a, b in zip(whole.rows[::2], whole.rows[1::2], strict=True)]
    limit = sorted(lengths)[6]
    dropped = read(rows, limit=limit, too_long="drop")
    assert len(dropped.rows) == 2 * sum(n <= limit for n in lengths)
    assert dropped.dropped == sum(n > limit for n in lengths) > 0
    assert all(a.index == b.index for a, b in zip(dropped.rows[::2], dropped.rows[1::2], strict=True))
    prompt = next(t for t, marked in enumerate(whole.rows[0].response) if marked)
    cut = read(rows, limit=prompt + 2)
    assert len(cut.rows) % 2 == 0
    assert cut.truncated + cut.emptied > 0
    assert all(any(row.response[1:]) for row in cut.rows)


# Mistakes ---------------------------------------------------------------------------------------


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            without(sums_row(1), "rejected"),
            r"rows.jsonl:1: the rule compares two responses, and the row has no `rejected`",
        ),
        (without(sums_row(1), "prompt"), "rows.jsonl:1: a pair of responses without a prompt"),
        (
            sums_row(1, rejected=""),
            r"rows.jsonl:1 \(rejected\): a row without a response: `rejected` is empty",
        ),
        (sums_row(1, chosen=None), r"rows.jsonl:1 \(chosen\): a row without a response: `chosen` is empty"),
        (sums_row(1, rejected=3), r"rows.jsonl:1 \(rejected\): `rejected` must be text, this is a number"),
        (
            sums_row(1, chosen=[]),
            "rows.jsonl:1: a pair needs messages or a text in `chosen`, which is missing or empty",
        ),
        (
            {"chosen": ASKED, "rejected": ASKED},
            "rows.jsonl:1: a pair without two responses: `chosen` says nothing",
        ),
        ({"prompt": "x", "completion": "y"}, "no `chosen`; the fields are prompt, completion"),
    ],
)
def test_a_row_without_a_pair_is_refused(
    row: dict[str, Any], message: str, read: Callable[..., Examples]
) -> None:
    with pytest.raises(DataFault, match=message):
        read([row])


def test_a_rule_of_one_response_refuses_pairs_with_a_way_out(
    read: Callable[..., Examples], tokenizer: Any
) -> None:
    with pytest.raises(DataFault, match="--prompt FIELD --completion chosen") as refused:
        read([without(sums_row(1), "prompt") | {"ask": "one ?"}], rule="dft")
    assert "two responses" in str(refused.value)
    found = read([sums_row(1)], rule="dft", prompt="prompt", completion="chosen")
    assert supervised(found, tokenizer) == [" the answer is 4 .</s>"]


@pytest.mark.parametrize(
    ("rule", "row", "message"),
    [
        ("column h: bool", sums_row(1, h=True), r"no field `h_chosen`.*`h: \.\.\. per pair`"),
        ("column h: bool", sums_row(1, h_chosen=True), "no field `h_rejected`"),
        ("column h: bool per pair", sums_row(1, h_chosen=True, h_rejected=True), "no field `h`"),
        (
            "column h: bool",
            sums_row(1, h_chosen=True, h_rejected=1),
            r"\(rejected\): column `h` must be true or false",
        ),
        (
            "column h: bool per pair",
            sums_row(1, h=[True]),
            "column `h` is declared per pair, but the row has a list",
        ),
    ],
)
def test_columns_that_are_not_there(
    rule: str, row: dict[str, Any], message: str, read: Callable[..., Examples]
) -> None:
    with pytest.raises(DataFault, match=message):
        read([row], f"{rule}; loss = chosen(sum((2 if h else 1) * nll_on, example))")


@pytest.mark.parametrize(
    ("rule", "flags", "message"),
    [
        (DPO, {"prompt": "prompt", "completion": "chosen"}, "--completion: the rule compares two responses"),
        (
            "dft",
            {"prompt": "prompt", "chosen": "a", "rejected": "b"},
            "--chosen: the rule compares no two responses",
        ),
        (DPO, {"separator": " ", "chat": True}, "--separator: .* has nothing to separate"),
    ],
)
def test_flags_that_would_mean_nothing(
    rule: str, flags: dict[str, Any], message: str, read: Callable[..., Examples]
) -> None:
    with pytest.raises(ConfigFault, match=message):
        read([sums_row(1)], rule, **flags)


def test_the_flags_of_the_responses_go_together() -> None:
    with pytest.raises(ValueError, match="--chosen needs --rejected"):
        RowConfig(model="m", data=("d",), chosen="a")
    assert RowConfig(model="m", data=("d",), chosen="a", rejected="b", prompt="p").prompt == "p"


# Batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 3, 2)]
)
def test_the_responses_of_a_pair_are_never_parted(
    batch_size: int, accumulation: int, processes: int, read: Callable[..., Examples]
) -> None:
    rows = read([sums_row(i) for i in range(13)]).rows
    seen: list[int] = []
    for rank in range(processes):
        spread = Spread(batch_size, accumulation, processes, rank, responses=2)
        for step in step_examples(len(rows), spread, seed=3, epoch=0):
            for batch in micro_batches([rows[i] for i in step], spread, "response", {"chosen"}):
                sides = dict.fromkeys(batch.examples[:, 0].tolist(), 0)
                for index, side in zip(batch.examples[:, 0].tolist(), batch.columns["chosen"], strict=True):
                    sides[index] += 1 if side else -1
                assert not any(sides.values())
                assert len(batch.targets) <= 2 * batch_size
                seen += [
                    i
                    for i, targets in zip(batch.examples[:, 0].tolist(), batch.targets, strict=True)
                    if (targets >= 0).any()
                ]
    assert sorted(seen) == sorted([*range(13), *range(13)])


# Training ---------------------------------------------------------------------------------------


@pytest.fixture
def preferences(write: Write) -> str:
    return write(
        "preferences.jsonl", [sums_row(i, h_chosen=i % 3 == 0, h_rejected=i % 2 == 0) for i in range(13)]
    )


def run(rule: str, data: str, model: str, output: Path, **more: Any) -> list[dict[str, Any]]:
    """The lines of the log of a short run."""
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, **more}
    fixed: dict[str, Any] = {"model": model, "data": [data], "rule": rule, "output": str(output)}
    train(TrainConfig(**{"quiet": True, "device": "cpu", **fixed, **settings}))
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_the_first_step_is_dpo_by_hand(
    model: str,
    other_model: str,
    preferences: str,
    tmp_path: Path,
    read: Callable[..., Examples],
    tokenizer: Any,
) -> None:
    """Row by row and without padding; the reference is another model, so that the loss is not log 2."""
    lines = run(
        DPO, preferences, model, tmp_path / "run", batch_size=13, max_steps=1, bind={"ref": other_model}
    )
    on, ref = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model, other_model))
    rows = read([json.loads(line) for line in Path(preferences).read_text().splitlines()]).rows

    @torch.no_grad()
    def log_probability(net: Any, row: Any) -> torch.Tensor:
        ids = torch.tensor([row.ids])
        logp = net(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return logp[torch.tensor(row.response[1:])].sum()

    d = [log_probability(on, row) - log_probability(ref, row) for row in rows]
    wanted = -torch.nn.functional.logsigmoid(0.1 * (torch.stack(d[::2]) - torch.stack(d[1::2]))).mean()
    assert lines[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert abs(wanted.item() - 0.6931) > 0.01
    tokens = sum(sum(row.response[1:]) for row in rows)
    nll = -sum(log_probability(on, row).item() for row in rows) / tokens
    assert lines[0]["nll"] == pytest.approx(nll, rel=1e-5)
    assert lines[0]["supervised_tokens"] == tokens
    logp = [log_probability(on, row).item() for row in rows]
    margins = [a - b for a, b in zip(logp[::2], logp[1::2], strict=True)]
    assert lines[0]["preference_margin"] == pytest.approx(sum(margins) / 13, rel=1e-4)
    assert lines[0]["preference_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 13)
    assert 0 < sum(m > 0 for m in margins) < 13, "both cases are there"


def test_a_run_and_an_evaluation_rank_pairs_alike(
    model: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where other tokens count in the loss, which differ here. A step without a line is not ranked."""
    rows = []
    for i in range(13):
        row = {}
        for side, length in (("chosen", 1 + i % 4), ("rejected", 1 + i % 3)):
            ids = [1, *(5 + (11 * i + 3 * j + length) % 300 for j in range(3 + length))]
            row |= {f"input_ids_{side}": ids, f"labels_{side}": [-100] * 4 + ids[4:]}
        rows.append(row)
    preferences = write("tokens.jsonl", rows)
    rule = DPO.replace("sum(", "sum((1 if response else 0.5) * ").replace("let d", "over = all; let d")
    how = {"max_steps": 2, "log_steps": 2, "eval_steps": 1, "eval_data": [preferences], "accumulation": 2}
    lines = run(rule, preferences, model, tmp_path / "run", quiet=False, batch_size=3, **how)
    assert [("nll" in line, "eval_nll" in line) for line in lines] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    found = evaluate(EvalConfig(model=str(tmp_path / "run"), data=(preferences,), device="cpu", quiet=True))
    for name in ("preference_accuracy", "preference_margin"):
        assert lines[-1][f"eval_{name}"] == pytest.approx(found[name], rel=1e-5)
        assert lines[1][name] != lines[-1][f"eval_{name}"], "the step has six of the pairs"
    assert f"margin {found['preference_margin']:.4f}" in capsys.readouterr().err
    card = (tmp_path / "run/README.md").read_text()
    assert f"| held-out preference accuracy | {found['preference_accuracy']:.1%} |" in card


def test_a_run_begins_at_log_2_and_learns_the_preference(
    model: str, preferences: str, tmp_path: Path
) -> None:
    lines = run(
        DPO, preferences, model, tmp_path / "run", max_steps=12, batch_size=13, eval_data=[preferences]
    )
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["eval_loss"] < 0.6


LAYOUTS = {"8x1": (8, 1, "dense"), "2x4": (2, 4, "dense"), "4x2": (4, 2, "fused")}
RULES = {
    "dpo": DPO,
    "batch": DPO.replace("loss = ", "let s = sg(std(chosen(d), batch)); loss = ") + " / (1 + s)",
    "tokens": "let d = mean(logp_on, example); weight = sg(sigmoid(chosen(d) - rejected(d)))",
}


@pytest.mark.parametrize("name", RULES)
def test_any_layout_and_either_loss_give_the_same_parameters(
    name: str, model: str, preferences: str, tmp_path: Path
) -> None:
    logs, found = [], []
    for layout, (batch_size, accumulation, loss) in LAYOUTS.items():
        spread = {"batch_size": batch_size, "accumulation": accumulation, "loss": loss}
        logs.append(run(RULES[name], preferences, model, tmp_path / layout, **spread))
        found.append(weights(tmp_path / layout))
    for log, parameters in zip(logs[1:], found[1:], strict=True):
        for one, other in zip(logs[0], log, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        torch.testing.assert_close(found[0], parameters, rtol=0, atol=1e-6)
    assert not torch.equal(found[0], weights(Path(model)))


def test_two_processes_give_the_parameters_of_one(model: str, preferences: str, tmp_path: Path) -> None:
    shared = {
        "model": model, "data": [preferences], "rule": DPO, "max_steps": 3, "learning_rate": 1e-3,
        "device": "cpu", "quiet": True,
    }  # fmt: skip
    two = {**shared, "output": str(tmp_path / "two"), "batch_size": 2, "accumulation": 2}
    ran = torchrun([two], tmp_path)
    for rank in (0, 1):
        told = Path(f"{two['output']}.rank{rank}.json")
        assert told.exists(), ran.stderr[-2000:]
        assert json.loads(told.read_text()) == {"rank": rank, "world": 2, "step": 3}
    run(DPO, preferences, model, tmp_path / "one")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-6)


def test_a_run_goes_on_where_it_stopped(model: str, preferences: str, tmp_path: Path) -> None:
    whole = run(DPO, preferences, model, tmp_path / "whole", max_steps=4, batch_size=4)
    run(DPO, preferences, model, tmp_path / "parts", max_steps=4, batch_size=4, save_steps=2)
    (tmp_path / "parts/checkpoints/step-4").rename(tmp_path / "gone")
    again = run(
        DPO, preferences, model, tmp_path / "parts", max_steps=4, batch_size=4, save_steps=2, resume=True
    )
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in whole])


def test_scores_say_which_response_a_row_is(
    model: str, preferences: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow import parquet

    out = str(tmp_path / "scores.parquet")
    rule = "weight = p_ref * (2 if chosen(length) > rejected(length) else 1)"
    words = ["score", "--model", model, "--data", preferences, "--rule", rule, "--out", out, "--quiet"]
    assert main(words) == 0, capsys.readouterr().err
    rows = parquet.read_table(out).to_pylist()
    assert [row["chosen"] for row in rows] == [True, False] * 13
    assert [row["row"] for row in rows] == [i // 2 for i in range(26)]


def test_a_token_rule_on_pairs_says_what_to_do(
    model: str, preferences: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--model",
        model,
        "--data",
        preferences,
        "--rule",
        "dft",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(words) != 0
    told = capsys.readouterr().err
    assert "--completion chosen" in told
    assert "Traceback" not in told
    assert main([*words, "--prompt", "prompt", "--completion", "chosen", "--max-steps", "1", "--quiet"]) == 0


# Real data --------------------------------------------------------------------------------------

SHARED = os.environ.get("PRIORITY_DATA", "")
needs_data = pytest.mark.skipif(
    not Path(SHARED, "models/stories260K").is_dir(), reason="PRIORITY_DATA does not name the data folder"
)


@needs_data
@pytest.mark.parametrize("rule", ["tis_dpo", "fdpo", "dpo"])
def test_real_preferences_train(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps from the command line; F-DPO reads a rejected response that is longer as hallucinated."""
    story = str(Path(SHARED, "models/stories260K"))
    rows = json.loads(Path(SHARED, "labelled/rasbt_preference.json").read_text())[:40]
    rows = [
        row | {"h_chosen": False, "h_rejected": len(row["rejected"]) > len(row["chosen"])} for row in rows
    ]
    data = tmp_path / "preferences.json"
    data.write_text(json.dumps(rows))
    other = tmp_path / "other"
    run("sft", str(Path(SHARED, "sft/rasbt_instruction_data.json")), story, other, max_steps=2)
    where = [
        "--model",
        story,
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--eval-data",
        str(data),
    ]
    how = ["--rule", rule, "--max-steps", "4", "--batch-size", "4", "--accumulation", "2"]
    bound = ["--bind", f"positive={other}", "--bind", f"negative={story}"] if rule == "tis_dpo" else []
    assert main(["train", *where, *how, *bound, "--learning-rate", "1e-3", "--device", "cpu"]) == 0
    assert "data: 40 pairs" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    if rule == "dpo":
        assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert all(line["loss"] > 0 for line in lines[:4])
    assert lines[-1]["eval_loss"] < lines[0]["loss"]


@needs_data
def test_real_conversations_are_read(tmp_path: Path, read: Callable[..., Examples], tokenizer: Any) -> None:
    rows = json.loads(Path(SHARED, "labelled/dpo_en_demo.json").read_text())[:60]
    found = read(rows)
    assert len(found.rows) == 120
    for row, text in zip(rows, supervised(found, tokenizer)[::2], strict=True):
        assert text == row["chosen"]["value"].strip() + "<|im_end|>" or text.startswith(
            row["chosen"]["value"][:20]
        )


def test_collate_tells_the_sides(read: Callable[..., Examples]) -> None:
    batch = collate(read([sums_row(1)]).rows, "response", {"chosen"})
    assert batch.columns["chosen"] == [True, False]
    assert batch.examples[:, 0].tolist() == [0, 0]
