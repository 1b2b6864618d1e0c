"""The subcommands `score` and `cache`: frozen statistics as a file, and what the cache holds."""

from __future__ import annotations

import time
from collections.abc import Sized


def score(words: list[str]) -> int:
    """`priority score`: tokens, statistics and weights of a data set as a Parquet file."""
    from trainer.config import ScoreConfig
    from trainer.flags import read_config

    config = read_config(
        ScoreConfig,
        words,
        "priority score",
        "Write tokens, statistics and weights of each row to a Parquet file; `on` is --model, frozen.",
        "priority score --model MODEL --data train.jsonl --rule prift_mass --out weights.parquet",
    )
    from trainer.score import score as run

    run(config)
    return 0


def cache(words: list[str]) -> int:
    """`priority cache`: list what the cache of frozen statistics holds, or remove it."""
    from trainer.flags import CommandParser

    parser = CommandParser(
        "priority cache",
        "List the statistics of frozen models that are kept, newest first, or remove them.",
        "priority cache --clear 69be08ed",
    )
    parser.add_argument("--cache", metavar="DIR", help="folder of the cache (default: in the user's cache)")
    parser.add_argument(
        "--clear", nargs="?", const="", metavar="KEY", help="remove the entry KEY, or all entries without one"
    )
    flags = parser.parse_args(words)
    from trainer.cache import cache_folder, cleared, listed

    folder = cache_folder(flags.cache)
    if flags.clear is not None:
        removed = cleared(folder, flags.clear or None)
        print(f"removed {_many(removed)}, {_size(sum(e.size for e in removed))}, from {folder}")
        return 0
    found = listed(folder)
    rows = [("key", "statistic", "model", "precision", "rows", "size", "age")]
    rows += [
        (
            e.key,
            e.statistic,
            e.model,
            e.precision,
            f"{e.rows:,}",
            _size(e.size),
            _age(time.time() - e.changed),
        )
        for e in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"{folder}: {_many(found)}, {_size(sum(e.size for e in found))}")
    for row in rows if found else ():
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _many(entries: Sized) -> str:
    return "1 entry" if len(entries) == 1 else f"{len(entries)} entries"


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("the last unit returns")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
