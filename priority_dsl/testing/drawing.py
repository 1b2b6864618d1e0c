"""Hypothesis strategies that write expressions of the right kind.

The words come from the registry, so a new word is drawn as soon as it is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from priority_dsl.kinds import Element
from priority_dsl.registry import (
    ALIASES,
    REGISTRY,
    Choice,
    Count,
    Function,
    Reading,
    Reduction,
    Statistic,
    View,
    Word,
)
from priority_dsl.words import Chance, PairSide, Pattern

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
REGEXES = ("#+ ", r"\d+(\.\d)?", r"\"(.*?)\"")
NUMBERS = ("0", "0.1", "0.5", "1", "2", "0.25", "3", "10")
FORMS = (
    "statistic",
    "statistic",
    "operator",
    "operator",
    "function",
    "function",
    "function",
    "reduction",
    "reduction",
    "choose",
    "condition",
    "negate",
)
SAFE = "(abs({}) + 0.5)"  # what a word with a hazard is mostly given


@dataclass(frozen=True)
class Scope:
    """The names that an expression may use.

    `numbers` are declared parameters, number columns and lets; `conditions` are bool columns and tests of
    category columns, as text.
    """

    models: tuple[str, ...] = ("on", "ref")
    numbers: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    pairs: bool = False  # also values of one response of a pair


def _built(kind: type[Word]) -> list[str]:
    words = (REGISTRY.words[name] for name in REGISTRY.names(kind))
    return sorted(word.name for word in words)


def statistics_of(element: Element) -> list[str]:
    """The statistics that are built and give this element."""
    return [n for n in _built(Statistic) if REGISTRY.statistic(n).element == element]


def _readings(element: Element) -> list[str]:
    return [n for n in _built(Reading) if REGISTRY.words[n].element == element]  # type: ignore[attr-defined]


class Choices:
    """A source of choices: one byte each of a drawn string, the simplest choice once it is used up.

    One string a rule, because of many small draws hypothesis makes new examples by repeating some of
    them: two rules in three came more than once.
    """

    def __init__(self, drawn: bytes) -> None:
        self.bytes = iter(drawn)

    def one(self, choices: Sequence[str]) -> str:
        """One of some texts."""
        return choices[next(self.bytes, 0) * len(choices) // 256]

    def odds(self, percent: int) -> bool:
        """True in so many of a hundred draws; shrinks to False."""
        return next(self.bytes, 0) >= 256 * (100 - percent) / 100


BYTES = st.binary(min_size=256, max_size=256)


@dataclass
class Writer:
    """Writes expressions by making one choice after the other."""

    choices: Choices
    scope: Scope

    def __post_init__(self) -> None:
        self.one, self.odds = self.choices.one, self.choices.odds

    # Numbers ------------------------------------------------------------------------------------

    def number(self, depth: int) -> str:
        """A number, with brackets where it is not one word."""
        if depth <= 0 or self.odds(15):
            return self.leaf()
        form = self.one((*FORMS, "pair", "pair", "pair") if self.scope.pairs else FORMS)
        if form == "pair":
            return self.of_pair(self.of_example(depth - 1))
        if form == "operator":
            return self.operator(self.one([s for s, w in REGISTRY.operators.items() if _is_infix(w)]), depth)
        if form == "function":
            return self.function(self.one(_callable_functions()), depth)
        if form == "reduction":
            return self.reduction(Element.NUMBER, depth - 1)
        if form == "choose":
            then, otherwise = self.number(depth - 1), self.number(depth - 1)
            return f"({then} if {self.condition(depth - 1)} else {otherwise})"
        if form == "condition":
            return f"{self.condition(depth - 1)}"
        return f"(-{self.number(depth - 1)})" if form == "negate" else self.statistic(Element.NUMBER)

    def leaf(self) -> str:
        """A statistic mostly, else a number, a declared name or a word that stands alone."""
        form = self.one(("statistic", "statistic", "statistic", "number", "name", "reading"))
        if form == "number":
            return self.one(NUMBERS)
        if form == "name" and self.scope.numbers:
            return self.one(self.scope.numbers)
        if form == "reading":
            return self.one((*_readings(Element.NUMBER), self.chance(Element.NUMBER)))
        return self.statistic(Element.NUMBER)

    def operator(self, sign: str, depth: int) -> str:
        """Two numbers joined by a sign."""
        left, right = self.number(depth - 1), self.number(depth - 1)
        if sign == "/" and not self.odds(4):
            right = SAFE.format(right)
        if sign == "**" and not self.odds(4):
            left = self.one((self.statistic(Element.NUMBER, "p"), SAFE.format(left)))
            right = self.one((self.one(("0.5", "2", "0", "1", "(-1)", "0.1")), f"tanh({right})"))
        return f"({left} {sign} {right})"

    def function(self, name: str, depth: int) -> str:
        """A call of a function, its arguments in its domain mostly."""
        word = REGISTRY.function(name)
        if name == "ramp":
            return self.one(("ramp(0, 0.5)", "ramp(0.25, 1)", "ramp(0.25, 0.25)"))
        count = len(word.arguments) + (1 if word.variadic and self.odds(20) else 0)
        arguments = [self.number(depth - 1) for _ in range(count)]
        if name == "exp":
            arguments = [f"(-{SAFE.format(arguments[0])})"]
        elif word.hazard is not None and not self.odds(4):
            of_chance = self.statistic(Element.NUMBER, "p")
            arguments = [self.one((SAFE.format(a), SAFE.format(a), of_chance)) for a in arguments]
        return f"{name}({', '.join(arguments)})"

    def reduction(self, element: Element, depth: int) -> str:
        """A reduction over a scope; `sg` where no gradient would flow through it."""
        known = {n: w for n, w in REGISTRY.words.items() if isinstance(w, Reduction) and w.element == element}
        word = known[self.one(sorted(known))]
        scope = self.one(("example", "example", "batch", "chunk(2)", "window(1)"))
        x = self.condition(depth) if word.condition else self.number(depth)
        settings = [self.one(("0.5", "0.07", "0", "1", "0.3", "(1 - progress)")) for _ in word.settings]
        arguments = [x, *settings, *[scope] * word.scoped]
        if self.odds(25):
            arguments.append(f"where={self.condition(0)}")
        arguments += [f"{name}={self.one(c.words)}" for name, c in word.options.items() if self.odds(30)]
        call = f"{word.written}({', '.join(arguments)})"
        carries = (word.derivative is not None and scope != "batch") or element == Element.BOOL
        return call if carries else f"sg({call})"

    # Pairs --------------------------------------------------------------------------------------

    def of_pair(self, of_example: str) -> str:
        """A value of one response of a pair."""
        return f"{self.one(_built(PairSide))}({of_example})"

    def of_example(self, depth: int) -> str:
        """A number with one value an example."""
        form = self.one(("sum", "mean", "other", "length", "drawn", "name"))
        if form in ("length", "drawn"):
            return form if form == "length" else "uniform(example)"
        if form == "name" and (known := [n for n in self.scope.numbers if n in ("score", "agreed", "tau")]):
            return self.one(known)
        if form in ("sum", "mean"):
            return f"{form}({self.number(depth)}, example)"
        return f"sg({self.one(('max', 'median', 'std'))}({self.number(depth)}, example))"

    # Statistics and models ----------------------------------------------------------------------

    def statistic(self, element: Element, name: str = "") -> str:
        """A statistic of drawn models with drawn options."""
        word = REGISTRY.statistic(name or self.one(statistics_of(element)))
        if word.inside:
            return f"{word.name}({self.one(self.scope.models)}, {', '.join(word.options)})"
        models = [self.model() for _ in range(word.models)]
        options = []
        for option, kind in word.options.items():
            if isinstance(kind, Count) and (kind.default is None or self.odds(50)):
                options.append(f"{option}={self.one(('1', '2', '3', '20'))}")
            elif isinstance(kind, Choice) and self.odds(50):
                options.append(f"{option}={self.one(kind.words)}")
        shown = next((a for a, n in ALIASES.items() if n == word.name), "") if self.odds(20) else ""
        shown = shown or word.name
        if not options and word.models == 1 and models[0] in self.scope.models and self.odds(40):
            return f"{shown}_{models[0]}"
        return f"{shown}({', '.join(models + options)})"

    def model(self) -> str:
        """A model, at times through a view or `sg`."""
        name = self.one(("on", "on", *self.scope.models))
        if self.odds(10):
            view = REGISTRY.words[
                self.one([n for n in _built(View) if n != "reading"])
            ]  # needs a text column
            assert isinstance(view, View)
            numbers = ("0.5", "2") if view.reads_anew else ("0.5", "2", "(1 + progress)")
            drawn = (self.one(self.scope.models if w == "model" else numbers) for w in view.wants[1:])
            name = f"{view.name}({', '.join([name, *drawn])})"
        return f"sg({name})" if self.odds(5) else name

    # Chance -------------------------------------------------------------------------------------

    def chance(self, element: Element) -> str:
        """A draw for each token or each example, its chance a number or a statistic."""
        words = [n for n in _built(Chance) if REGISTRY.words[n].element == element]  # type: ignore[attr-defined]
        word = REGISTRY.words[self.one(words)]
        assert isinstance(word, Chance)
        chances = ("0.5", "0.1", "progress", self.statistic(Element.NUMBER, "p"))
        per = ["example"] if self.odds(40) else []
        return f"{word.name}({', '.join([*(self.one(chances) for _ in word.arguments), *per])})"

    # Conditions ---------------------------------------------------------------------------------

    def condition(self, depth: int) -> str:
        """A condition, with brackets where it is not one word."""
        form = self.one(
            ("compare", "compare", "reduction", "joined", "known", "statistic", "not", "chain", "in")
        )
        if depth <= 0 and form in ("joined", "not"):
            form = "compare"
        below = max(0, depth - 1)
        if self.scope.pairs and self.odds(20):
            return self.of_pair(f"{self.of_example(below)} {self.one(COMPARISONS)} {self.one(NUMBERS)}")
        if form == "joined":
            return f"({self.condition(below)} {self.one(('and', 'or'))} {self.condition(below)})"
        if form == "not":
            return f"(not {self.condition(below)})"
        if form == "reduction":
            return self.reduction(Element.BOOL, below)
        if form == "chain":
            return f"({self.one(NUMBERS)} < {self.number(below)} <= {self.number(below)})"
        if form == "in":
            return f"({self.statistic(Element.NUMBER, 'rank')} in {{1, 2, {self.one(('3', '-4', '0.5'))}}})"
        if form == "statistic":
            return self.statistic(Element.BOOL)
        if form == "known":
            roles = ("(role == assistant)", "(role not in {system, tool})", '(role != "user")')
            drawn = self.chance(Element.BOOL)
            regexes = [f'{word}("{self.one(REGEXES)}")' for word in _built(Pattern)]
            known = (*self.scope.conditions, *_readings(Element.BOOL), *regexes)
            return self.one((*known, self.one(roles), drawn))
        return f"({self.number(below)} {self.one(COMPARISONS)} {self.number(below)})"


def _is_infix(word: Function) -> bool:
    return word.element == Element.NUMBER and word.wants == ("number", "number") and word.symbol in "+-*/**"


def _callable_functions() -> list[str]:
    return [n for n in _built(Function) if not REGISTRY.function(n).symbol]


def expressions(
    *, condition: bool = False, depth: int = 3, scope: Scope | None = None
) -> st.SearchStrategy[str]:
    """Texts of well-kinded expressions, numbers unless `condition`.

    They read `on`, `ref` and the names that `scope` lists. A division, power or logarithm stays in its
    domain mostly, not always.

    >>> from hypothesis import given
    >>> from priority_dsl import check
    >>> @given(expressions(condition=True))
    ... def test_selects(text):
    ...     assert check(text + " and p_on > 0").range.is_boolean
    >>> test_selects()
    """

    def write(drawn: bytes) -> str:
        writer = Writer(Choices(drawn), scope or Scope())
        return writer.condition(depth) if condition else writer.number(depth)

    return BYTES.map(write)
