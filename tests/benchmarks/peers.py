"""Other heads that hold no full logits, where they are installed and run. None of them is a dependency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from tests.benchmarks.losses import Inputs, Variant

# What TRL's SFT trainer computes beside the log-probabilities, for its log.
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
TRL_TILE = 32_768  # columns of logits, as its fused head has it


def peers(device: str, dtype: torch.dtype, baseline: str) -> tuple[dict[str, Variant], list[str]]:
    """The peers that run on a device, by name, and for each other why it does not."""
    found: dict[str, Variant] = {}
    missing: list[str] = []
    for make in (_torch, _trl, _liger, _apple):
        for name, variant in make(device, dtype, baseline):
            if isinstance(variant, str):
                missing.append(f"{name}: {variant}")
            else:
                found[name] = variant
    return found, missing


def runnable(found: dict[str, Variant], given: Inputs) -> tuple[dict[str, Variant], list[str]]:
    """Those of the peers that run here on some inputs, and what went wrong with each other."""
    kept, missing = {}, []
    for name, variant in found.items():
        try:
            given.step(variant.loss)()
            kept[name] = variant
        except Exception as error:  # another project's code must not cost the table
            missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    return kept, missing


Found = Iterator[tuple[str, Variant | str]]


def _torch(device: str, dtype: torch.dtype, baseline: str) -> Found:
    name = "torch `linear_cross_entropy`"
    linear = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if linear is None:
        yield name, f"torch {torch.__version__} has none"
    elif device == "cpu" and dtype != torch.float32:
        yield name, "16-bit products on a CPU take too long"
    else:
        yield name, Variant(lambda i: linear(i.hidden, i.head, i.targets), same_as=baseline)


def _trl(device: str, dtype: torch.dtype, baseline: str) -> Found:
    names = ["TRL's fused head", "TRL's DFT on its fused head"]
    if not find_spec("trl"):
        yield " and ".join(names), "TRL is not installed"
        return
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        yield " and ".join(names), f"this version of TRL has no such head ({error})"
        return

    def log_p(i: Inputs) -> Tensor:
        arguments = (i.hidden, i.head, None, i.targets, 1.0, TRL_TILE, None, 1.0, TRL_OUTPUTS)
        return ChunkedLogProbFunction.apply(*arguments)[0]

    def dft(i: Inputs) -> Tensor:
        found = log_p(i)
        return (-found * found.exp().detach()).mean()

    if device == "cpu" and dtype != torch.float32:
        yield " and ".join(names), "16-bit products on a CPU take too long"
        return
    yield names[0], Variant(lambda i: -log_p(i).mean(), same_as=baseline)
    yield names[1], Variant(dft, same_as="`dft`")


def _liger(device: str, dtype: torch.dtype, baseline: str) -> Found:
    names = ["Liger's fused linear cross-entropy", "the same scaled by p, which is `dft`"]
    if reason := _absent("liger_kernel", device):
        yield names[0], reason
        return
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as linear

    plain: Callable[..., Tensor] = linear
    yield names[0], Variant(lambda i: plain(i.hidden, i.head, i.targets), same_as=baseline)
    yield (
        names[1],
        Variant(lambda i: plain(i.hidden, i.head, i.targets, use_token_scaling=True), same_as="`dft`"),
    )


def _apple(device: str, dtype: torch.dtype, baseline: str) -> Found:
    name = "Apple's cut cross-entropy"
    if reason := _absent("cut_cross_entropy", device):
        yield name, reason
    elif dtype == torch.float32:
        yield name, "takes 16 bits alone"
    else:
        from cut_cross_entropy import linear_cross_entropy as linear

        yield name, Variant(lambda i: linear(i.hidden, i.head, i.targets), same_as=baseline)


def _absent(package: str, device: str) -> str:
    """Why a package of Triton kernels cannot run, empty where it can."""
    if device != "cuda":
        return "needs a GPU"
    return "" if find_spec(package) else f"{package} is not installed"
