"""What a rule reads of the rows of a data set, and under which names it is found there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from priority_dsl.chance import draws
from priority_dsl.integrations.refusals import IntegrationError
from priority_dsl.values import Value, walk

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule

EXAMPLE = "priority_example"  # which row of the data set a token belongs to
KEPT = "priority_keep"  # says that the rows were chosen by the rule's `keep`
LENGTHS, POSITIONS = "seq_lengths", "position_ids"  # where the examples of a packed row begin


@dataclass(frozen=True)
class Reads:
    """The columns of a data set that a rule reads beside `input_ids` and `labels`.

    `columns` are the rule's own; `stored` the columns of what frozen models said, by the name that the plan
    gives them; `kept` is the column that says which `keep` chose the rows, None where the rule has none.
    """

    columns: tuple[str, ...]
    stored: dict[str, str]
    kept: str | None
    draws: bool
    whole_steps: bool

    @classmethod
    def of(cls, rule: CompiledRule, seed: int) -> Reads:
        """What a rule reads; `seed` is that of what it draws once."""
        keep = rule.checked.keep
        return cls(
            tuple(sorted(rule.requires.columns - {"response"})),
            {column.name: stored_name(rule, column.name, column.value, seed) for column in rule.plan.stored},
            None if keep is None else stored_name(rule, KEPT, keep, seed),
            any(draws(part) for part in walk(*rule.checked.everything)),
            bool(rule.checked.batches),
        )

    @property
    def names(self) -> frozenset[str]:
        """All names that a row may have for the rule alone."""
        kept = () if self.kept is None else (self.kept,)
        return frozenset((EXAMPLE, *self.columns, *self.stored.values(), *kept))

    def missing(self, names: Collection[str]) -> list[str]:
        """The plan's names of the stored columns that a data set with these columns lacks."""
        return [name for name, column in self.stored.items() if column not in names]

    def check(self, names: Collection[str], where: str) -> None:
        """`IntegrationError` where a data set lacks a column of the rule, or was not chosen by its `keep`."""
        for name in self.columns:
            if name not in names:
                raise IntegrationError(
                    f"the rule reads the column `{name}`, which {where} does not have (it has "
                    f"{', '.join(sorted(names))}); add it: one value a row, or a list with one a token"
                )
        if self.kept is not None and self.kept not in names:
            raise IntegrationError(
                f"the rule chooses rows by `keep`, and {where} was not chosen by it; call with_stored on it"
            )


def stored_name(rule: CompiledRule, name: str, value: Value, seed: int) -> str:
    """The data-set column of a stored value: its text with the parameters that it was computed for.

    So that another value of a parameter is another column, and never reads what was computed for this one.
    """
    read = sorted({str(part.option("name")) for part in walk(value) if part.word == "param"})
    settings = [f"{param}={rule.params[param]}" for param in read]
    if any(draws(part) for part in walk(value)):
        settings.append(f"seed={seed}")
    return f"{name} [{', '.join(settings)}]" if settings else name
