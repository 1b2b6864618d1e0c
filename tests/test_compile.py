"""torch.compile takes the loss of a rule as one graph, and gives the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from priority_dsl import compile_rule

RULES = ["sft", "dft", "prift_mass", "asft"]


def has_compiler() -> bool:
    """Whether inductor can build C++ here."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError):
        return False


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in RULES),
        ("asft", "inductor"),  # the largest; the rest takes a C++ compiler a minute
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in RULES[:-1]),
    ],
)
def test_the_loss_compiles_without_a_graph_break(name: str, backend: str) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("inductor needs a C++ compiler")
    rule = compile_rule(name)  # never called before: tracing finds everything made
    generator = torch.Generator().manual_seed(5)
    z, ref = torch.randn(2, 2, 6, 40, generator=generator).unbind(0)
    targets = torch.randint(0, 40, (2, 6), generator=generator)
    targets[0, 3] = -100

    def step(logits: Tensor, reference: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        out = rule.loss(logits, wanted, models={"ref": reference})
        return out.mean, out.weights

    results = []
    for run in (torch.compile(step, fullgraph=True, backend=backend), step):
        leaf = z.clone().requires_grad_()
        mean, weights = run(leaf, ref, targets)
        mean.backward()
        results.append((mean.detach(), weights, leaf.grad))
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)
