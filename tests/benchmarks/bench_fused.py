"""The fused loss against `F.cross_entropy` on full logits: time by turns, and the error beside it.

Every repeat draws the order of the variants anew; ratios are of the repeat's own baseline, wall clock and
processor time. The gradient's error is against float64 on the dense path, so that fast and wrong cannot win.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from priority_dsl import compile_rule

ROWS, WIDTH, VOCABULARY = 1024, 512, 32_000
REPEATS = 7
LIVE = 0.34

pytestmark = pytest.mark.slow


@dataclass
class Inputs:
    """Hidden states `[N, D]`, a head `[V, D]`, targets `[N]` and which tokens a selection keeps."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    chosen: Tensor

    @classmethod
    def draw(cls) -> Inputs:
        torch.manual_seed(0)
        hidden = torch.randn(ROWS, WIDTH).requires_grad_()
        head = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
        return cls(hidden, head, torch.randint(0, VOCABULARY, (ROWS,)), torch.rand(ROWS) < LIVE)


def variants(given: Inputs) -> dict[str, Callable[[Inputs], Any]]:
    """What is timed: each takes the inputs to a scalar loss."""
    reads = {"columns": {"k": given.chosen}}
    rules = {
        "sft": ("sft", {}),
        "dft": ("dft", {}),
        "entropy": ("H_on * 1", {}),
        "selection": ("column k: bool per token; weight = p_on > 2 or k", reads),
        "stored selection": ("prift_mass", {"stored": {"mass(ref) >= tau": given.chosen}}),
    }

    def fused(text: str, more: dict[str, Any]) -> Callable[[Inputs], Any]:
        rule = compile_rule(text)
        return lambda i: rule.fused_loss(i.hidden, i.head, i.targets, **more).mean

    def plain(i: Inputs) -> Any:
        return torch.nn.functional.cross_entropy(i.hidden @ i.head.T, i.targets)

    return {"F.cross_entropy": plain, **{name: fused(*rule) for name, rule in rules.items()}}


def timed(run: Callable[[Inputs], Any], given: Inputs) -> tuple[float, float]:
    """Wall clock and processor seconds of a loss and its gradients."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(given).backward()
    given.hidden.grad = given.head.grad = None
    return time.perf_counter() - wall, time.process_time() - cpu


def gradient_error(run: Callable[[Inputs], Any], given: Inputs) -> float:
    """The relative error of the gradient of the hidden states against float64."""
    wide = Inputs(
        given.hidden.detach().double().requires_grad_(),
        given.head.detach().double(),
        given.targets,
        given.chosen,
    )
    (got,) = torch.autograd.grad(run(given), given.hidden)
    (exact,) = torch.autograd.grad(run(wide), wide.hidden)
    return float((got.double() - exact).norm() / exact.norm())


def test_the_fused_loss_costs_about_a_plain_cross_entropy():
    torch.set_num_threads(2)
    given = Inputs.draw()
    runs = variants(given)
    errors = {name: gradient_error(run, given) for name, run in runs.items()}
    assert abs(runs["sft"](given).item() - runs["F.cross_entropy"](given).item()) < 1e-5
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    draw = random.Random(0)
    for _ in range(REPEATS):
        order = list(runs)
        draw.shuffle(order)
        took = {name: timed(runs[name], given) for name in order}
        base = took["F.cross_entropy"]
        for name, (wall, cpu) in took.items():
            ratios[name].append((wall / base[0], cpu / base[1]))
    print(f"\n{ROWS} tokens, d {WIDTH}, V {VOCABULARY}, fp32, two threads, {LIVE:.0%} live")
    print(f"{'what':18} {'wall ratio':>11} {'cpu ratio':>10} {'gradient error':>15}")
    for name, pairs in ratios.items():
        wall, cpu = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        print(f"{name:18} {wall:11.3f} {cpu:10.3f} {errors[name]:15.1e}")
        assert errors[name] < 1e-5
    middle = {name: statistics.median(p[1] for p in pairs) for name, pairs in ratios.items()}
    assert middle["stored selection"] < middle["selection"] < middle["sft"], "dead tokens must be cheaper"
