"""The row kernels without a GPU: under Triton's interpreter, asked for before Triton is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from priority_dsl.vocab_pass import products
from priority_dsl.vocab_pass.sweep import has_kernels


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernels_are_right_under_the_interpreter() -> None:
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         str(here.with_name("interpreted.py"))],
        cwd=here.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-1000:])
    assert done.returncode == 0


def test_there_are_kernels_on_a_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[has_kernels.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert has_kernels(torch.device("cuda"))
    assert not has_kernels(torch.device("cpu"))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not has_kernels(torch.device("cuda"))


@pytest.fixture
def sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as a GPU makes them: 16-bit operands, sums in float32."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype, out):
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def wide_addmm(total, a, b, *, out_dtype, out):
        return addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(products, "_stays_narrow", lambda x, w: x.dtype == w.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)


def test_products_of_16_bits_go_straight_into_their_sums(sixteen_bits: None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g).bfloat16() for n in (5, 11))
    z = torch.full((5, 11), torch.nan)
    products.make_logits(hidden, weight, z)
    torch.testing.assert_close(z, hidden.float() @ weight.float().T)
    products.make_logits(hidden, weight, z, add=True)
    torch.testing.assert_close(z, 2 * hidden.float() @ weight.float().T)
    dz = torch.zeros(5, 11).view(torch.bfloat16)[:, :11].copy_(z)  # rows apart, as over wider logits
    sums = torch.full((11, 6), torch.nan)
    products.add_to_weight(sums, dz, hidden, fresh=True)
    products.add_to_weight(sums, dz, hidden)
    torch.testing.assert_close(sums, 2 * dz.float().T @ hidden.float())
    assert products.to_hidden(dz, weight, hidden).dtype == torch.bfloat16


def test_a_gradient_is_16_bits_only_where_every_product_takes_that(sixteen_bits: None) -> None:
    narrow, wide = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)
    assert products.gradient_dtype([(narrow, narrow)], torch.float32) == torch.bfloat16
    assert products.gradient_dtype([(narrow, narrow), (wide, wide)], torch.float32) == torch.float32
    assert products.gradient_dtype([(wide, narrow)], torch.float32) == torch.float32
