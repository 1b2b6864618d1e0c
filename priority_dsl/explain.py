"""What a rule is, in words: what it reads, its range and regime."""

from __future__ import annotations

from priority_dsl.checked import CheckedRule
from priority_dsl.printer import format_rule


def explain_rule(rule: CheckedRule) -> str:
    """The rule's text, regime, range, what it reads and when it is known, its normaliser and warnings."""
    reads = rule.requires
    loss = "its own" if rule.loss is not None else "weight * nll(on)"
    params = [f"{n} = {p.value:g} in {p.range}" for n, p in rule.params.items()]
    lines = [
        format_rule(rule.tree).rstrip("\n"),
        "",
        f"regime      {rule.regime}",
        f"range       {rule.range}",
        f"extent      one weight per {rule.weight.kind.extent}",
        f"stage       {rule.weight.kind.stage}",
        f"loss        {loss}",
        f"normalize   {rule.normalize}",
        f"over        {rule.over}",
        f"models      {', '.join(sorted(reads.models))}",
        f"statistics  {', '.join(sorted(reads.statistics)) or 'none'}",
        f"columns     {', '.join(sorted(reads.columns)) or 'none'}",
        f"parameters  {', '.join(params) or 'none'}",
    ]
    return "\n".join([*lines, *(f"\n{warning}" for warning in rule.warnings)])
