"""Calls over a scope: `mean(x, batch)`, `top(x, f, chunk(8), where=c)`; what the checker knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from priority_dsl import nodes
from priority_dsl.chance import drawn_once
from priority_dsl.kinds import BOOLEAN, Element, Extent, Kind, Range, Stage, hull
from priority_dsl.nodes import Expr
from priority_dsl.printer import format_expression
from priority_dsl.registry import REGISTRY, Reduction, Scope
from priority_dsl.repeated import Repeated
from priority_dsl.spelling import SCOPES
from priority_dsl.values import BROKEN, Option, Value

if TYPE_CHECKING:
    from priority_dsl.expressions import Expressions

ZERO = Range.of((0.0,))


def scope_of(node: Expr) -> str | None:
    """The scope that an argument names; None where it is a value."""
    match node:
        case nodes.Name(name=name) | nodes.Call(function=name) if name in SCOPES:
            return name
    return None


def stage_of(scope: Option, arguments: Sequence[Value]) -> Stage:
    """When a reduction is known: with its arguments, in the run at the earliest where it is of a batch."""
    known = max(a.kind.stage for a in arguments)
    return max(known, Stage.RUN if scope == "batch" else Stage.DATA)


class Scoping:
    """Checks the reductions of one rule."""

    def __init__(self, expressions: Expressions) -> None:
        self.of = expressions
        self.repeated = Repeated(expressions)

    def call(self, node: nodes.Call) -> Value | None:
        """A reduction; None where the call is none: `max(a, b)` without a scope is arithmetic."""
        word = REGISTRY.reduction(node.function)
        if word is None:
            return None
        given = [*node.arguments, *(k.value for k in node.keywords if k.name == "scope")]
        if word.written != word.name and not any(scope_of(a) for a in given):
            return None
        return self.reduction(word, node)

    def reduction(self, word: Reduction, node: nodes.Call) -> Value:
        """A reduction of its arguments."""
        where = next((k.value for k in node.keywords if k.name == "where"), None)
        bare = node.model_copy(update={"keywords": tuple(k for k in node.keywords if k.name != "where")})
        names = ["x", *word.settings, *(["scope"] if word.scoped else [])]
        bound = self.of.calls.bind(bare, names, word.options, signature=word.signature)
        if bound is None:
            return BROKEN
        arguments, given = bound
        found = self.scope(arguments.pop()) if word.scoped else ("example", None)
        if found is None:
            return BROKEN
        x = self.of.visit(arguments[0])
        x = self.condition(x, arguments[0]) if word.condition else self.of.as_number(x, arguments[0])
        values = [x, *(self.setting(word, a) for a in arguments[1:])]
        if where is not None:
            values.append(self.of.condition(where))
        if BROKEN in values:
            return BROKEN
        if word.hazard is not None:
            self.of.hazard(word, values[: 1 + len(word.settings)], node)
        if found[0] == "draws":
            assert found[1] is not None
            return self.repeated.reduced(word, values, found[1], node)
        options: dict[str, Option] = {"scope": found[0], "where": where is not None}
        if found[1] is not None:
            options["size"] = found[1]
        for name, option in word.options.items():
            chosen = self.of.calls.choice(name, option, given[name]) if name in given else option.default
            options[name] = chosen
        return self.reduced(word, values, options, node)

    def how_many(self, test: Value, node: Expr) -> Value:
        """How many supervised tokens of the step a condition holds for, whatever its own extent."""
        tokens = Kind(Extent.TOKEN, Element.NUMBER, test.kind.range, test.kind.stage)
        members = self.of.value("indicator", tokens, test, span=node.span)
        word = REGISTRY.reduction("sum")
        assert word is not None
        kind = Kind(Extent.RUN, Element.NUMBER, word.range(BOOLEAN), stage_of("batch", [members]))
        return self.of.value(word.name, kind, members, span=node.span, scope="batch")

    def condition(self, value: Value, node: Expr) -> Value:
        """What `count` counts: a condition, as 0 and 1."""
        if value is BROKEN or value.kind.element == Element.BOOL:
            return self.of.as_number(value, node)
        what = format_expression(node)
        return self.of.error(
            "PD301", f"`{what}` is a {value.kind.element}, where a condition is needed", node,
            f"a {value.kind.element}", f"compare it: `count({what} > 0, ...)`",
        )  # fmt: skip

    def setting(self, word: Reduction, node: Expr) -> Value:
        """A number beside x, the same for the whole scope."""
        value = self.of.number(node)
        if value is not BROKEN and value.kind.extent > Extent.RUN:
            what, extent = format_expression(node), value.kind.extent
            return self.of.error(
                "PD305", f"`{what}` differs from {extent} to {extent}", node,
                f"`{word.written}` needs one number for its scope", "use a number, a parameter or a schedule",
            )  # fmt: skip
        return value

    def scope(self, node: Expr) -> tuple[str, int | None] | None:
        """The name of a scope and its size; None (reported) where it is none."""
        name = scope_of(node)
        word = REGISTRY.get(name) if name else None
        known = ", ".join(REGISTRY.words[n].signature for n in REGISTRY.names(Scope))
        if name is None:
            self.of.error(
                "PD308", f"`{format_expression(node)}` is not a scope", node, "over what?", f"one of {known}"
            )
            return None
        assert isinstance(word, Scope), name
        size: tuple[Expr, ...] = node.arguments if isinstance(node, nodes.Call) else ()
        named = isinstance(node, nodes.Call) and node.keywords
        if named or len(size) != word.sized or (isinstance(node, nodes.Call) and not word.sized):
            problem = f"it takes one whole number {word.size}" if word.sized else "it takes no arguments"
            self.of.error(
                "PD303", f"the scope `{name}` does not fit", node, problem, f"write `{word.signature}`"
            )
            return None
        return name, self.of.calls.whole(word.signature, next(iter(size)))[0] if word.sized else None

    def reduced(
        self, word: Reduction, values: Sequence[Value], options: dict[str, Option], node: nodes.Call
    ) -> Value:
        """The value of a reduction: its kind by the scope and what it reads."""
        scope, where = str(options["scope"]), bool(options["where"])
        members = [values[0], *([values[-1]] if where else [])]
        if scope == "dataset":
            values = [drawn_once(v) for v in values]
            if not self.known_before(values, node):
                return BROKEN
        range = word.range(values[0].kind.range)
        if where and not (word.rescales and word.element == Element.BOOL):
            range = hull(range, ZERO)
        extent = REGISTRY.words[scope].extent  # type: ignore[attr-defined]
        if word.rescales:
            extent = Extent.TOKEN
            counted = max(v.kind.extent for v in members)
            if counted in (Extent.PAIR, Extent.EXAMPLE) and word.scoped and scope not in ("chunk", "window"):
                extent = Extent.EXAMPLE if scope == "example" else counted
        gradient = word.element == Element.NUMBER and values[0].kind.gradient
        kind = Kind(extent, word.element, range, stage_of(scope, values), gradient)
        options = {name: setting for name, setting in options.items() if setting is not False}
        return self.of.value(word.name, kind, *values, span=node.span, **options)

    def known_before(self, values: Sequence[Value], node: nodes.Call) -> bool:
        """Whether all that a reduction over the data set reads is known before training (law 9)."""
        late = next((v for v in values if v.kind.stage > Stage.FROZEN), None)
        if late is None:
            return True
        what = "the model being trained" if late.kind.stage == Stage.ONLINE else "the run itself"
        self.of.error(
            "PD311", "a value over the data set is computed before training", node,
            f"this reads {what}", "read `ref` or a declared model, or take the scope `batch`",
        )  # fmt: skip
        return False
