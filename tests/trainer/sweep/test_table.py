"""The intervals by tables of Student's t and by hand, and the tables that show them."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest

from trainer.sweep.intervals import Mean, difference, inside, mean, t_quantile
from trainer.sweep.run import Result
from trainer.sweep.table import (
    as_markdown,
    cells,
    differences,
    frozen,
    parts,
    printed,
    shown,
    summary,
    written,
)

# Two-sided 95 % points of Student's t, as printed in statistical tables.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert t_quantile(freedom, 0.95) == pytest.approx(TABLE[freedom], abs=5e-4)
    assert inside(t_quantile(freedom, 0.9), freedom) == pytest.approx(0.9)


def test_an_interval_by_hand() -> None:
    found = mean([1.0, 2.0, 6.0])
    assert found.value == 3.0
    assert found.half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)
    assert found.n == 3
    assert mean([2.0]) == Mean(2.0, None, 1), "one seed has no interval"
    assert mean([2.0, 2.0]) == Mean(2.0, 0.0, 2)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(2000):
        found = mean([chance.gauss(5, 2) for _ in range(3)])
        assert found.half is not None
        held += abs(found.value - 5) <= found.half
    assert 0.935 <= held / 2000 <= 0.965


def test_differences_are_paired_by_seed() -> None:
    one, other = {0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 3: 100.0}
    found = difference(one, other)
    assert found is not None
    assert (found.value, found.n) == (0.75, 2)
    assert found.half == pytest.approx(12.7062 * stdev([0.5, 1.0]) / math.sqrt(2), rel=1e-4)
    assert difference({0: 1.0}, {1: 1.0}) is None


def results() -> list[Result]:
    nll = {"sft": (1.0, 1.2, 1.1), "dft": (0.9, 1.1, 1.0), "mine | x": (1.5, 1.1)}
    made = [
        Result(
            label, seed, {"nll": value, "pass@4": value / 10}, 2.0, frozen=5 * (label == "sft" and seed == 0)
        )
        for label, values in nll.items()
        for seed, value in enumerate(values)
    ]
    return [*made, Result("mine | x", 2, {}, 1.0, "no memory")]


def test_the_tables() -> None:
    of = summary(results(), None)
    headings, lines = cells(of)
    assert headings == ["run", "seeds", "nll", "pass@4"]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert lines[0] == ["sft", "3", f"1.1000 ± {half:.4f}", f"11.0 ± {10 * half:.1f}"]
    assert lines[2][:2] == ["mine | x", "2 (1 failed)"]
    headings, lines = differences(of)
    assert [line[0] for line in lines] == ["dft", "mine | x"]
    assert lines[0] == ["dft", "3", "-0.1000 ± 0.0000 *", "-1.0 ± 0.0 *"]
    assert lines[1][1] == "2", "the seeds that both have"
    assert not lines[1][2].endswith("*")
    _, lines = differences(summary(results(), "dft"))
    assert [line[0] for line in lines] == ["sft", "mine | x"]
    assert lines[0][2].startswith("+0.1000")


def test_one_seed_and_one_run() -> None:
    of = summary([Result("sft", 0, {"nll": 1.0})], None)
    assert cells(of)[1] == [["sft", "1", "1.0000"]]
    assert "Differences" not in as_markdown(of, "Sweep")
    assert shown("accuracy", Mean(0.5, None, 1)) == "50.0"


def test_all_failed_is_a_table_too(capsys: pytest.CaptureFixture[str]) -> None:
    of = summary([Result("sft", 0, {}, 0.0, "boom"), Result("dft", 0, {}, 0.0, "boom")], None)
    printed(of)
    assert "0 (1 failed)" in capsys.readouterr().out


def test_what_is_written(tmp_path: Path) -> None:
    of = summary(results(), None)
    markdown, table, everything = written(of, results(), tmp_path, "Sweep")
    assert "| mine \\| x | 2 (1 failed) |" in markdown.read_text()
    assert "- mine | x seed 2: no memory" in markdown.read_text()
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["nll"]) for line in lines[:3]] == [1.0, 1.2, 1.1]
    assert lines[-1]["error"] == "no memory"
    assert lines[-1]["nll"] == ""
    known = json.loads(everything.read_text())
    assert known["rows"]["dft"]["differences"]["nll"]["n"] == 3
    assert known["rows"]["sft"]["figures"]["nll"]["value"] == pytest.approx(fmean([1.0, 1.2, 1.1]))
    assert frozen(results()).startswith("Frozen models: 5 rows in 1 of 9 runs")


def test_a_narrow_screen_gets_the_table_in_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    printed(summary(results(), None))
    shown = capsys.readouterr().out
    assert "1.1000 ± 0.2484 │" in shown
    assert "11.0 ± 2.5 │" in shown
    assert shown.count("┃ run ") == 4
    assert max(map(len, shown.splitlines())) <= 48
    monkeypatch.setenv("COLUMNS", "200")
    printed(summary(results(), None))
    assert capsys.readouterr().out.count("┃ run ") == 2
    assert parts(["a", "b", "c", "d"], [["x" * 9] * 4], 10) == [[0, 1, 2], [0, 1, 3]], "never an empty part"
