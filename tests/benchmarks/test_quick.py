"""The benchmark runs, on tiny shapes: what it says of time is for `make bench` on a quiet machine."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import fused, losses
from tests.benchmarks.peers import peers, runnable


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_has_every_loss_and_says_what_is_not_run(dtype: str) -> None:
    said = fused.Asked(fused.QUICK, dtype, 1, roofline=True).report()
    for name in losses.variants("cpu", getattr(torch, dtype)):
        assert f"| {name} |" in said
    assert "Not run: Liger's fused linear cross-entropy: needs a GPU." in said
    assert "a copy moves" in said


def test_the_head_of_trl_is_among_the_peers() -> None:
    pytest.importorskip("trl")
    found, _ = peers("cpu", torch.float32, losses.BASELINE)
    assert fused.TRL_DFT in found


def test_a_peer_that_fails_costs_a_note() -> None:
    def fail(given: losses.Inputs) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    fine = losses.baselines(torch.float32)
    kept, failed = runnable({**fine, "theirs": losses.Variant(fail)}, losses.Inputs.draw(*fused.QUICK))
    assert kept == fine
    assert "theirs: RuntimeError" in failed[0]
    assert "no kernel image" in failed[0]


def test_a_wrong_loss_is_refused() -> None:
    kinds = losses.variants()
    kinds["`sft`"] = losses.Variant(lambda i: 2 * kinds[losses.BASELINE].loss(i), same_as=losses.BASELINE)
    with pytest.raises(AssertionError, match="sft"):
        fused.check_equal(kinds, losses.Inputs.draw(*fused.QUICK))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
def test_a_table_on_a_gpu() -> None:
    for one in fused.asked("cuda", True, False, 2, True):
        print(one.report())
