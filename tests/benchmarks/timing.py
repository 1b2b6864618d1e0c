"""How the benchmarks measure: time by turns in one process, peak memory in fresh ones, a GPU by its own."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Times:
    """Wall clock and processor seconds of a variant, and their ratios to the baseline of the same repeat."""

    wall: list[float]
    ratios: list[float]
    cpu_ratios: list[float]

    @property
    def ratio(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        """The median of the paired ratios of processor time."""
        return statistics.median(self.cpu_ratios)


Clock = Callable[[Callable[[], object]], tuple[float, float]]


def by_turns(
    runs: Mapping[str, Callable[[], object]], baseline: str, repeats: int, device: str = "cpu"
) -> dict[str, Times]:
    """Each variant once a repeat, in an order drawn anew; ratios are to the repeat's own baseline."""
    timed = clock(device)
    for run in runs.values():
        run()  # once before the clock starts
    draw, found = random.Random(0), {name: Times([], [], []) for name in runs}
    for _ in range(repeats):
        order = list(runs)
        draw.shuffle(order)
        took = {name: timed(runs[name]) for name in order}
        for name, (wall, cpu) in took.items():
            found[name].wall.append(wall)
            found[name].ratios.append(wall / took[baseline][0])
            found[name].cpu_ratios.append(cpu / took[baseline][1])
    return found


def clock(device: str) -> Clock:
    """What says how many seconds a run takes, and how many of the processor's."""
    return _on_gpu if device == "cuda" else _timed


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _on_gpu(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds between two events on the GPU, which may still be at work when `run` returns."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu = time.process_time()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, time.process_time() - cpu


def gpu_memory(run: Callable[[], object]) -> float:
    """MiB that a run allocates on the GPU at its peak above what is held before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory(module: str, call: str) -> float:
    """MiB of resident memory that `module.call(...)`, evaluated in a fresh process, needed at its peak.

    The call makes its inputs and returns what to measure, which runs once.
    """
    code = (
        f"import json; from tests.benchmarks import timing, {module} as m; "
        f"print(json.dumps(timing.above(m.{call})))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def above(run: Callable[[], object]) -> float:
    """MiB that a call needs at its peak above what the process holds before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
