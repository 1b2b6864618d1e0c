"""The row kernels and the fused loss on a GPU: `pytest -m gpu tests/vocab_pass/test_kernels_gpu.py`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from priority_dsl import compile_rule, list_rules
from priority_dsl.vocab_pass import Head
from tests.test_fused import HEADS, MORE_RULES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
drawn = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
LONG = [(3, 1), (3, 31), (5, 2049), (4, 32_000), (2, 151_936)]  # rows and vocabularies
HIGH_ROWS = 20_000  # times V = 151,936: places that 32 bits cannot count


@pytest.fixture
def checks():
    """The checks, which load Triton."""
    pytest.importorskip("triton", reason="a CUDA build of torch brings Triton")
    from tests.vocab_pass import kernel_checks

    return kernel_checks


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep(checks, shape, dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    z = (torch.randn(*shape, generator=g, device="cuda") * 5).to(dtype)
    checks.check_sweep(z, torch.randint(0, shape[1], shape[:1], generator=g, device="cuda"))


def test_drawn_sweeps_and_gradients(checks) -> None:
    @drawn
    @given(checks.rows_of_logits("cuda"), st.data())
    def check(rows, data) -> None:
        checks.check_sweep(*rows)
        checks.check_gradient(*rows, data)

    check()


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_over_its_logits(checks, shape, dtype) -> None:
    """In bfloat16 over float32, where each row's gradient lies on logits that are still to be read."""
    from priority_dsl.registry import RowGradient
    from priority_dsl.vocab_pass import kernels

    g = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(*shape, generator=g, device="cuda")
    y = torch.randint(0, shape[1], shape[:1], generator=g, device="cuda")
    parts = RowGradient(*(torch.randn(shape[0], generator=g, device="cuda") for _ in range(4)))
    row = checks.SweptRow.of(z, y)
    numbers, head = (row.top, row.total, row.target), Head(z)
    every = torch.arange(len(z), device="cuda")
    apart = kernels.write_gradient(z, y, numbers, parts, head, dtype, every)
    exact = checks.logit_gradient(
        z.double(), checks.exponentials(z.double()), checks.total(z.double()), y,
        RowGradient(*(p.double() for p in parts[:4])),
    )  # fmt: skip
    over = kernels.write_gradient(z, y, numbers, parts, head, dtype)
    torch.testing.assert_close(over, apart, rtol=0, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(over.double(), exact, rtol=tolerance, atol=tolerance)


def test_places_beyond_32_bits(checks) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    z = torch.zeros(HIGH_ROWS, 151_936, device="cuda")
    z[-1, 7] = 5.0
    row = checks.SweptRow.of(z, torch.full((HIGH_ROWS,), 7, device="cuda"))
    assert row.target[-1] == row.top[-1] == 5.0
    assert row.target[-2] == 0.0


@pytest.mark.parametrize("text", [*list_rules(), *MORE_RULES])
def test_every_rule(checks, text) -> None:
    checks.check_rule(text, "cuda", torch.float64, 1e-9)
    checks.check_rule(text, "cuda", torch.float32, 2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_heads(checks, head) -> None:
    checks.check_rule("dft", "cuda", torch.float32, 2e-5, **HEADS[head])


@pytest.mark.parametrize(
    "text", ["sft", "dft", "asft", "loss = nll_on + 0.1 * H_on", "top(H_on, 0.5, batch)"]
)
@pytest.mark.parametrize("head", ["bare", "scale and cap"])
def test_16_bits_are_what_a_cpu_makes_of_them(checks, text, head) -> None:
    """Sums are float32 on both; the gradient of the logits is rounded to 16 bits on the GPU."""
    rule = compile_rule(text)
    case = Case.draw(rule, torch.bfloat16, shape=(4, 30), vocabulary=200, width=64, **HEADS[head])
    found = {}
    for device in ("cpu", "cuda"):
        given = checks.on_device(case, device)
        leaves = [t.detach().requires_grad_() for t in (given.hidden, given.head.weight)]
        out = rule.fused_loss(
            leaves[0], Head(leaves[1], given.head.bias, given.head.scale, given.head.cap), given.targets,
            **given.reads,
        )  # fmt: skip
        found[device] = [out.losses, *torch.autograd.grad(out.mean, leaves)]
    for got, expected in zip(found["cuda"], found["cpu"], strict=True):
        error = (got.cpu().double() - expected.double()).norm() / expected.double().norm()
        assert error < 0.01
