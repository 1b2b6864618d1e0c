"""Flags and YAML become one config, exactly as written; every mistake names its flag, or file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import EvalConfig, TrainConfig
from trainer.faults import ConfigFault
from trainer.flags import read_config

NEEDED = ["--model", "m", "--data", "d.jsonl", "--rule", "dft"]


def config(*words: str, model: Any = TrainConfig) -> Any:
    return read_config(model, words, "priority train", "Train.", "priority train ...")


def refused(*words: str, model: Any = TrainConfig) -> list[str]:
    with pytest.raises(ConfigFault) as caught:
        config(*words, model=model)
    return str(caught.value).splitlines()


def test_flags_fill_the_config():
    found = config(*NEEDED, "--data", "e.jsonl", "--set", "tau=2", "--set", "w=1e-3", "--bind", "good=a=b",
                   "--max-steps=7", "--overwrite", "--no-chat")  # fmt: skip
    assert found.data == ("d.jsonl", "e.jsonl")
    assert found.set == {"tau": 2.0, "w": 0.001}
    assert found.bind == {"good": "a=b"}
    assert (found.max_steps, found.overwrite, found.chat) == (7, True, False)
    assert type(found) is TrainConfig


EXACT = ['"x"', "-p_on", "-1 if label == neg else 1", "{a, b}", "[1, 2]", "a,b", "null", "None", "1", "true",
         'span("a,\\"b\\"", 2)', "'q'", " blank ", "@file", "a = 1; weight = a", '{"a": 1}', "--x", "\\n",
         "a\nb"]  # fmt: skip


@pytest.mark.parametrize("text", EXACT)
@pytest.mark.parametrize("tied", [True, False])
def test_a_value_arrives_as_it_was_written(text: str, tied: bool):
    def flag(name: str) -> list[str]:
        return [f"{name}={text}"] if tied else [name, text]

    found = config("--model", "m", *flag("--data"), *flag("--rule"), *flag("--separator"))
    assert (found.data, found.rule, found.separator) == ((text,), text, text)


def test_the_environment_is_no_source(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEED", "9")
    monkeypatch.setenv("MAX_STEPS", "9")
    found = config(*NEEDED)
    assert (found.seed, found.max_steps) == (0, None)


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_flags_go_over_the_file(tmp_path: Path):
    path = yaml(
        tmp_path, "model: m\ndata: one.jsonl\nrule: dft\nlearning_rate: 1e-3\nset: {tau: 2, k: 3}\nseed: 4\n"
    )
    found = config("--config", path, "--set", "tau=5", "--data", "two.jsonl", "--seed", "6")
    assert found.data == ("two.jsonl",)
    assert found.set == {"tau": 5.0, "k": 3.0}
    assert (found.seed, found.learning_rate, found.rule) == (6, 0.001, "dft")


def test_the_saved_config_of_a_run_is_a_config_file(tmp_path: Path):
    import yaml as library

    before = config(*NEEDED, "--set", "tau=2", "--bind", "good=g", "--max-steps", "3")
    path = yaml(tmp_path, library.safe_dump(before.model_dump(mode="json")))
    assert config("--config", path) == before


YAML_MISTAKES = {
    "unknown field": ("max_stepz: 3", "{file}:4: max_stepz: unknown field; did you mean `max_steps`?"),
    "wrong type": ("max_steps: many", "{file}:4: max_steps: input should be a valid integer"),
    "out of range": ("warmup: 2", "{file}:4: warmup: input should be less than 1, not 2"),
    "nested": ("set:\n  tau: x", "{file}:5: set.tau: input should be a valid number"),
    "item": ("eval_data:\n  - a\n  - 3", "{file}:6: eval_data.1: input should be a valid string"),
    "twice": ("seed: 1\nseed: 2", "{file}:5: `seed` is given twice, first in line 4"),
    "not YAML": ("set: {tau: 1", "{file}:5: malformed YAML"),
    "no map": ("seed", "{file}:5: malformed YAML"),
}


@pytest.mark.parametrize("case", YAML_MISTAKES)
def test_a_mistake_in_a_file_names_file_and_line(case: str, tmp_path: Path):
    text, message = YAML_MISTAKES[case]
    path = yaml(tmp_path, f"model: m\ndata: [d.jsonl]\nrule: dft\n{text}\n")
    assert refused("--config", path)[0].startswith(message.format(file=path))


FLAG_MISTAKES = {
    "unknown flag": ([*NEEDED, "--max-stepz", "3"], ["--max-stepz: unknown flag; did you mean --max-steps?"]),
    "shortened flag": ([*NEEDED, "--max-step", "3"], ["--max-step: unknown flag; did you mean --max-steps?"]),
    "no value": ([*NEEDED, "--seed"], ["--seed: a value is missing"]),
    "no pair": ([*NEEDED, "--set", "tau"], ["--set tau: must be NAME=NUMBER"]),
    "no number": ([*NEEDED, "--set", "tau=x"], ["--set tau: input should be a valid number"]),
    "not finite": ([*NEEDED, "--set", "tau=nan"], ["--set tau: input should be a finite number"]),
    "no folder": ([*NEEDED, "--bind", "ref="], ["--bind ref=: must be NAME=FOLDER"]),
    "zero steps": (
        [*NEEDED, "--max-steps", "0"],
        ["--max-steps: input should be greater than or equal to 1, not '0'"],
    ),
    "choice": ([*NEEDED, "--dtype", "fp8"], ["--dtype: input should be 'fp32' or 'bf16', not 'fp8'"]),
    "two mistakes": ([*NEEDED, "--seed", "-1", "--clip", "x"], ["--clip: ", "--seed: "]),
    "missing": (["--rule", "dft"], ["--model: is missing", "--data: is missing"]),
    "half a pair": ([*NEEDED, "--prompt", "q"], ["--prompt needs --completion"]),
    "contradiction": ([*NEEDED, "--resume", "--overwrite"], ["--resume continues"]),
    "nothing to measure": ([*NEEDED, "--eval-steps", "2"], ["--eval-steps needs --eval-data"]),
    "extra word": ([*NEEDED, "word"], ["unrecognized arguments: word"]),
    "no file": (["--config", "none.yaml"], ["--config none.yaml: cannot be read"]),
}


@pytest.mark.parametrize("case", FLAG_MISTAKES)
def test_a_mistake_in_a_flag_names_the_flag(case: str):
    words, messages = FLAG_MISTAKES[case]
    found = sorted(refused(*words))
    assert len(found) == len(messages)
    assert all(line.startswith(start) for line, start in zip(found, sorted(messages), strict=True)), found


EVAL_MISTAKES = {
    "samples for a checker": (["--checker", "exact"], "--checker needs --samples"),
    "checker for k": (["--samples", "4", "--entropy", "--k", "2"], "--k needs --checker"),
    "samples for k": (["--samples", "4", "--checker", "exact", "--k", "8"], "--k 8 needs at least as many"),
    "samples for nothing": (["--samples", "4"], "--samples needs --checker, --entropy or --base"),
    "temperature for nothing": (["--temperature", "0.5"], "--temperature needs --samples"),
}


@pytest.mark.parametrize("case", EVAL_MISTAKES)
def test_an_evaluation_refuses_flags_that_would_be_ignored(case: str):
    words, message = EVAL_MISTAKES[case]
    assert refused("--model", "m", "--data", "d", *words, model=EvalConfig)[0].startswith(message)


def test_help_shows_every_field_and_ends_with_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        config("--help")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in TrainConfig.model_fields)
    assert shown.rstrip().endswith("example:\n  priority train ...")
    assert "unset" not in shown
    assert "tuple[" not in shown
