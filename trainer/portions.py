"""The rows of a pass in portions: batches of similar length, and shards, which the cache keeps whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from trainer.cache import digest, row_key
from trainer.data import Example

SHARD_TOKENS = 32768  # what a killed run can lose


def key_of(row: Example, over: str) -> str:
    """The key of a row in the cache: of all that is read of it."""
    key = row_key(row.ids, [True] * len(row.ids) if over == "all" else row.response)
    return digest([key, row.anew]) if row.anew else key


def batches_by_length(rows: Mapping[str, Example], budget: int) -> Iterator[list[str]]:
    """Row keys in batches of at most `budget` padded tokens (one row at least), the longest rows first.

    Which rows share a batch depends on the rows alone: what is left after whole batches are taken away
    falls into the same batches again, so a pass that was killed ends with the same numbers.
    """
    batch: list[str] = []
    for key in sorted(rows, key=lambda k: (-len(rows[k].ids), k)):
        if batch and (len(batch) + 1) * len(rows[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def shards(batches: Iterable[list[str]], rows: Mapping[str, Example]) -> Iterator[list[list[str]]]:
    """Consecutive batches in groups of at least SHARD_TOKENS padded tokens, but for the last."""
    group: list[list[str]] = []
    tokens = 0
    for batch in batches:
        group.append(batch)
        tokens += len(batch) * len(rows[batch[0]].ids)
        if tokens >= SHARD_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group
