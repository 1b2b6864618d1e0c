"""What can go wrong outside the rule, as one exception a kind: each says the place and the way out."""

from __future__ import annotations


class Fault(Exception):
    """A mistake that a person can mend; the command line prints its text and leaves with `exit_code`."""

    exit_code = 1


class ConfigFault(Fault):
    """A flag, a field of a config file or a combination of them that cannot be right (exit code 2)."""

    exit_code = 2


class DataFault(Fault):
    """A data file, a row or a column that cannot be used (exit code 1)."""


class ModelFault(Fault):
    """A model or tokenizer folder that cannot be used (exit code 1)."""


class RunFault(Fault):
    """A run that had to stop (exit code 1); its log and its last checkpoint are kept."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, at most `limit` characters; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__
