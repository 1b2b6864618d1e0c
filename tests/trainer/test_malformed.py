"""Malformed data files, configs and flags: each answer names file and line, field or flag."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from priority_dsl import compile_rule
from tests.trainer.malformed import Case, bad_cells, bad_configs, bad_files, bad_rows, distinct
from trainer.cli import main
from trainer.columns import ColumnReader
from trainer.config import TrainConfig
from trainer.data import Examples, Reader

GOOD = {"prompt": "what is 1 ?", "completion": " 1"}
Answer = tuple[int, str]


def line(row: object) -> str:
    return json.dumps(row) + "\n"


# name -> (file name, content, rule, what the answer must hold); the first row of most files is right
BAD_DATA: dict[str, tuple[str, str | bytes, str, str]] = {
    "cut json line": ("d.jsonl", line(GOOD) + '{"prompt": "a", "comp', "dft", "d.jsonl:2: malformed JSON"),
    "not json": ("d.jsonl", line(GOOD) + "prompt: a\n", "dft", "d.jsonl:2: malformed JSON"),
    "a list as row": ("d.jsonl", line(GOOD) + "[1, 2]\n", "dft", "d.jsonl:2: a row must be an object"),
    "nested too deeply": ("d.jsonl", line(GOOD) + "[" * 100_000 + "\n", "dft", "d.jsonl:2: malformed JSON"),
    "empty file": ("d.jsonl", "", "dft", "d.jsonl: the file is empty"),
    "blank file": ("d.jsonl", "\n \n", "dft", "d.jsonl: the file is empty"),
    "no rows": ("d.json", "[]", "dft", "d.json: holds no rows"),
    "not UTF-8": (
        "d.jsonl",
        line(GOOD).encode() + b'{"prompt": "\xe4"}\n',
        "dft",
        "d.jsonl:2: not UTF-8 (byte 0xe4)",
    ),
    "half a surrogate": (
        "d.jsonl",
        line(GOOD) + '{"prompt": "\\ud800", "completion": "b"}\n',
        "dft",
        "d.jsonl:2: `prompt`",
    ),
    "json lines named json": ("d.json", line(GOOD) * 2, "dft", "d.json:2: malformed JSON: Extra data"),
    "json object": ("d.json", line(GOOD), "dft", "a .json file holds a list of rows"),
    "damaged gzip": (
        "d.jsonl.gz",
        gzip.compress(line(GOOD).encode() * 99)[:40],
        "dft",
        "d.jsonl.gz: damaged gzip",
    ),
    "damaged parquet": ("d.parquet", b"PAR1 not really", "dft", "d.parquet: not a readable parquet file"),
    "unknown kind of file": ("d.txt", "a", "dft", "d.txt: unknown kind of file `.txt`"),
    "csv cells": (
        "d.csv",
        "prompt,completion\na,b\na,b,c\n",
        "dft",
        "d.csv:3: 3 cells, but the header names 2",
    ),
    "csv header": ("d.csv", "prompt,prompt\na,b\n", "dft", "d.csv:1: column `prompt` appears twice"),
    "csv quote": ("d.csv", 'prompt,completion\na,"b\n', "dft", "d.csv:2: malformed csv"),
    "unknown fields": (
        "d.jsonl",
        line({"q": "a", "a": "b"}),
        "dft",
        "d.jsonl:1: the fields q, a are not a known layout",
    ),
    "no response field": (
        "d.jsonl",
        line({"prompt": "a", "x": "b"}),
        "dft",
        "d.jsonl:1: a row without a response",
    ),
    "response missing": (
        "d.jsonl",
        line(GOOD) + line({"prompt": "a"}),
        "dft",
        "d.jsonl:2: a row without a response",
    ),
    "response empty": (
        "d.jsonl",
        line(GOOD) + line({**GOOD, "completion": ""}),
        "dft",
        "d.jsonl:2: a row without",
    ),
    "response null": (
        "d.jsonl",
        line(GOOD) + line({**GOOD, "completion": None}),
        "dft",
        "d.jsonl:2: a row without",
    ),
    "prompt missing": (
        "d.jsonl",
        line(GOOD) + line({"completion": "a"}),
        "dft",
        "d.jsonl:2: no field `prompt`",
    ),
    "prompt a number": (
        "d.jsonl",
        line(GOOD) + line({**GOOD, "prompt": 3}),
        "dft",
        "d.jsonl:2: `prompt` must be text",
    ),
    "prompt a list": ("d.jsonl", line({**GOOD, "prompt": []}), "dft", "d.jsonl:1: `prompt` is a list"),
    "messages no list": ("d.jsonl", line({"messages": "hi"}), "dft", "d.jsonl:1: `messages` must be a list"),
    "message without role": (
        "d.jsonl",
        line({"messages": [{"content": "a"}]}),
        "dft",
        "d.jsonl:1: message 1 must be",
    ),
    "unknown role": (
        "d.jsonl",
        line({"messages": [{"role": "bot", "content": "a"}]}),
        "dft",
        "unknown role 'bot'",
    ),
    "no assistant": (
        "d.jsonl",
        line({"messages": [{"role": "user", "content": "a"}]}),
        "dft",
        "d.jsonl:1: a row without",
    ),
    "ids no list": (
        "d.jsonl",
        line({"input_ids": 3}),
        "dft",
        "d.jsonl:1: `input_ids` must be a list of integers",
    ),
    "ids no integers": (
        "d.jsonl",
        line({"input_ids": [1, "a"]}),
        "dft",
        "d.jsonl:1: `input_ids` must be a list",
    ),
    "id outside": ("d.jsonl", line({"input_ids": [1, 320]}), "dft", "d.jsonl:1: token id 320 is outside"),
    "labels too short": (
        "d.jsonl",
        line({"input_ids": [1, 2], "labels": [1]}),
        "dft",
        "d.jsonl:1: 1 labels for 2",
    ),
    "labels shifted": (
        "d.jsonl",
        line({"input_ids": [5, 6], "labels": [6, 7]}),
        "dft",
        "d.jsonl:1: label 6 at token 0",
    ),
    "nothing supervised": (
        "d.jsonl",
        line({"input_ids": [5, 6], "labels": [5, -100]}),
        "dft",
        "d.jsonl:1: a row without",
    ),
    "padded row": (
        "d.jsonl",
        line({"input_ids": [5, 6], "attention_mask": [1, 0]}),
        "dft",
        "d.jsonl:1: the row is padded",
    ),
    "column missing": ("d.jsonl", line(GOOD), "-1 if label == neg", "d.jsonl:1: no field `label`"),
    "column misspelt": (
        "d.jsonl",
        line({**GOOD, "lable": "neg"}),
        "-1 if label == neg",
        "did you mean `lable`?",
    ),
    "column value missing": (
        "d.jsonl",
        line({**GOOD, "label": "neg"}) + line({**GOOD, "label": None}),
        "-1 if label == neg",
        "d.jsonl:2: column `label` has no value",
    ),
    "category unknown": (
        "d.jsonl",
        line({**GOOD, "label": "bad"}),
        "-1 if label == neg",
        "`label` is never `neg`",
    ),
    "category undeclared": (
        "d.jsonl",
        line({**GOOD, "label": "bad"}),
        "column label: {pos, neg}; weight = -1 if label == neg",
        "d.jsonl:1: column `label` is `bad`, which the rule does not declare",
    ),
    "category a number": (
        "d.jsonl",
        line({**GOOD, "label": 1}),
        "-1 if label == neg",
        "d.jsonl:1: column `label` must be",
    ),
    "number a text": (
        "d.jsonl",
        line({**GOOD, "w": "much"}),
        "column w: number; weight = w",
        "d.jsonl:1: column `w` must be",
    ),
    "number not finite": (
        "d.jsonl",
        '{"prompt": "a", "completion": "b", "w": NaN}\n',
        "column w: number; weight = w",
        "`w` is nan",
    ),
    "number out of range": (
        "d.jsonl",
        line({**GOOD, "w": 0.5}) + line({**GOOD, "w": 2}),
        "column w: number in [0, 1]; weight = w",
        "d.jsonl:2: column `w` is 2, outside the range [0, 1]",
    ),
    "bool a number": (
        "d.jsonl",
        line({**GOOD, "ok": 1}),
        "column ok: bool; weight = 1 if ok else 0",
        "`ok` must be true or",
    ),
    "list per example": (
        "d.jsonl",
        line({**GOOD, "w": [1]}),
        "column w: number; weight = w",
        "declared per example",
    ),
    "per token in text": (
        "d.jsonl",
        line({**GOOD, "w": [1]}),
        "column w: number per token; weight = w",
        "d.jsonl:1: column `w` has a value per token, which needs rows that are tokenised",
    ),
    "per token too short": (
        "d.jsonl",
        line({"input_ids": [5, 6], "w": [1]}),
        "column w: number per token; weight = w",
        "d.jsonl:1: column `w` has 1 values for 2 input ids",
    ),
    "role of tokens": (
        "d.jsonl",
        line({"input_ids": [5, 6]}),
        "role == assistant",
        "d.jsonl:1: the rule reads `role`",
    ),
}


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> Answer:
    code = main(words)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert "(unexpected;" not in captured.err, "every mistake has a message of its own"
    return code, captured.err


@pytest.mark.parametrize("case", BAD_DATA)
def test_malformed_data(case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    name, content, rule, message = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["train", "--model", model, "--data", name, "--rule", rule, "--max-steps", "1", "--device", "cpu"]
    code, shown = answer(words, capsys)
    assert message in shown
    assert code == 1
    assert not Path("priority-run").exists(), "nothing is written before all is known to be right"


# what is changed in a right command line -> exit code, what the answer must hold
BAD_COMMANDS: dict[str, tuple[dict[str, str | None], int, str]] = {
    "no data": ({"--data": None}, 2, "--data: is missing"),
    "no rule": ({"--rule": None}, 2, "--rule: is missing"),
    "no model": ({"--model": None}, 2, "--model: is missing"),
    "missing data file": ({"--data": "none.jsonl"}, 1, "none.jsonl: no such file"),
    "data is a folder": ({"--data": "."}, 1, ".: is a folder"),
    "missing model folder": ({"--model": "./none"}, 1, "--model ./none: no such folder"),
    "model is a file": ({"--model": "d.jsonl"}, 1, "--model d.jsonl: is a file"),
    "model folder is empty": ({"--model": "empty"}, 1, "--model empty: the folder has no config.json"),
    "missing reference": (
        {"--rule": "mass(ref)", "--bind": "ref=./none"},
        1,
        "--bind ref=./none: no such folder",
    ),
    "unread binding": ({"--bind": "good=empty"}, 2, "does not read a model `good`"),
    "unbound model": ({"--rule": 'model good "g"; weight = p(good)'}, 2, "bind it with --bind good=FOLDER"),
    "missing held-out file": ({"--eval-data": "none.jsonl"}, 1, "none.jsonl: no such file"),
    "fields that are not there": (
        {"--prompt": "q", "--completion": "a"},
        1,
        "d.jsonl:1: a row without a response: `a`",
    ),
    "mistake in the rule": ({"--rule": "p_on * p_onn"}, 2, "did you mean `p_on`"),
    "syntax of the rule": ({"--rule": "p_on *"}, 2, "error[PD1"),
    "rule file missing": ({"--rule": "none.rule"}, 2, "none.rule"),
    "rule name unknown": ({"--rule": "dfft"}, 2, "dft"),
    "parameter unknown": ({"--set": "tau=1"}, 2, "tau"),
    "parameter out of range": ({"--rule": "prift_mass", "--set": "tau=2"}, 2, "tau"),
    "parameter missing": ({"--rule": "p_on ** (1/tau)"}, 2, "tau"),
    "separator for chat": ({"--chat": "", "--separator": "x"}, 2, "--separator"),
    "template file missing": (
        {"--chat-template": "none.jinja"},
        2,
        "--chat-template none.jinja: cannot be read",
    ),
    "output is a file": ({"--output": "d.jsonl"}, 2, "--output d.jsonl: is a file"),
    "output is not empty": ({"--output": "full"}, 2, "--output full: is not empty"),
    "output is no run": ({"--output": "full", "--overwrite": ""}, 2, "--output full: holds no run"),
    "config file missing": ({"--config": "none.yaml"}, 2, "--config none.yaml: cannot be read"),
    "config not YAML": ({"--config": "bad.yaml"}, 2, "bad.yaml:2: malformed YAML"),
    "config field": (
        {"--config": "field.yaml"},
        2,
        "field.yaml:2: max_stepz: unknown field; did you mean `max_steps`?",
    ),
    "config value": ({"--config": "value.yaml"}, 2, "value.yaml:1: seed: input should be a valid integer"),
    "all rows too long": ({"--max-length": "2", "--too-long": "drop"}, 1, "no row is left of 1"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_malformed_commands(case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    changes, exit_code, message = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text(line(GOOD))
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("bad.yaml").write_text("seed: 1\n  rule: [\n")
    Path("field.yaml").write_text("seed: 1\nmax_stepz: 2\n")
    Path("value.yaml").write_text("seed: often\n")
    right = {"--model": model, "--data": "d.jsonl", "--rule": "dft", "--max-steps": "1", "--device": "cpu"}
    flags = {**right, **changes}
    words = [
        w for flag, value in flags.items() if value is not None for w in ([flag, value] if value else [flag])
    ]
    code, shown = answer(["train", *words], capsys)
    assert message in shown
    assert code == exit_code
    assert Path("full/mine.txt").read_text() == "mine"


def test_a_slow_tokenizer_and_a_tokenizer_without_end_token(model: str, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = tmp_path / "d.jsonl"
    data.write_text(line(GOOD))
    words = [
        "train",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--rule",
        "dft",
        "--output",
        str(tmp_path / "o"),
    ]
    code, shown = answer([*words, "--device", "cpu"], capsys)
    assert code == 1
    assert "no end token" in shown


def test_a_tokenizer_of_another_model(model: str, make_folder: Callable[..., str], tmp_path: Path, capsys):
    folder = make_folder(tmp_path / "small", seed=0, vocab_size=50)
    data = tmp_path / "d.jsonl"
    data.write_text(line(GOOD))
    words = [
        "train",
        "--model",
        folder,
        "--data",
        str(data),
        "--rule",
        "dft",
        "--output",
        str(tmp_path / "o"),
    ]
    code, shown = answer([*words, "--device", "cpu"], capsys)
    assert code == 1
    assert "tokenizer and model do not belong together" in shown


def test_a_process_of_its_own_leaves_with_the_code_and_one_line(tmp_path: Path):
    words = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        "--model",
        "./none",
        "--data",
        "none.jsonl",
        "--rule",
        "dft",
    ]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(words, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.strip() == "error: --model ./none: no such folder"
    assert found.stdout == ""


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(Exception, match="no such folder"):
        main(
            [
                "train",
                "--model",
                "./none",
                "--data",
                "none.jsonl",
                "--rule",
                "dft",
                "--debug",
                "--device",
                "cpu",
            ]
        )


# Generated --------------------------------------------------------------------------------------

ROWS = distinct([*bad_rows(variations=2), *bad_cells()])
CASES = distinct([*ROWS, *bad_files(variations=2)])
CONFIGS = [*bad_configs()]


def test_there_are_enough_of_them():
    assert len(CASES) + len({content for _, content, _ in CONFIGS}) >= 250, "beside those by hand"


def refusal(case: Case, model: str, capsys: pytest.CaptureFixture[str]) -> Answer:
    Path(case.file).write_bytes(case.content)
    words = ["train", "--model", model, "--data", case.file, "--rule", case.rule, "--max-steps", "1"]
    return answer([*words, "--device", "cpu"], capsys)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generated_files(case: Case, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, shown = refusal(case, model, capsys)
    assert code == 1, shown
    assert re.match(f"error: {re.escape(case.names)}[: ]", shown), "the message names file and line"
    assert len(shown) < 1000, "and says it in a few lines"
    assert [path.name for path in tmp_path.iterdir()] == [case.file], "nothing was written"


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_the_good_rows_are_those_of_a_file_without_the_bad_one(
    case: Case, model: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path(case.file).write_bytes(case.content)
    rule = compile_rule(case.rule)

    def read() -> Examples:
        config = TrainConfig(model=model, data=(case.file,), rule=case.rule, bad_rows="skip")
        columns = ColumnReader(rule.columns)
        roles, pairs = "role" in rule.requires.columns, rule.checked.reads_pairs
        return Reader(config, tokenizer, 320, 64, columns, roles=roles, pairs=pairs).read(config.data)

    found = read()
    assert [bad.place for bad in found.bad] == [case.names]
    assert f"1 bad {'pair' if rule.checked.reads_pairs else 'row'} left out:\n  {case.names}" in str(found)
    assert case.clean is not None
    Path(case.file).write_bytes(case.clean)
    clean = read()
    assert not clean.bad
    assert [replace(row, place="") for row in found.rows] == [replace(row, place="") for row in clean.rows]
    assert found.fingerprint == clean.fingerprint


@pytest.mark.parametrize(("name", "content", "named"), CONFIGS, ids=[name[:40] for name, *_ in CONFIGS])
def test_generated_configs(
    name: str, content: bytes, named: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text(line(GOOD))
    Path("c.yaml").write_bytes(content.replace(b"MODEL", model.encode()))
    code, shown = answer(["train", "--config", "c.yaml"], capsys)
    assert code == 2, shown
    assert named in shown
    assert len(shown) < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "d.jsonl"]


def test_all_bad_rows_are_listed_up_to_a_number_then_counted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{**GOOD, "completion": ""} if i % 2 else GOOD for i in range(1, 601)]
    Path("d.jsonl").write_text("".join(map(line, rows)))
    words = ["train", "--model", model, "--data", "d.jsonl", "--rule", "dft", "--max-steps", "1"]
    code, shown = answer([*words, "--device", "cpu"], capsys)
    listed = shown.splitlines()
    assert code == 1
    assert listed[:200] == [
        f"error: d.jsonl:{2 * i + 1}: a row without a response: `completion` is empty" for i in range(200)
    ]
    assert listed[200:] == [
        "error: and 100 more",
        "error: 300 of 600 rows cannot be used: mend them, or leave them out with --bad-rows skip",
    ]


def test_a_run_that_skips_bad_rows_is_that_of_the_good_ones(model: str, tmp_path: Path, capsys):
    """Bit for bit, chance and order included; the summary says what was left out."""
    bad = {4: "[", 9: line({"prompt": "a"}).strip(), 10: line({**GOOD, "completion": "\ud800"}).strip()}
    good = [line({**GOOD, "completion": f" {i}"}).strip() for i in range(12)]
    lines = [*good]
    for place, text in bad.items():
        lines.insert(place, text)
    (tmp_path / "clean.jsonl").write_text("\n".join(good))
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    weights = {}
    for name in ("clean", "bad"):
        data, output = str(tmp_path / f"{name}.jsonl"), str(tmp_path / name)
        words = ["train", "--model", model, "--data", data, "--output", output, "--rule", "bernoulli(0.5)"]
        code, said = answer(
            [*words, "--bad-rows", "skip", "--batch-size", "4", "--device", "cpu", "--eval-data", data],
            capsys,
        )
        assert code == 0, said
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert ("3 bad rows left out" in said) == (name == "bad")
    assert weights["bad"] == weights["clean"]
    assert weights["bad"] != (Path(model) / "model.safetensors").read_bytes()
    summary = json.loads((tmp_path / "bad" / "data.json").read_text())
    assert summary["data"]["rows"] == 12
    assert summary["data"]["dropped"] == {"bad": 3, "too_long": 0, "response_cut_off": 0, "keep": 0}
    places = [text.removeprefix(str(tmp_path)).partition(": ")[0] for text in summary["data"]["bad_rows"]]
    assert places == [f"/bad.jsonl:{place + 1}" for place in bad]
    assert summary["held_out"]["dropped"]["bad"] == 3
    assert summary["data"]["tokens"] > summary["data"]["supervised_tokens"] > 0 < summary["data"]["longest"]


def test_no_row_left_is_a_fault_even_where_bad_rows_are_skipped(model: str, tmp_path: Path, capsys):
    (tmp_path / "d.jsonl").write_text(line({**GOOD, "completion": ""}) * 3)
    words = [
        "train",
        "--model",
        model,
        "--data",
        str(tmp_path / "d.jsonl"),
        "--rule",
        "dft",
        "--device",
        "cpu",
    ]
    code, shown = answer([*words, "--bad-rows", "skip", "--output", str(tmp_path / "o")], capsys)
    assert code == 1
    assert "no row is left of 3" in shown
    assert "d.jsonl:3: a row without a response" in shown


def test_a_layout_is_taken_from_the_first_row_that_shows_one(model: str, tmp_path: Path, capsys):
    (tmp_path / "d.jsonl").write_text("{\n" + line({"note": "a"}) + line(GOOD) * 2)
    words = [
        "train",
        "--model",
        model,
        "--data",
        str(tmp_path / "d.jsonl"),
        "--rule",
        "dft",
        "--device",
        "cpu",
    ]
    code, shown = answer([*words, "--bad-rows", "skip", "--output", str(tmp_path / "o")], capsys)
    assert code == 0
    assert "2 bad rows left out" in shown
    assert "d.jsonl:2: the fields note are not a known layout" in shown


# Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe.jsonl", "pipe.jsonl: is no regular file"),
        ("folder.jsonl", "folder.jsonl: is a folder"),
        ("dangling.jsonl", "dangling.jsonl: no such file"),
        ("loop.jsonl", "loop.jsonl: cannot be read"),
        ("d.jsonl/d.jsonl", "d.jsonl/d.jsonl: cannot be read"),
        ("x" * 5000 + ".jsonl", "xxx: cannot be read"),
        ("locked.jsonl", "locked.jsonl: cannot be read: [Errno 13]"),
        ("../none/../none.jsonl", "../none/../none.jsonl: no such file"),
        ("/dev/zero", "/dev/zero: is no regular file"),
        ("owner/name:config:more", "owner/name:config:more: no such file"),
    ],
)
def test_paths_that_lead_to_no_data(
    source: str, message: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.mkfifo("pipe.jsonl")
    Path("folder.jsonl").mkdir()
    Path("dangling.jsonl").symlink_to("nowhere.jsonl")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    for name in ("d.jsonl", "locked.jsonl"):
        Path(name).write_text(line(GOOD))
    opened = Path.open

    def locked(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == "locked.jsonl":  # file modes do not stop root, who may run this
            raise PermissionError(13, "Permission denied")
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", locked)
    code, shown = answer(
        ["train", "--model", model, "--data", source, "--rule", "dft", "--device", "cpu"], capsys
    )
    assert code == 1
    assert message in shown


def test_numbers_of_any_size_take_no_memory(model: str, tmp_path: Path, capsys):
    (tmp_path / "d.jsonl").write_text(line(GOOD) * 3)
    words = [
        "train",
        "--model",
        model,
        "--data",
        str(tmp_path / "d.jsonl"),
        "--rule",
        "dft",
        "--device",
        "cpu",
    ]
    large = [
        "--batch-size",
        "1000000000000",
        "--accumulation",
        "1000000000000",
        "--max-length",
        "1000000000000",
    ]
    code, shown = answer([*words, *large, "--max-steps", "1", "--output", str(tmp_path / "o")], capsys)
    assert code == 0, shown


def test_a_row_of_a_million_characters(model: str, tmp_path: Path, capsys):
    rows = [
        GOOD,
        {"prompt": "a", "completion": " b" * 500_000},
        {"prompt": "a" * 1_000_000, "completion": " b"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(map(line, rows)))
    words = [
        "train",
        "--model",
        model,
        "--data",
        str(tmp_path / "d.jsonl"),
        "--rule",
        "dft",
        "--device",
        "cpu",
    ]
    code, shown = answer([*words, "--output", str(tmp_path / "o")], capsys)
    assert code == 0, shown
    assert "1 row over 64 tokens truncated; 1 row dropped whose response was beyond token 64" in shown
