"""What is known of a word of the language: statistic, function, reading, view, reduction.

A word is made by a decorator of `registry` and never changes. Its bodies use operators and tensor methods
only, never the torch module, so that they run on tensors and on `torch.fx` proxies alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from priority_dsl.kinds import ANY, Element, Extent, Range, Stage

Wants = Literal["model", "number", "text", "condition", "branch", "setting"]
Verdict = Literal["certain", "possible"] | None


class RowGradient(NamedTuple):
    """The gradient of a statistic by the logits of its row, as numbers `[N]` and `added [N, V]` (None: 0).

    dz_v = p_v * (spread + centred * log p_v + below * [z_v <= z_y]) + target * [v = y] + added_v,
    with p the softmax of the row and y the target. What fits the numbers costs one pass over the row.
    """

    spread: Any = None
    target: Any = None
    centred: Any = None
    below: Any = None
    added: Any = None


@dataclass(frozen=True)
class Count:
    """An option that takes a whole number of at least 1, written in the rule or bound to a parameter."""

    default: int | None = None


@dataclass(frozen=True)
class Choice:
    """An option that takes one of a few words; the first is the default."""

    words: tuple[str, ...]

    @property
    def default(self) -> str:
        """The choice where none is given."""
        return self.words[0]


@dataclass(frozen=True)
class Symbol:
    """An option that must be one word, which means something in this call only: `prompt` in `attention`."""

    word: str

    @property
    def default(self) -> None:
        """It is always written."""
        return None


@dataclass(frozen=True)
class Word:
    """What every word has: its name, what it is, where it stands, how it is called."""

    name: str
    group: str
    doc: str
    example: str
    source: str = ""

    @property
    def signature(self) -> str:
        """How the word is written, for messages and tables."""
        return self.name


@dataclass(frozen=True)
class Statistic(Word):
    """A number that one or two models give at a token, from logits `[N, V]` and targets `[N]`.

    `body(z, y, ...)` (or `body(a, b, y, ...)`) returns `[N]` in the dtype of the logits; autograd of
    the body is the derivative where `differentiable`. `row_gradient(g, value, z, y, ...)` says in closed
    form what flows to the logits when `g [N]` flows to the value, for the fused loss; of two models it
    returns one for each. `of_row` is the body on what one sweep over the row tells (`vocabulary.rows.Row`)
    where that is enough. `oracle` says the value on Python floats, with no shared code. A statistic that is
    `inside` a model's forward pass has none of these: it is given under its text.
    """

    models: int = 1
    element: Element = Element.NUMBER
    body: Callable[..., Any] = field(repr=False, default=None)  # type: ignore[assignment]
    of_row: Callable[..., Any] = field(repr=False, default=None)  # type: ignore[assignment]
    oracle: Callable[..., float] = field(repr=False, default=None)  # type: ignore[assignment]
    range: Range | Callable[..., Range] = ANY
    options: dict[str, Count | Choice | Symbol] = field(default_factory=dict, hash=False)
    inside: bool = False
    differentiable: bool = True
    row_gradient: Callable[..., RowGradient | tuple[RowGradient, RowGradient]] | None = field(
        repr=False, default=None
    )

    @property
    def signature(self) -> str:
        """How the statistic is written."""
        models = ["m"] if self.models == 1 else ["a", "b"]
        options = [
            f"{name}={option.default}" if option.default is not None else name
            for name, option in self.options.items()
        ]
        return f"{self.name}({', '.join(models + options)})"

    def range_of(self, **options: Any) -> Range:
        """The range for given options."""
        return self.range if isinstance(self.range, Range) else self.range(**options)


@dataclass(frozen=True)
class Function(Word):
    """Arithmetic on values, elementwise.

    `body` takes tensors (or numbers where `scalars`), `derivative(g, out, *arguments)` returns what
    flows to each argument (None: nothing ever does), `range` maps argument ranges to the result's,
    `oracle` maps floats to a float. `hazard(*ranges)` says whether a result can be no real number.
    """

    arguments: tuple[str, ...] = ()
    wants: tuple[Wants, ...] = ()
    element: Element = Element.NUMBER
    body: Callable[..., Any] = field(repr=False, default=None)  # type: ignore[assignment]
    derivative: Callable[..., tuple[Any, ...]] | None = field(repr=False, default=None)
    oracle: Callable[..., float] = field(repr=False, default=None)  # type: ignore[assignment]
    range: Callable[..., Range] = field(repr=False, default=lambda *_: ANY)
    hazard: Callable[..., Verdict] | None = field(repr=False, default=None)
    danger: str = ""  # what happens in the hazard: "division by zero"
    scalars: bool = True
    variadic: bool = False
    implicit: tuple[str, ...] = ()  # readings that stand before the written arguments
    symbol: str = ""  # the operator's sign, for words that are written as operators
    derived: bool = False  # a form that the compiler chooses for another word; nobody writes it

    @property
    def signature(self) -> str:
        """How the function is written; an operator is its sign."""
        if self.symbol:
            return self.symbol
        written = self.arguments[len(self.implicit) :]
        return f"{self.name}({', '.join(written)}{', ...' if self.variadic else ''})"


@dataclass(frozen=True)
class Reading(Word):
    """What a token, its row or the run tells by itself: `position`, `role`, `progress`.

    `given` says where the value comes from: the layout of the supervised tokens, a keyword of the
    call, or a column.
    """

    extent: Extent = Extent.TOKEN
    element: Element = Element.NUMBER
    stage: Stage = Stage.DATA
    range: Range = ANY
    values: tuple[str, ...] = ()
    given: Literal["layout", "call", "column"] = "layout"


@dataclass(frozen=True)
class View(Word):
    """A model made from another, by a body on logits `[N, V]` and the values of its other arguments.

    A view that `reads_anew` has no body: the model reads other input, in a forward pass of its own, and what
    it then says is bound under the view's text. One that `draws` draws what it reads.
    `row_gradient(dz, m, ...)` takes the gradient `[N, V]` of the view's logits to that of the model's, for
    the fused loss, and returns one for each model that it is made of; without it the loss is taken from full
    logits.
    """

    arguments: tuple[str, ...] = ()
    wants: tuple[Wants, ...] = ()
    reads_anew: bool = False
    draws: bool = False
    body: Callable[..., Any] = field(repr=False, default=None)  # type: ignore[assignment]
    oracle: Callable[..., list[float]] = field(repr=False, default=None)  # type: ignore[assignment]
    row_gradient: Callable[..., Any] | None = field(repr=False, default=None)
    hazard: Callable[..., Verdict] | None = field(repr=False, default=None)
    danger: str = ""

    @property
    def signature(self) -> str:
        """How the view is written."""
        return f"{self.name}({', '.join(self.arguments)})"


@dataclass(frozen=True)
class Chance(Word):
    """What is drawn for each token, or for each example where the call names that scope.

    `body(u, ...)` makes it of a number u drawn evenly from [0, 1) and of the arguments; `range` maps the
    ranges of the arguments to the result's, `oracle` is the body on Python floats.
    """

    arguments: tuple[str, ...] = ()
    element: Element = Element.NUMBER
    body: Callable[..., Any] = field(repr=False, default=None)  # type: ignore[assignment]
    oracle: Callable[..., float] = field(repr=False, default=None)  # type: ignore[assignment]
    range: Callable[..., Range] = field(repr=False, default=None)  # type: ignore[assignment]
    hazard: Callable[..., Verdict] | None = field(repr=False, default=None)

    @property
    def signature(self) -> str:
        """How the call is written where it draws for each token."""
        return f"{self.name}({', '.join(self.arguments)})"

    @property
    def of_example(self) -> str:
        """How the call is written where it draws for each example."""
        return f"{self.name}({', '.join([*self.arguments, 'example'])})"


@dataclass(frozen=True)
class Pattern(Word):
    """A word that takes a regex and says of each token whether its characters are where the regex says.

    `body(matches, length)` gives the ranges `[start, end)` of characters of a response of `length`
    characters, from an iterator of the regex's matches in it. The end token stands at `[length, length + 1)`.
    """

    body: Callable[[Iterator[Any], int], list[tuple[int, int]]] = field(repr=False, default=None)  # type: ignore[assignment]

    @property
    def signature(self) -> str:
        """How the call is written."""
        return f'{self.name}("regex")'


@dataclass(frozen=True)
class Average(Word):
    """A model that the run makes of the trained one, declared with `model NAME = ema(R)`."""

    @property
    def signature(self) -> str:
        """How the model is declared."""
        return f"model NAME = {self.name}(R)"


@dataclass(frozen=True)
class Composition(Word):
    """A rule of the library read inside another."""

    @property
    def signature(self) -> str:
        """How the call is written."""
        return f'{self.name}("NAME", PARAMETER=...)'


@dataclass(frozen=True)
class PairSide(Word):
    """A value of one response of a pair, as both of its responses see it: `chosen(x)`.

    x is a value per example, a number or a condition; the result is a value per pair. `chosen` says of which
    response.
    """

    chosen: bool = True

    @property
    def signature(self) -> str:
        """How the call is written."""
        return f"{self.name}(x)"


@dataclass(frozen=True)
class Scope(Word):
    """Which tokens or examples are taken together: `example`, `batch`, `chunk(k)`.

    `extent` is that of one number of the scope; `sized` says that it takes a whole number, `size` how that
    is called.
    """

    extent: Extent = Extent.EXAMPLE
    sized: bool = False
    size: str = "k"

    @property
    def signature(self) -> str:
        """How the scope is written."""
        return f"{self.name}({self.size})" if self.sized else self.name


@dataclass(frozen=True)
class Reduction(Word):
    """What the tokens (or examples) of a scope come to together, or a token's place among them.

    `body(over, x, *settings)` returns `numbers` numbers in which the scope is summed up, made with the
    methods of `over` (`groups.Segments` or `windows.Windows`). Where the reduction `rescales`,
    `apply(over, x, *numbers)` makes of them what each token has, else the one number is the result.
    `range(x)` is the result's over a scope that holds something; `empty` is the value over nothing.
    `derivative(over, g, x)` is what flows to x (None: gradient cannot flow). `oracle(xs, *settings)` says
    the number for the values of a scope in order, `oracle(xs, at, *settings)` that of element `at`.
    """

    written: str = ""
    settings: tuple[str, ...] = ()
    condition: bool = False  # x is a condition
    element: Element = Element.NUMBER
    rescales: bool = False
    numbers: int = 1
    scoped: bool = True  # False: always over the example, which is not written
    options: dict[str, Choice] = field(default_factory=dict, hash=False)
    range: Callable[[Range], Range] = field(repr=False, default=lambda x: ANY)
    body: Callable[..., tuple[Any, ...]] = field(repr=False, default=None)  # type: ignore[assignment]
    apply: Callable[..., Any] | None = field(repr=False, default=None)
    derivative: Callable[..., Any] | None = field(repr=False, default=None)
    oracle: Callable[..., float] = field(repr=False, default=None)  # type: ignore[assignment]
    hazard: Callable[..., Verdict] | None = field(repr=False, default=None)
    danger: str = ""

    @property
    def signature(self) -> str:
        """How the reduction is written."""
        options = [f"{name}={option.default}" for name, option in self.options.items()]
        scope = ["scope"] * self.scoped
        return f"{self.written}({', '.join(['x', *self.settings, *scope, *options])})"
