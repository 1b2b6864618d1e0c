"""The config of a sweep: a base config of `priority train`, what varies, and how each run is measured."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from trainer.config import EvalConfig, RowConfig, Text, TrainConfig
from trainer.faults import ConfigFault
from trainer.flags import YamlFile

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Value = str | int | float
# Fields that a sweep decides itself, and why they are no axis.
OWN = {
    "rule": "--rules names the rules",
    "seed": "--seeds names the seeds",
    "set": "name the parameter itself",
    "bind": "a binding belongs to a rule; name it with --bind",
    "output": "each run has its own folder in --output",
    "cache": "all runs share one cache",
    "resume": "a sweep always goes on where it stopped",
    "overwrite": "it is for the whole sweep",
    "quiet": "it changes no result",
    "strict": "it changes no result",
    "push_to_hub": "each run would replace the one before",
    "hub_private": "each run would replace the one before",
    "dry_run": "--list shows what would run",
}


class SweepConfig(TrainConfig):
    """A sweep: the settings of a run (see `priority train`), `rules`, `grid` and `seeds` that vary them."""

    rule: str = Field(default="", description="the rule, where there is only one")
    rules: tuple[Text, ...] = Field(
        default=(), description="rules to compare, in place of --rule: texts, library names, .rule files"
    )
    grid: dict[str, tuple[Value, ...]] = Field(
        default={},
        description="values of a parameter of the rule, or of any setting of a run; repeatable: all "
        "combinations are run",
    )
    seeds: tuple[Seed, ...] = Field(default=(), description="seeds of each run; default: the one of --seed")
    baseline: Text | None = Field(
        default=None,
        description="run that the others are compared with, as --list names it (default: the first)",
    )
    eval_config: Text | None = Field(
        default=None, description="YAML file of settings of `priority eval` for each trained model"
    )
    samples: int | None = Field(
        default=None, ge=1, description="responses drawn for each prompt of --eval-data, with --checker"
    )
    checker: Text | None = Field(
        default=None, description="what makes a response right, as for `priority eval`"
    )
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), description="report Pass@K; repeatable")
    list: bool = Field(default=False, description="list the runs and what is left to do, and run nothing")
    output: Text = Field(
        default="priority-sweep", description="folder of the sweep: a run in each NAME/seed-N, and the tables"
    )

    @field_validator("seeds", "rules", mode="before")
    @classmethod
    def _listed(cls, value: object, info: Any) -> object:
        """One is a list of one; seeds also with commas between them."""
        several = value if isinstance(value, tuple | list) else (value,)
        if info.field_name == "rules":
            return tuple(several)
        return tuple(part for each in several for part in _parts(each))

    @field_validator("grid", mode="before")
    @classmethod
    def _axes(cls, value: object) -> object:
        """Values with commas between them, or a YAML list."""
        if not isinstance(value, dict):
            return value
        listed = {name: tuple(v) if isinstance(v, tuple | list) else _parts(v) for name, v in value.items()}
        return {str(name): parts for name, parts in listed.items()}

    @model_validator(mode="after")
    def _sweep_combinations(self) -> SweepConfig:
        """Refuse what would be ignored, given twice or missing."""
        if self.dry_run:
            raise ValueError("--dry-run shows a single run; --list shows the runs of a sweep")
        if self.push_to_hub is not None:
            raise ValueError("--push-to-hub: a sweep has many models; `priority push RUN` uploads one")
        if not self.rule and not self.rules:
            raise ValueError("--rules is missing: the rules to compare, or --rule for a single one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds: a seed is given twice")
        for name, values in self.grid.items():
            if name in OWN:
                raise ValueError(f"--grid {name}: {OWN[name]}")
            if not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"--grid {name}: " + ("a value is given twice" if values else "no values"))
        if (self.samples or self.checker or self.k) and not (self.eval_data or self.eval_config):
            raise ValueError("--samples, --checker and --k need --eval-data, whose prompts are answered")
        return self

    @property
    def compared(self) -> tuple[str, ...]:
        """The rules of the sweep: --rules, else the one of the base config."""
        return self.rules or (self.rule,)

    @property
    def each_seed(self) -> tuple[int, ...]:
        """The seeds of each run: --seeds, else the one of the base config."""
        return self.seeds or (self.seed,)

    def as_yaml(self) -> str:
        """The settings of the sweep that were given, as YAML."""
        given = self.model_dump(mode="json", include=self.model_fields_set)
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)

    def run(
        self, rule: str, values: dict[str, float], changes: dict[str, Value], folder: str, seed: int
    ) -> TrainConfig:
        """The config of one run; `ConfigFault` names the axis whose value a run cannot have."""
        given = self.model_dump(include=set(TrainConfig.model_fields) & self.model_fields_set)
        own = {"rule": rule, "set": values, "output": f"{self.output}/{folder}/seed-{seed}", "seed": seed}
        try:
            return TrainConfig(**{**given, **changes, **own})
        except ValidationError as error:
            raise ConfigFault("\n".join(_mistakes(error, changes))) from error

    def measuring(self, run: TrainConfig) -> EvalConfig | None:
        """How a run's model is measured beside what the run measures itself; None where nothing is asked for.

        Rows are read as in training. Responses are drawn with the run's seed unless the file has one.
        """
        if self.eval_config is None and self.samples is None and self.checker is None and not self.k:
            return None
        shared = run.model_dump(include=set(RowConfig.model_fields) & run.model_fields_set)
        file = YamlFile.read(self.eval_config, "--eval-config").values if self.eval_config else {}
        if run.eval_data:
            shared["data"] = run.eval_data
        elif "data" not in file:
            raise ConfigFault("--eval-config: no data to measure; name it there, or with --eval-data")
        flags = {"samples": self.samples, "checker": self.checker, "k": self.k or None}
        given = {name: value for name, value in flags.items() if value is not None}
        own = {"model": run.output, "quiet": True}
        try:
            return EvalConfig(**{**shared, "seed": run.seed, **file, **given, **own})
        except ValidationError as error:
            raise ConfigFault("\n".join(_mistakes(error, {}, self.eval_config or ""))) from error


def _parts(value: object) -> tuple[object, ...]:
    """The parts of a text with commas between them; anything else as it is."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else (value,)


def _mistakes(error: ValidationError, changes: dict[str, Value], file: str = "") -> list[str]:
    found = []
    for mistake in error.errors():
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        message = mistake["msg"].removeprefix("Value error, ")
        if name in changes:
            found.append(f"--grid {name}={changes[name]}: {message[:1].lower()}{message[1:]}")
        else:
            found.append(": ".join(part for part in (file, name, message) if part))
    return found
