"""A rule that looks at data alone: `on` is one more frozen model, every weight is known beforehand."""

from __future__ import annotations

from dataclasses import replace

from priority_dsl.chance import drawn_once, own_stage
from priority_dsl.checked import CheckedRule
from priority_dsl.kinds import Stage
from priority_dsl.values import Value, walk


def with_on_frozen(rule: CheckedRule) -> CheckedRule:
    """The same rule with every statistic of `on` at stage `frozen` and without gradient.

    Its plan computes all statistics in passes and keeps no model; weights then need stored columns only.
    """
    loss = None if rule.loss is None else _frozen(rule.loss)
    return replace(rule, weight=_frozen(rule.weight), loss=loss)


def _frozen(root: Value) -> Value:
    known: dict[Value, Value] = {}
    root = drawn_once(root)  # a view that draws, as in epoch 0
    for part in walk(root):
        arguments = tuple(known[a] for a in part.arguments)
        stage = part.kind.stage
        if stage == Stage.ONLINE:  # a leaf that is online is the model itself
            least = own_stage(part) if arguments else Stage.FROZEN
            stage = max([least, *(a.kind.stage for a in arguments)])
        kind = replace(part.kind, stage=stage, gradient=False)
        known[part] = Value(part.word, arguments, part.options, kind, part.span)
    return known[root]
