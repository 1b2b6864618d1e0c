"""Data files -> rows that know their place: jsonl, json, csv, parquet, or a data set by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.faults import DataFault, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# A data set by name is owner/name, with an optional configuration and split.
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: its fields, and the place that messages name (`train.jsonl:12`).

    `textual` says that all values are strings, as in csv, where numbers and booleans are read from them.
    """

    place: str
    fields: dict[str, object]
    textual: bool = False


@dataclass(frozen=True, slots=True)
class RowFile:
    """All rows of one file or data set, at least one."""

    name: str
    rows: list[Row]


def read_rows(source: str) -> RowFile:
    """Read one data file, or a data set by name, into rows.

    Raises `DataFault` with file and line for what cannot be read: a missing or empty file, text that is not
    UTF-8, malformed json or csv, a damaged gzip or parquet file, a row that is not an object.
    """
    path = Path(source)
    if path.is_dir():
        raise DataFault(
            f"{source}: is a folder; name its data files ({', '.join('*' + s for s in SUFFIXES)})"
        )
    rows = list(_read_file(path, source) if path.exists() else _read_named(source))
    if not rows:
        raise DataFault(f"{source}: holds no rows")
    return RowFile(source, rows)


def _read_file(path: Path, name: str) -> Iterator[Row]:
    packed = path.suffix == ".gz"
    suffix = (path.with_suffix("").suffix if packed else path.suffix).lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if suffix not in readers:
        raise DataFault(
            f"{name}: unknown kind of file `{suffix}`; known are {', '.join(SUFFIXES)}, each also as .gz"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        damage = "damaged gzip file" if packed else "cannot be read"
        raise DataFault(f"{name}: {damage}: {first_line(error)}") from error
    if not content.strip():
        raise DataFault(f"{name}: the file is empty")
    return readers[suffix](content, name)


def _decode(content: bytes, name: str, first: int = 1) -> str:
    """UTF-8 text (a byte-order mark is dropped); `first` is the line number of the first line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first + content.count(b"\n", 0, error.start)
        raise DataFault(
            f"{name}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _object(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataFault(f"{place}: a row must be an object of fields, this is {json_kind(value)}")
    return value


def json_kind(value: object) -> str:
    """What a value from a row is, in words that a person who wrote the file knows."""
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _parse_json(text: str, name: str, line: int, advice: str = "") -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}:{line + error.lineno - 1}"
        raise DataFault(f"{place}: malformed JSON: {error.msg} (column {error.colno}){advice}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        raise DataFault(f"{name}:{line}: malformed JSON: {first_line(error)}") from error


def _jsonl(content: bytes, name: str) -> Iterator[Row]:
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if line := _decode(raw, name, number).strip():
            place = f"{name}:{number}"
            yield Row(place, _object(_parse_json(line, name, number), place))


def _json(content: bytes, name: str) -> Iterator[Row]:
    advice = "; a file with one object a line is named .jsonl" if content.lstrip()[:1] == b"{" else ""
    value = _parse_json(_decode(content, name), name, 1, advice)
    if not isinstance(value, list):
        raise DataFault(f"{name}: a .json file holds a list of rows, this is {json_kind(value)}{advice}")
    for number, fields in enumerate(value, start=1):
        place = f"{name}: row {number}"
        yield Row(place, _object(fields, place))


def _csv(content: bytes, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # long texts are normal here
    reader = csv.reader(io.StringIO(_decode(content, name), newline=""), strict=True)
    try:
        header = next(reader)
        doubled = sorted({field for field in header if header.count(field) > 1})
        if doubled:
            raise DataFault(f"{name}:1: column `{doubled[0]}` appears twice in the header")
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataFault(
                    f"{name}:{start}: {len(cells)} cells, but the header names {len(header)} columns"
                )
            if cells:
                yield Row(f"{name}:{start}", dict(zip(header, cells, strict=True)), textual=True)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataFault(f"{name}:{reader.line_num}: malformed csv: {error}") from error


def _parquet(content: bytes, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataFault(f"{name}: not a readable parquet file: {first_line(error)}") from error
    for number, fields in enumerate(table.to_pylist(), start=1):
        yield Row(f"{name}: row {number}", fields)


def _read_named(source: str) -> Iterator[Row]:
    """Rows of a data set by name; a name that looks like a file is a missing file."""
    match = HUB_NAME.fullmatch(source)
    looks_like_file = source.lower().removesuffix(".gz").endswith(SUFFIXES) or Path(source).parent.is_dir()
    if match is None or ("/" in source and looks_like_file):
        raise DataFault(f"{source}: no such file (a data set is written owner/name, owner/name:config@split)")
    import datasets

    try:
        found = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the loader raises whatever its back ends raise
        raise DataFault(f"{source}: neither a file nor a data set that loads: {first_line(error)}") from error
    for number, fields in enumerate(found, start=1):
        yield Row(f"{source}: row {number}", dict(fields))
