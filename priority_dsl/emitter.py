"""Writing values into a torch.fx graph: forward, and the derivative by every statistic.

The registry's bodies run on `torch.fx` proxies, so the graph is made of plain tensor operations and its
source can be read (`rule.code`). Equal operations become one node. The derivative of the loss with
respect to each statistic is written into the graph from the rule's tree; autograd carries it on from the
statistics to the logits. So a factor of 0 or a branch that is not taken adds exactly nothing (law 4),
whatever is infinite on the other side.

Shapes: N tokens, V vocabulary; logits_M [N, V] of model M, everything else [N] or 0-dimensional.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Proxy

from priority_dsl import chance
from priority_dsl.binding import reads_anew
from priority_dsl.checked import CheckedRule, text
from priority_dsl.folding import fold
from priority_dsl.graphs import LossGraph, SharingTracer
from priority_dsl.groups import Order, Segments, chunk_ids, one_for_all
from priority_dsl.kinds import NONNEGATIVE, Element, Extent, Kind, Stage
from priority_dsl.normalform import normal_form
from priority_dsl.pairing import Response, is_chosen, rows
from priority_dsl.plan import substituted
from priority_dsl.registry import REGISTRY, Reading, Reduction, Statistic, View
from priority_dsl.values import Value, walk
from priority_dsl.vocabulary.rows import SweptRow, swept_alone
from priority_dsl.windows import Windows, window_index
from priority_dsl.words import Chance, PairSide

ON = Value(
    "model", (), (("name", "on"),), Kind(Extent.CONSTANT, Element.MODEL, stage=Stage.ONLINE, gradient=True)
)
NLL_ON = Value("nll", (ON,), (), Kind(Extent.TOKEN, Element.NUMBER, NONNEGATIVE, Stage.ONLINE, True))


class Emitter:
    """Writes values into a graph.

    `stored` names values that come as inputs instead of from logits. `given` says that every statistic
    does, `stepped` that the numbers of every batch do, `swept` that those that a sweep over the row gives are
    taken from a kernel's, without derivative.
    """

    def __init__(
        self,
        rule: CheckedRule,
        stored: frozenset[str] = frozenset(),
        *,
        given: bool = False,
        stepped: bool = False,
        swept: bool = False,
    ) -> None:
        self.rule = rule
        self.params = {name: p.value for name, p in rule.params.items()}
        self.stored = stored
        self.given, self.stepped, self.swept = given, stepped, swept
        self.graph = Graph()
        self.tracer = SharingTracer(self.graph)
        self.inputs: dict[str, Proxy] = {}
        self.live: dict[Value, Proxy] = {}  # statistics with their autograd history
        self.known: dict[tuple[Value, bool], Any] = {}
        self.groups: dict[Value, Segments | Windows] = {}  # of each reduction
        self.numbers: dict[Value, tuple[Any, ...]] = {}  # in which its scope is summed up
        self.one: Any = self.input("one")
        self.valid: Any = self.input("valid")

    def input(self, name: str) -> Proxy:
        """The placeholder of an input, made where it is first read."""
        if name not in self.inputs:
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            with self.graph.inserting_before(first) if first is not None else nullcontext():
                plain = re.sub(r"\W+", "_", name).strip("_")
                while any(plain == proxy.node.target for proxy in self.inputs.values()):
                    plain += (
                        "_"  # names that differ only in signs, as `mass(ref) < tau` and `mass(ref) > tau`
                    )
                self.inputs[name] = Proxy(self.graph.placeholder(plain), self.tracer)
        return self.inputs[name]

    def form(self, root: Value) -> Value:
        """The value as it is computed: its normal form, with the stored parts read from outside."""
        return substituted(normal_form(root, self.params), self.stored)

    # Forward ------------------------------------------------------------------------------------

    def value(self, root: Value, detached: bool) -> Any:
        """The tensor (or number, where parameters alone decide) of a value.

        `detached` says that no factor in it has gradient: it is the weight, or under `sg`.
        """
        for part in walk(root):
            for state in (detached, True):
                if part.kind.element != Element.MODEL and (part, state) not in self.known:
                    self.known[part, state] = self._emit(part, state)
        return self.known[root, detached]

    def _emit(self, value: Value, detached: bool) -> Any:
        if value.kind.stage == Stage.CONSTANT:
            number = fold(value, self.params)
            return bool(number) if value.kind.element == Element.BOOL else number
        if value.word in ("column", "stored"):
            given = self.input(f"{value.word}_{value.option('name')}")
            return given if value.kind.extent > Extent.RUN else one_for_all(given, self.valid)
        word = REGISTRY.get(value.word)
        if isinstance(word, Reading):
            return self.input(word.name)
        if isinstance(word, Statistic):
            return self._statistic(value)
        inside = detached or value.word in ("sg", "weight")
        operands = [self.known[argument, inside] for argument in value.arguments]
        if isinstance(word, Reduction):
            return self._reduction(value, word, operands)
        if isinstance(word, Chance):
            return word.body(self._drawn(value), *operands)
        if isinstance(word, PairSide):
            return self._response(word).shown(self.tensor(operands[0]))
        if value.word in ("sg", "weight"):
            return operands[0]
        if value.word == "indicator":
            return operands[0].to(self.one.dtype)
        if value.word == "is_in":
            return self._is_in(value, operands[0])
        return self._function(value, operands, detached)

    def _function(self, value: Value, operands: list[Any], detached: bool) -> Any:
        word = REGISTRY.function(value.word)
        if not word.scalars:
            operands = [self.tensor(o) for o in operands]
        elif value.word == "power":  # as text, which a graph becomes, `-2.0 ** x` is -(2.0 ** x)
            operands = [self.tensor(operands[0]), operands[1]]
        out = word.body(*operands)
        if value.word != "multiply":
            return out
        for factor, operand, other in zip(value.arguments, operands, reversed(value.arguments), strict=True):
            if not (detached or not factor.kind.gradient) or other.kind.range.is_finite:
                continue
            if not isinstance(operand, Proxy):
                out = out if operand != 0 else self.one * 0.0
            elif factor.kind.range.contains(0.0):
                out = out.masked_fill(operand == 0, 0.0)
        return out

    def tensor(self, operand: Any) -> Any:
        """A number as a 0-dimensional tensor, where a body needs tensors."""
        return operand if isinstance(operand, Proxy) else self.one * float(operand)

    def _is_in(self, value: Value, codes: Proxy) -> Any:
        column = self.rule.columns[str(value.arguments[0].option("name"))]
        tests = [codes == column.categories.index(str(m)) for m in value.option("members")]  # type: ignore[union-attr]
        result = tests[0]
        for test in tests[1:]:
            result = result | test
        return result

    def _drawn(self, value: Value) -> Any:
        """The number of a draw `[N]`; an example has one at position 0, what is drawn once one in epoch 0."""
        example, position = self.input("example_ids"), self.input("position").long()
        epoch = 0 if value.option("once") else self.input("epoch").long()
        position = 0 if value.option("per") == "example" else position
        place: Any = value.option("place")
        return chance.uniform(self.input("seed"), epoch, example, position, place, self.one)

    def _reduction(self, value: Value, word: Reduction, operands: list[Any]) -> Any:
        options = dict(value.options)
        where = operands[-1] if "where" in options else None
        settings = [*operands[1 : 1 + len(word.settings)], *(options[name] for name in word.options)]
        over = self.groups[value] = self._over(value, where)
        x, outside = self.tensor(operands[0]), options["scope"] == "dataset"
        if outside or (self.stepped and options["scope"] == "batch"):
            numbers = tuple(self.input(name) for name in number_names(value))
        else:
            numbers = word.body(over, x, *settings)
        self.numbers[value] = numbers
        if word.apply is None:
            return numbers[0]
        result = word.apply(over, x, *numbers)
        if where is None:
            return result
        if word.element == Element.BOOL:
            return result & where
        return result.masked_fill(~(self.valid & where), 0.0)

    def _response(self, word: PairSide) -> Response:
        """The chosen or the rejected response of each pair."""
        position: Any = self.input("position")
        chosen = is_chosen(self.input("example_ids"))
        first = self.valid & (position == 0) & (chosen if word.chosen else ~chosen)
        return Response(first, self.input("pairs"), self.valid)

    def _over(self, value: Value, where: Any) -> Segments | Windows:
        """The groups of a reduction: over examples, the first supervised token of each stands for it.

        So does that of the chosen response for a pair.
        """
        options, word = dict(value.options), REGISTRY.words[value.word]
        members = [value.arguments[0], *value.arguments[-1:] * ("where" in options)]
        eligible = self.valid if where is None else self.valid & where
        position: Any = self.input("position")
        segments: Any = self.input("segments")
        scope, size = options["scope"], options.get("size")
        if scope == "window":
            index, inside = (window_index(segments, self.valid, size)[i] for i in range(2))  # type: ignore[index]
            return Windows(index, inside, eligible, Order(self.input("example_ids"), position))
        counted, whole = max(m.kind.extent for m in members), scope in ("batch", "dataset")
        example: Any = self.input("example_ids")
        if counted in (Extent.PAIR, Extent.EXAMPLE) and scope != "chunk" and word.scoped:  # type: ignore[attr-defined]
            eligible, position = eligible & (position == 0), position * 0
            if counted == Extent.PAIR and whole:
                eligible, example = eligible & is_chosen(example), rows(example)
        order = Order(example, position)
        if scope == "chunk":
            segments = chunk_ids(segments, position, size)  # type: ignore[arg-type]
        return Segments(segments * 0 if whole else segments, eligible, self.valid, order, whole)

    def _statistic(self, value: Value) -> Any:
        word = REGISTRY.statistic(value.word)
        if word.inside:
            return self.input(f"stored_{text(value)}")
        if self.given:
            given: Any = self.input(f"statistic_{text(value)}")
            # Kept as numbers, as every statistic of a pass is.
            return given != 0 if value.kind.element == Element.BOOL else given
        models = [self.logits(model) for model in value.arguments]
        targets, options = self.input("targets"), dict(value.options)
        if self.swept and word.of_row is not None:
            self.live[value] = word.of_row(*(SweptRow.of(z, targets) for z in models), **options)
        else:
            self.live[value] = word.body(*models, targets, **options)
        detached = self.live[value].detach()
        detached.node._rename("_".join([value.word, *(text(m) for m in value.arguments)]))
        return detached

    def logits(self, model: Value) -> Proxy:
        """The logits `[N, V]` of a model or of a view of it."""
        if model.word == "model" or reads_anew(model):
            return self.input(f"logits_{text(model)}")
        if model.word == "sg":
            return self.logits(model.arguments[0]).detach()
        word = REGISTRY.words[model.word]
        assert isinstance(word, View)
        models = [a.kind.element == Element.MODEL for a in model.arguments]
        seen = zip(model.arguments, models, strict=True)
        return word.body(*(self.logits(a) if is_model else self.value(a, True) for a, is_model in seen))

    # Derivative ---------------------------------------------------------------------------------

    def derivatives(self, loss: Value, g: Proxy) -> dict[Value, Any]:
        """What flows to each statistic that carries gradient when `g` flows to the loss."""
        flows: dict[Value, Any] = {loss: g}
        order = [v for v in walk(loss) if v.kind.gradient and v.kind.element != Element.MODEL]
        summed = any(v in self.groups or isinstance(REGISTRY.get(v.word), PairSide) for v in order)
        for value in reversed(order):
            if value not in flows or isinstance(REGISTRY.get(value.word), Statistic):
                continue
            if value in self.groups:
                flows[value.arguments[0]] = self._through(value, flows)
                continue
            if isinstance(side := REGISTRY.get(value.word), PairSide):
                (x,), part = value.arguments, self._response(side).returned(flows[value])
                flows[x] = flows[x] + part if x in flows else part
                continue
            word = REGISTRY.function(value.word)
            assert word.derivative is not None, value.word
            operands = [self.known[a, False] for a in value.arguments]
            operands = operands if word.scalars else [self.tensor(o) for o in operands]
            parts = word.derivative(flows[value], self.known[value, False], *operands)
            for argument, part in zip(value.arguments, parts, strict=True):
                if argument.kind.gradient:
                    if summed:  # what a token does not read must not spoil what others read with it (law 4)
                        part = part.masked_fill(flows[value] == 0, 0.0)
                    flows[argument] = flows[argument] + part if argument in flows else part
        return {v: flow for v, flow in flows.items() if isinstance(REGISTRY.get(v.word), Statistic)}

    def _through(self, value: Value, flows: dict[Value, Any]) -> Any:
        """What flows through a reduction to what it reads, with what flows there already."""
        word, over, x = REGISTRY.words[value.word], self.groups[value], value.arguments[0]
        assert isinstance(word, Reduction), value.word
        assert word.derivative is not None, value.word
        flow = word.derivative(over, flows[value], self.known[x, False]).masked_fill(~over.eligible, 0.0)
        return flows[x] + flow if x in flows else flow

    # Results ------------------------------------------------------------------------------------

    def weights(self) -> Proxy:
        """The weight of each token `[N]`, 0 where ignored."""
        value = self.form(self.rule.weight)
        weight = self.value(value, True)
        if value.kind.extent < Extent.EXAMPLE or not isinstance(weight, Proxy):
            weight = self.valid.to(self.one.dtype) * weight
        result = weight.masked_fill(~self.valid, 0.0)
        result.node._rename("weights")
        return result

    def share(self) -> Any:
        """What the loss of each token is multiplied by, divided by the size of its group where it has one."""
        share: Any = self.input("share")
        for group in self.rule.groups:
            member, count = (self.value(self.form(v), True) for v in (group.member, group.count))
            divided = share / count.clamp(min=1)
            if isinstance(member, Proxy):
                share = divided.where(member, share)
            elif member:
                share = divided
        return share

    def finish(self, *outputs: Proxy) -> LossGraph:
        """The graph with these outputs, without what they do not need."""
        self.graph.output(tuple(o.node for o in outputs))
        self.graph.eliminate_dead_code()
        swept_alone(self.graph)
        for name, proxy in list(self.inputs.items()):
            if not proxy.node.users:
                self.graph.erase_node(proxy.node)
                del self.inputs[name]
        self.graph.lint()
        names = {proxy.node: name for name, proxy in self.inputs.items()}
        order = tuple(names[node] for node in self.graph.nodes if node.op == "placeholder")
        return LossGraph(GraphModule(torch.nn.Module(), self.graph, "LossGraph"), order)


def number_names(reduction: Value) -> list[str]:
    """The inputs through which a graph is given the numbers of a batch or of the data set."""
    word = REGISTRY.words[reduction.word]
    assert isinstance(word, Reduction), reduction.word
    return [f"{text(reduction)}[{i}]" for i in range(word.numbers)]
