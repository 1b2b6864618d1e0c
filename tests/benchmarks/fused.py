"""What the fused loss costs beside cross-entropy on full logits: `make bench` prints the table.

Every repeat draws the order of the variants anew and ratios are to the repeat's own baseline. Fast and wrong
cannot win: equal rules must have equal losses, and the error of each gradient is against float64. Peak memory
is a fresh process's, above its inputs; on a GPU (`python -m tests.benchmarks.fused --device cuda`) it is the
allocator's, times are between events, and beside each loss stands the share of its time that the products and
the passes over the logits that it cannot do without take here by themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.benchmarks import timing
from tests.benchmarks.losses import BASELINE_16, Inputs, Variant, variants
from tests.benchmarks.peers import peers, runnable
from tests.benchmarks.roofline import Roofline
from tests.benchmarks.tiled import TiledProduct

Shape = tuple[int, int, int]
QUICK: Shape = (48, 16, 300)
TRL_DFT, TRL_SHARE = "TRL's DFT on its fused head", {"cpu": 0.45, "cuda": 0.80}


def gradient_error(variant: Variant, exact: Variant, given: Inputs, rows: int = 128) -> float:
    """The relative error of the gradient of the first hidden states against `exact` in float64."""
    some, wide = given.first(rows), given.wide(rows)
    (got,) = torch.autograd.grad(variant.loss(some), some.hidden)
    (right,) = torch.autograd.grad(exact.loss(wide), wide.hidden)
    return float((got.double() - right).norm() / right.norm())


def memory_step(name: str, rows: int, width: int, vocabulary: int, dtype: str) -> Callable[[], None]:
    """A step of a variant, for `timing.peak_memory`."""
    torch.set_num_threads(2)
    kind = getattr(torch, dtype)
    loss = (variants("cpu", kind) | peers("cpu", kind, "")[0])[name].loss
    if name == BASELINE_16:  # holds the same, and ends today on a CPU
        loss = _by_tiles
    loss(Inputs.draw(64, 64, 256, kind)).backward()  # what a first call loads is no tensor
    given = Inputs.draw(rows, width, vocabulary, kind)
    return lambda: loss(given).backward()


def _by_tiles(i: Inputs) -> Tensor:
    return cross_entropy(TiledProduct.apply(i.hidden, i.head).float(), i.targets)  # type: ignore[union-attr]


def memory(name: str, shape: Shape, dtype: str = "float32") -> float:
    """Peak memory in MiB of a step above its inputs, in a fresh process."""
    return timing.peak_memory("fused", f"memory_step({name!r}, *{shape}, {dtype!r})")


@dataclass
class Row:
    """One line of the table; `share` is the roofline's of its time."""

    name: str
    times: timing.Times
    target: float | None
    error: float
    least: float
    share: float | None = None


def measure(
    kinds: dict[str, Variant],
    given: Inputs,
    baseline: str,
    repeats: int,
    roof: Roofline | None = None,
) -> list[Row]:
    """Time and error of each variant; equal rules must give equal losses."""
    check_equal(kinds, given)
    device = given.hidden.device.type
    times = timing.by_turns({n: given.step(v.loss) for n, v in kinds.items()}, baseline, repeats, device)
    least = min(times[baseline].wall)
    rows = []
    for name, kind in kinds.items():
        error = gradient_error(kind, kinds[kind.same_as] if kind.same_as else kind, given)
        shortest = min(times[name].wall)
        share = roof.least(kind.cost) / shortest if roof and kind.cost else None
        rows.append(Row(name, times[name], kind.target, error, shortest / least, share))
    return rows


def check_equal(kinds: dict[str, Variant], given: Inputs) -> None:
    """Refuse variants that should compute the same and do not: 16-bit logits are rounded by some of them."""
    near = 1e-5 if given.hidden.dtype == torch.float32 else 1e-2
    for name, variant in kinds.items():
        if variant.same_as:
            one, other = (float(kinds[n].loss(given).detach()) for n in (name, variant.same_as))
            assert abs(one - other) <= near * max(1.0, abs(other)), (name, one, other)


def table(rows: list[Row], memories: dict[str, float], baseline: str) -> str:
    """The rows in Markdown; the roofline's column where it was measured."""
    titles = ["loss and gradients", "time", "by minima", "by CPU time", "target", "memory", "gradient error"]
    titles += ["roofline"] * any(row.share is not None for row in rows)
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [row.name, f"{row.times.ratio:.2f}", f"{row.least:.2f}", f"{row.times.cpu_ratio:.2f}"]
        cells.append("" if row.target is None else f"≤ {row.target:.2f}")
        cells.append(f"{memories[row.name] / memories[baseline]:.2f}" if row.name in memories else "")
        cells.append(f"{row.error:.0e}")
        cells.append("" if row.share is None else f"{row.share:.0%}")
        lines.append(cells[: len(titles)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: list[Row], missing: list[str], device: str) -> str:
    """What is said below a table: ours against TRL's, and what was not run and why."""
    least = {row.name: row.least for row in rows}
    lines = []
    if TRL_DFT in least:
        share = least["`dft`"] / least[TRL_DFT]
        lines.append(f"`dft` takes {share:.2f} of the time of {TRL_DFT} (target ≤ {TRL_SHARE[device]:.2f}).")
    return "\n".join([*lines, *(f"Not run: {reason}." for reason in missing)])


@dataclass(frozen=True)
class Asked:
    """A table that is asked for; memory is measured at the shape `held`, if any."""

    shape: Shape
    dtype: str
    repeats: int
    held: Shape | None = None
    device: str = "cpu"
    roofline: bool = False

    def report(self) -> str:
        """The table with a title, and what was not run."""
        dtype = getattr(torch, self.dtype)
        kinds = variants(self.device, dtype)
        baseline = next(iter(kinds))
        others, missing = peers(self.device, dtype, baseline)
        given = Inputs.draw(*self.shape, dtype, self.device)
        others, failed = runnable(others, given.first(64))
        kinds |= others
        clock = timing.clock(self.device)
        roof = Roofline.measured(given, clock) if self.roofline else None
        rows = measure(kinds, given, baseline, self.repeats, roof)
        memories = self.memories(kinds, given, baseline)
        below = notes(rows, missing + failed, self.device)
        return f"{self.title(roof)}\n\n{table(rows, memories, baseline)}\n\n{below}\n"

    def memories(self, kinds: dict[str, Variant], given: Inputs, baseline: str) -> dict[str, float]:
        """Peak memory: of a few in fresh processes, of all on a GPU, at the shape that is timed."""
        if self.device == "cuda":
            return {name: timing.gpu_memory(given.step(v.loss)) for name, v in kinds.items()}
        asked = [baseline, "`sft`", "top half of the batch"] if self.held else []
        return {n: memory(n, self.held, self.dtype) for n in asked if n in kinds and self.held}

    def title(self, roof: Roofline | None) -> str:
        """What was measured, and where."""
        rows, width, vocabulary = self.shape
        where = (
            torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} threads"
        )
        text = f"{rows} tokens, hidden size {width}, vocabulary {vocabulary}, {self.dtype}, {where}"
        text += f"; memory at {self.held[0]} tokens, vocabulary {self.held[2]}" if self.held else ""
        return text if roof is None else f"{text}; {roof}"


def asked(device: str, quick: bool, long: bool, repeats: int | None, roofline: bool) -> list[Asked]:
    """The tables of a command line."""
    if quick:
        dtypes = ("float32", "bfloat16")
        return [Asked(QUICK, dtype, repeats or 2, None, device, roofline) for dtype in dtypes]
    if device == "cuda":
        return [
            Asked((16_384, 4096, 151_936), "bfloat16", repeats or 10, None, device, True),
            Asked((4096, 2048, 32_000), "float32", repeats or 10, None, device, True),
        ]
    tables = [
        Asked((1024, 512, 32_000), "float32", repeats or 5, (2048, 512, 32_000), device, roofline),
        Asked((64, 512, 8_000), "bfloat16", repeats or 5, None, device, roofline),
    ]
    large = (2048, 1024, 151_936)
    return tables + [Asked(large, "float32", repeats or 5, large, device, roofline)] * long


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--long", action="store_true", help="large vocabularies too, in many minutes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--roofline", action="store_true", help="beside each loss what the device allows")
    parser.add_argument("--repeats", type=int)
    given = parser.parse_args()
    torch.set_num_threads(2)
    for one in asked(given.device, given.quick, given.long, given.repeats, given.roofline):
        print(one.report(), flush=True)


if __name__ == "__main__":
    main()
