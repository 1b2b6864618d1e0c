"""The task of the demonstration as files: data, base model and configs for the commands of `priority`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from trainer.demo import BASE
from trainer.demo.countdown import (
    RESPONSE_TOKENS,
    demonstrations,
    held_out_problems,
    solutions,
)
from trainer.faults import ConfigFault, first_line

DEMONSTRATIONS = 3000
PROBLEMS = 192
NOISE = 0.4
"""The share of the demonstrations that is wrong."""


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write rows as one JSON object a line; returns the path."""
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_files(folder: Path, seed: int, rows: int = DEMONSTRATIONS, problems: int = PROBLEMS) -> list[Path]:
    """Write countdown into a folder: train.jsonl, held_out.jsonl, the model `base`, base.yaml and eval.yaml.

    The configs are those of the demonstration, for `priority train`, `sweep` and `eval`; their paths begin
    with the folder as it is given. A held-out row shows the first of its solutions; the checker takes any.
    Raises `ConfigFault` where the folder holds something already or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigFault(f"--write {folder}: is there already; name a new folder")
    shown = [
        {"prompt": p.prompt, "completion": solutions(p)[0].text} for p in held_out_problems(problems, seed)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(BASE, folder / "base")
        train = write_rows(folder / "train.jsonl", demonstrations(rows, NOISE, seed))
        held_out = write_rows(folder / "held_out.jsonl", shown)
        base = _write_config(folder / "base.yaml", _training(folder))
        measuring = _write_config(folder / "eval.yaml", _measuring(folder))
    except OSError as error:
        raise ConfigFault(f"--write {folder}: cannot be written: {first_line(error)}") from error
    return [train, held_out, folder / "base", base, measuring]


def _training(folder: Path) -> dict[str, object]:
    return {
        "model": str(folder / "base"),
        "data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "held_out.jsonl")],
        "separator": " ",
        "epochs": 4,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "warmup": 0.0,
        "device": "cpu",
    }


def _measuring(folder: Path) -> dict[str, object]:
    return {
        "data": [str(folder / "held_out.jsonl")],
        "separator": " ",
        "samples": 32,
        "checker": "trainer.demo.countdown:right",
        "k": [4, 16, 32],
        "max_new_tokens": RESPONSE_TOKENS,
        "batch_size": 2048,
        "entropy": True,
        "base": str(folder / "base"),
        "device": "cpu",
    }


def _write_config(path: Path, values: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path
