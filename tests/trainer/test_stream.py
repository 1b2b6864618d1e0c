"""A stream gives the steps that the seed says, on any layout, after a resume too; it never holds all rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.config import TrainConfig
from trainer.faults import BadRows, ConfigFault
from trainer.flags import read_config
from trainer.stream import shuffled
from trainer.train import train

LINES = 30
RULE = "column ok: bool; weight = p_on if ok else 0.5"


@pytest.fixture
def stream(write: Callable[..., str]) -> str:
    """A file of 30 rows, of which the sixth is bad."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"what is {i} + {i * 3} ?", "completion": f" the answer is {4 * i}", "ok": i % 3 > 0}
        for i in range(LINES)
    ]
    rows[5]["completion"] = ""
    return write("stream.jsonl", rows)


@pytest.fixture
def run(model: str, stream: str, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Trains on the stream, and returns the lines of the log."""

    def to_log(output: str, **changes: Any) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {
            "model": model, "data": stream, "rule": RULE, "output": str(tmp_path / output),
            "max_steps": 12, "batch_size": 4, "streaming": True, "bad_rows": "skip", "shuffle_buffer": 7,
            "device": "cpu", "learning_rate": 1e-3, "cache": str(tmp_path / "cache"), "quiet": True,
        }  # fmt: skip
        settings |= changes
        if not settings["streaming"]:
            del settings["shuffle_buffer"]
        train(TrainConfig(**settings))
        return [json.loads(line) for line in (tmp_path / output / "log.jsonl").read_text().splitlines()]

    return to_log


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in log]


def test_a_stream_ends_an_epoch_and_begins_the_next_in_another_order(run: Any):
    log = run("out")
    assert [line["epoch"] for line in log] == [0] * 8 + [1] * 4, "29 rows in steps of 4"
    assert log[0]["tokens"] > log[7]["tokens"], "the last step of an epoch has the row that is left"
    assert losses(log)[:4] != losses(log)[8:]


def test_one_buffer_for_all_rows_and_a_step_of_all_rows_equal_training_in_memory(run: Any):
    whole = {"batch_size": 29, "max_steps": 3}
    streamed = run("streamed", **whole, shuffle_buffer=100)
    in_memory = run("memory", **whole, streaming=False)
    assert losses(streamed) == pytest.approx(losses(in_memory), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_layout_of_a_step_changes_nothing(batch_size: int, run: Any):
    other = run("other", batch_size=batch_size, accumulation=4 // batch_size)
    assert losses(other) == pytest.approx(losses(run("one")), abs=1e-6)


def test_a_resumed_stream_gives_the_rows_that_it_would_have_given(run: Any, tmp_path: Path, stream: str):
    whole = run("whole")
    run("half", save_steps=3, max_steps=9, schedule="constant")
    straight = run("straight", schedule="constant")
    assert losses(run("half", save_steps=3, resume=True, schedule="constant")) == losses(straight)
    assert losses(whole) != losses(straight)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "straight")]
    assert weights[0] == weights[1]
    summary = json.loads((tmp_path / "half" / "data.json").read_text())["data"]
    assert (summary["rows"], summary["dropped"]["bad"]) == (29, 1), "rows are counted once, in the first pass"


def test_a_resumed_stream_of_other_rows_is_refused(run: Any, stream: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.CHUNK", 8)  # the first rows alone are looked at before
    run("half", save_steps=3, max_steps=6)
    lines = Path(stream).read_text().splitlines(keepends=True)
    Path(stream).write_text("".join([*lines[:12], lines[13], lines[12], *lines[14:]]))
    with pytest.raises(ConfigFault, match="--resume: the stream is not the one that the run began with"):
        run("half", resume=True, save_steps=3)


def test_a_bad_row_stops_a_stream_when_it_comes(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(BadRows, match=r"stream.jsonl:6: a row without a response"):
        run("out", bad_rows="refuse")
    assert not (tmp_path / "out").exists(), "it was among the first rows"
    monkeypatch.setattr("trainer.data.CHUNK", 1)
    with pytest.raises(BadRows, match=r"stream.jsonl:6: a row without a response"):
        run("out", bad_rows="refuse", shuffle_buffer=1)
    assert (tmp_path / "out" / "log.jsonl").read_text().count("\n") == 1, "the first step was taken"


def test_keep_and_stored_columns_that_need_no_model_are_of_each_row(run: Any):
    options = {"rule": "column ok: bool; keep = ok; weight = p_on", "batch_size": 40, "max_steps": 2}
    streamed = run("streamed", **options, shuffle_buffer=100)
    in_memory = run("memory", **options, streaming=False)
    assert losses(streamed) == pytest.approx(losses(in_memory), abs=1e-6)


def test_a_frozen_model_runs_at_every_step(run: Any):
    options = {"rule": "p(ref)", "batch_size": 29, "max_steps": 2, "shuffle_buffer": 100}
    streamed = run("streamed", **options, online_reference=True)
    in_memory = run("memory", **options, streaming=False)
    assert losses(streamed) == pytest.approx(losses(in_memory), abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("p(ref)", r"nll\(ref\) would be computed for all rows before training; with --online-reference"),
        ("p(ref) / mean(p(ref), dataset)", "the rule reads numbers of the whole data set"),
        ("keep = mean(p(ref), example) > 0.1; weight = 1", r"frozen models \(ref\) choose the examples"),
    ],
)
def test_a_rule_that_needs_all_rows_first_is_refused_with_a_way_out(rule: str, reason: str, run: Any):
    with pytest.raises(ConfigFault, match=f"--streaming: {reason}"):
        run("out", rule=rule)


def test_packed_files_and_tables_stream_too(run: Any, stream: str, tmp_path: Path):
    import pyarrow.parquet

    rows = [json.loads(line) for line in Path(stream).read_text().splitlines()]
    packed, table = tmp_path / "s.jsonl.gz", tmp_path / "s.parquet"
    packed.write_bytes(gzip.compress(Path(stream).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    expected = losses(run("plain", max_steps=3))
    assert losses(run("packed", data=str(packed), max_steps=3)) == expected
    assert losses(run("table", data=str(table), max_steps=3)) == expected


def test_a_named_data_set_is_asked_for_a_stream(run: Any, stream: str, monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        return [json.loads(line) for line in Path(stream).read_text().splitlines()]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert losses(run("named", data="owner/name@train", max_steps=3)) == losses(run("plain", max_steps=3))
    assert set(asked) == {("owner/name", None, "train", True)}


def test_rows_are_read_when_they_are_needed():
    taken = []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield number

    order = shuffled(rows(), 10, seed=1)
    first = [next(order) for _ in range(5)]
    assert len(taken) == 15
    found = [*first, *order]
    assert sorted(found) == list(range(1000))
    assert found != list(range(1000))
    assert found == list(shuffled(iter(range(1000)), 10, seed=1))
    assert found != list(shuffled(iter(range(1000)), 10, seed=2))
    assert list(shuffled(iter(range(50)), 1, seed=1)) == list(range(50)), "a buffer of one row"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--streaming"], "--streaming needs --max-steps"),
        (["--streaming", "--max-steps", "3", "--epochs", "1"], "no --epochs"),
        (["--streaming", "--max-steps", "3", "--packing"], "--packing"),
        (["--shuffle-buffer", "3"], "--shuffle-buffer needs --streaming"),
    ],
)
def test_flags_that_a_stream_cannot_follow_are_refused(words: list[str], reason: str):
    with pytest.raises(ConfigFault, match=reason):
        read_config(TrainConfig, ["--model", "m", "--data", "d.jsonl", "--rule", "dft", *words], "p", "", "")


def test_what_was_left_out_of_a_stream_is_said(model: str, stream: str, tmp_path: Path, capsys: Any):
    words = ["--rule", "dft", "--max-steps", "1", "--device", "cpu", "--streaming", "--bad-rows", "skip"]
    assert main(["train", "--model", model, "--data", stream, "--output", str(tmp_path / "o"), *words]) == 0
    said = capsys.readouterr().err
    assert f"  {stream}:6: a row without a response: `completion` is empty" in said
    assert "rows of the stream were read, 1 bad ones left out" in said
    summary = json.loads((tmp_path / "o" / "data.json").read_text())["data"]
    assert summary["bad_rows"] == [f"{stream}:6: a row without a response: `completion` is empty"]
