"""What can go wrong outside the rule, as one exception a kind: each says the place and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class Fault(Exception):
    """A mistake that a person can mend; the command line prints its text and leaves with `exit_code`."""

    exit_code = 1


class ConfigFault(Fault):
    """A flag, a field of a config file or a combination of them that cannot be right (exit code 2)."""

    exit_code = 2


class DataFault(Fault):
    """A data file, a row or a column that cannot be used (exit code 1)."""


class RowFault(DataFault):
    """A row that cannot be used: its place, file and line, and why; `--bad-rows skip` leaves it out.

    `why` may begin with the place, as the messages of other faults do.
    """

    def __init__(self, place: str, why: str) -> None:
        super().__init__(why if why.startswith(place) else f"{place}: {why}")
        self.place = place


class BadRows(DataFault):
    """Rows that cannot be used, of some that were read: a line each, up to a number, and the way out."""

    SHOWN = 200

    def __init__(self, bad: Sequence[RowFault], read: int) -> None:
        count = f"{len(bad)} of {read} rows" if len(bad) > 1 else f"1 row of {read}"
        way = "mend them, or leave them out with --bad-rows skip"
        super().__init__("\n".join([*listed(bad, self.SHOWN), f"{count} cannot be used: {way}"]))
        self.bad = tuple(bad)


def listed(faults: Sequence[Fault], most: int) -> list[str]:
    """A line a fault, at most so many, then how many more there are."""
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return [*map(str, faults[:most]), *rest]


class ModelFault(Fault):
    """A model or tokenizer folder that cannot be used (exit code 1)."""


class RunFault(Fault):
    """A run that had to stop (exit code 1); its log and its last checkpoint are kept."""


class NotFinite(RunFault):
    """A step whose loss or gradient is not finite; `--skip-non-finite` leaves it out."""


def shown_rows(places: Sequence[str], most: int = 8) -> str:
    """Some rows by file and line, at most so many, then how many more there are."""
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, at most `limit` characters; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__
