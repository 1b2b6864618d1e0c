"""A run that is killed with SIGKILL at any moment and resumed ends as the run that was not: bit for bit."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.killing import KILLED, PHASES, Killer, Ran

# Chance, a stored column, a moving average, progress; the model has dropout.
RULE = (
    "model slow = ema(0.8); "
    "weight = (1 if mass(ref) >= 0.3 else 0.2) * bernoulli(0.7) * (p(slow) + 0.1) * (1 - progress / 2)"
)
OWN = {
    "config.yaml",
    "log.jsonl",
    "manifest.json",
    "README.md",
}  # of OUTPUT: they name it or the time


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    made = Killer(tmp_path_factory.mktemp("killer"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def settings(make_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"what is {i} + {i} ?", "completion": f" it is {2 * i}" + " ." * (i % 5)}
        for i in range(20)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": make_folder(folder / "model", seed=0, attention_dropout=0.3),
        "data": [str(data)], "eval_data": [str(data)], "rule": RULE, "device": "cpu", "seed": 3,
        "batch_size": 4, "accumulation": 2, "epochs": 3, "learning_rate": 2e-2,
        "save_steps": 3, "eval_steps": 1, "keep_best": True, "keep_last": 1,
    }  # fmt: skip


class Series:
    """Runs of one kind, each with folder and cache of its own, held against the one that went through."""

    def __init__(self, killer: Killer, settings: dict[str, Any], folder: Path) -> None:
        self._killer = killer
        self._settings = settings
        self._folder = folder
        self.numbers = itertools.count()
        self.whole = self.run("whole")
        assert self.whole.code == 0, self.whole.said

    def run(self, name: str, resume: bool = False, **kill: Any) -> Ran:
        own = {"output": str(self._folder / name), "cache": str(self._folder / f"{name}-cache")}
        return self._killer.run({**self._settings, **own, "resume": resume}, **kill)

    def killed(self, name: str, **kill: Any) -> str | None:
        """Kill a run, resume it, and hold it against the whole one; returns how far the killed one came.

        None where it ended before it was killed.
        """
        ran = self.run(name, **kill)
        if ran.code == 0:
            return None
        assert ran.code == KILLED, ran.said
        place = self.place(name)
        resumed = self.run(name, resume=True)
        assert resumed.code == 0, f"{kill}, {place}: {resumed.said}"
        self.same(name, f"{kill}, {place}")
        return place

    def place(self, name: str) -> str:
        """How far a run came, from its folder."""
        output = self._folder / name
        if not (output / "log.jsonl").exists():
            return (
                f"before the folder, {len(list(self._folder.glob(f'{name}-cache/*/*/*')))} files in the cache"
            )
        if (output / "model.safetensors").exists():
            return "the model is there"
        done = len((output / "log.jsonl").read_text().splitlines())
        writing = (
            any((output / "checkpoints").glob(".partial-*")) if (output / "checkpoints").exists() else False
        )
        found = sorted(p.name for p in (output / "checkpoints").glob("step-*"))
        return f"{'writing a checkpoint' if writing else 'stepping'}, {done // 2} steps, {found}"

    def same(self, name: str, when: str) -> None:
        one, other = (contents(self._folder / n) for n in ("whole", name))
        assert one.keys() == other.keys(), when
        assert [path for path in one if one[path] != other[path]] == [], when
        assert log(self._folder / name) == log(self._folder / "whole"), when


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of all files of a run: model, checkpoints with all they hold, best, finished."""
    files = {str(path.relative_to(output)): path for path in sorted(output.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in OWN}


def log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def series(killer: Killer, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Series:
    return Series(killer, settings, tmp_path_factory.mktemp("runs"))


def test_the_run_that_is_killed_has_all_that_could_go_wrong(series: Series):
    output = series._folder / "whole"
    lines = [line for line in log(output) if "nll" in line]
    assert all(0 < line["weight_nonzero"] < 1 for line in lines), "chance decides"
    measured = [line["eval_nll"] for line in log(output) if "eval_nll" in line]
    assert len(measured) == 9
    best = json.loads((output / "best.json").read_text())
    assert best["eval_nll"] == min(measured)
    kept = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert kept == sorted({f"step-{best['step']}", "step-9"})
    assert (output / "checkpoints" / "step-9" / "average-slow.weights").exists()
    phases = Counter(phase for phase, _ in series.whole.instants)
    assert phases.keys() == set(PHASES)
    assert phases["checkpoint"] > 100
    assert any("half of model.safetensors" in what for _, what in series.whole.instants)


def test_another_seed_is_another_run(series: Series):
    """The comparison can fail."""
    series._settings["seed"] += 1
    assert series.run("other").code == 0
    series._settings["seed"] -= 1
    with pytest.raises(AssertionError):
        series.same("other", "")


def kill_at_random(series: Series, count: int, seed: int) -> Counter[str]:
    """Kill so many runs at random, a fifth of them before the output folder is made."""
    chance = random.Random(seed)
    places: Counter[str] = Counter()
    longest = series.whole.seconds
    for number in range(count):
        share = (number + chance.random()) / count
        begins = series.whole.began / series.whole.seconds
        share = share * 5 * begins if share < 0.2 else begins + (share - 0.2) / 0.8 * (1 - begins)
        while (place := series.killed(f"random-{seed}-{number}-{longest}", after=share * longest)) is None:
            longest *= 0.9  # it was faster than the one that was timed
        places[place] += 1
    return places


def kill_at(series: Series, instants: list[int]) -> None:
    for n in instants:
        name = f"instant-{n}-{next(series.numbers)}"
        assert series.killed(name, instant=n) is not None, f"there is no instant {n}"


def spread(found: list[int], count: int) -> list[int]:
    """So many of some numbers, from the first to the last."""
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]


def test_a_few_kills(series: Series):
    kill_at_random(series, 2, seed=0)
    # In the second checkpoint: a file half written, all of them but not its name, an old one half removed.
    found = series.whole.of("checkpoint")
    for what in ("half of optimizer.pt", "os.rename .partial-step", "os.remove config.json"):
        kill_at(series, [n for n in found if what in series.whole.instants[n][1]][1:2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random(series: Series):
    places = kill_at_random(series, 50, seed=1)
    print(*sorted(f"{n} x {place}" for place, n in places.items()), sep="\n")
    assert len(places) >= 8, "the kills hit many different places"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_in_the_writing_of_a_checkpoint(series: Series):
    chosen = spread(series.whole.of("checkpoint"), 20)
    print(*(f"{n}: {series.whole.instants[n][1]}" for n in chosen), sep="\n")
    assert len(set(chosen)) == 20
    kill_at(series, chosen)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("phase", PHASES)
def test_kills_at_every_instant_of_a_phase(phase: str, series: Series):
    """All instants of a phase; of the checkpoints those of the second one, which lets an old one go."""
    found = series.whole.of(phase)
    if phase == "checkpoint":
        whats = [what for _, what in series.whole.instants]
        begins = [n for n in found if whats[n] == "os.mkdir checkpoints"]
        found = [n for n in found if begins[1] <= n < begins[2]]
    kill_at(series, found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_again_and_again(series: Series):
    chance = random.Random(5)
    total = len(series.whole.instants)
    for number in range(5):
        name, kills = f"again-{number}", 0
        while (
            ran := series.run(name, resume=kills > 0, instant=chance.randrange(total // 2))
        ).code == KILLED:
            kills += 1
        assert ran.code == 0, ran.said
        series.same(name, f"{kills} kills")
