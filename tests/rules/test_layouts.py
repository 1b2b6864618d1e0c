"""Library rules do not see the layout of examples: packed rows, micro-batches, readings of the data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from priority_dsl import compile_rule
from priority_dsl.survey import Rows
from tests.rules.by_hand import nll
from tests.rules.draws import EXAMPLES, TOKENS, Draw, draw
from tests.rules.test_rules import NAMES, arguments, compiled, stored
from tests.rules.twins import KEEPS, OVER_DATASET

SEEDS = range(2)


def outcome(rule: Any, given: Draw, **reads: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and losses in the order of the tokens, the mean and its gradient."""
    logits = given.leaf()
    shape = reads["examples"].shape
    out = rule.loss(logits.reshape(*shape, -1), given.targets.reshape(shape), **reads)
    out.mean.backward()
    assert logits.grad is not None
    return out.weights.reshape(-1), out.losses.reshape(-1), out.mean.detach(), logits.grad


def spread(values: Any, shape: tuple[int, int]) -> Any:
    """A column with one value for each token, in rows of this shape."""
    if torch.is_tensor(values):
        return (values if values.dim() == 2 else values.unsqueeze(-1).expand(-1, TOKENS)).reshape(shape)
    rows = [v if isinstance(v, list) else [v] * TOKENS for v in values]
    flat = [value for row in rows for value in row]
    return [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]


def packed(rule: Any, reads: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """What a call reads, with several examples a row."""
    columns = {n: spread(v, shape) for n, v in reads["columns"].items() if n in rule.requires.columns}
    return {
        **reads,
        "models": {name: z.reshape(*shape, -1) for name, z in reads["models"].items()},
        "columns": columns,
        "examples": reads["examples"].reshape(shape),
        "stored": {name: values.reshape(shape) for name, values in reads["stored"].items()},
    }


@pytest.mark.parametrize("shape", [(1, EXAMPLES * TOKENS), (2, 2 * TOKENS)], ids=["one row", "two rows"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_examples_do_not_see_each_other(name: str, shape: tuple[int, int]) -> None:
    rule = compiled(name)
    for seed in SEEDS:
        given = draw(seed)
        reads = arguments(name, rule, given)
        alone = outcome(rule, given, **reads)
        together = outcome(rule, given, **packed(rule, reads, shape))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def part(reads: dict[str, Any], rows: slice) -> dict[str, Any]:
    """What a micro-batch of some rows reads."""
    cut = {key: {name: v[rows] for name, v in reads[key].items()} for key in ("models", "columns", "stored")}
    return {**reads, **cut, "examples": reads["examples"][rows]}


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_are_the_step(name: str) -> None:
    rule = compiled(name)
    cuts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    for seed in SEEDS:
        given = draw(seed)
        reads = arguments(name, rule, given)
        whole = rule.loss(given.logits, given.targets, **reads)
        seen = [rule.observe(given.logits[c], given.targets[c], **part(reads, c)) for c in cuts]
        step = sum(seen[1:], seen[0])
        parts = [rule.loss(given.logits[c], given.targets[c], **part(reads, c), step=step) for c in cuts]
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(torch.cat([p.weights for p in parts]), whole.weights, **close)
        torch.testing.assert_close(sum(p.mean for p in parts), whole.mean, **close)
        assert all(p.denominator == whole.denominator for p in parts)


@pytest.mark.parametrize("cuts", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"share": 0.3}, {"share": 0.001}, {"share": 1}], ids=str)
@pytest.mark.parametrize("name", OVER_DATASET)
def test_the_survey_finds_the_tokens_of_the_twin(
    name: str, settings: dict[str, float], cuts: list[int]
) -> None:
    rule = compile_rule(name, **settings)
    for seed in SEEDS:
        given = draw(seed)
        counted = given.targets != -100
        gains = {m: nll(given.models[m], given.targets).masked_fill(~counted, 0.0) for m in ("ref", "warm")}
        batches = [
            Rows(targets, {"nll(ref)": ref, "nll(warm)": warm}, examples=examples)
            for targets, ref, warm, examples in zip(
                *(t.split(cuts) for t in (given.targets, gains["ref"], gains["warm"], given.examples)),
                strict=True,
            )
        ]
        numbers = rule.survey(lambda batches=batches: batches)
        found = [
            rule.stored_columns(b.targets, statistics=b.statistics, examples=b.examples, numbers=numbers)
            for b in batches
        ]
        for column, expected in stored(name, rule, given).items():
            chosen = torch.cat([f[column] for f in found])
            torch.testing.assert_close(chosen[counted], expected[counted])


def table(seed: int, examples: int) -> dict[str, Any]:
    """Columns of a small data set, many values equal."""
    random = torch.Generator().manual_seed(seed)

    def quarters() -> list[float]:
        return torch.randint(0, 5, (examples,), generator=random).div(4).tolist()

    return {
        "score": quarters(),
        "difficulty": quarters(),
        "influence": quarters(),
        "predicted_loss": quarters(),
        "uncertainty": quarters(),
        "passes": [q > 0.25 for q in quarters()],
        "relabelled": [q > 0.25 for q in quarters()],
    }


@pytest.mark.parametrize("examples", [1, 2, 7, 20])
@pytest.mark.parametrize("name", KEEPS)
def test_examples_are_kept_as_the_twin_keeps_them(name: str, examples: int) -> None:
    for seed in range(8):
        columns = table(seed, examples)
        for settings in ({}, {"share": 0.5}) if "share" in compiled(name).params else ({},):
            rule = compile_rule(name, **settings)
            read = {column: columns[column] for column in rule.requires.columns}
            rows = [
                Rows(
                    torch.tensor([[1, 2, -100]]),
                    {},
                    {c: [v[i]] for c, v in read.items()},
                    torch.full((1, 3), i),
                )
                for i in range(examples)
            ]
            numbers = rule.survey(lambda rows=rows: rows, keep=True)
            kept = [bool(rule.kept(row, numbers)[0, 0]) for row in rows]
            assert kept == KEEPS[name](columns, **rule.params)
