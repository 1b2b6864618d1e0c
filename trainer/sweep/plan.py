"""What a sweep will run: every rule with every combination of its axes, once for each seed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from priority_dsl import PriorityError, check
from priority_dsl.library import SUFFIX, resolve
from trainer.config import EvalConfig, TrainConfig
from trainer.faults import ConfigFault
from trainer.sweep.config import SweepConfig, Value

LONGEST = 40  # characters of a rule or a value in the name of a folder
PARAMETER = "set."  # before the name of an axis that is a parameter although a setting has its name


@dataclass(frozen=True, slots=True)
class Planned:
    """One run: the row of the table that it belongs to, its seed, its config, and how it is measured."""

    label: str
    seed: int
    config: TrainConfig
    measuring: EvalConfig | None

    @property
    def name(self) -> str:
        """What messages call the run."""
        return f"{self.label} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the grid: a setting of a run, or a parameter of the rules."""

    name: str
    values: tuple[Value, ...]
    parameter: bool

    def number(self, value: Value) -> float:
        """The value of a parameter; `ConfigFault` where it is no number."""
        try:
            return float(value)
        except ValueError as error:
            raise ConfigFault(f"--grid {self.name}={value}: a parameter of a rule is a number") from error


def plan(config: SweepConfig) -> list[Planned]:
    """All runs of a sweep, row by row, checked as far as they can be without reading data.

    An axis that is a parameter varies the rules that read it; a rule that does not has one row for all its
    values. Raises `PriorityError` for a rule with a mistake and `ConfigFault` for what no run can have.
    """
    labels = [label_of(rule) for rule in config.compared]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigFault(f"--rules: two of them are called {twice}")
    rules = {label: text_of(rule) for label, rule in zip(labels, config.compared, strict=True)}
    axes = [_axis(config, name, values, [*rules.values()]) for name, values in config.grid.items()]
    for name in config.set:
        if not any(reads(rule, name, config.set[name]) for rule in rules.values()):
            raise ConfigFault(f"--set {name}: no rule of the sweep reads it")
    planned = [run for label, rule in rules.items() for run in _of_rule(config, label, rule, axes)]
    known = list(dict.fromkeys(run.label for run in planned))
    if config.baseline is not None and config.baseline not in known:
        raise ConfigFault(f"--baseline {config.baseline}: no such run; they are {', '.join(known)}")
    return planned


def _of_rule(config: SweepConfig, label: str, rule: str, axes: list[Axis]) -> list[Planned]:
    """The runs of one rule: every combination of the axes that it has."""
    own = [axis for axis in axes if not axis.parameter or reads(rule, axis.name, _number(axis.values[0]))]
    fixed = {name: value for name, value in config.set.items() if reads(rule, name, value)}
    planned = []
    for values in product(*(axis.values for axis in own)):
        at = list(zip(own, values, strict=True))
        parameters = fixed | {axis.name: axis.number(value) for axis, value in at if axis.parameter}
        changes = {axis.name: value for axis, value in at if not axis.parameter}
        check(rule, **parameters)
        row = [label, *(f"{axis.name}={value}" for axis, value in at)]
        for seed in config.each_seed:
            run = config.run(rule, parameters, changes, "-".join(map(slug, row)), seed)
            planned.append(Planned(" ".join(row), seed, run, config.measuring(run)))
    return planned


def _axis(config: SweepConfig, name: str, values: tuple[Value, ...], rules: list[str]) -> Axis:
    """What an axis varies; `ConfigFault` for a name that is nothing, or two things."""
    bare = name.removeprefix(PARAMETER)
    read = any(reads(rule, bare, _number(values[0])) for rule in rules)
    setting = bare in TrainConfig.model_fields and bare == name
    if read and setting:
        raise ConfigFault(f"--grid {name}: is a setting and a parameter; {PARAMETER}{name} is the parameter")
    if not read and not setting:
        parameters = sorted({p for rule in rules for p in _parameters(rule, config.set)})
        close = get_close_matches(bare, [*parameters, *TrainConfig.model_fields], n=1)
        way = (
            f"did you mean {close[0]}?" if close else f"the parameters are {', '.join(parameters) or 'none'}"
        )
        raise ConfigFault(f"--grid {name}: no rule has such a parameter and no run such a setting; {way}")
    return Axis(bare, values, read)


def reads(rule: str, name: str, value: float) -> bool:
    """Whether a rule reads a parameter of that name; what else is wrong with the rule is not asked here."""
    try:
        check(rule, **{name: value})
    except PriorityError as error:
        return not any(d.code == "PD206" for d in error.diagnostics)
    return True


def _parameters(rule: str, values: dict[str, float]) -> list[str]:
    try:
        return list(check(rule).params)
    except PriorityError:  # a rule that needs values, which the person is about to give
        return [name for name in values if reads(rule, name, values[name])]


def _number(value: Value) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def text_of(rule: str) -> str:
    """A rule as the runs have it: the name of a library rule, or a text; a file is read now, for all runs."""
    source = resolve(rule)
    return source.text.rstrip("\n") + "\n" if rule.endswith(SUFFIX) and "\n" not in rule else rule


def label_of(rule: str) -> str:
    """What the table calls a rule: a library name, the name of a file, or the text on one line."""
    if rule.endswith(SUFFIX) and "\n" not in rule:
        return re.split(r"[\\/]", rule)[-1].removesuffix(SUFFIX)
    return " ".join(rule.split())


def slug(words: str) -> str:
    """A text as part of a folder's name; what cannot stand there as it is also gets a digest."""
    plain = re.sub(r"[^\w.=+-]+", "-", words).strip("-.")
    if plain == words and len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"
