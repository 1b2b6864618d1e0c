"""Binding times: what is computed once before training, what is read from disk, what stays online.

Everything that reads only data and frozen models is computed before the first step. The pass over a frozen
model keeps its statistics (one float32 a model and token); training reads the largest frozen expressions as
one value a token, a bool as one bit. Only what needs a whole distribution of a frozen model during training
keeps that model loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from priority_dsl.binding import bound_names
from priority_dsl.checked import CheckedRule, text, texts
from priority_dsl.kinds import Element, Stage
from priority_dsl.normalform import by_surprise, normal_form
from priority_dsl.registry import REGISTRY, Statistic
from priority_dsl.values import Value, walk

WRAPPINGS = ("indicator", "sg", "weight")  # words that store nothing of their own


@dataclass(frozen=True)
class StoredColumn:
    """One value a token that training reads instead of a frozen model: `name` is its text."""

    name: str
    value: Value

    @property
    def bits(self) -> int:
        """Bits a token: 1 for a bool, else 32."""
        return 1 if self.value.kind.element == Element.BOOL else 32


@dataclass(frozen=True)
class Pass:
    """One run of frozen models over the data before training, and the statistics that it keeps."""

    models: tuple[str, ...]
    statistics: tuple[Value, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics by name, such as `mass(ref)`."""
        return tuple(text(s) for s in self.statistics)

    @property
    def inside(self) -> tuple[str, ...]:
        """Those that are read inside a forward pass, not from what it says."""
        return tuple(text(s) for s in self.statistics if REGISTRY.statistic(s.word).inside)


@dataclass(frozen=True)
class Plan:
    """How a rule runs: passes before training, columns that training reads, models that stay loaded."""

    passes: tuple[Pass, ...]
    stored: tuple[StoredColumn, ...]
    online: tuple[str, ...]  # statistics that training computes
    kept: tuple[str, ...]  # frozen models that stay loaded
    keep: tuple[Pass, ...] = ()  # passes that decide which examples are trained on

    @property
    def surveys(self) -> bool:
        """Whether a stored column needs a number of the whole data set."""
        return any(over_dataset(column.value) for column in self.stored)

    @property
    def stored_bits(self) -> int:
        """Bits a token that training reads."""
        return sum(column.bits for column in self.stored)

    @property
    def cached_bytes(self) -> int:
        """Bytes a token that the cache keeps: a float32 for each statistic of each pass."""
        return 4 * sum(len(p.statistics) for p in self.passes)


def plan(rule: CheckedRule) -> Plan:
    """The plan of a checked rule for the parameter values in force."""
    params = {name: p.value for name, p in rule.params.items()}
    roots = [normal_form(root, params) for root in rule.roots]
    frozen = _largest_frozen(roots)
    kept = bound_names(*statistics_of(_without(roots, frozen))) - {"on"}
    # What runs at every step anyway needs no pass, but for the numbers of the whole data set.
    frozen = [v for v in frozen if over_dataset(v) or not bound_names(v) <= kept]
    online = {text(v) for v in statistics_of(_without(roots, frozen))} | {"nll(on)"}
    stored = tuple(StoredColumn(text(v), v) for v in frozen)
    passes = _passes(statistics_of([by_surprise(v) for v in frozen]))
    deciding = () if rule.keep is None else _passes(statistics_of([by_surprise(rule.keep)]))
    return Plan(passes, stored, tuple(sorted(online)), tuple(sorted(kept)), deciding)


def _without(roots: list[Value], frozen: list[Value]) -> list[Value]:
    """What is left online when these values are stored."""
    names = frozenset(text(v) for v in frozen)
    return [substituted(root, names) for root in roots]


def statistics_of(roots: list[Value]) -> list[Value]:
    """The statistics below some values, each once."""
    return [v for v in walk(*roots) if isinstance(REGISTRY.get(v.word), Statistic)]


def _largest_frozen(roots: list[Value]) -> list[Value]:
    """The values that are frozen while what reads them is not, each once, in the order of the rule."""
    found: dict[Value, None] = {}
    stack = list(reversed(roots))
    seen: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in seen or value.kind.element == Element.MODEL:
            continue
        seen.add(value)
        if value.kind.stage == Stage.FROZEN or (value.kind.stage == Stage.DATA and over_dataset(value)):
            found[_without_wrapping(value)] = None
        else:
            stack += reversed(value.arguments)
    return list(found)


def over(scope: str, value: Value) -> bool:
    """Whether a value is a reduction over a scope."""
    return dict(value.options).get("scope") == scope


def over_dataset(value: Value) -> bool:
    """Whether a value needs a number of the whole data set, which is computed before training."""
    return any(over("dataset", part) for part in walk(value))


def why_whole(rule: CheckedRule, how: Plan) -> str | None:
    """Why all rows must be there before the first step, even if frozen models run at every step.

    None where a run can take its rows from a stream.
    """
    if how.surveys or (rule.keep is not None and over_dataset(rule.keep)):
        return "the rule reads numbers of the whole data set"
    if how.keep:
        return (
            f"frozen models ({', '.join(how.keep[0].models)}) choose the examples of the rule before training"
        )
    return None


def _without_wrapping(value: Value) -> Value:
    """A condition read as a number is stored as itself, one bit, as is its negation; `sg` says nothing."""
    while value.word in (*WRAPPINGS, "negation"):
        value = value.arguments[0]
    return value


def _passes(statistics: list[Value]) -> tuple[Pass, ...]:
    """Statistics by what must be bound for them; models that one statistic reads together run together."""
    groups: list[tuple[set[str], list[Value]]] = []
    for statistic in statistics:
        models, members = bound_names(statistic), [statistic]
        for group in [g for g in groups if g[0] & models]:
            models |= group[0]
            members = group[1] + members
            groups.remove(group)
        groups.append((models, members))
    return tuple(Pass(tuple(sorted(models)), tuple(members)) for models, members in groups)


def substituted(root: Value, stored: frozenset[str]) -> Value:
    """The value with every part whose name is among the stored ones read from outside."""
    names = texts(root) if stored else {}
    known: dict[Value, Value] = {}
    for part in walk(root):
        # A condition read as a number has the condition's name: the condition is what is stored.
        name = "" if part.word == "indicator" else names.get(part, "")
        is_value = part.kind.element != Element.MODEL and part.word not in WRAPPINGS
        if name in stored and is_value and not part.kind.gradient:
            known[part] = Value("stored", (), (("name", name),), part.kind, part.span)
        else:
            arguments = tuple(known[a] for a in part.arguments)
            known[part] = Value(part.word, arguments, part.options, part.kind, part.span)
    return known[root]
