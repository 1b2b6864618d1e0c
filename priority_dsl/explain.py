"""The EXPLAIN of a rule: what it reads, its regime, the plan that will be executed, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from priority_dsl.checked import CheckedRule, text
from priority_dsl.fused_plan import FusedPlan, fused_plan
from priority_dsl.kinds import Stage
from priority_dsl.plan import Pass, Plan, over, plan, why_whole
from priority_dsl.printer import format_expression, format_rule
from priority_dsl.registry import REGISTRY, Statistic
from priority_dsl.values import carrying, walk

TRAINED_MATMULS = 3  # of vocabulary size a step: logits, gradient of the hidden states, gradient of the head


def explain_json(rule: CheckedRule) -> dict[str, Any]:
    """Everything that the checker and the planner derive for a rule, as plain data for JSON."""
    return _facts(rule, plan(rule))


def _facts(rule: CheckedRule, how: Plan) -> dict[str, Any]:
    reads = rule.requires
    return {
        "text": format_rule(rule.tree).rstrip("\n"),
        "description": rule.doc,
        "citations": list(rule.cites),
        "regime": rule.regime.name,
        "signal": rule.regime.signal,
        "range": str(rule.range),
        "extent": str(rule.weight.kind.extent),
        "stage": str(rule.weight.kind.stage),
        "loss": "weight * nll(on)" if rule.loss is None else _loss_text(rule),
        "normalize": rule.normalize,
        "keep": "every example" if rule.keep is None else text(rule.keep),
        "over": rule.over,
        "reads": {name: sorted(getattr(reads, name)) for name in ("models", "statistics", "columns")},
        "gradient": sorted(_with_gradient(rule)),
        "parameters": {n: {"value": p.value, "range": str(p.range)} for n, p in rule.params.items()},
        "plan": _plan_json(how, rule),
        "cost": cost(how, _fused(rule, how)),
        "warnings": [
            {"code": w.code, "message": w.message, "line": w.line, "column": w.column, "help": w.help}
            for w in rule.warnings
        ],
    }


def cost(how: Plan, fused: FusedPlan) -> dict[str, float]:
    """Forward passes and matmuls of vocabulary size, before training and a step; storage a token.

    The matmuls of a step are those of a step in which gradient flows from every token.
    """
    again = fused.kind == "two passes"  # the logits of tokens with gradient are made once more
    return {
        "forward_passes_before": sum(len(p.models) for p in _all_passes(how)),
        "forward_passes_a_step": 1 + len(how.kept),
        "vocabulary_matmuls_before": sum(len(p.models) for p in _all_passes(how)),
        "vocabulary_matmuls_a_step": TRAINED_MATMULS + again + len(how.kept),
        "cached_bytes_a_token": how.cached_bytes,
        "stored_bits_a_token": how.stored_bits,
    }


def _all_passes(how: Plan) -> set[Pass]:
    """What runs before training, once also where `keep` and the weight read the same."""
    return {*how.passes, *how.keep}


def explain_rule(rule: CheckedRule) -> str:
    """The same as text for people."""
    how = plan(rule)
    facts = _facts(rule, how)
    reads, spent = facts["reads"], facts["cost"]
    params = [f"{n} = {p.value:g} in {p.range}" for n, p in rule.params.items()]
    rows = {
        "regime": str(rule.regime),
        "range": f"{facts['range']}, one weight per {facts['extent']}, known at stage {facts['stage']}",
        "loss": facts["loss"],
        "gradient": "through " + ", ".join(facts["gradient"]),
        "normalize": f"{facts['normalize']}, over {facts['over']}",
        "models": ", ".join(reads["models"]),
        "statistics": ", ".join(reads["statistics"]) or "none",
        "columns": ", ".join(reads["columns"]) or "none",
        "parameters": ", ".join(params) or "none",
    }
    lines = [facts["text"], "", *(f"{name:<12}{value}" for name, value in rows.items()), "", "plan"]
    lines += [f"  {line}" for line in _plan_lines(how, rule)]
    lines += [
        "",
        f"{'cost':<12}forward passes: {spent['forward_passes_before']} before training, "
        f"{spent['forward_passes_a_step']} a step",
        f"{'':<12}matmuls of vocabulary size: {spent['vocabulary_matmuls_before']} before training, "
        f"{spent['vocabulary_matmuls_a_step']} a step (plain fine-tuning: {TRAINED_MATMULS})",
        f"{'':<12}a token: {_many(spent['cached_bytes_a_token'], 'byte')} in the cache, "
        f"{_many(spent['stored_bits_a_token'], 'bit')} read in training",
    ]
    return "\n".join([*lines, *(f"\n{warning}" for warning in rule.warnings)])


def _plan_lines(how: Plan, rule: CheckedRule) -> list[str]:
    lines = [f"before     {_pass(p)} to choose examples" for p in how.keep]
    if rule.keep is not None:
        lines.append(f"keep       {text(rule.keep)}: the other examples are left out and counted")
    lines += [f"before     {_pass(p)}" for p in how.passes]
    lines += [f"data set   {name}: over all that is kept, before training" for name in _surveyed(how)]
    lines += [f"stored     {c.name}: {_many(c.bits, 'bit')} a token" for c in how.stored]
    lines.append(f"online     {', '.join(how.online)}")
    lines.append(f"fused      {_fused_text(_fused(rule, how))}")
    lines += [f"kept       {name} {_why_kept(name, rule)}" for name in how.kept]
    lines += [
        f"inside     {name} is read in the same forward pass: the last layer attends once more, no gradient"
        for name in how.online
        if name.startswith("attention(")
    ]
    lines += [f"batch      {name}: over the whole step" for name in _unique(map(text, rule.batches))]
    if (reason := why_whole(rule, how)) is not None:
        lines.append(f"streaming  impossible: {reason}")
    elif how.passes:
        lines.append("streaming  with frozen models that run at every step, in place of what is stored")
    if _observes_on(rule):
        lines.append(
            "observe    several micro-batches or processes: one more forward pass of each, without gradient"
        )
    return lines if how.passes or how.keep else ["before     nothing", *lines]


def _fused(rule: CheckedRule, how: Plan) -> FusedPlan:
    """How the fused loss runs in training, which reads what is stored."""
    return fused_plan(rule, frozenset(column.name for column in how.stored))


def _fused_text(fused: FusedPlan) -> str:
    if fused.kind == "autograd":
        return f"full logits, as {fused.why}"
    if fused.kind == "two passes":
        return f"two passes, as {fused.why}; the second for tokens with gradient alone"
    return f"one pass: {fused.why}"


def _pass(of: Pass) -> str:
    return f"one pass of {' and '.join(of.models)} keeps {', '.join(of.names)}"


def _surveyed(how: Plan) -> list[str]:
    """The reductions over the data set that stored columns need."""
    return _unique(text(v) for c in how.stored for v in walk(c.value) if over("dataset", v))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _observes_on(rule: CheckedRule) -> bool:
    """Whether a step of several micro-batches must read the trained model before it can weigh a token."""
    counts = [rule.weight] if rule.normalize in ("kept", "weights") else []
    statistics = (v for v in walk(*counts, *rule.batches) if isinstance(REGISTRY.get(v.word), Statistic))
    return any(v.kind.stage == Stage.ONLINE for v in statistics)


def _why_kept(name: str, rule: CheckedRule) -> str:
    if name in rule.models and rule.models[name].ema is not None:
        return "is kept beside on: an average of its weights, in one more forward pass a step"
    if name not in (*rule.models, "ref"):
        return "is read at each step, in a forward pass of its own"
    return "stays loaded: each step needs a whole distribution of it"


def _many(number: float, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _plan_json(how: Plan, rule: CheckedRule) -> dict[str, Any]:
    return {
        "passes": [{"models": list(p.models), "statistics": list(p.names)} for p in how.passes],
        "stored": [{"name": c.name, "bits": c.bits} for c in how.stored],
        "online": list(how.online),
        "kept": list(how.kept),
        "fused": {"plan": _fused(rule, how).kind, "why": _fused(rule, how).why},
        "keep": [{"models": list(p.models), "statistics": list(p.names)} for p in how.keep],
        "data_set": _surveyed(how),
        "batch": _unique(map(text, rule.batches)),
        "observes": _observes_on(rule),
        "streams": why_whole(rule, how) is None,
    }


def _with_gradient(rule: CheckedRule) -> set[str]:
    """The statistics through which gradient reaches the trained model: not those under `weight` or `sg`."""
    if rule.loss is None:
        return {"nll(on)"}
    return {text(v) for v in carrying(rule.loss) if isinstance(REGISTRY.get(v.word), Statistic)}


def _loss_text(rule: CheckedRule) -> str:
    return next(format_expression(s.value) for s in rule.tree.statements if s.kind == "loss")
