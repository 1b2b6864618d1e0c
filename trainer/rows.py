"""Data files -> rows that know their place: jsonl, json, csv, parquet, or a data set by name.

Rows are read as they are asked for, one after the other. What is wrong with a single row comes as a
`RowFault` in its place; what is wrong with a whole file is raised.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainer.faults import DataFault, RowFault, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# A data set by name is owner/name, with an optional configuration and split.
HUB_DATA = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
LONGEST_LINE = 2**28  # bytes; a longer line is no row of text but a packed file that unpacks without end
LARGEST_UNPACKED = 2**31  # bytes of a packed file that has to be held whole
# How a file begins that is not text, whatever its name says.
SIGNS = {
    b"\x1f\x8b": "packed with gzip; give its name the ending .gz",
    b"PAR1": "a parquet file; give its name the ending .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16; convert the file to UTF-8",
    b"\xfe\xff": "UTF-16; convert the file to UTF-8",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: its fields, and the place that messages name (`train.jsonl:12`).

    `textual` says that all values are strings, as in csv, where numbers and booleans are read from them.
    """

    place: str
    fields: dict[str, object]
    textual: bool = False


Read = Row | RowFault  # a row, or what is wrong with it


@dataclass(frozen=True, slots=True)
class RowFile:
    """The rows of one file or data set, at least one, and those that could not be read."""

    name: str
    rows: list[Row]
    bad: list[RowFault] = field(default_factory=list)


def read_rows(source: str) -> RowFile:
    """Read one data file, or a data set by name, whole; raises as `open_rows` does."""
    found = list(open_rows(source))
    return RowFile(
        source, [r for r in found if isinstance(r, Row)], [r for r in found if isinstance(r, RowFault)]
    )


def open_rows(source: str, streaming: bool = False) -> Iterator[Read]:
    """The rows of one data file, or of a data set by name, which `streaming` does not download whole.

    A row that cannot be read comes as a `RowFault` with file and line: text that is not UTF-8, malformed
    json or csv, no object, a field that is there twice. Raises `DataFault` with the file for what leaves
    no rows to tell apart: a missing or empty file, a damaged gzip or parquet file, another encoding.
    """
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a zero byte
        raise DataFault(f"{source[:200]}: cannot be read: {first_line(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise DataFault(
            f"{source}: is a folder; name its data files ({', '.join('*' + s for s in SUFFIXES)})"
        )
    if mode is not None and not stat.S_ISREG(mode):
        raise DataFault(f"{source}: is no regular file; copy what it gives into one")
    nothing = True
    for row in _named(source, streaming) if mode is None else _read_file(path, source):
        nothing = False
        yield row
    if nothing:
        raise DataFault(f"{source}: holds no rows")


def _read_file(path: Path, name: str) -> Iterator[Read]:
    packed = path.suffix == ".gz"
    suffix = (path.with_suffix("").suffix if packed else path.suffix).lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if suffix not in readers:
        raise DataFault(
            f"{name}: unknown kind of file `{suffix}`; known are {', '.join(SUFFIXES)}, each also as .gz"
        )
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            head = file.peek(64)[:64]
            if not head:
                raise DataFault(f"{name}: the file is empty")
            if suffix != ".parquet":
                _check_text(head, name)
            yield from readers[suffix](file, name, packed)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        damage = "damaged gzip file" if packed else "cannot be read"
        raise DataFault(f"{name}: {damage}: {first_line(error)}") from error


def _check_text(head: bytes, name: str) -> None:
    """Refuse a file that is not UTF-8 from its first bytes on, rather than row by row."""
    for sign, what in SIGNS.items():
        if head.startswith(sign):
            raise DataFault(f"{name}: is {what}")
    if b"\0" in head[:2]:
        raise DataFault(f"{name}: begins with a zero byte, so it is UTF-16 or no text; convert it to UTF-8")


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise DataFault(
                f"{name}:{number}: the line is longer than {LONGEST_LINE:,} bytes, which is no row of text"
            )
        yield number, raw


def _whole(file: BinaryIO, name: str, packed: bool) -> bytes:
    """All bytes of a file that cannot be read row by row."""
    content = file.read(LARGEST_UNPACKED + 1 if packed else -1)
    if packed and len(content) > LARGEST_UNPACKED:
        raise DataFault(
            f"{name}: unpacks to more than {LARGEST_UNPACKED:,} bytes; unpack it, or use .jsonl.gz"
        )
    if not content.strip():
        raise DataFault(f"{name}: the file is empty")
    return content


def _not_utf8(byte: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"


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


def whole_text(value: str, where: str) -> str:
    """A text as it is, or `DataFault` where no tokenizer could read it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataFault(f"{where} holds half of a surrogate pair, which is not text") from error
    return value


def _row(place: str, value: object) -> Read:
    if isinstance(value, dict):
        return Row(place, value)
    return RowFault(place, f"a row must be an object of fields, this is {json_kind(value)}")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no field may be twice: one of the values would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field `{doubled}` is there twice")
    return fields


def _jsonl(file: BinaryIO, name: str, packed: bool) -> Iterator[Read]:
    del packed
    nothing = True
    for number, raw in _lines(file, name):
        place = f"{name}:{number}"
        try:
            text = raw.decode("utf-8-sig").strip()
            nothing = nothing and not text
            if text:
                yield _row(place, json.loads(text, object_pairs_hook=_fields))
        except UnicodeDecodeError as error:
            nothing = False
            yield RowFault(place, _not_utf8(error.object[error.start]))
        except json.JSONDecodeError as error:
            yield RowFault(place, f"malformed JSON: {error.msg} (column {error.colno})")
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
            yield RowFault(place, f"malformed JSON: {first_line(error)}")
    if nothing:
        raise DataFault(f"{name}: the file is empty")


def _json(file: BinaryIO, name: str, packed: bool) -> Iterator[Read]:
    content = _whole(file, name, packed)
    advice = "; a file with one object a line is named .jsonl" if content.lstrip()[:1] == b"{" else ""
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_fields)
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataFault(f"{name}:{line}: {_not_utf8(error.object[error.start])}") from error
    except json.JSONDecodeError as error:
        raise DataFault(
            f"{name}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno}){advice}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataFault(f"{name}: malformed JSON: {first_line(error)}") from error
    if not isinstance(value, list):
        raise DataFault(f"{name}: a .json file holds a list of rows, this is {json_kind(value)}{advice}")
    for number, fields in enumerate(value, start=1):
        yield _row(f"{name}: row {number}", fields)


def _csv(file: BinaryIO, name: str, packed: bool) -> Iterator[Read]:
    del packed
    csv.field_size_limit(LONGEST_LINE)  # long texts are normal here
    reader = csv.reader(_texts(file, name), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataFault(f"{name}:{reader.line_num}: malformed csv: {error}") from error
    if not any(cell.strip() for cell in header):
        raise DataFault(f"{name}: the file is empty, or its first line names no columns")
    doubled = sorted({cell for cell in header if header.count(cell) > 1})
    if doubled:
        raise DataFault(f"{name}:1: column `{doubled[0]}` appears twice in the header")
    if (broken := _broken(header)) is not None:
        raise DataFault(f"{name}:1: {broken}")
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines = f" (lines {start} to {reader.line_num} are one row)" if reader.line_num > start else ""
            yield RowFault(f"{name}:{start}", f"malformed csv: {error}{lines}")
            continue
        if cells is None:
            return
        if cells:
            yield _cells(f"{name}:{start}", header, cells)


def _texts(file: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a file as text, in which a byte that is not UTF-8 stands as half of a surrogate pair."""
    for number, raw in _lines(file, name):
        for part in raw.splitlines(keepends=True):  # at \r alone, too
            text = part.decode("utf-8", errors="surrogateescape")
            yield text.removeprefix("\ufeff") if number == 1 else text


def _cells(place: str, header: list[str], cells: list[str]) -> Read:
    """A row of csv, or what is wrong with it."""
    if (broken := _broken(cells)) is not None:
        return RowFault(place, broken)
    if len(cells) != len(header):
        return RowFault(place, f"{len(cells)} cells, but the header names {len(header)} columns")
    return Row(place, dict(zip(header, cells, strict=True)), textual=True)


def _broken(cells: list[str]) -> str | None:
    """What is wrong with cells that hold bytes which are not UTF-8; None where all is right."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(ord(error.object[error.start]) & 0xFF)
    return None


def _parquet(file: BinaryIO, name: str, packed: bool) -> Iterator[Read]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # Packed files are held whole: parquet begins to read at the end.
        table = parquet.ParquetFile(pyarrow.BufferReader(_whole(file, name, True)) if packed else file)
        names = table.schema_arrow.names
        doubled = sorted({column for column in names if names.count(column) > 1})
        if doubled:
            raise DataFault(f"{name}: column `{doubled[0]}` is there twice")
        for batch in table.iter_batches(batch_size=512):
            for fields in _converted(batch):
                number += 1
                place = f"{name}: row {number}"
                if isinstance(fields, Exception):
                    yield RowFault(place, f"a value cannot be read: {first_line(fields)}")
                else:
                    yield Row(place, fields)
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise DataFault(f"{name}: not a readable parquet file{after}: {first_line(error)}") from error


def _converted(batch: Any) -> Iterable[dict[str, Any] | Exception]:
    """The rows of a batch of columns; where values have no equal in Python, the error in place of the row."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the calendar
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error


def _named(source: str, streaming: bool) -> Iterator[Read]:
    """Rows of a data set by name; a name that looks like a file is a missing file."""
    match = HUB_DATA.fullmatch(source)
    looks_like_file = source.lower().removesuffix(".gz").endswith(SUFFIXES) or Path(source).parent.is_dir()
    if match is None or ("/" in source and looks_like_file):
        raise DataFault(f"{source}: no such file (a data set is written owner/name, owner/name:config@split)")
    import datasets

    number, split = 0, match["split"] or "train"
    try:
        for fields in datasets.load_dataset(match["name"], match["config"], split=split, streaming=streaming):
            number += 1
            yield Row(f"{source}: row {number}", dict(fields))
    except Exception as error:  # the loader raises whatever its back ends raise
        after = f" after row {number}" if number else ""
        raise DataFault(
            f"{source}: neither a file nor a data set that loads{after}: {first_line(error)}"
        ) from error
