"""The weights of a data set as a file: tokens, statistics and weights of each row, for any use."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator

from priority_dsl import compile_rule
from priority_dsl.rule import CompiledRule
from priority_dsl.scoring import with_on_frozen
from trainer.batches import IGNORED, collate
from trainer.cache import cache_folder
from trainer.columns import ColumnReader, check_categories
from trainer.config import ScoreConfig
from trainer.data import Example, Examples, Reader
from trainer.dataset import leave_out, survey
from trainer.faults import ConfigFault, first_line
from trainer.models import (
    Quantize,
    check_bindings,
    context_of,
    load_tokenizer,
    quieten,
    shape_of,
    vocabulary_of,
)
from trainer.portions import key_of
from trainer.precompute import STORED_ROWS, Known, Precompute, Source, with_stored
from trainer.prompts import PromptReader
from trainer.runlog import RunLog
from trainer.strict import refuse_warnings
from trainer.views import frozen_names


def score(config: ScoreConfig) -> int:
    """Write the rows of the data with the statistics and the weight of each token; returns their number.

    `on` is --model, as a frozen model; `progress` is 0. Raises as `train` does.
    """
    quieten()
    rule = compile_rule(config.rule, **config.set)
    if config.strict:
        refuse_warnings(rule.checked)
    if rule.checked.batches:
        raise ConfigFault(
            "the rule reads values of the batch: scoring has no optimizer steps; write `dataset` "
            "or `example` for `batch`, or train for a step and read the log"
        )
    check_bindings(frozen_names(rule), config.bind)
    rule = CompiledRule(with_on_frozen(rule.checked), rule.name)
    tokenizer = load_tokenizer(config.model, config.chat_template, config.trust_remote_code)
    accelerator = Accelerator(cpu=config.device == "cpu")
    log = RunLog(Path(config.out).parent, accelerator.is_main_process, config.quiet)
    data = _read(config, rule, tokenizer)
    source = Source(
        config.model, config.bind, tokenizer, cache_folder(config.cache), config.dtype == "bf16",
        config.batch_size, config.seed, Quantize.of(config), config.trust_remote_code,
    )  # fmt: skip
    precompute = Precompute(rule, source, accelerator, log)
    data = leave_out(data, precompute, config.seed)
    log.note(f"data: {data}")
    rows = data.rows
    known = precompute.run(rows)
    numbers = survey(rule, rows, known, config.seed) if rule.plan.surveys else {}
    rows = with_stored(rule, rows, known, numbers, config.seed)
    if accelerator.is_main_process:
        _write(config.out, _table(rule, rows, known, tokenizer, config.seed))
        log.note(f"{len(rows)} rows are in {config.out}")
    accelerator.wait_for_everyone()
    return len(rows)


def _read(config: ScoreConfig, rule: CompiledRule, tokenizer: Any) -> Examples:
    model = shape_of(config.model, trust=config.trust_remote_code)
    limits = [n for n in (context_of(model), config.max_length) if n is not None]
    roles = "role" in rule.requires.columns
    columns = ColumnReader(rule.columns, rule.checked.source.name)
    reader = Reader(
        config,
        tokenizer,
        vocabulary_of(model),
        min(limits, default=None),
        columns,
        roles,
        rule.checked.reads_pairs,
        PromptReader.of(rule, config, tokenizer, context_of(model)),
    )
    data = reader.read(config.data)
    check_categories(rule.columns, [row.columns for row in data.rows])
    return data


def _table(rule: CompiledRule, rows: Sequence[Example], known: Known, tokenizer: Any, seed: int) -> pa.Table:
    """Lists aligned with `input_ids`: a statistic is null and a weight 0 at a token that is no target."""
    weights = [w for part in _parts(rows) for w in _weights(rule, part, seed)]
    live = [[False, *(rule.over == "all" or marked for marked in row.response[1:])] for row in rows]
    columns: dict[str, Any] = {
        "row": pa.array([row.index for row in rows], pa.int64()),
        **({"chosen": [row.chosen for row in rows]} if rule.checked.reads_pairs else {}),
        "input_ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
        "tokens": [tokenizer.convert_ids_to_tokens(row.ids) for row in rows],
        "target": live,
    }
    for name, values in known.items():
        of_rows = [values[key_of(row, rule.over)] for row in rows]
        lists = [_spread(v, mask) for v, mask in zip(of_rows, live, strict=True)]
        kind = pa.bool_() if all(v.dtype == bool for v in of_rows) else pa.float32()
        columns[name] = pa.array(lists, pa.list_(kind))
    columns["weight"] = pa.array(weights, pa.list_(pa.float32()))
    return pa.table(columns)


def _parts(rows: Sequence[Example]) -> list[Sequence[Example]]:
    return [rows[start : start + STORED_ROWS] for start in range(0, len(rows), STORED_ROWS)]


def _weights(rule: CompiledRule, rows: Sequence[Example], seed: int) -> list[list[float]]:
    """The weight of each token of each row, 0 for the first, which nothing predicts."""
    batch = collate(rows, rule.over, rule.requires.columns)
    found = rule.weights(
        None, batch.targets, columns=batch.columns, examples=batch.examples, stored=batch.stored, seed=seed
    ).masked_fill(batch.targets == IGNORED, 0.0)
    zero = torch.zeros(len(rows), 1)
    padded = torch.cat([zero, found.float()], -1)
    return [line[: len(row.ids)].tolist() for line, row in zip(padded, rows, strict=True)]


def _spread(values: np.ndarray, live: list[bool]) -> list[Any]:
    """Values of the targets at their places, None elsewhere."""
    each = iter(values.tolist())
    return [next(each) if mark else None for mark in live]


def _write(out: str, table: pa.Table) -> None:
    """Write the file under its name only when it is complete."""
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        pyarrow.parquet.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        raise ConfigFault(f"--out {out}: cannot be written: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
