"""What a rule costs on a given model and data: tokens, bytes, forward passes, the share of extra compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from priority_dsl.binding import base_model, bindings
from trainer.columns import ColumnReader, check_categories
from trainer.config import RowConfig
from trainer.data import Reader
from trainer.examples import Examples
from trainer.models import check_bindings, context_of, load_tokenizer, quieten, shape_of, vocabulary_of
from trainer.prompts import PromptReader
from trainer.views import frozen_names

if TYPE_CHECKING:
    from priority_dsl import CheckedRule
    from priority_dsl.plan import Plan
    from priority_dsl.rule import CompiledRule

TRAINING = 3  # of a forward pass: forward, and backward as twice a forward


def figures(rule: CheckedRule, config: RowConfig, bind: Mapping[str, str], epochs: int) -> dict[str, Any]:
    """The figures of a rule for a model, data and a number of epochs; no weight is loaded.

    Shares are of the compute of plain training: one frozen model of the size of the trained one costs
    1 / (3 * epochs) where it is needed once, and 1/3 where it runs at every step.
    """
    from priority_dsl import compile_rule

    quieten()
    compiled = compile_rule(rule)
    frozen = frozen_names(compiled)
    check_bindings(frozen, bind)
    trust = config.trust_remote_code
    shapes = {"on": shape_of(config.model, trust=trust)}
    for name in sorted(frozen):
        shapes[name] = shape_of(
            bind.get(name, config.model), f"--bind {name}=" if name in bind else "--model", trust
        )
    sizes = {name: sum(p.numel() for p in shape.parameters()) for name, shape in shapes.items()}
    limits = [n for n in (context_of(shapes["on"]), config.max_length) if n is not None]
    tokenizer = load_tokenizer(config.model, config.chat_template, trust)
    reader = Reader(
        config,
        tokenizer,
        vocabulary_of(shapes["on"]),
        min(limits, default=None),
        ColumnReader(compiled.columns, rule.source.name),
        roles="role" in compiled.requires.columns,
        pairs=rule.reads_pairs,
        prompts=PromptReader.of(compiled, config, tokenizer, context_of(shapes["on"])),
    )
    data = reader.read(config.data)
    check_categories(compiled.columns, [row.columns for row in data.rows])
    return figures_of(compiled, sizes, data, epochs)


def figures_of(rule: CompiledRule, sizes: Mapping[str, int], data: Examples, epochs: int) -> dict[str, Any]:
    """The same of rows that are read already, and of models of so many parameters, by name."""
    how, rows = rule.plan, data.rows
    bound = {n: base_model(v) for n, v in bindings(*rule.checked.everything).items()}
    of_bound = {name: sizes.get(model, sizes["on"]) for name, model in bound.items()}  # an average is as `on`
    targets = sum(len(r.ids) - 1 if rule.over == "all" else sum(r.response[1:]) for r in rows)
    return {
        "parameters": dict(sizes),
        "rows": len(rows) // data.responses,
        "bad_rows": len(data.bad),
        "tokens": sum(len(row.ids) for row in rows),
        "supervised_tokens": sum(sum(row.response[1:]) for row in rows),
        "targets": targets,
        "cached_bytes": how.cached_bytes * targets,
        "stored_bytes": math.ceil(how.stored_bits * targets / 8),
        "epochs": epochs,
        **extra_compute(how, {**sizes, **of_bound}, epochs),
    }


def extra_compute(how: Plan, sizes: Mapping[str, int], epochs: int) -> dict[str, Any]:
    """Forward passes over the data, and their shares of the compute of plain training of `sizes["on"]`."""
    once = [name for of in how.passes for name in of.models]
    unit = TRAINING * sizes["on"]
    before = sum(sizes[name] for name in once) / (unit * epochs)
    during = sum(sizes[name] for name in how.kept) / unit
    return {
        "forward_passes_before": {name: once.count(name) for name in sorted(set(once))},
        "forward_passes_during": dict.fromkeys(how.kept, epochs),
        "extra_compute_before": before,
        "extra_compute_during": during,
        "extra_compute": before + during,
        "extra_compute_online": sum(sizes[name] for name in {*once, *how.kept}) / unit,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The figures as lines for people."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in found["parameters"].items())
    before = ", ".join(f"{name} {n}x" for name, n in found["forward_passes_before"].items()) or "none"
    during = ", ".join(f"{name} {n}x" for name, n in found["forward_passes_during"].items()) or "none"
    epochs = f"{found['epochs']} epoch{'s' if found['epochs'] != 1 else ''}"
    return "\n".join(
        [
            f"data        {found['rows']:,} rows, {found['tokens']:,} tokens, {found['supervised_tokens']:,} "
            f"supervised, {found['targets']:,} with a weight"
            + (f"; {found['bad_rows']:,} bad rows left out" if found["bad_rows"] else ""),
            f"parameters  {sizes}",
            f"storage     {found['cached_bytes']:,} bytes in the cache, {found['stored_bytes']:,} bytes read "
            "in training",
            f"passes      frozen models over the data: {before} before training, {during} in {epochs}",
            f"compute     {found['extra_compute']:.1%} more than plain training of {epochs} "
            f"({found['extra_compute_before']:.1%} before, {found['extra_compute_during']:.1%} at the steps; "
            f"with frozen models at every step it would be {found['extra_compute_online']:.1%})",
        ]
    )
