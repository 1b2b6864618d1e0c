"""What rows become: examples, and of a data set what was cut or left out to get them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.atomic import write_file
from trainer.columns import Value
from trainer.faults import RowFault, RunFault, first_line, listed

SUMMARY = "data.json"
COUNTS = ("total", "truncated", "dropped", "emptied", "left_out")  # of `Examples`, which add up
SAID = 20  # bad rows that a note lists
KEPT = 10_000  # bad rows that a summary lists


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised: `ids`, which of them are the `response`, who speaks, and the rule's columns.

    `index` is the row's number in the data, which keys the rule's chance and breaks its ties. `stored` are
    the columns that training reads in place of frozen models, aligned with the targets `ids[1:]`. A row of
    pairs is two examples of the same `index`, one after the other; `chosen` says which one was preferred.
    `prompts` are those that views put in place of the row's own, by column, `anew` is a digest of all that
    views read beside `ids`.
    """

    index: int
    place: str
    ids: list[int]
    response: list[bool]
    roles: list[str | None]
    columns: dict[str, Value | list[Value]]
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    chosen: bool | None = None
    prompts: dict[str, list[int]] = field(default_factory=dict)
    anew: str = ""


def _rows(count: int, what: str = "row") -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a data set, or of a part of it, and what was cut or left out to get them.

    `total` counts the rows that could be used, before any was left out for its length or by `keep`; `bad`
    are those that could not. `responses` are the examples of a row: two where rows are pairs.
    """

    rows: list[Example]
    total: int
    truncated: int = 0
    dropped: int = 0
    emptied: int = 0
    limit: int | None = None
    left_out: int = 0
    responses: int = 1
    bad: tuple[RowFault, ...] = ()

    def __str__(self) -> str:
        return "; ".join(self._notes())

    def _notes(self) -> Iterator[str]:
        found, what = self.summary(), "pair" if self.responses == 2 else "row"
        yield (
            f"{_rows(found['rows'], what)}, {found['tokens']} tokens, {found['supervised_tokens']} of them "
            f"supervised, at most {found['longest']} in a row"
        )
        if self.truncated:
            yield f"{_rows(self.truncated, what)} over {self.limit} tokens truncated"
        if self.dropped:
            yield f"{_rows(self.dropped, what)} over {self.limit} tokens dropped"
        if self.emptied:
            yield f"{_rows(self.emptied, what)} dropped whose response was beyond token {self.limit}"
        if self.left_out:
            yield f"{_rows(self.left_out, what)} left out by `keep`"
        if self.bad:
            lines = [f"  {line}" for line in listed(self.bad, SAID)]
            yield "\n".join([f"{_rows(len(self.bad), f'bad {what}')} left out:", *lines])

    def summary(self) -> dict[str, Any]:
        """What was read, as JSON: counts of rows and tokens, what was dropped and why, the bad rows."""
        return {
            "rows": len(self.rows) // self.responses,
            "tokens": sum(len(row.ids) for row in self.rows),
            "supervised_tokens": sum(sum(row.response[1:]) for row in self.rows),
            "longest": max((len(row.ids) for row in self.rows), default=0),
            "truncated": self.truncated,
            "dropped": {
                "bad": len(self.bad),
                "too_long": self.dropped,
                "response_cut_off": self.emptied,
                "keep": self.left_out,
            },
            "bad_rows": listed(self.bad, KEPT),
        }

    @property
    def fingerprint(self) -> str:
        """A digest of all token ids and response masks in order: the same data gives the same one."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.index, row.ids, row.response)).encode())
        return digest.hexdigest()[:16]


def joined(parts: Iterable[Examples], whole: Examples) -> Examples:
    """The parts of a data set as one; `whole` has its limit and the examples of a row, and no rows."""
    rows: list[Example] = []
    bad: list[RowFault] = []
    counts = dict.fromkeys(COUNTS, 0)
    for part in parts:
        rows += part.rows
        bad += part.bad
        for name in COUNTS:
            counts[name] += getattr(part, name)
    return replace(whole, rows=rows, bad=tuple(bad), **counts)


def merged(found: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of two parts from those of each; `found` may be empty."""
    if not found:
        return dict(more)
    bad = [*found["bad_rows"], *more["bad_rows"]][:KEPT]
    dropped = {why: count + more["dropped"][why] for why, count in found["dropped"].items()}
    added = {name: found[name] + more[name] for name in ("rows", "tokens", "supervised_tokens", "truncated")}
    longest = max(found["longest"], more["longest"])
    return {**added, "longest": longest, "dropped": dropped, "bad_rows": bad}


def write_summary(output: Path, **parts: Mapping[str, Any]) -> None:
    """Write summaries into OUTPUT/data.json, each under its name; those that are there under others stay."""
    path = output / SUMMARY
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_file(path, json.dumps(known | parts, indent=1) + "\n")
    except (OSError, ValueError, TypeError) as error:
        raise RunFault(f"{path}: cannot be written: {first_line(error)}") from error
