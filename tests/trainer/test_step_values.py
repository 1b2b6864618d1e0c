"""Values of a whole optimizer step: the same weights and the same training however its rows are spread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import test_distributed
from tests.trainer.test_chance import log, same
from trainer.batches import IGNORED
from trainer.config import TrainConfig
from trainer.train import train
from trainer.trained import Call, Found, Trained

RULES = {
    "entropy_scaling": "entropy_scaling",
    "entropy over its mean": "weight = H_on / mean(H_on, batch)",
    "top_p": "top_p",
    "top_p, kept": "normalize = kept; weight = top(p_on, 0.3, batch)",
    "ties": "normalize = kept; weight = top(-position, 0.4, batch)",  # the data-set row decides most
    "talr": "talr",
    "examples counted once": (
        "let sure = mean(p_on, example); normalize = weights; weight = sure >= median(sure, batch)"
    ),
    "groups": "let hard = top(nll_on, 0.5, batch); normalize = groups(hard); weight = 1 if hard else -0.2",
    "where": "0.2 * zscore(nll_on, batch, where=position > 0) * minmax(H_on, batch)",
    "quantile of the batch in an example": "mean(nll_on > quantile(nll_on, 0.3, batch), example)",
    "chance": "entrodrop",
    "chance, kept": "normalize = kept; weight = top(uniform(), 0.5, batch) and bernoulli(0.7, example)",
    "example": "normalize = examples; weight = p_on / max(mean(p_on, example), 0.1)",
    "chunk": "weight = minmax(nll_on, chunk(2)) + top(p_on, 0.5, chunk(3))",
    "window": "weight = mean(p_on, window(1))",
    "suffix_sum": "weight = exp(0.02 * suffix_sum(logp_on))",
    "loss per example": "loss = log(1 + sum(nll_on, example))",
    "loss per example that reads the batch": (
        "let of_row = mean(nll_on, example); loss = of_row * (1 + 0.1 * sg(zscore(of_row, batch)))"
    ),
    "loss of chunks": "loss = mean(nll_on, chunk(3)) ** 2",
    "loss that reads the batch": "loss = nll_on * (1 + 0.1 * nll_on / max(sg(mean(nll_on, batch)), 0.1))",
    "rho1": "rho1",
    "forgetting": "forgetting",
}  # fmt: skip
LOSSES = ("fused", "dense")
SPREADS = {
    "8 x 1": {"batch_size": 8, "accumulation": 1},
    "2 x 4": {"batch_size": 2, "accumulation": 4},
}
TWO_EACH = {"batch_size": 2, "accumulation": 2}  # on two processes
WORKER = """
import json, os, sys
import torch
from tests.trainer.test_step_values import recorded
from trainer.config import TrainConfig
from trainer.train import train

torch.set_num_threads(1)
for settings in json.loads(sys.argv[1]):
    with recorded() as weights:
        step = train(TrainConfig(**settings)).step
    rank = int(os.environ["RANK"])
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    torch.save({"world": world, "step": step, "weights": weights}, f"{settings['output']}.rank{rank}.pt")
"""
Weights = dict[tuple[float, int, bool | None, int], float]  # by progress, data-set row, response and target


@contextmanager
def recorded() -> Iterator[Weights]:
    """Collects the weight of every token that is trained on while it lasts."""
    weights: Weights = {}
    forward, patch = Trained.forward, pytest.MonkeyPatch()

    def keeping(self: Trained, call: Call, counting: bool = False) -> Any:
        found = forward(self, call, counting)
        if isinstance(found, Found) and torch.is_grad_enabled():
            for row, where in zip(call.batch.rows, call.batch.spans, strict=True):
                targets, of_row = call.batch.targets[where].tolist(), found.weights[where].tolist()
                for t, (target, weight) in enumerate(zip(targets, of_row, strict=True)):
                    key = (call.given["progress"], row.index, row.chosen, t)
                    if target != IGNORED:
                        assert key not in weights, "no token is trained on twice in a step"
                        weights[key] = weight
        return found

    patch.setattr(Trained, "forward", keeping)
    try:
        yield weights
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def shared(model: str, other_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirteen rows, so that the second step is a short one; a rate that does not make much of rounding."""
    folder = tmp_path_factory.mktemp("steps")
    rows = [{"prompt": f"what is {i} ?", "completion": " 1 is 2"[: 2 + i % 6] * 2} for i in range(13)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": model, "data": [str(folder / "rows.jsonl")], "epochs": 1, "learning_rate": 1e-4, "warmup": 0,
        "schedule": "constant", "device": "cpu", "quiet": True, "cache": str(folder / "cache"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def settings_of(shared: dict[str, Any], other_model: str) -> Callable[..., dict[str, Any]]:
    """The settings of a run of a rule, with the other model for the names that it declares."""

    def of(name: str, folder: Path, **options: Any) -> dict[str, Any]:
        bind = {"rho1": {"curated": other_model}, "forgetting": {"warm": other_model}}.get(name, {})
        output = folder / "-".join([name, *map(str, options.values())])
        return {**shared, "rule": RULES[name], "bind": bind, "output": str(output), **options}

    return of


@pytest.fixture(scope="module")
def two_processes(
    settings_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, list[dict[str, Any]]]]:
    """The folder of the run of a rule on two processes, and what each of them saw; all rules in one start."""
    folder = tmp_path_factory.mktemp("two")
    runs = {(n, loss): settings_of(n, folder, loss=loss, **TWO_EACH) for n in RULES for loss in LOSSES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_distributed, "WORKER", WORKER)
        ran = test_distributed.torchrun([*runs.values()], folder)

    def of(name: str, loss: str) -> tuple[Path, list[dict[str, Any]]]:
        output = runs[name, loss]["output"]
        told = [Path(f"{output}.rank{rank}.pt") for rank in (0, 1)]
        assert all(path.exists() for path in told), ran.stderr
        return Path(output), [torch.load(path) for path in told]

    return of


@pytest.mark.parametrize("name", RULES)
def test_the_spread_of_a_step_changes_nothing(
    name: str, settings_of: Callable[..., dict[str, Any]], two_processes: Callable[..., Any], tmp_path: Path
):
    def run(**options: Any) -> tuple[Path, Weights]:
        with recorded() as weights:
            outcome = train(TrainConfig(**settings_of(name, tmp_path, **options)))
        return outcome.output, weights

    whole, wanted = run(loss="dense", **SPREADS["8 x 1"])
    assert len(set(wanted.values())) > 1 or "loss" in name
    runs = [run(loss="fused", **SPREADS["8 x 1"])]
    runs += [run(loss=loss, **SPREADS["2 x 4"]) for loss in LOSSES]
    for loss in LOSSES:
        output, seen = two_processes(name, loss)
        assert [(of["world"], of["step"]) for of in seen] == [(2, 2)] * 2
        assert not seen[0]["weights"].keys() & seen[1]["weights"].keys()
        runs.append((output, {**seen[0]["weights"], **seen[1]["weights"]}))
    for output, weights in runs:
        assert weights == pytest.approx(wanted, abs=1e-6), output
        same(output, whole)
    assert len(log(whole)) == 2
