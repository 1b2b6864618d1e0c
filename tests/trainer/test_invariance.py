"""The same run on any layout, from the command line: weights, losses and parameters do not depend on it.

A layout is how many rows make a micro-batch, how many micro-batches a step, on how many processes, whether
rows are packed or padded and how far, and whether full logits are held. Each class of rules has one here.
Every cell also shows that its layout was what it says: what went through the model is written down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import test_distributed
from tests.trainer.test_distributed import weights as parameters
from tests.trainer.test_pairs import sums_row
from tests.trainer.test_step_values import Weights, recorded
from trainer.cli import main
from trainer.trained import Call, Found, Trained

ROWS = 8  # of a step; the second step of an epoch has five
RULES: dict[str, tuple[str, str]] = {  # its class: the data that it reads, and the rule
    "pointwise": ("text", "dft"),
    "batch": ("text", "(1 + 0.2 * zscore(nll_on, batch)) * (1 if top(p_on, 0.5, batch) else 0.5)"),
    "stored": ("text", "prift_mass"),
    "chance": ("text", "normalize = kept; weight = bernoulli(0.7) * (0.5 + uniform(example))"),
    "schedule": ("text", "p_on ** (1 - progress) + ramp(0.25, 0.75) * (epoch == 1)"),
    "pairs": ("pairs", "fdpo"),
    "columns": (
        "tokens",
        "column noise: number per token; column good: bool; weight = noise * (1 if good else -0.3)",
    ),
    "views": (
        "text",
        "model slow = ema(0.5); weight = p(slow) + p(unprompted(on)) * (0.5 + attention(on, prompt))",
    ),
}
MORE: dict[str, tuple[str, str]] = {
    "of examples": ("text", "normalize = examples; weight = p_on / max(mean(p_on, example), 0.1)"),
    "of neighbours": ("text", "mean(p_on, window(1)) + minmax(nll_on, chunk(2)) * 0.1"),
    "of groups": (
        "text",
        "let hard = top(nll_on, 0.5, batch); normalize = groups(hard); weight = 1 if hard else -0.2",
    ),
    "a kept model": ("text", "asft"),
    "all tokens": ("text", "over = all; weight = p_on if role == user else 1"),
    "text": ("text", '2 if span("is (.)") else 1 - progress'),
    "noise in the input": ("text", "p(perturbed(on, 5)) + uniform()"),
    "pairs by batch": (
        "pairs",
        "let d = sum(logratio(on, ref), example); loss = -log_sigmoid(chosen(d) - rejected(d)) "
        "* (1 + 0.1 * sg(zscore(sum(nll_on, example), batch)))",
    ),
}
ALL = {**RULES, **MORE}
SET = {"stored": ["--set", "tau=0.3"]}
PACKING_LENGTH = {"text": 24, "tokens": 10, "pairs": 76}  # a line holds one to three of them
WORKER = """
import json, sys
import torch
from tests.trainer.test_invariance import measured

torch.set_num_threads(1)
for words, output in json.loads(sys.argv[1]):
    measured(words, output)
"""


@dataclass(frozen=True)
class Layout:
    """How the steps of a run are computed."""

    processes: int
    batch_size: int
    packed: bool = False
    multiple: int = 1
    loss: str = "fused"

    @property
    def accumulation(self) -> int:
        return ROWS // (self.batch_size * self.processes)

    def flags(self, data: str) -> list[str]:
        words = ["--batch-size", str(self.batch_size), "--accumulation", str(self.accumulation)]
        words += ["--pad-to-multiple", str(self.multiple), "--loss", self.loss]
        return words + (["--packing", "--packing-length", str(PACKING_LENGTH[data])] if self.packed else [])


PLAIN = Layout(1, 8, loss="dense")
FEW = [
    Layout(1, 2, multiple=8), Layout(1, 2, packed=True),
    Layout(2, 2), Layout(2, 1, packed=True, multiple=8, loss="dense"),
]  # fmt: skip
MATRIX = [
    Layout(processes, size, packed, multiple, loss)
    for processes, sizes in ((1, (8, 4, 2, 1)), (2, (4, 2, 1)))
    for size, packed, multiple, loss in product(sizes, (False, True), (1, 8), ("fused", "dense"))
    if Layout(processes, size, packed, multiple, loss) != PLAIN
]


@dataclass
class Seen:
    """What a process computed: the world it found, the weight of each token, and its micro-batches.

    A micro-batch is (progress, lines, width, rows of each line).
    """

    world: int = 1
    code: int = -1
    weights: Weights = field(default_factory=dict)
    micro: list[tuple[float, int, int, tuple[int, ...]]] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """What goes through the trained model in training while it lasts."""
    seen, patch = Seen(), pytest.MonkeyPatch()
    with recorded() as weights:
        forward = Trained.forward

        def keeping(self: Trained, call: Call, counting: bool = False) -> Any:
            found = forward(self, call, counting)
            if isinstance(found, Found) and torch.is_grad_enabled():
                lines, width = call.batch.input_ids.shape
                of = [line for line, _ in call.batch.spans] if call.batch.tokens else []
                held = tuple(of.count(line) for line in range(lines))
                seen.micro.append((call.given["progress"], lines, width, held))
            return found

        patch.setattr(Trained, "forward", keeping)
        try:
            yield seen
        finally:
            patch.undo()
            seen.weights = weights


def measured(words: Sequence[str], output: str) -> None:
    """Run the command line, and write what this process computed beside the output folder."""
    with watched() as seen:
        seen.code = main([*words])
    if torch.distributed.is_initialized():
        seen.world = torch.distributed.get_world_size()
    assert seen.code == 0, words
    torch.save(vars(seen), f"{output}.rank{os.environ.get('RANK', '0')}.pt")


@dataclass(frozen=True)
class Matrix:
    """Runs of rules on layouts, in a folder."""

    folder: Path
    shared: list[str]
    data: dict[str, str]

    def output(self, name: str, layout: Layout) -> Path:
        return self.folder / f"{list(ALL).index(name)}-{'-'.join(str(v) for v in vars(layout).values())}"

    def words(self, name: str, layout: Layout) -> tuple[list[str], str]:
        data, rule = ALL[name]
        output = str(self.output(name, layout))
        words = ["train", *self.shared, "--data", self.data[data], "--eval-data", self.data[data]]
        words += ["--rule", rule, "--output", output, *SET.get(name, []), *layout.flags(data)]
        return words, output

    def run(self, names: Sequence[str], layouts: Sequence[Layout]) -> None:
        """All of them; those on two processes in one start."""
        for name, layout in product(names, layouts):
            if layout.processes == 1:
                measured(*self.words(name, layout))
        two = [self.words(name, layout) for name, layout in product(names, layouts) if layout.processes == 2]
        if two:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(test_distributed, "WORKER", WORKER)
                ran = test_distributed.torchrun(two, self.folder)  # type: ignore[arg-type]
            missing = [out for _, out in two for rank in (0, 1) if not Path(f"{out}.rank{rank}.pt").exists()]
            assert not missing, ran.stderr

    def seen(self, name: str, layout: Layout) -> list[Seen]:
        """What each process of a run computed."""
        output = self.output(name, layout)
        ranks = range(layout.processes)
        return [Seen(**torch.load(f"{output}.rank{r}.pt", weights_only=False)) for r in ranks]

    def log(self, name: str, layout: Layout) -> list[dict[str, Any]]:
        text = (self.output(name, layout) / "log.jsonl").read_text()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


@pytest.fixture
def matrix(model: str, tmp_path: Path) -> Matrix:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    text = [{"prompt": f"what is {i} ?", "completion": " 1 is 2"[: 2 + i % 6] * 2} for i in range(13)]
    tokens = [
        {
            "input_ids": [1, *(5 + (7 * i + j) % 300 for j in range(3 + i % 7))],
            "noise": [(i + j) % 5 / 4 for j in range(4 + i % 7)],
            "good": i % 3 > 0,
        }
        for i in range(13)
    ]
    pairs = [sums_row(i, h_chosen=i % 3 == 0, h_rejected=i % 2 == 0) for i in range(13)]
    data = {
        "text": write("text.jsonl", text),
        "tokens": write("tokens.jsonl", tokens),
        "pairs": write("pairs.jsonl", pairs),
    }
    shared = {
        "model": model, "epochs": 2, "learning-rate": 1e-4, "warmup": 0, "schedule": "constant", "seed": 5,
        "device": "cpu", "cache": tmp_path / "cache",
    }  # fmt: skip
    return Matrix(tmp_path, ["--quiet", *(f"--{k}={v}" for k, v in shared.items())], data)


def is_layout(layout: Layout, seen: list[Seen], responses: int) -> None:
    """Assert that a run was computed as its layout says."""
    assert [of.world for of in seen] == [layout.processes] * layout.processes
    micro = [of.micro for of in seen]
    assert len({len(of) for of in micro}) == 1, "all processes take the same number of micro-batches"
    assert all(width % layout.multiple == 0 for of in micro for _, _, width, _ in of)
    held = [rows for of in micro for _, _, _, rows in of]
    if not layout.packed:
        first = [m for m in micro[0] if m[0] == 0]
        assert len(first) == layout.accumulation
        assert all(lines == layout.batch_size * responses for _, lines, _, _ in first)
        assert all(set(rows) <= {0, 1} for rows in held)
    else:
        lines = [rows for of in held for rows in of]
        assert len(lines) < 0.8 * sum(lines) / responses, "lines hold several rows"
        assert all(len(of) <= layout.batch_size for of in held)


def the_same(matrix: Matrix, name: str, layout: Layout, worst: dict[str, float]) -> None:
    """Assert that a run is the plain one; `worst` keeps the largest differences, relative above 1."""
    pairs = ALL[name][0] == "pairs"
    (plain,) = matrix.seen(name, PLAIN)
    seen = matrix.seen(name, layout)
    assert plain.code == 0
    assert [of.code for of in seen] == [0] * layout.processes
    is_layout(layout, seen, 2 if pairs else 1)
    found: Weights = {}
    for of in seen:
        assert of.weights
        assert not found.keys() & of.weights.keys()
        found |= of.weights
    assert found.keys() == plain.weights.keys()
    far = {"weight": max(abs(found[key] - plain.weights[key]) for key in found)}
    lines = [*zip(matrix.log(name, layout), matrix.log(name, PLAIN), strict=True)]
    assert len(lines) == 5, "four steps and a measurement"
    for one, other in lines:
        assert one.keys() == other.keys()
        ranked = {key.removeprefix("eval_") for key in one if "preference" in key}
        assert ranked == ({"preference_accuracy", "preference_margin"} if pairs else set())
        for key, value in one.items():
            kind = "loss" if key.endswith(("loss", "nll")) else "figure"
            far[kind] = max(far.get(kind, 0.0), abs(value - other[key]) / max(1.0, abs(value)))
    ends = [parameters(matrix.output(name, of)) for of in (layout, PLAIN)]
    far["parameter"] = float((ends[0] - ends[1]).abs().max())
    for kind, value in far.items():
        worst[kind] = max(worst.get(kind, 0.0), value)
    allowed = {"weight": 1e-6, "loss": 1e-6, "figure": 1e-5, "parameter": 1e-5}
    assert {k: v for k, v in far.items() if v > allowed[k]} == {}, (name, layout)


def shapes(matrix: Matrix, name: str, layout: Layout) -> tuple[Any, ...]:
    """What was computed, but for the loss: two layouts of the matrix must not have it in common."""
    return tuple(tuple(of.micro) for of in matrix.seen(name, layout))


def invariant(matrix: Matrix, names: Sequence[str], layouts: Sequence[Layout]) -> dict[str, float]:
    """Assert that rules give the same runs on all layouts, which differ; returns the largest differences."""
    matrix.run(names, [PLAIN, *layouts])
    start, worst = parameters(Path(matrix.shared[1].partition("=")[2])), {}
    for name in names:
        for layout in layouts:
            the_same(matrix, name, layout, worst)
        different = {(of.processes, of.batch_size, of.packed, of.multiple): of for of in (PLAIN, *layouts)}
        computed = {shapes(matrix, name, layout) for layout in different.values()}
        assert len(computed) == len(different), "each layout was another one"
        assert (parameters(matrix.output(name, PLAIN)) - start).abs().max() > 1e-4, "the run trained"
    return worst


def test_the_layout_of_a_run_changes_nothing(matrix: Matrix):
    invariant(matrix, [*RULES], FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_the_matrix(name: str, matrix: Matrix, capsys: pytest.CaptureFixture[str]):
    worst = invariant(matrix, [name], MATRIX)
    with capsys.disabled():
        print(
            f"\n{name}: {len(MATRIX)} layouts, largest differences", {k: f"{v:.0e}" for k, v in worst.items()}
        )
