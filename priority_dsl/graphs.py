"""Graphs of tensor operations: equal operations are made once, and inputs are given by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer


@dataclass(frozen=True)
class LossGraph:
    """A compiled graph and the names of the inputs that it reads, in order."""

    module: GraphModule
    inputs: tuple[str, ...]

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The outputs for inputs by name."""
        return self.module(*(inputs[name] for name in self.inputs))


class SharingTracer(GraphAppendingTracer):
    """Makes a node once for equal operations on equal operands (nothing here has side effects)."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.made: dict[Any, Proxy] = {}

    def create_proxy(self, kind, target, args, kwargs, *rest, **named):  # type: ignore[override]  # noqa: D102 (torch.fx calls it)
        key = (kind, target, _key(args), _key(kwargs))
        if key not in self.made:
            self.made[key] = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        return self.made[key]


def _key(argument: Any) -> Any:
    """A hashable form of an operand; numbers keep their type, so that 1 and True differ."""
    if isinstance(argument, Proxy):
        return argument.node
    if isinstance(argument, tuple | list):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, dict):
        return tuple(sorted((k, _key(v)) for k, v in argument.items()))
    if isinstance(argument, slice):
        return (slice, _key(argument.start), _key(argument.stop), _key(argument.step))
    return (type(argument), argument)
