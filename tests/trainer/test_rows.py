"""Every kind of file gives the same rows, and each row knows its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from trainer.faults import DataFault
from trainer.rows import Row, open_rows, read_rows

ROWS = [{"prompt": 'a, "b"\nc', "completion": "d"}, {"prompt": "ä", "completion": "e"}]


def as_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def as_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "r.jsonl": as_jsonl,
    "r.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "r.csv": as_csv,
    "r.parquet": as_parquet,
    "r.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode()),
}
PLACES = {
    "r.jsonl": ["r.jsonl:1", "r.jsonl:2"],
    "r.json": ["r.json: row 1", "r.json: row 2"],
    "r.csv": ["r.csv:2", "r.csv:4"],  # the first row holds a line end
    "r.parquet": ["r.parquet: row 1", "r.parquet: row 2"],
    "r.jsonl.gz": ["r.jsonl.gz:1", "r.jsonl.gz:2"],
    "bom.jsonl": ["bom.jsonl:1", "bom.jsonl:2"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    WRITERS[name](tmp_path / name)
    rows = read_rows(name).rows
    assert [row.fields for row in rows] == ROWS
    assert [row.place for row in rows] == PLACES[name]


def test_blank_lines_count_as_lines(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.place for row in read_rows(str(path)).rows] == [f"{path}:1", f"{path}:3"]


def test_a_data_set_by_name_goes_through_the_datasets_library(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("owner/name:main@test").rows[0].fields == {"text": "a"}
    assert read_rows("owner/name").rows[0].place == "owner/name: row 1"
    assert next(open_rows("owner/name", streaming=True)) == Row("owner/name: row 1", {"text": "a"})
    assert asked == [
        ("owner/name", "main", "test", False),
        ("owner/name", None, "train", False),
        ("owner/name", None, "train", True),
    ]


def test_a_data_set_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(*_args, **_options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataFault, match=r"owner/name: neither a file nor a data set .* no route to the hub"):
        read_rows("owner/name")
