"""The words of the language: one decorated definition holds all that is known of a word.

    @statistic(range=UNIT, oracle=..., source="...")     a number of one or two models at a token
    @function(range=..., derivative=..., oracle=...)     arithmetic on values
    @reading(extent=..., element=..., ...)               what a token, a row or the run tells by itself
    @view(oracle=...)                                    a model made from another
    @reduction(range=..., oracle=...)                    what the tokens of a scope come to together

The decorated function is the torch body. Bodies use operators and tensor methods only, never the
torch module, so that they run on tensors and on `torch.fx` proxies alike and the vocabulary loads
without torch. Checker, compiler, oracle, documentation, did-you-mean and tests read this registry;
nobody edits a list.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from priority_dsl.words import (
    Choice,
    Count,
    Function,
    Reading,
    Reduction,
    RowGradient,
    Scope,
    Statistic,
    Verdict,
    View,
    Wants,
    Word,
)

__all__ = [
    "ALIASES",
    "REGISTRY",
    "Choice",
    "Count",
    "Function",
    "Reading",
    "Reduction",
    "Registry",
    "RowGradient",
    "Scope",
    "Statistic",
    "Verdict",
    "View",
    "Wants",
    "Word",
    "function",
    "leaf",
    "reading",
    "reduction",
    "scope",
    "statistic",
    "view",
]


class Registry:
    """All words by name, and the operators by sign."""

    def __init__(self) -> None:
        self.words: dict[str, Word] = {}
        self.operators: dict[str, Function] = {}

    def add(self, word: Word) -> Word:
        """Enter a word; a second word of the same name is a mistake in the vocabulary."""
        if word.name in self.words:
            raise ValueError(f"the word `{word.name}` is defined twice")
        self.words[word.name] = word
        if isinstance(word, Function) and word.symbol:
            self.operators[word.symbol] = word
        return word

    def get(self, name: str) -> Word | None:
        """The word `name`, or None."""
        return self.words.get(name)

    def function(self, name: str) -> Function:
        """The function `name`; it is known to exist."""
        word = self.words[name]
        assert isinstance(word, Function), name
        return word

    def statistic(self, name: str) -> Statistic:
        """The statistic `name`; it is known to exist."""
        word = self.words[name]
        assert isinstance(word, Statistic), name
        return word

    def reduction(self, written: str) -> Reduction | None:
        """The reduction that is written so: `min` over a scope, beside `min` of arguments."""
        found = (w for w in self.words.values() if isinstance(w, Reduction) and w.written == written)
        return next(found, None)

    def names(self, *types: type[Word]) -> list[str]:
        """The names that a rule can write, sorted, of words of the given types (default: all)."""
        kinds = types or (Word,)
        found = (w for w in self.words.values() if isinstance(w, kinds) and not getattr(w, "symbol", ""))
        return sorted({w.written if isinstance(w, Reduction) else w.name for w in found})


REGISTRY = Registry()


def _described(body: Callable[..., Any], name: str) -> tuple[str, str]:
    doc = inspect.cleandoc(body.__doc__ or "")
    if not doc:
        raise ValueError(f"the word `{name}` has no description")
    return name, doc


def _on_logits(of_row: Callable[..., Any], row: Callable[..., Any], models: int) -> Callable[..., Any]:
    """A body on logits from one on rows."""

    @functools.wraps(of_row)
    def body(*given: Any, **options: Any) -> Any:
        y = given[models]
        return of_row(*(row(z, y) for z in given[:models]), *given[models + 1 :], **options)

    return body


def statistic(
    *, example: str = "", alias: str = "", row: Callable[..., Any] | None = None, **facts: Any
) -> Callable[[Callable[..., Any]], Statistic]:
    """Define a statistic; the decorated function is its torch body, its docstring its page.

    Where `row` is given, the function reads a `row(z, y)` of each model in place of logits and targets.
    """

    def define(body: Callable[..., Any]) -> Statistic:
        name, doc = _described(body, body.__name__)
        models = "on" if facts.get("models", 1) == 1 else "ref, on"
        if row is not None:
            facts["of_row"], body = body, _on_logits(body, row, facts.get("models", 1))
        word = Statistic(name, "statistics", doc, example or f"{name}({models})", body=body, **facts)
        REGISTRY.add(word)
        if alias:
            ALIASES[alias] = name
        return word

    return define


def function(
    *,
    name: str = "",
    group: str = "arithmetic",
    example: str = "",
    wants: tuple[Wants, ...] = (),
    **facts: Any,
) -> Callable[[Callable[..., Any]], Function]:
    """Define a function on values; the decorated function is its torch body, its docstring its page."""

    def define(body: Callable[..., Any]) -> Function:
        title, doc = _described(body, name or body.__name__.rstrip("_"))
        arguments = tuple(inspect.signature(body).parameters)
        word = Function(
            title,
            group,
            doc,
            example or f"{title}({', '.join(['p_on'] * len(arguments))})",
            arguments=arguments,
            wants=wants or ("number",) * len(arguments),
            body=body,
            **facts,
        )
        REGISTRY.add(word)
        return word

    return define


def view(*, example: str, **facts: Any) -> Callable[[Callable[..., Any]], View]:
    """Define a view of a model; the decorated function takes logits and returns logits.

    That of a view that `reads_anew` only names the arguments and describes them.
    """

    def define(body: Callable[..., Any]) -> View:
        name, doc = _described(body, body.__name__)
        arguments = tuple(inspect.signature(body).parameters)
        word = View(name, "views", doc, example, arguments=arguments, body=body, **facts)
        REGISTRY.add(word)
        return word

    return define


def reduction(
    *, name: str = "", written: str = "", group: str = "reductions", example: str = "", **facts: Any
) -> Callable[[Callable[..., Any]], Reduction]:
    """Define a reduction; the decorated function sums up a scope, its docstring is its page."""

    def define(body: Callable[..., Any]) -> Reduction:
        title, doc = _described(body, name or body.__name__.rstrip("_"))
        settings = tuple(n for n in list(inspect.signature(body).parameters)[2:] if n not in _options(facts))
        shown = written or title
        word = Reduction(title, group, doc, example, written=shown, settings=settings, body=body, **facts)
        REGISTRY.add(word)
        return word

    return define


def _options(facts: dict[str, Any]) -> dict[str, Any]:
    return facts.get("options", {})


def scope(name: str, doc: str, example: str, **facts: Any) -> Scope:
    """Define a scope."""
    word = Scope(name, "scopes", doc, example, **facts)
    REGISTRY.add(word)
    return word


def reading(name: str, group: str, doc: str, example: str, **facts: Any) -> Reading:
    """Define a word that stands alone and reads the layout, the columns or the run."""
    word = Reading(name, group, doc, example, **facts)
    REGISTRY.add(word)
    return word


ALIASES: dict[str, str] = {}  # `H` reads as `entropy`


def leaf(body: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a step of a torch body as one node of the graph, where it needs sizes that proxies lack."""

    @functools.wraps(body)
    def call(*arguments: Any) -> Any:
        from torch.fx import Proxy  # bodies run only where torch is there

        for argument in arguments:
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", call, arguments, {})
        return body(*arguments)

    return call
