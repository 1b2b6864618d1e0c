"""What the statements of a rule declare: parameters, models, columns, and which names are free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from numbers import Real

from priority_dsl import nodes
from priority_dsl.checked import Column, ModelDeclaration, OwnModels, Parameter
from priority_dsl.diagnostics import Diagnostic, Severity, Source, Span, did_you_mean
from priority_dsl.kinds import ANY, BOOLEAN, Range
from priority_dsl.registry import ALIASES, REGISTRY, Statistic
from priority_dsl.values import Value

SUGGESTIONS = 25  # findings that come with a search for the nearest word; the search takes milliseconds


@cache
def joinable() -> frozenset[str]:
    """The statistics that a name can join to a model: of one model, without an option that must be given."""
    words = {
        name: REGISTRY.statistic(ALIASES.get(name, name)) for name in [*REGISTRY.names(Statistic), *ALIASES]
    }
    return frozenset(
        name
        for name, word in words.items()
        if word.models == 1 and all(o.default is not None for o in word.options.values())
    )


class Findings:
    """The diagnostics of one text, collected so that all are reported together."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Diagnostic] = []

    def add(
        self,
        code: str,
        message: str,
        span: Span | None,
        label: str = "",
        help: str = "",
        severity: Severity = "error",
    ) -> None:
        """Note a finding; a second one of the same code at the same place is not noted."""
        if not any(d.code == code and d.span == span and d.message == message for d in self.found):
            self.found.append(Diagnostic(code, message, span, label, help, severity, self.source))

    def warn(self, code: str, message: str, span: Span | None, label: str = "", help: str = "") -> None:
        """Note a finding that does not stop a run."""
        self.add(code, message, span, label, help, "warning")

    def suggest(self, word: str, known: Iterable[str], otherwise: str) -> str:
        """A help that offers the nearest known words; only `otherwise` where a text has many findings."""
        return did_you_mean(word, known, otherwise) if len(self.found) < SUGGESTIONS else otherwise

    def of(self, severity: Severity) -> tuple[Diagnostic, ...]:
        """The findings of a severity in the order of their places."""
        chosen = [d for d in self.found if d.severity == severity]
        return tuple(sorted(chosen, key=lambda d: (d.span is not None, d.span or Span(0, 0))))


class Declarations:
    """The names of a rule. A name is declared once, before use, and is never a word of the language."""

    def __init__(self, findings: Findings, given: Mapping[str, object]) -> None:
        self.findings = findings
        self.given = dict(given)
        self.unused_given = set(given)
        self.params: dict[str, Parameter] = {}
        self.models: dict[str, ModelDeclaration] = {}
        self.columns: dict[str, Column] = {}
        self.lets: dict[str, Value] = {}
        self.let_spans: dict[str, Span | None] = {}
        self.used: set[str] = set()
        self.failed: set[str] = set()  # names whose declaration was refused: reported once, not at each use

    def names(self) -> list[str]:
        """Every declared name."""
        return [*self.params, *self.models, *self.columns, *self.lets]

    def model_names(self) -> list[str]:
        """The models that a statistic can read."""
        return [*OwnModels, *self.models]

    def readable(self) -> list[str]:
        """Every name that an expression could have meant, for did-you-mean."""
        joined = [f"{s}_{m}" for s, m in self.statistics_of_models()]
        return [*self.names(), *OwnModels, *REGISTRY.names(), *ALIASES, *joined, *self.given]

    def statistics_of_models(self) -> Iterator[tuple[str, str]]:
        """Every pair of names that joined by `_` reads as a statistic of a model."""
        yield from itertools.product(joinable(), self.model_names())

    def split(self, name: str) -> tuple[str, str] | None:
        """The statistic and the model that a name such as `p_on` joins; None where it does not."""
        for index, letter in enumerate(name):
            statistic, model = name[:index], name[index + 1 :]
            if letter == "_" and statistic in joinable() and (model in OwnModels or model in self.models):
                return ALIASES.get(statistic, statistic), model
        return None

    # Declaring ----------------------------------------------------------------------------------

    def free(self, name: str, span: Span | None) -> bool:
        """Whether a name may be declared; what stands in the way is reported."""
        if name in nodes.RESERVED:
            self.findings.add("PD107", f"`{name}` is reserved", span, help="choose another name")
        elif name in self.names() or name in OwnModels:
            self.findings.add(
                "PD205", f"`{name}` is declared twice", span, "declared before", "rename one of them"
            )
        elif name in REGISTRY.names() or name in ALIASES:
            word = REGISTRY.words[ALIASES.get(name, name)]
            self.findings.add(
                "PD205",
                f"`{name}` is a word of the language",
                span,
                f"{word.group}: {word.signature}",
                "rename it",
            )
        elif self.split(name):
            statistic, model = self.split(name) or ("", "")
            self.findings.add(
                "PD205", f"`{name}` already reads as `{statistic}({model})`", span, help="choose another name"
            )
        else:
            return True
        self.failed.add(name)
        return False

    def param(self, node: nodes.Param) -> None:
        """Declare a parameter; a given value takes the place of its default."""
        if not self.free(node.name, node.span):
            return
        range = self.bounds(node.bounds)
        value = self._number(node.name, self.given[node.name]) if node.name in self.given else node.default
        self.unused_given.discard(node.name)
        for number, what in ((node.default, "the default of"), (value, "the value given for")):
            if number is not None and not range.contains(number):
                self.findings.add(
                    "PD307",
                    f"{what} `{node.name}` is {number:g}, outside {range}",
                    node.span,
                    help="stay in the range",
                )
                break
        self.params[node.name] = Parameter(
            node.name, node.default if value is None else value, range, True, node.span
        )

    def implied(self, name: str) -> Parameter | None:
        """The parameter that a given value of an undeclared name makes."""
        if name not in self.given:
            return None
        value = self._number(name, self.given[name])
        self.unused_given.discard(name)
        self.params[name] = Parameter(name, 1.0 if value is None else value, declared=False)
        return self.params[name]

    def _number(self, name: str, value: object) -> float | None:
        if isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(float(value)):
            return float(value)
        self.findings.add(
            "PD307",
            f"the value given for `{name}` is {value!r}, not a number",
            None,
            help=f"give {name}=0.5, say",
        )
        return None

    def bounds(self, node: nodes.Bounds | None) -> Range:
        """A declared range; one that holds nothing is reported."""
        if node is None:
            return ANY
        range = Range(node.low, node.high, node.low_open, node.high_open)
        if node.low > node.high or (node.low == node.high and (node.low_open or node.high_open)):
            self.findings.add(
                "PD110", f"the range {range} holds no number", node.span, help="write the smaller first"
            )
            return ANY
        return range

    def model(self, node: nodes.Model, ema: float | None = None) -> None:
        """Declare one more frozen model, or the moving average of the trained one at the rate `ema`."""
        if not self.free(node.name, node.span):
            return
        self.models[node.name] = ModelDeclaration(node.name, node.description or "", ema, node.span)
        for name in self.names():
            if name.endswith(f"_{node.name}") and self.split(name):
                self.findings.add(
                    "PD205", f"with the model `{node.name}`, `{name}` reads as a statistic", node.span,
                    help="rename one of them",
                )  # fmt: skip

    def column(self, node: nodes.Column) -> None:
        """Declare a data-set column."""
        if not self.free(node.name, node.span):
            return
        if node.type in ("text", "spans") and node.per != "example":
            self.findings.add(
                "PD302", f"a column of `{node.type}` has one value a row", node.span, f"per {node.per}",
                f"leave out `per {node.per}`" + (", it reads per token" if node.type == "spans" else ""),
            )  # fmt: skip
            self.failed.add(node.name)
            return
        if node.type == "spans":
            self.columns[node.name] = Column(
                node.name, "bool", "token", range=BOOLEAN, span=node.span, spans=True
            )
            return
        values = node.values or ()
        if len(set(values)) < len(values):
            self.findings.add(
                "PD205", f"a value of `{node.name}` is listed twice", node.span, help="list it once"
            )
        range = BOOLEAN if node.type == "bool" else self.bounds(node.bounds)
        self.columns[node.name] = Column(
            node.name, node.type, node.per, values, range, True, bool(values), node.span
        )  # fmt: skip
