"""Calls of views: a model through `tempered`, read anew by `unprompted`; what the checker knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from priority_dsl import nodes
from priority_dsl.checked import text
from priority_dsl.diagnostics import Span
from priority_dsl.folding import fold
from priority_dsl.kinds import ANY, Element, Extent, Kind, Stage
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_expression
from priority_dsl.registry import REGISTRY, View
from priority_dsl.values import BROKEN, Option, Value

if TYPE_CHECKING:
    from priority_dsl.expressions import Expressions


class Viewing:
    """Checks the views of one rule."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions

    def call(self, word: View, node: nodes.Call) -> Value:
        """A model seen through a view."""
        bound = self.of.calls.bind(node, word.arguments, {})
        if bound is None:
            return BROKEN
        wanted = list(zip(word.wants, bound[0], strict=True))
        values = [self.argument(word, want, argument) for want, argument in wanted]
        if BROKEN in values:
            return BROKEN
        numbers = [v for want, v in zip(word.wants, values, strict=True) if want == "number"]
        self.of.hazard(word, numbers, node)
        drawn: dict[str, Option] = {"place": self.of.place(node), "once": 0} if word.draws else {}
        return self.seen(word, values, drawn, node.span)

    def argument(self, word: View, want: str, node: Expr) -> Value:
        """A model, the text column of another prompt, or a number that is the same for every token."""
        if want == "model":
            return self.of.model(node)
        if want == "text":
            return self.prompt(word, node)
        return self.number(node, Extent.CONSTANT if word.reads_anew else Extent.RUN)

    def number(self, node: Expr, latest: Extent) -> Value:
        """A number of the whole model, which differs with the run at most where `latest` allows."""
        value = self.of.number(node)
        if value is BROKEN or value.kind.extent <= latest:
            return value
        what, extent = format_expression(node), value.kind.extent
        differs = "moment to moment" if extent == Extent.RUN else f"{extent} to {extent}"
        return self.of.error(
            "PD305", f"`{what}` differs from {differs}", node, "one number for the whole model is needed",
            "use a number or a parameter" + (" or a schedule" if latest == Extent.RUN else ""),
        )  # fmt: skip

    def prompt(self, word: View, node: Expr) -> Value:
        """A declared text column with one value an example."""
        name = node.name if isinstance(node, nodes.Name) else ""
        column = self.of.declared.columns.get(name)
        if column is not None and column.element == "text" and column.extent == "example":
            return self.of.column(name, node.span)
        if name in self.of.declared.failed:
            return BROKEN
        what = format_expression(node)
        return self.of.error(
            "PD302", f"`{what}` is not a text column", node, f"`{word.name}` reads another prompt",
            f"declare it: `column {name or 'other_prompt'}: text`",
        )  # fmt: skip

    def inside(self, node: Expr) -> Value:
        """A model inside whose forward pass something is read: one that reads, not one with other logits."""
        model = self.of.model(node)
        while model.word == "sg":  # no gradient flows out of there anyway
            model = model.arguments[0]
        if model is BROKEN or _reads(model):
            return model
        return self.of.error(
            "PD208", f"`{model.word}` only changes logits", node, "inside, it is the model that it sees",
            f"write `{text(model.arguments[0])}`",
        )  # fmt: skip

    def rate(self, node: Expr) -> float | None:
        """The rate R of a declaration `model NAME = ema(R)`; None (reported) where it is none."""
        if not (isinstance(node, nodes.Call) and node.function == "ema"):
            self.of.error(
                "PD208", f"`{format_expression(node)}` makes no model", node, "what is this model?",
                'write `ema(R)`, or say what is bound: model NAME "what to bind"',
            )  # fmt: skip
            return None
        bound = self.of.calls.bind(node, ["R"], {}, signature="ema(R)")
        value = BROKEN if bound is None else self.number(bound[0][0], Extent.CONSTANT)
        if value is BROKEN:
            return None
        rate = fold(value, self.of.params)
        if not 0 <= rate <= 1:
            help = "at 0 the average is `on` itself, at 1 where it began"
            self.of.error("PD307", f"the rate is {rate:g}, outside [0, 1]", node, "not a rate", help)
        return rate

    def seen(self, word: View, values: Sequence[Value], drawn: dict[str, Option], span: Span | None) -> Value:
        """The view of checked arguments. What only changes logits stands outside of what reads anew."""
        model, *others = values
        if word.reads_anew and not _reads(model):
            inner = [
                self.seen(word, [a, *others], drawn, span) if a.kind.element == Element.MODEL else a
                for a in model.arguments
            ]
            if model.word == "sg":
                return self.of.value("sg", inner[0].kind.detached(), *inner, span=span)
            outer = REGISTRY.words[model.word]
            assert isinstance(outer, View)
            return self.of.value(model.word, _kind(outer, inner), *inner, span=span)
        self.of.declared.used.update(str(v.option("name")) for v in others if v.word == "column")
        return self.of.value(word.name, _kind(word, values), *values, span=span, **drawn)


def _reads(model: Value) -> bool:
    """Whether a model is one that reads: a name, or a view that reads anew."""
    word = REGISTRY.get(model.word)
    return model.word == "model" or (isinstance(word, View) and word.reads_anew)


def _kind(word: View, values: Sequence[Value]) -> Kind:
    stage = max([Stage.RUN if word.draws else Stage.CONSTANT, *(v.kind.stage for v in values)])
    gradient = any(v.kind.gradient for v in values if v.kind.element == Element.MODEL)
    return Kind(Extent.CONSTANT, Element.MODEL, ANY, stage, gradient)
