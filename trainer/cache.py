"""The cache of frozen statistics: CACHE/statistics/KEY holds one statistic of given models, row by row.

A row is known by its digest (token ids, and which of them are targets), never by its place in a file. A
shard is an Arrow file that is named by its own checksum: it is written to a temporary name, fsynced and
renamed, and never opened for writing again. So a run that is killed leaves whole shards, two runs at once
write the same files or different ones, and a damaged file is seen by its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.faults import ConfigFault, RunFault, first_line

FORMAT = 1  # of the files and of what a statistic means; another number is another key
LEFTOVER = 3600  # seconds after which a temporary file has no writer any more
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what a disk may say while it is written
KEY = re.compile(r"[0-9a-f]{24}")


def cache_folder(given: str | None) -> Path:
    """The folder of the cache: the given one, else priority_dsl in the user's cache folder."""
    if given is not None:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "priority_dsl"


def digest(value: Any) -> str:
    """A fingerprint of a JSON value: 24 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, "value": value}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def row_key(ids: list[int], targets: list[bool]) -> str:
    """The digest of a row: its token ids, and which of them are targets."""
    packed = np.packbits(np.array(targets, dtype=bool)).tobytes()
    return hashlib.sha256(np.array(ids, dtype="<i8").tobytes() + b"|" + packed).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Entry:
    """One statistic of given models: a folder of shards. `about` is all that its values depend on.

    `shown` are names for people (statistic, model), which do not decide the key.
    """

    cache: Path
    about: dict[str, Any]
    shown: dict[str, str]

    @property
    def key(self) -> str:
        """The name of the folder, a digest of `about`."""
        return digest(self.about)

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        return self.cache / "statistics" / self.key

    def read(self, wanted: Collection[str], say: Callable[[str], None]) -> dict[str, np.ndarray]:
        """The values of the wanted rows that are known: float32 or bool, one a target token, in order.

        A damaged shard is told to `say` and removed; its rows are then not known.
        """
        found: dict[str, np.ndarray] = {}
        with _writable(self.cache):
            for path in sorted(self.folder.glob("*.arrow")):
                try:
                    table = _checked(path)
                except FileNotFoundError:  # cleared, or found damaged by another run, a moment ago
                    continue
                if table is None:
                    say(f"cache: {path} is damaged; its rows are computed again")
                    path.unlink(missing_ok=True)
                    continue
                rows, lists = table["row"].combine_chunks(), table["values"].combine_chunks()
                values, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
                for i, row in enumerate(rows.to_pylist()):
                    if row in wanted:
                        found.setdefault(row, values[ends[i] : ends[i + 1]].copy())
        return found

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add a shard with the values of some rows; it is there as a whole or not at all."""
        kind = pa.bool_() if all(v.dtype == bool for v in rows.values()) else pa.float32()
        values = pa.array([*rows.values()], pa.list_(kind))
        table = pa.table({"row": pa.array([*rows], pa.string()), "values": values})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        data = sink.getvalue().to_pybytes()
        with _writable(self.cache):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "entry.json").exists():
                about = json.dumps({**self.shown, "about": self.about}, indent=1, ensure_ascii=False)
                _publish(self.folder / "entry.json", about.encode())
            _publish(self.folder / f"{_checksum(data)}.arrow", data)

    def sweep_up(self) -> None:
        """Remove temporary files that a killed run left long ago."""
        for path in self.folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > LEFTOVER:
                    path.unlink()
            except OSError:  # another run was faster
                continue


@dataclass(frozen=True, slots=True)
class Listed:
    """What the cache holds of one statistic: its key, names, rows, bytes and the time of its last shard."""

    key: str
    statistic: str
    model: str
    precision: str
    rows: int
    size: int
    changed: float


def listed(cache: Path) -> list[Listed]:
    """All entries of a cache, the newest first."""
    return sorted(map(_listed, _folders(cache)), key=lambda entry: -entry.changed)


def cleared(cache: Path, key: str | None) -> list[Listed]:
    """Remove an entry by its key or the beginning of one, or all entries; returns what was removed."""
    found = [entry for entry in listed(cache) if key is None or (key and entry.key.startswith(key))]
    if key is not None and len(found) != 1:
        what = f"no entry {key}" if not found else f"{len(found)} entries begin with {key}"
        raise ConfigFault(f"--clear {key}: {what}; `priority cache` lists them")
    with _writable(cache):
        for entry in found:
            shutil.rmtree(cache / "statistics" / entry.key)
    return found


def _folders(cache: Path) -> list[Path]:
    """The folders of entries; whatever else somebody keeps there is left alone."""
    return [p for p in (cache / "statistics").glob("*") if p.is_dir() and KEY.fullmatch(p.name)]


def _listed(folder: Path) -> Listed:
    try:
        known = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    shards = [*folder.glob("*.arrow")]
    return Listed(
        folder.name,
        str(known.get("statistic", "?")),
        str(known.get("model", "?")),
        str(known.get("about", {}).get("precision", "?")),
        sum(map(_rows, shards)),
        sum(path.stat().st_size for path in shards),
        max((path.stat().st_mtime for path in shards), default=folder.stat().st_mtime),
    )


def _rows(path: Path) -> int:
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            return sum(batch.num_rows for batch in stream)
    except (OSError, pa.ArrowInvalid):
        return 0


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _checked(path: Path) -> pa.Table | None:
    """The table of a shard, or None where its bytes are not those that it was named for."""
    data = path.read_bytes()
    if _checksum(data) != path.stem:
        return None
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()


def _publish(path: Path, data: bytes) -> None:
    """Write a file so that its name only ever stands for all of it, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    """Turn what the file system refuses into a fault that names the flag; a full disk is no wrong flag."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunFault(
                f"--cache {cache}: cannot be written: {first_line(error)}, before the first step; what is "
                "there is whole and will be used. Make room, or give another --cache, and start again"
            ) from error
        raise ConfigFault(f"--cache {cache}: cannot be used: {first_line(error)}") from error
