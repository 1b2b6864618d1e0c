"""The cache: whole shards or none, found by content, safe against damage, other runs and a full disk."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from trainer.cache import Entry, cache_folder, cleared, listed, row_key
from trainer.cli import main
from trainer.faults import ConfigFault

ROWS = {f"row{i}": np.arange(i + 1, dtype=np.float32) / 7 for i in range(5)}


def entry(folder: Path, statistic: str = "mass(ref)") -> Entry:
    about: dict[str, Any] = {"statistic": statistic, "precision": "fp32"}
    return Entry(folder, about, {"statistic": statistic, "model": "M"})


def quiet(text: str) -> None:
    raise AssertionError(f"nothing was to be said: {text}")


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and np.array_equal(found[k], wanted[k]) for k in wanted
    )


def test_what_was_written_is_read_and_only_what_is_wanted(tmp_path: Path):
    entry(tmp_path).write(ROWS)
    assert same(entry(tmp_path).read(ROWS.keys(), quiet), ROWS)
    assert same(entry(tmp_path).read({"row3", "other"}, quiet), {"row3": ROWS["row3"]})
    assert entry(tmp_path, "nll(ref)").read(ROWS.keys(), quiet) == {}


def test_bools_and_rows_without_a_target_are_kept(tmp_path: Path):
    rows = {"a": np.array([True, False, True]), "b": np.zeros(0, dtype=bool)}
    entry(tmp_path).write(rows)
    assert same(entry(tmp_path).read(rows.keys(), quiet), rows)


def test_infinities_and_every_bit_survive(tmp_path: Path):
    rows = {"a": np.array([np.inf, -np.inf, 1e-45, np.float32(1) / 3], dtype=np.float32)}
    entry(tmp_path).write(rows)
    assert entry(tmp_path).read(["a"], quiet)["a"].tobytes() == rows["a"].tobytes()


def test_a_shard_is_a_file_that_datasets_opens(tmp_path: Path):
    entry(tmp_path).write(ROWS)
    (shard,) = entry(tmp_path).folder.glob("*.arrow")
    opened = datasets.Dataset.from_file(str(shard))
    assert opened.column_names == ["row", "values"]
    assert opened[4]["values"] == ROWS["row4"].tolist()


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "longer"])
def test_a_damaged_shard_is_noticed_and_removed(damage: str, tmp_path: Path):
    place = entry(tmp_path)
    place.write({k: v for k, v in ROWS.items() if k != "row4"})
    (shard,) = place.folder.glob("*.arrow")
    place.write({"row4": ROWS["row4"]})
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(
        {"a bit": data, "cut": data[:100], "empty": b"", "longer": shard.read_bytes() + b"x"}[damage]
    )
    said: list[str] = []
    assert same(place.read(ROWS.keys(), said.append), {"row4": ROWS["row4"]})
    assert f"{shard} is damaged" in said[0]
    assert not shard.exists()
    place.write(ROWS)
    assert same(place.read(ROWS.keys(), quiet), ROWS)


def test_the_key_says_all_that_the_values_depend_on(tmp_path: Path):
    assert entry(tmp_path).key == entry(tmp_path / "elsewhere").key
    assert entry(tmp_path).key != entry(tmp_path, "mass(ref, ties=exclude)").key
    assert row_key([1, 2], [False, True]) != row_key([1, 2], [True, True])
    assert row_key([1, 2, 3], [False, True, True]) != row_key([1, 2, 4], [False, True, True])
    assert row_key([1, 23], [False, True]) != row_key([12, 3], [False, True])


def test_files_of_a_run_that_was_killed_while_writing_are_no_shards(tmp_path: Path):
    place = entry(tmp_path)
    place.write(ROWS)
    old, young = place.folder / ".a.arrow.1.tmp", place.folder / ".b.arrow.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert same(place.read(ROWS.keys(), quiet), ROWS)
    place.sweep_up()
    assert (old.exists(), young.exists()) == (False, True), "another run may still be writing the young one"


def _write_many(folder: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    place = entry(Path(folder))
    for _ in range(20):
        chosen = draw.choice(5, 3, replace=False)
        place.write({f"row{i}": ROWS[f"row{i}"] for i in chosen})
        found = place.read(ROWS.keys(), quiet)
        assert all(np.array_equal(found[k], ROWS[k]) for k in found)


def test_writers_at_once_do_not_corrupt_each_other(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert same(entry(tmp_path).read(ROWS.keys(), quiet), ROWS)
    assert not [p for p in entry(tmp_path).folder.iterdir() if p.suffix == ".tmp"]


def test_the_folder_is_the_given_one_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "priority_dsl"
    assert cache_folder("here") == Path("here")
    for unset in ("", "relative"):  # the specification of that variable: a relative path is ignored
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder(None) == Path.home() / ".cache" / "priority_dsl"


@pytest.mark.parametrize("what", ["a file", "read-only"])
def test_a_folder_that_cannot_be_used_is_named(what: str, tmp_path: Path):
    place = tmp_path / "cache"
    if what == "a file":
        place.write_text("mine")
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        place.mkdir(mode=0o500)
    with pytest.raises(ConfigFault, match=f"--cache {place}: cannot be used"):
        entry(place).write(ROWS)


def test_listing_and_clearing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("mass(ref)", "nll(ref)"):
        entry(tmp_path, name).write(ROWS)
    foreign = tmp_path / "statistics" / "notes"
    foreign.mkdir()
    key = entry(tmp_path, "nll(ref)").key
    assert {(e.statistic, e.model, e.precision, e.rows) for e in listed(tmp_path)} == {
        ("mass(ref)", "M", "fp32", 5), ("nll(ref)", "M", "fp32", 5)
    }  # fmt: skip
    assert main(["cache", "--cache", str(tmp_path)]) == 0
    assert "2 entries" in (shown := capsys.readouterr().out)
    assert key in shown
    with pytest.raises(ConfigFault, match="no entry ffff"):
        cleared(tmp_path, "ffff")
    assert main(["cache", "--cache", str(tmp_path), "--clear", key[:8]]) == 0
    assert [e.statistic for e in listed(tmp_path)] == ["mass(ref)"]
    assert main(["cache", "--cache", str(tmp_path), "--clear"]) == 0
    assert listed(tmp_path) == []
    assert foreign.exists(), "what is not ours stays"
    assert main(["cache", "--cache", str(tmp_path / "none")]) == 0
