"""What the fused loss costs beside cross-entropy on full logits: `make bench` prints the table.

Every repeat draws the order of the variants anew and ratios are to the repeat's own baseline. Fast and wrong
cannot win: equal rules must have equal losses, and the error of each gradient is against float64. Peak memory
is a fresh process's, above its inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from priority_dsl import compile_rule
from tests.benchmarks import timing
from tests.benchmarks.tiled import TiledProduct

LIVE = 0.34
BASELINE = "F.cross_entropy"
BASELINE_16 = "F.cross_entropy of logits.float()"
STATISTICS = "H_on + mass_on + rank_on + topk_entropy(on, 20) + pmax_on + margin_on + p_on"


@dataclass
class Inputs:
    """Hidden states `[N, D]`, a head `[V, D]`, targets `[N]` and which tokens a selection keeps."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    chosen: Tensor

    @classmethod
    def draw(cls, rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Inputs:
        torch.manual_seed(0)
        hidden = torch.randn(rows, width)
        head = torch.randn(vocabulary, width) / width**0.5
        chosen = torch.rand(rows) < LIVE
        targets = torch.randint(0, vocabulary, (rows,))
        return cls(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets, chosen)

    def wide(self, rows: int) -> Inputs:
        """The first rows in float64."""
        hidden, head = (t.detach().double().requires_grad_() for t in (self.hidden[:rows], self.head))
        return Inputs(hidden, head, self.targets[:rows], self.chosen[:rows])

    def first(self, rows: int) -> Inputs:
        """The first rows."""
        hidden, head = (t.detach().requires_grad_() for t in (self.hidden[:rows], self.head))
        return Inputs(hidden, head, self.targets[:rows], self.chosen[:rows])

    def step(self, loss: Callable[[Inputs], Tensor]) -> Callable[[], None]:
        """A loss with its gradients."""

        def run() -> None:
            loss(self).backward()
            self.hidden.grad = self.head.grad = None

        return run


@dataclass(frozen=True)
class Variant:
    """A loss of inputs, what its time may be as a share of the baseline's, and what it is, in words."""

    loss: Callable[[Inputs], Tensor]
    target: float | None = None
    same_as: str = ""  # a variant of which this is another way to compute the same


def fused(text: str, target: float | None = None, reads: Callable[[Inputs], dict] = lambda i: {}) -> Variant:
    """A rule of ours by its text."""
    rule = compile_rule(text)
    return Variant(lambda i: rule.fused_loss(i.hidden, i.head, i.targets, **reads(i)).mean, target)


def variants() -> dict[str, Variant]:
    """What is measured in float32."""
    plain = fused("sft", 0.90)
    found = {
        BASELINE: Variant(lambda i: cross_entropy(i.hidden @ i.head.T, i.targets)),
        "`sft`": replace(plain, same_as=BASELINE),
        "`dft`": fused("dft", 0.90),
        "`weight = H_on`": fused("weight = H_on", 0.90),
        "seven statistics at once": fused(STATISTICS, 1.00),
        f"selection that reads the model, {LIVE:.0%} live": fused(
            "column k: bool per token; weight = p_on > 2 or k",
            round((1 + 2 * LIVE) / 3 + 0.03, 2),
            lambda i: {"columns": {"k": i.chosen}},
        ),
        f"stored selection (`prift_mass`), {LIVE:.0%} live": fused(
            "prift_mass", round(LIVE + 0.03, 2), lambda i: {"stored": {"mass(ref) >= tau": i.chosen}}
        ),
        "top half of the batch": fused("top(H_on, 0.5, batch)", 0.85),
        "entropy bonus, gradient through H": fused("loss = nll_on - 0.1 * H_on"),
    }
    return found | peers()


def peers() -> dict[str, Variant]:
    """Other heads that never hold full logits, where they are installed and run on a CPU."""
    found: dict[str, Variant] = {}
    if (linear := getattr(torch.nn.functional, "linear_cross_entropy", None)) is not None:
        found["torch `linear_cross_entropy`"] = Variant(
            lambda i: linear(i.hidden, i.head, i.targets), same_as=BASELINE
        )
    try:
        from trl.trainer.sft_trainer import dft_loss
    except ImportError:
        return found

    @dataclass
    class Outputs:
        logits: Tensor

    def trl_dft(i: Inputs) -> Tensor:
        labels = torch.cat([torch.tensor([-100]), i.targets])  # TRL shifts
        logits = i.hidden @ i.head.T
        padded = torch.cat([logits, logits[-1:].detach()])
        return dft_loss(Outputs(padded.unsqueeze(0)), labels.unsqueeze(0))

    return found | {"TRL's DFT on full logits": Variant(trl_dft, same_as="`dft`")}


def variants_16() -> dict[str, Variant]:
    """What is measured in bfloat16."""
    return {
        BASELINE_16: Variant(lambda i: cross_entropy((i.hidden @ i.head.T).float(), i.targets)),
        "`sft`": fused("sft", 1.00),
        "`dft`": fused("dft", 1.00),
    }


def gradient_error(variant: Variant, given: Inputs, rows: int = 128) -> float:
    """The relative error of the gradient of the hidden states against float64, for the first rows."""
    some, wide = given.first(rows), given.wide(rows)
    (got,) = torch.autograd.grad(variant.loss(some), some.hidden)
    (exact,) = torch.autograd.grad(variant.loss(wide), wide.hidden)
    return float((got.double() - exact).norm() / exact.norm())


def memory_step(name: str, rows: int, width: int, vocabulary: int, dtype: str) -> Callable[[], None]:
    """A step of a variant, for `timing.peak_memory`."""
    torch.set_num_threads(2)
    kinds = variants() if dtype == "float32" else variants_16()
    loss = kinds[name].loss
    if name == BASELINE_16:  # holds the same, and ends today on a CPU
        loss = _by_tiles
    loss(Inputs.draw(64, 64, 256, getattr(torch, dtype))).backward()  # what a first call loads is no tensor
    given = Inputs.draw(rows, width, vocabulary, getattr(torch, dtype))
    return lambda: loss(given).backward()


def _by_tiles(i: Inputs) -> Tensor:
    return cross_entropy(TiledProduct.apply(i.hidden, i.head).float(), i.targets)  # type: ignore[union-attr]


def memory(name: str, shape: tuple[int, int, int], dtype: str = "float32") -> float:
    """Peak memory in MiB of a step above its inputs, in a fresh process."""
    return timing.peak_memory("fused", f"memory_step({name!r}, *{shape}, {dtype!r})")


@dataclass
class Row:
    """One line of the table."""

    name: str
    times: timing.Times
    target: float | None
    error: float
    least: float


def measure(kinds: dict[str, Variant], given: Inputs, baseline: str, repeats: int) -> list[Row]:
    """Time and error of each variant; equal rules must give equal losses."""
    for name, variant in kinds.items():
        if variant.same_as:
            ours, theirs = (float(kinds[n].loss(given).detach()) for n in (name, variant.same_as))
            assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)), (name, ours, theirs)
    times = timing.by_turns({n: given.step(v.loss) for n, v in kinds.items()}, baseline, repeats)
    least = min(times[baseline].wall)
    return [
        Row(n, times[n], v.target, gradient_error(v, given), min(times[n].wall) / least)
        for n, v in kinds.items()
    ]


def table(rows: list[Row], memories: dict[str, float], baseline: str) -> str:
    """The rows in Markdown."""
    lines = [
        "| loss and gradients | time | by minima | by CPU time | target | memory | gradient error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        held = f"{memories[row.name] / memories[baseline]:.2f}" if row.name in memories else ""
        target = "" if row.target is None else f"≤ {row.target:.2f}"
        times = row.times
        lines.append(
            f"| {row.name} | {times.ratio:.2f} | {row.least:.2f} | {times.cpu_ratio:.2f} | {target} "
            f"| {held} | {row.error:.0e} |"
        )
    return "\n".join(lines)


def report(shape: tuple[int, int, int], dtype: str, repeats: int, held: tuple[int, int, int] | None) -> str:
    """The table of one shape with a title, memory at the shape `held`."""
    kinds, baseline = (variants(), BASELINE) if dtype == "float32" else (variants_16(), BASELINE_16)
    rows = measure(kinds, Inputs.draw(*shape, getattr(torch, dtype)), baseline, repeats)
    asked = [baseline, "`sft`", "top half of the batch"]
    memories = {n: memory(n, held, dtype) for n in asked if n in kinds} if held else {}
    title = f"{shape[0]} tokens, hidden size {shape[1]}, vocabulary {shape[2]}, {dtype}, two threads"
    title += f"; memory at {held[0]} tokens, vocabulary {held[2]}" if held else ""
    return f"{title}\n\n{table(rows, memories, baseline)}\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--long", action="store_true", help="large vocabularies too, in many minutes")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(2)
    print(report((1024, 512, 32_000), "float32", given.repeats, (2048, 512, 32_000)))
    print(report((64, 512, 8_000), "bfloat16", given.repeats, None))
    if given.long:
        print(report((2048, 1024, 151_936), "float32", given.repeats, (2048, 1024, 151_936)))


if __name__ == "__main__":
    main()
