"""What a rule is once it is checked: its values, what it declares, and the regime that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from priority_dsl.diagnostics import Diagnostic, Source, Span
from priority_dsl.kinds import ANY, Extent, Range, Stage
from priority_dsl.nodes import Rule
from priority_dsl.registry import REGISTRY, Function, Statistic
from priority_dsl.values import Value, walk

OwnModels = ("on", "ref")


@dataclass(frozen=True)
class Parameter:
    """A number that the run may set: the value in force and the declared range."""

    name: str
    value: float
    range: Range = ANY
    declared: bool = True
    span: Span | None = None


@dataclass(frozen=True)
class ModelDeclaration:
    """One more frozen model: its name, what to bind, and the rate where it is a moving average."""

    name: str
    help: str = ""
    ema: float | None = None
    span: Span | None = None


@dataclass(frozen=True)
class Column:
    """A data-set column that a rule reads.

    `categories` are the values that the rule or its declaration names; where `declared`, no other
    value is allowed in a category column that lists its values (`closed`).
    """

    name: str
    element: Literal["bool", "number", "category", "text"]
    extent: Literal["token", "example", "pair"]
    categories: tuple[str, ...] = ()
    range: Range = ANY
    declared: bool = True
    closed: bool = False
    span: Span | None = None


@dataclass(frozen=True)
class Regime:
    """Where a rule stands in the taxonomy: derived, never typed in.

    `name` is `uniform`, `hard selection`, `soft reweighting`, `signed` or `loss rule`; `signal` is
    `intrinsic` (reads models), `external` (reads columns, roles, text), `both` or `none`.
    Source: arXiv:2602.01227, the taxonomy of token priority.
    """

    name: Literal["uniform", "hard selection", "soft reweighting", "signed", "loss rule"]
    signal: Literal["intrinsic", "external", "both", "none"]

    def __str__(self) -> str:
        return self.name if self.signal == "none" else f"{self.name} ({self.signal})"


@dataclass(frozen=True)
class Requires:
    """What a rule reads, as sets of names: models, statistics (`mass(ref)`), columns."""

    models: frozenset[str]
    statistics: frozenset[str]
    columns: frozenset[str]


@dataclass(frozen=True)
class CheckedRule:
    """A rule whose every name is resolved and every expression has a kind.

    `weight` and `loss` are values; `loss` is None where the rule leaves the default,
    `weight * nll(on)`. `warnings` are findings that do not stop a run.
    """

    source: Source
    tree: Rule
    doc: str
    cites: tuple[str, ...]
    params: dict[str, Parameter]
    models: dict[str, ModelDeclaration]
    columns: dict[str, Column]
    weight: Value
    loss: Value | None
    over: Literal["response", "all"]
    normalize: Literal["tokens", "kept", "weights", "none", "examples"]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def roots(self) -> tuple[Value, ...]:
        """The values that the run computes."""
        return (self.weight,) if self.loss is None else (self.weight, self.loss)

    @property
    def range(self) -> Range:
        """The values that the weight can take."""
        return self.weight.kind.range

    @property
    def requires(self) -> Requires:
        """What the rule reads; the default loss reads `nll(on)`, so `on` is always among the models."""
        values = list(walk(*self.roots))
        return Requires(
            frozenset({"on"} | {str(v.option("name")) for v in values if v.word == "model"}),
            frozenset(text(v) for v in values if isinstance(REGISTRY.get(v.word), Statistic)),
            frozenset(str(v.option("name")) for v in values if v.word == "column"),
        )

    @property
    def regime(self) -> Regime:
        """The regime of the taxonomy, derived from the range of the weight and what the rule reads."""
        reads_model = any(isinstance(REGISTRY.get(v.word), Statistic) for v in walk(*self.roots))
        reads_data = any(v.kind.stage == Stage.DATA for v in walk(*self.roots))
        signal = {(True, True): "both", (True, False): "intrinsic", (False, True): "external"}
        return Regime(self._regime_name(), signal.get((reads_model, reads_data), "none"))  # type: ignore[arg-type]

    def _regime_name(self) -> Literal["uniform", "hard selection", "soft reweighting", "signed", "loss rule"]:
        if self.weight.kind.extent == Extent.CONSTANT:
            return "uniform" if self.loss is None else "loss rule"
        if self.range.is_boolean:
            return "hard selection"
        return "soft reweighting" if self.range.low >= 0 else "signed"


def text(value: Value) -> str:
    """The name under which a statistic is stored or bound, such as `mass(ref)` or `nll(tempered(on, 2))`."""
    if value.word in ("model", "param", "column"):
        return str(value.option("name"))
    if value.word == "constant":
        number = float(value.option("value"))  # type: ignore[arg-type]
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    word = REGISTRY.get(value.word)
    operands = [text(argument) for argument in value.arguments]
    if isinstance(word, Function) and word.symbol:
        return (
            f"({f' {word.symbol} '.join(operands)})"
            if len(operands) > 1
            else f"{word.symbol[0]}{operands[0]}"
        )
    if isinstance(word, Statistic):
        operands += [_setting(word, name, setting) for name, setting in value.options]
        return f"{value.word}({', '.join(o for o in operands if o)})"
    return f"{value.word}({', '.join(operands)})" if operands else value.word


def _setting(word: Statistic, name: str, setting: object) -> str:
    default = word.options[name].default
    if default is None:
        return str(setting)
    return "" if setting == default else f"{name}={setting}"
