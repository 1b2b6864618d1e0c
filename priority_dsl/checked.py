"""What a rule is once it is checked: its values, what it declares, and the regime that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from priority_dsl import pairing
from priority_dsl.chance import placed
from priority_dsl.diagnostics import Diagnostic, Source, Span
from priority_dsl.kinds import ANY, Extent, Range, Stage
from priority_dsl.nodes import Rule
from priority_dsl.registry import REGISTRY, Function, Reduction, Statistic
from priority_dsl.values import Value, walk
from priority_dsl.words import Chance, PairSide, View

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
    value is allowed in a category column that lists its values (`closed`). A column with a `pattern`, such as
    ("after", "#### "), is what the rule asks of the response's text; one of `spans` is ranges of its
    characters. Both read as a bool per token, which whoever holds the text makes of it.
    """

    name: str
    element: Literal["bool", "number", "category", "text"]
    extent: Literal["token", "example", "pair"]
    categories: tuple[str, ...] = ()
    range: Range = ANY
    declared: bool = True
    closed: bool = False
    span: Span | None = None
    pattern: tuple[str, str] | None = None
    spans: bool = False


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
class Group:
    """One of the groups of `normalize = groups(...)`: which tokens are in it, and how many in the step."""

    member: Value
    count: Value


@dataclass(frozen=True)
class CheckedRule:
    """A rule whose every name is resolved and every expression has a kind.

    `weight` and `loss` are values; `loss` is None where the rule leaves the default,
    `weight * nll(on)`. `normalize` is `terms` where a loss per example is divided by the number of examples.
    `groups` are those of `normalize = groups(...)`, `keep` says which examples are trained on (None: all).
    `warnings` are findings that do not stop a run.
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
    normalize: Literal["tokens", "kept", "weights", "none", "examples", "groups", "terms"]
    groups: tuple[Group, ...] = ()
    keep: Value | None = None
    warnings: tuple[Diagnostic, ...] = ()
    batches: tuple[Value, ...] = field(init=False)  # the reductions over the whole optimizer step
    reads_pairs: bool = field(init=False)  # it is about pairs: it must know of which one a response is

    def __post_init__(self) -> None:
        # Not cached properties: their lock stops torch.compile.
        found = tuple(v for v in walk(*self.roots) if dict(v.options).get("scope") == "batch")
        object.__setattr__(self, "batches", found)
        of_pairs = any(v.kind.extent == Extent.PAIR for v in walk(*self.everything))
        object.__setattr__(self, "reads_pairs", of_pairs)

    @property
    def roots(self) -> tuple[Value, ...]:
        """The values that the run computes."""
        groups = (value for group in self.groups for value in (group.member, group.count))
        return (self.weight, *(() if self.loss is None else (self.loss,)), *groups)

    @property
    def of_examples(self) -> bool:
        """Whether the loss is one number an example."""
        return self.loss is not None and self.loss.kind.extent == Extent.EXAMPLE

    @property
    def of_pairs(self) -> bool:
        """Whether the loss is one number a pair."""
        return self.loss is not None and self.loss.kind.extent == Extent.PAIR

    @property
    def everything(self) -> tuple[Value, ...]:
        """The values that the run computes and the one that decides before it which examples are kept."""
        return (*self.roots, *([] if self.keep is None else [self.keep]))

    @property
    def range(self) -> Range:
        """The values that the weight can take."""
        return self.weight.kind.range

    @property
    def requires(self) -> Requires:
        """What the rule reads; the default loss reads `nll(on)`, so `on` is always among the models."""
        values = list(walk(*self.everything))
        return Requires(
            frozenset({"on"} | {str(v.option("name")) for v in values if v.word == "model"}),
            frozenset(text(v) for v in values if isinstance(REGISTRY.get(v.word), Statistic)),
            frozenset(str(v.option("name")) for v in values if v.word == "column").union(
                [pairing.COLUMN] if self.reads_pairs else []
            ),
        )

    @property
    def regime(self) -> Regime:
        """The regime of the taxonomy, derived from the range of the weight and what the rule reads."""
        values = list(walk(*self.everything))
        reads_model = any(isinstance(REGISTRY.get(v.word), Statistic) for v in values)
        reads_data = any(_is_external(v) for v in values)
        signal = {(True, True): "both", (True, False): "intrinsic", (False, True): "external"}
        return Regime(self._regime_name(), signal.get((reads_model, reads_data), "none"))  # type: ignore[arg-type]

    def _regime_name(self) -> Literal["uniform", "hard selection", "soft reweighting", "signed", "loss rule"]:
        if self.weight.kind.extent == Extent.CONSTANT:
            if self.keep is not None and self.loss is None:
                return "hard selection"
            return "uniform" if self.loss is None else "loss rule"
        if self.range.is_boolean:
            return "hard selection"
        return "soft reweighting" if self.range.low >= 0 else "signed"


def _is_external(value: Value) -> bool:
    """Whether a value is something that the data tell: a column, the layout, which response was preferred."""
    told = value.kind.stage == Stage.DATA and not value.arguments
    return told or isinstance(REGISTRY.get(value.word), PairSide)


LONGEST_NAME = 200  # characters of a name; a longer one ends in a fingerprint of the whole


def text(value: Value) -> str:
    """The name under which a value is stored, bound or shown: `mass(ref)`, `mass(ref) >= tau`.

    Equal values have equal names, different values different ones.
    """
    return texts(value)[value]


def texts(*roots: Value) -> dict[Value, str]:
    """The names of all values below the roots."""
    names: dict[Value, str] = {}
    for part in walk(*roots):
        operands = [f"({names[a]})" if _is_infix(a) else names[a] for a in part.arguments]
        name = _written(part, operands)
        if len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}...{sha256(name.encode()).hexdigest()[:16]}"
        names[part] = name
    return names


def _is_infix(value: Value) -> bool:
    word = REGISTRY.get(value.word)
    prefix = ("negate", "negation", "indicator")
    return value.word == "is_in" or (
        isinstance(word, Function) and bool(word.symbol) and word.name not in prefix
    )


def _written(value: Value, operands: list[str]) -> str:
    word = REGISTRY.get(value.word)
    if value.word in ("model", "param", "column", "stored"):
        return str(value.option("name"))
    if value.word == "constant":
        number = float(value.option("value"))  # type: ignore[arg-type]
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    if value.word == "is_in":
        return f"{operands[0]} in {{{', '.join(map(str, value.option('members')))}}}"  # type: ignore[arg-type]
    if value.word == "choose":
        return f"{operands[0]} if {operands[1]} else {operands[2]}"
    if value.word == "power_of_probability":
        return f"exp(-{operands[0]}) ** {operands[1]}"
    if value.word in ("negate", "negation", "indicator"):
        return {"negate": "-", "negation": "not ", "indicator": ""}[value.word] + operands[0]
    if isinstance(word, Function) and word.symbol:
        sign = word.symbol.removesuffix("x")
        return f" {sign} ".join(operands)
    if isinstance(word, Statistic):
        operands = [*operands, *(_setting(word, name, setting) for name, setting in value.options)]
        return f"{value.word}({', '.join(o for o in operands if o)})"
    if isinstance(word, Reduction):
        return _reduction(word, value, operands)
    if isinstance(word, View) and word.draws:
        return _perturbed(value, operands)
    if isinstance(word, Chance):
        return _drawn(value, operands)
    return f"{value.word}({', '.join(operands)})" if operands else value.word


def _reduction(word: Reduction, value: Value, operands: list[str]) -> str:
    options = dict(value.options)
    size = f"({options['size']})" if "size" in options else ""
    where = [f"where={operands.pop()}"] if "where" in options else []
    changed = [f"{n}={options[n]}" for n, choice in word.options.items() if options[n] != choice.default]
    scope = [f"{options['scope']}{size}"] if word.scoped else []
    return f"{word.written}({', '.join([*operands, *scope, *where, *changed])})"


def _perturbed(value: Value, operands: list[str]) -> str:
    """The first view of a rule that draws is bound as it is written, a further one says which it is."""
    place, when = placed(value)
    call = [f"call={place}"] if place != "1" else []
    return f"{value.word}({', '.join([*operands, *call, *when])})"


def _drawn(value: Value, operands: list[str]) -> str:
    """Two calls that are written alike draw apart, so their names say which call it is."""
    place, when = placed(value)
    per = ["example"] if value.option("per") == "example" else []
    return f"{value.word}({', '.join([*operands, *per, f'call={place}', *when])})"


def _setting(word: Statistic, name: str, setting: object) -> str:
    default = word.options[name].default
    if default is None:
        return str(setting)
    return "" if setting == default else f"{name}={setting}"
