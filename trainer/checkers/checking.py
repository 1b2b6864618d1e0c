"""Sampled responses -> right or wrong, several at once where a checker runs outside this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.checkers.table import Bounds, Check, Verdict
from trainer.faults import ConfigFault, RunFault, first_line
from trainer.layouts import Prompt
from trainer.sampling import Sample

SHOWN = 5  # rows that are named where a checker stopped


@dataclass(frozen=True, slots=True)
class Asked:
    """A row that responses are drawn to: its place and fields, what is asked, and the reference answer."""

    place: str
    fields: Mapping[str, object]
    prompt: Prompt
    answer: str


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_all(
    check: Check,
    asked: Sequence[Asked],
    texts: Sequence[Sequence[str]],
    bounds: Bounds,
    workers: int | None = None,
) -> list[list[Verdict]]:
    """Whether each response to each row is right.

    A checker that stops on a response says so in its verdict, which is not right. `workers` bound how many
    are checked at once; those that run in this process are checked one by one.
    """

    def verdict(row: Asked, text: str) -> Verdict:
        try:
            return check(text, row.answer, row.fields, bounds)
        except Exception as error:  # a person's own checker may raise anything
            why = f"{row.place}: the checker stopped: {type(error).__name__}: {first_line(error)}"
            return Verdict(False, why, failed=True)

    pairs = [(row, text) for row, several in zip(asked, texts, strict=True) for text in several]
    if check.bounded and len(pairs) > 1:
        with ThreadPoolExecutor(min(workers or cores(), len(pairs))) as pool:
            found = iter(pool.map(lambda pair: verdict(*pair), pairs))
            return _nested(found, texts)
    return _nested((verdict(row, text) for row, text in pairs), texts)


def _nested(found: Iterator[Verdict], texts: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    return [[next(found) for _ in several] for several in texts]


def tell_failures(verdicts: Sequence[Sequence[Verdict]], say: Callable[[str], None]) -> int:
    """Say where a checker stopped, and how often; `RunFault` where it never did its work."""
    every = [verdict for several in verdicts for verdict in several]
    failed = [verdict for verdict in every if verdict.failed]
    if failed and len(failed) == len(every):
        raise RunFault(failed[0].why)
    for verdict in failed[:SHOWN]:
        say(f"{verdict.why} (counted as wrong)")
    if len(failed) > SHOWN:
        say(f"... and {len(failed) - SHOWN} more")
    return len(failed)


def write_responses(
    path: str,
    asked: Sequence[Asked],
    drawn: Sequence[Sequence[Sample]],
    verdicts: Sequence[Sequence[Verdict]],
) -> None:
    """Write a line of JSON a row: place, prompt, reference, and each response with what was found of it."""
    lines = []
    for number, (row, responses) in enumerate(zip(asked, drawn, strict=True)):
        shown: list[dict[str, object]] = [{"text": response.text} for response in responses]
        for entry, verdict in zip(shown, verdicts[number] if verdicts else [], strict=bool(verdicts)):
            entry |= {"right": verdict.right} | ({"why": verdict.why} if verdict.why else {})
        line = {"place": row.place, "prompt": row.prompt.text, "reference": row.answer, "responses": shown}
        lines.append(json.dumps(line) + "\n")
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"--responses {path}: cannot be written: {error.strerror}") from error
