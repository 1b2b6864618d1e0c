"""Numbers the rows of a data set, so that a rule knows of which row a token is, however rows are batched."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, cast

from priority_dsl.integrations.collate import lengths_of
from priority_dsl.integrations.reads import EXAMPLE, LENGTHS, POSITIONS, Reads
from priority_dsl.integrations.refusals import IntegrationError

MOST_A_ROW = 2**20  # examples that a packed row can hold


class Numbered:
    """A data set that is read by index, whose rows say which they are; a packed row, which examples."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.data[index])
        lengths = lengths_of(row)
        if len(lengths) == 1:
            return {**row, EXAMPLE: index}
        first = (index + 1) * MOST_A_ROW
        return {**row, EXAMPLE: [first + i for i, n in enumerate(lengths) for _ in range(n)]}


def columns_of(data: Any) -> set[str] | None:
    """The columns of a data set; None where only reading it would tell."""
    names = getattr(data, "column_names", None)
    if isinstance(names, list):
        return set(names)
    if isinstance(data, Sized) and len(data) and isinstance(row := cast(Any, data)[0], Mapping):
        return set(row)
    return None


def is_indexed(data: Any) -> bool:
    """Whether rows of a data set can be asked for by number; a stream's cannot."""
    return isinstance(data, Sized) and callable(getattr(type(data), "__getitem__", None))


def numbered(data: Any, reads: Reads, where: str) -> Any:
    """The data set with numbered rows; as it is where it has numbers, or is a stream.

    Raises `IntegrationError` where a rule needs the rows of the data set and they are not known any more.
    """
    names = columns_of(data)
    if names is not None and EXAMPLE in names:
        return data
    needs_rows = reads.draws or reads.whole_steps
    if not is_indexed(data):
        if needs_rows:
            raise IntegrationError(
                f"the rule must know the row of each token, and {where} is a stream of rows without numbers; "
                f"give it the column `{EXAMPLE}`, an integer for each row"
            )
        return data
    if needs_rows and names is not None and {LENGTHS, POSITIONS} & names:
        raise IntegrationError(
            f"the rule must know the row of each token, and {where} is packed; call with_stored before that"
        )
    return Numbered(data)
