"""A whole training step under fused rules against the same step with dense plain fine-tuning.

A step is what a run does: forward pass, loss, backward pass, figures for the log, clipping, AdamW. Every
repeat draws the order of the variants anew; ratios are of the repeat's own baseline.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

VOCABULARY, WIDTH, LAYERS = 32_000, 512, 4
ROWS, LENGTH = 2, 512  # of a step, in targets
LIVE = 0.34  # of the stored selection
REPEATS = 7
MOST_TIME = 1.03  # of the baseline: loss.md, for rules that read only `on` or stored columns
STORED = "mass(ref) >= tau"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Variant:
    """A rule, the loss that computes it, whether its figures are shown, and whether it has the target."""

    rule: str
    loss: str = "fused"
    shown: bool = True
    held: bool = True


VARIANTS = {
    "dense sft": Variant("sft", "dense", held=False),
    "sft": Variant("sft"),
    "dft": Variant("dft"),
    "entropy": Variant("H_on * 1"),
    "prift_mass, stored": Variant("prift_mass"),
    "the same, not logged": Variant("prift_mass", shown=False),
    "asft": Variant("asft", held=False),
    "dense dft": Variant("dft", "dense", held=False),
}


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_batch() -> Any:
    """Random tokens, all of them supervised, `LIVE` of them kept by the stored selection."""
    from trainer.batches import collate
    from trainer.data import Example

    draw = random.Random(0)
    rows = [
        Example(i, f"row {i}", [draw.randrange(VOCABULARY) for _ in range(LENGTH + 1)],
                [True] * (LENGTH + 1), ["assistant"] * (LENGTH + 1), {})
        for i in range(ROWS)
    ]  # fmt: skip
    kept = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(0)) < LIVE
    return replace(collate(rows, "response", ()), stored={STORED: kept})


def make_step(model: Any, ref: Any, variant: Variant, accelerator: Any, batch: Any) -> Callable[[], Any]:
    """A training step as a run makes it; returns its figures."""
    from priority_dsl import compile_rule
    from priority_dsl.integrations.heads import take_apart
    from trainer.objective import Moment, Objective
    from trainer.trained import Trained
    from trainer.views import Views

    rule = compile_rule(variant.rule)
    views = Views(rule, None)
    frozen = {name: take_apart(ref, False, print) for name in rule.plan.kept}
    trained = Trained(model, rule, variant.loss == "fused", False, views)
    objective = Objective(rule, trained, frozen, views, accelerator, seed=0)
    # A rate that changes nothing, so that all variants see the same model.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-30)

    def step() -> Any:
        figures = objective.step([batch], Moment(0, 0.0, 0), variant.shown)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    return step


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall clock and processor seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def test_a_fused_step_costs_about_a_dense_step_of_plain_fine_tuning():
    from accelerate import Accelerator

    torch.set_num_threads(2)
    model, batch, accelerator = make_model(), make_batch(), Accelerator(cpu=True)
    ref = make_model().eval().requires_grad_(False)
    steps = {name: make_step(model, ref, variant, accelerator, batch) for name, variant in VARIANTS.items()}
    figures = {name: step() for name, step in steps.items()}  # once before the clock starts
    for one, other in (("sft", "dense sft"), ("dft", "dense dft")):
        assert figures[one].loss == pytest.approx(figures[other].loss, rel=1e-5)
    assert figures["prift_mass, stored"].nll == pytest.approx(figures["dense sft"].nll, rel=1e-5)

    draw = random.Random(0)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        order = list(steps)
        draw.shuffle(order)
        took = {name: timed(steps[name]) for name in order}
        base = took["dense sft"]
        for name, (wall, cpu) in took.items():
            ratios[name].append((wall / base[0], cpu / base[1]))
            seconds[name].append(wall)

    print(f"\n{ROWS} x {LENGTH} tokens, d {WIDTH}, {LAYERS} layers, V {VOCABULARY}, fp32, two threads")
    print(f"{'step':22} {'min s':>7} {'wall ratio':>11} {'cpu ratio':>10}")
    middle = {}
    for name, pairs in ratios.items():
        middle[name], cpu = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        print(f"{name:22} {min(seconds[name]):7.3f} {middle[name]:11.3f} {cpu:10.3f}")
    late = {name: middle[name] for name, v in VARIANTS.items() if v.held and middle[name] > MOST_TIME}
    assert not late, f"slower than {MOST_TIME} of dense plain fine-tuning: {late}"
