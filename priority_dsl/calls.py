"""Calls: a word applied to its arguments, with the word's own rules for how many and of what kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from priority_dsl import nodes
from priority_dsl.diagnostics import Span, nearest
from priority_dsl.folding import fold, known_range
from priority_dsl.kinds import Element, Extent, Kind, Range, Stage, join
from priority_dsl.nodes import Expr
from priority_dsl.patterns import pattern_value
from priority_dsl.printer import format_expression
from priority_dsl.registry import ALIASES, REGISTRY, Choice, Count, Function, Reading, Scope, Statistic, View
from priority_dsl.values import BROKEN, Option, Value
from priority_dsl.words import Average, Chance, Composition, PairSide, Pattern, Symbol

if TYPE_CHECKING:
    from priority_dsl.expressions import Expressions


class Calls:
    """Checks the calls of one rule."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions

    def call(self, node: nodes.Call) -> Value:
        """A word applied to its arguments."""
        word = REGISTRY.get(ALIASES.get(node.function, node.function))
        if word is not None and getattr(word, "symbol", ""):
            word = None
        reduced = self.of.scoping.call(node)
        if reduced is not None:
            return reduced
        match word:
            case Statistic():
                bound = self.bind(node, ["a", "b"][: word.models] if word.models > 1 else ["m"], word.options)
                if bound is None:
                    return BROKEN
                read = self.of.viewing.inside if word.inside else self.of.model
                return self.statistic(word, [read(a) for a in bound[0]], bound[1], node.span)
            case View():
                return self.of.viewing.call(word, node)
            case Function():
                return self.function(word, node)
            case Composition():
                return self.of.composition.call(node)
            case Chance():
                return self.chance(word, node)
            case PairSide():
                return self.of_pair(word, node)
            case Average():
                return self.of.error(
                    "PD208", f"`{word.name}` makes a model, which needs a name", node, "not declared",
                    f"declare it: `{word.signature}`",
                )  # fmt: skip
            case Pattern():
                return pattern_value(self, word, node)
            case Reading():
                return self.of.error(
                    "PD303", f"`{word.name}` takes no arguments", node, help=f"write `{word.name}`"
                )
            case Scope():
                return self.of.lone_word(word, node)
        return self.unknown_function(node)

    def unknown_function(self, node: nodes.Call) -> Value:
        """A call of something that is no function; the place is its name."""
        name = node.function
        span = node.span and Span(node.span.start, node.span.start + len(name))
        words = [n for n in REGISTRY.names() if not isinstance(REGISTRY.words[n], Reading)]
        message, help = f"unknown function `{name}`", self.of.findings.suggest(name, [*words, *ALIASES], "")
        if name in self.of.declared.names():
            message, help = f"`{name}` is declared in the rule and is no function", f"write `{name}` alone"
        elif self.of.declared.split(name):
            message, help = f"`{name}` is a value already", f"write `{name}` without brackets"
        label = "not a function, statistic or view"
        self.of.findings.add("PD207", message, span, label, help or "the language reference lists all words")
        return BROKEN

    def bind(
        self,
        node: nodes.Call,
        names: Sequence[str],
        options: Mapping[str, Count | Choice | Symbol],
        variadic: bool = False,
        signature: str = "",
    ) -> tuple[list[Expr], dict[str, Expr]] | None:
        """Arguments in order and options by name; None (reported) where a call does not fit its word."""
        signature = signature or REGISTRY.words[ALIASES.get(node.function, node.function)].signature
        order = [*names, *options]
        bound: dict[str, Expr] = dict(zip(order, node.arguments, strict=False))
        extra = list(node.arguments[len(order) :])
        problem = ""
        for keyword in node.keywords:
            if keyword.name not in order:
                close = nearest(keyword.name, order)
                problem = f"there is no argument `{keyword.name}`" + (f", but `{close[0]}`" if close else "")
            elif keyword.name in bound:
                problem = f"`{keyword.name}` is given twice"
            else:
                bound[keyword.name] = keyword.value
        missing = [n for n in order if n not in bound and (n in names or options[n].default is None)]
        if extra and not variadic:
            problem = f"it takes {len(order)} argument{'s' * (len(order) != 1)}, not {len(node.arguments)}"
        elif missing:
            problem = problem or f"`{missing[0]}` is missing"
        if problem:
            self.of.error(
                "PD303",
                f"the call of `{node.function}` does not fit",
                node,
                problem,
                f"write `{signature}`",
            )
            return None
        return [bound[n] for n in names] + extra, {n: bound[n] for n in options if n in bound}

    def settings(self, word: Statistic, given: Mapping[str, Expr]) -> tuple[dict[str, Option], Range]:
        """The options of a statistic and the range that they leave; a broken one takes a harmless value.

        A whole number that comes from a parameter is used as it is bound, and its declared range bounds
        the statistic's range.
        """
        chosen: dict[str, Option] = {}
        widest: dict[str, Option] = {}
        for name, option in word.options.items():
            if name not in given:
                chosen[name] = widest[name] = option.default or 1
            elif isinstance(option, Symbol):
                chosen[name] = widest[name] = self.symbol(option, given[name])
            elif isinstance(option, Count):
                chosen[name], widest[name] = self.whole(name, given[name])
            else:
                chosen[name] = widest[name] = self.choice(name, option, given[name])
        return chosen, word.range_of(**widest)

    def whole(self, name: str, node: Expr) -> tuple[int, float]:
        """An option that is a whole number of at least 1, known before anything runs, and its upper bound."""
        value = self.of.number(node)
        if value is BROKEN:
            return 1, 1
        known = value.kind.stage == Stage.CONSTANT
        number = fold(value, self.of.params) if known else math.nan
        if number.is_integer() and number >= 1:
            return int(number), max(number, value.kind.range.high)
        self.of.error(
            "PD304", f"`{name}` must be a whole number of at least 1", node,
            f"this is {number:g}" if known else "this is known only later",
            "write a number such as 20, or a parameter",
        )  # fmt: skip
        return 1, 1

    def symbol(self, option: Symbol, node: Expr) -> str:
        """An option that is one word."""
        if not (isinstance(node, nodes.Name) and node.name == option.word):
            self.of.error("PD304", f"this must be `{option.word}`", node, help=f"write `{option.word}`")
        return option.word

    def choice(self, name: str, option: Choice, node: Expr) -> str:
        """An option that is one of a few words."""
        if isinstance(node, nodes.Name) and node.name in option.words:
            return node.name
        self.of.error(
            "PD304", f"`{name}` is one of {', '.join(option.words)}", node,
            help=self.of.findings.suggest(_called(node), option.words, f"write {name}={option.default}"),
        )  # fmt: skip
        return option.default

    def statistic(
        self, word: Statistic, models: Sequence[Value], given: Mapping[str, Expr], span: Span | None
    ) -> Value:
        """A statistic of models; it carries gradient where it has a derivative and a model does."""
        settings, range = self.settings(word, given)
        if BROKEN in models:
            return BROKEN
        joined = join([m.kind for m in models], word.element, range, gradient=word.differentiable)
        return self.of.value(word.name, replace(joined, extent=Extent.TOKEN), *models, span=span, **settings)

    def function(self, word: Function, node: nodes.Call) -> Value:
        """A function of values; `sg` also takes a model, `min` and `max` any number of arguments."""
        written = word.arguments[len(word.implicit) :]
        bound = self.bind(node, written, {}, word.variadic)
        if bound is None:
            return BROKEN
        implied = [self.of.reading(REGISTRY.words[n], None) for n in word.implicit]  # type: ignore[arg-type]
        if word.name == "sg":
            inside = self.of.visit(bound[0][0])
            if inside is not BROKEN and inside.kind.element in (Element.MODEL, Element.BOOL):
                return self.of.value("sg", inside.kind.detached(), inside, span=node.span)
            return self.of.apply("sg", [self.of.as_number(inside, bound[0][0])], node)
        values = [*implied, *(self.of.number(a) for a in bound[0])]
        if not word.variadic:
            return self.of.apply(word.name, values, node)
        result = values[0]
        for value in values[1:]:
            result = self.of.apply(word.name, [result, value], node)
        return result

    def of_pair(self, word: PairSide, node: nodes.Call) -> Value:
        """A value of one response of a pair; what both responses have in common is itself."""
        bound = self.bind(node, ["x"], {})
        value = BROKEN if bound is None else self.of.visit(bound[0][0])
        if bound is None or value is BROKEN:
            return BROKEN
        if value.kind.element != Element.BOOL:
            value = self.of.as_number(value, bound[0][0])
        if value is BROKEN or value.kind.extent <= Extent.PAIR:
            return value
        if value.kind.extent > Extent.EXAMPLE:
            what = format_expression(bound[0][0])
            return self.of.error(
                "PD305", f"`{what}` differs from token to token", bound[0][0],
                f"`{word.name}` takes one value of a whole response",
                f"add the tokens up: `{word.name}(sum({what}, example))`",
            )  # fmt: skip
        kind = replace(value.kind, extent=Extent.PAIR, stage=max(Stage.DATA, value.kind.stage))
        return self.of.value(word.name, kind, value, span=node.span)

    def chance(self, word: Chance, node: nodes.Call) -> Value:
        """A draw for each token, or for each example where that scope stands last."""
        scope = {"scope": Choice(("example",))}
        bound = self.bind(node, word.arguments, scope, signature=f"{word.signature}` or `{word.of_example}")
        if bound is None:
            return BROKEN
        per = "example" if "scope" in bound[1] else "token"
        if per == "example" and _called(given := bound[1]["scope"]) != "example":
            return self.of.error(
                "PD308", f"`{format_expression(given)}` is nothing to draw for", given, "drawn for what?",
                f"`{word.signature}` draws for each token, `{word.of_example}` for each example",
            )  # fmt: skip
        values = [self.of.number(a) for a in bound[0]]
        if BROKEN in values:
            return BROKEN
        self.no_chance(word, values, node)
        own = Extent.EXAMPLE if per == "example" else Extent.TOKEN
        extent = max([own, *(v.kind.extent for v in values)])
        stage = max([Stage.RUN, *(v.kind.stage for v in values)])
        kind = Kind(extent, word.element, word.range(*(v.kind.range for v in values)), stage)
        return self.of.value(
            word.name, kind, *values, span=node.span, per=per, place=self.of.place(node), once=0
        )

    def no_chance(self, word: Chance, values: Sequence[Value], node: nodes.Call) -> None:
        """Report a chance that is not between 0 and 1."""
        known = [known_range(v, self.of.params) for v in values]
        verdict = word.hazard and word.hazard(*known)
        ranges = ", ".join(map(str, known))
        if verdict == "certain":
            help = "a chance is a number from 0 to 1"
            self.of.error("PD309", "a chance outside [0, 1], always", node, f"of {ranges}", help)
        elif verdict == "possible":
            self.of.findings.warn(
                "PD405", "a chance outside [0, 1] is possible here", node.span, f"of {ranges}",
                "bound it with clip, or declare the range of what it reads: below 0 is never, above 1 always",
            )  # fmt: skip


def _called(node: Expr) -> str:
    """The name that an argument is or calls: how a scope is told from a value."""
    if isinstance(node, nodes.Name):
        return node.name
    return node.function if isinstance(node, nodes.Call) else ""
