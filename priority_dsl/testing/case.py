"""Inputs for a rule: small batches with everything that goes wrong in large ones.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from priority_dsl import pairing
from priority_dsl.binding import bound_names
from priority_dsl.checked import CheckedRule, Column, text
from priority_dsl.plan import statistics_of
from priority_dsl.reference import IGNORED
from priority_dsl.registry import REGISTRY
from priority_dsl.rule import CompiledRule
from priority_dsl.survey import Rows

DTYPES = (torch.float64, torch.float32)
INF = math.inf


@dataclass(frozen=True)
class Case:
    """One batch: what `rule.weights` and `rule.loss` take.

    `logits` [B, T, V] float32 or float64, `targets` [B, T] with -100 where ignored, `models` the logits of
    every other model that the rule reads, `columns` its columns (lists where they hold text, else
    tensors; [B, T] or [B]), `examples` [B, T] or None.
    """

    logits: Tensor
    targets: Tensor
    models: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    examples: Tensor | None = None
    progress: float = 0.0
    epoch: int = 0
    seed: int = 0
    stored: dict[str, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of a call, after `logits` and `targets`."""
        return {
            "models": self.models,
            "columns": self.columns,
            "examples": self.examples,
            "progress": self.progress,
            "epoch": self.epoch,
            "seed": self.seed,
            **({"stored": self.stored} if self.stored else {}),
        }

    @property
    def valid(self) -> Tensor:
        """Which tokens are supervised, [B, T] bool."""
        return self.targets != IGNORED

    def lists(self) -> dict[str, Any]:
        """The same as nested lists, as the oracle takes it."""
        return {
            "logits": self.logits.tolist(),
            "targets": self.targets.tolist(),
            "models": {name: z.tolist() for name, z in self.models.items()},
            "stored": {name: values.tolist() for name, values in self.stored.items()},
            "columns": {n: c.tolist() if isinstance(c, Tensor) else c for n, c in self.columns.items()},
            "examples": None if self.examples is None else self.examples.tolist(),
            "progress": self.progress,
            "epoch": self.epoch,
            "seed": self.seed,
        }

    def with_data_set(self, rule: CompiledRule) -> Case:
        """The case with what the rule reads over the whole data set, for which this batch is taken."""
        if not rule.plan.surveys:
            return self
        known: dict[str, Tensor] = {}
        for of in rule.plan.passes:
            models = {name: self.models[name] for name in of.models}
            inside = {name: self.stored[name] for name in of.inside}
            known.update(rule.statistics(of, models, self.targets, stored=inside))
        rows = Rows(self.targets, known, self.columns, self.examples, self.seed)
        numbers = rule.survey(lambda: [rows])
        more = {"columns": self.columns, "examples": self.examples, "seed": self.seed, "numbers": numbers}
        columns = rule.stored_columns(self.targets, statistics=known, **more)
        return replace(self, stored={**self.stored, **columns})

    def row(self, index: int) -> Case:
        """One row as a batch of its own."""
        part = slice(index, index + 1)
        return replace(
            self,
            logits=self.logits[part],
            targets=self.targets[part],
            models={name: z[part] for name, z in self.models.items()},
            columns={name: values[part] for name, values in self.columns.items()},
            examples=None if self.examples is None else self.examples[part],
            stored={name: values[part] for name, values in self.stored.items()},
        )

    def __repr__(self) -> str:
        """Text that makes the same case again."""
        parts = [f"logits={_tensor(self.logits)}", f"targets={_tensor(self.targets)}"]
        if self.models:
            parts.append("models={" + ", ".join(f"{n!r}: {_tensor(z)}" for n, z in self.models.items()) + "}")
        if self.columns:
            shown = (
                f"{n!r}: {_tensor(c) if isinstance(c, Tensor) else repr(c)}" for n, c in self.columns.items()
            )
            parts.append("columns={" + ", ".join(shown) + "}")
        if self.examples is not None:
            parts.append(f"examples={_tensor(self.examples)}")
        return f"Case({', '.join(parts)}, progress={self.progress!r}, epoch={self.epoch}, seed={self.seed})"


def _tensor(values: Tensor) -> str:
    text = repr(values.tolist()).replace("-inf", "-INF").replace("inf", "INF").replace("-INF", "-inf")
    dtype = "" if values.dtype in (torch.int64, torch.bool) else f", dtype={values.dtype}"
    return f"torch.tensor({text.replace('INF', 'inf')}{dtype})"


def inside_of(rule: CheckedRule) -> set[str]:
    """The statistics of a rule that are read inside a forward pass, which no logits tell."""
    return {text(v) for v in statistics_of(list(rule.roots)) if REGISTRY.statistic(v.word).inside}


@st.composite
def cases(
    draw: st.DrawFn,
    rule: CheckedRule | CompiledRule,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    extreme: bool = True,
) -> Case:
    """Batches for a rule: shapes, models, columns and schedules as its declarations say.

    There are ties, also at the top, -inf logits, near certainty, ignored tokens (with NaN logits at times),
    packed rows and models of other vocabulary sizes. `extreme` adds targets of probability zero and models
    that exclude different tokens, where surprises and divergences are infinite. Draws in `dtypes`.

    >>> from hypothesis import given
    >>> from priority_dsl import compile_rule
    >>> rule = compile_rule("mass(ref) >= 0.5")
    >>> @given(cases(rule))
    ... def test_selects(case):
    ...     weights = rule.weights(case.logits, case.targets, **case.settings)
    ...     assert ((weights == 0) | (weights == 1)).all()
    >>> test_selects()
    """
    checked = rule.checked if isinstance(rule, CompiledRule) else rule
    dtype, packed, vocabulary, rows, positions = draw(st.sampled_from(_shapes(tuple(dtypes))))
    if checked.reads_pairs:  # a row holds one response, or packed two
        rows, positions = (rows, max(2, positions)) if packed else (2 * rows, positions)
    maker = _Maker(Random(draw(st.integers(0, 2**32 - 1))), rows, positions, vocabulary, extreme)
    return maker.case(checked, dtype, packed)


@cache
def _shapes(dtypes: tuple[torch.dtype, ...]) -> list[tuple[torch.dtype, bool, int, int, int]]:
    """What a case can look like, the simplest first; one draw chooses (see `drawing.Choices`)."""
    rows, positions, vocabularies = (1, 2, 2), (1, 2, 3, 4), (2, 3, 4, 5, 6, 5, 6, 1)
    return list(product(dtypes, (False, False, False, True), vocabularies, rows, positions))


def _per_pair(checked: CheckedRule) -> list[str]:
    """The columns that a rule reads per pair."""
    return sorted(
        n for n, c in checked.columns.items() if c.extent == "pair" and n in checked.requires.columns
    )


class _Maker:
    """Fills a case from one source of chance; the shape is decided before."""

    def __init__(self, random: Random, rows: int, positions: int, vocabulary: int, extreme: bool) -> None:
        self.random, self.extreme = random, extreme
        self.rows, self.positions, self.vocabulary = rows, positions, vocabulary

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def case(self, checked: CheckedRule, dtype: torch.dtype, packed: bool) -> Case:
        """A case for the rule."""
        random, places = self.random, range(self.rows * self.positions)
        names = ["on", *sorted(bound_names(*checked.roots) - {"on"})]
        sizes = {n: self._size(n) for n in names}
        shared = min(sizes.values())
        targets = [random.randrange(shared) for _ in places]
        valid = [not self.chance(0.2) for _ in places]
        responses = self._responses(packed) if checked.reads_pairs else None
        if responses is not None:
            self._whole(responses, valid)
        logits: dict[str, list[list[float]]] = {n: [] for n in names}
        for place in places:
            rows = self._rows(names, sizes, targets[place])
            if not valid[place] and self.chance(0.3):
                rows = {n: [math.nan] * sizes[n] for n in names}
            for n in names:
                logits[n].append(rows[n])
        tensors = {n: torch.tensor(logits[n], dtype=dtype).reshape(self._shape(sizes[n])) for n in names}
        shown = [y if v else IGNORED for y, v in zip(targets, valid, strict=True)]
        examples = self._examples() if packed else None
        columns = {
            n: self._column(checked.columns[n], responses if packed and responses else examples)
            for n in sorted(checked.requires.columns - {pairing.COLUMN})
        }
        if responses is not None:
            examples = [[number // 2 for number in row] for row in responses]
            columns |= {n: self._of_pair(checked.columns[n], examples, packed) for n in _per_pair(checked)}
            columns[pairing.COLUMN] = self._sides(responses, packed)
        return Case(
            tensors.pop("on"),
            torch.tensor(shown).reshape(self._shape()),
            tensors,
            columns,
            None if examples is None else torch.tensor(examples),
            random.choice([0.0, 0.25, 0.5, round(random.random(), 3)]),
            random.choice([0, 0, 1, 3]),
            random.choice([0, 1, random.randrange(2**32)]),
            {name: self._share(dtype) for name in sorted(inside_of(checked))},
        )

    def _share(self, dtype: torch.dtype) -> Tensor:
        """What is read inside a model at each token: a number from 0 to 1."""
        places = range(self.rows * self.positions)
        values = [self.random.choice([0.0, 1.0, self.random.random(), 0.5]) for _ in places]
        return torch.tensor(values, dtype=dtype).reshape(self._shape())

    def _shape(self, *last: int) -> tuple[int, ...]:
        return (self.rows, self.positions, *last)

    def _size(self, model: str) -> int:
        if model == "on" or not self.chance(0.15):
            return self.vocabulary
        return max(1, self.vocabulary + self.random.choice([-1, 1, 2]))

    # Logits -------------------------------------------------------------------------------------

    def _rows(self, names: Sequence[str], sizes: Mapping[str, int], target: int) -> dict[str, list[float]]:
        """The logits of one position under every model."""
        rows: dict[str, list[float]] = {}
        holes = self._holes(target) if self.chance(0.3) else frozenset()
        for name in names:
            near = self.chance(0.3) and rows and sizes[name] == sizes["on"]
            row = self._near(rows["on"]) if near else self._row(sizes[name], target)
            own = self._holes(target) if self.extreme and holes and self.chance(0.2) else holes
            rows[name] = [-INF if v in own else z for v, z in enumerate(row)]
            if all(z == -INF for z in rows[name][: min(sizes.values())]):  # what two models share
                rows[name] = row
        return rows

    def _row(self, size: int, target: int) -> list[float]:
        random = self.random
        style = random.random()
        if style < 0.35:  # ties
            row = [float(random.randint(-2, 2)) for _ in range(size)]
        elif style < 0.42:
            row = [random.choice([0.0, 1.0, -3.5])] * size
        elif style < 0.5:  # near certainty
            row = [random.choice([1.0, 20.0]) * random.gauss(0.0, 1.0) for _ in range(size)]
        else:
            row = [2.0 * random.gauss(0.0, 1.0) for _ in range(size)]
        if self.chance(0.4):
            row[target] = max(row) + random.choice([0.0, 0.5, 3.0])
        offset = random.choice([0.0, 0.0, 0.0, 64.0])
        return [z + offset for z in row]

    def _near(self, row: Sequence[float]) -> list[float]:
        """A model that agrees, or nearly."""
        noise = self.random.choice([0.0, 0.1])
        finite = [z if z > -INF else -4.0 for z in row]
        return [z + noise * self.random.gauss(0.0, 1.0) if noise else z for z in finite]

    def _holes(self, target: int) -> frozenset[int]:
        """Tokens that are impossible; the target only rarely, and only in extreme cases."""
        spared = None if self.extreme and self.chance(0.2) else target
        return frozenset(v for v in range(self.vocabulary + 2) if v != spared and self.chance(0.35))

    def _examples(self) -> list[list[int]]:
        """Packed rows: pieces of a few tokens, ids in no order."""
        ids = self.random.sample(range(20), 2 * self.rows)
        return [
            [ids[2 * b + (t > self.positions // 2)] for t in range(self.positions)] for b in range(self.rows)
        ]

    # Pairs --------------------------------------------------------------------------------------

    def _responses(self, packed: bool) -> list[list[int]]:
        """The response of each token, numbered as `pairing` does: rows and sides in no order."""
        count = 2 * self.rows if packed else self.rows
        numbers = [2 * i + side for i in self.random.sample(range(20), count // 2) for side in (0, 1)]
        self.random.shuffle(numbers)
        if not packed:
            return [[number] * self.positions for number in numbers]
        split = self.random.randrange(1, self.positions)
        return [[numbers[2 * b + (t >= split)] for t in range(self.positions)] for b in range(self.rows)]

    def _whole(self, responses: list[list[int]], valid: list[bool]) -> None:
        """Give every response of a pair a supervised token where the other one has any."""
        of_token = [number for row in responses for number in row]
        seen = {number for number, v in zip(of_token, valid, strict=True) if v}
        for number in sorted(n ^ 1 for n in seen if n ^ 1 not in seen):
            places = [place for place, n in enumerate(of_token) if n == number]
            valid[self.random.choice(places)] = True

    def _sides(self, responses: list[list[int]], packed: bool) -> Any:
        """Which responses are the chosen ones: per token, or per row where a row holds one."""
        of_token = [[number % 2 == 0 for number in row] for row in responses]
        return torch.tensor(of_token if packed or self.chance(0.5) else [row[0] for row in of_token])

    def _of_pair(self, column: Column, rows: list[list[int]], packed: bool) -> Any:
        """A column per pair, the same for both responses of a data-set row."""
        entries = {row: self._entry(column) for row in sorted({r for line in rows for r in line})}
        values: list[Any] = [[entries[r] for r in line] for line in rows]
        return self._typed(column, values if packed else [line[0] for line in values])

    # Columns ------------------------------------------------------------------------------------

    def _column(self, column: Column, examples: list[list[int]] | None) -> Any:
        """Values per token, or per row; one value per example is written out where rows are packed."""
        values: list[Any]
        if column.extent == "token" and (column.declared or self.chance(0.6)):
            values = [[self._entry(column) for _ in range(self.positions)] for _ in range(self.rows)]
        elif examples is None:
            values = [self._entry(column) for _ in range(self.rows)]
        else:
            entries = {e: self._entry(column) for row in examples for e in row}
            values = [[entries[e] for e in row] for row in examples]
        return self._typed(column, values)

    def _typed(self, column: Column, values: list[Any]) -> Any:
        if column.element == "category":
            return values
        dtype = torch.bool if column.element == "bool" else torch.float64
        return torch.tensor(values, dtype=dtype)

    def _entry(self, column: Column) -> str | bool | float:
        if column.element == "category":
            return self.random.choice([*column.categories, *([] if column.closed else ["unseen"])])
        if column.element == "bool":
            return self.chance(0.5)
        low = column.range.low if column.range.low > -INF else min(-2.0, column.range.high - 2.0)
        high = column.range.high if column.range.high < INF else max(2.0, low + 2.0)
        number = self.random.choice([low, high, low + self.random.random() * (high - low), 0.0, 1.0])
        return (
            number
            if column.range.contains(number)
            else low + (high - low) * (0.1 + 0.8 * self.random.random())
        )
