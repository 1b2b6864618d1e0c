"""`priority explain`: what is derived of rules, as text or JSON, and the figures for a model and data."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from priority_dsl import CheckedRule, PriorityError, check, compile_rule, explain
from priority_dsl.explain import explain_json
from trainer.config import RowConfig
from trainer.faults import ConfigFault


def explain_rules(flags: Namespace, values: dict[str, float]) -> int:
    """Print what is known of each rule; 2 if one of them has a mistake."""
    config = _config(flags)
    found, failed = [], False
    for argument in flags.rules:
        try:
            found.append(_explained(check(argument, **values), flags, config))
        except PriorityError as error:
            failed = True
            headline = argument.strip().splitlines()[0] if argument.strip() else "(empty)"
            found.append({"errors": _errors(error)} if flags.json else f"{headline}\n{error}")
    if flags.json:
        print(json.dumps(found if len(found) > 1 else found[0], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(found))
    return 2 if failed else 0


def _explained(rule: CheckedRule, flags: Namespace, config: RowConfig | None) -> Any:
    facts: dict[str, Any] = explain_json(rule)
    parts = [explain(rule).rstrip()]
    if config is not None:
        from trainer.figures import as_text, figures

        facts["figures"] = figures(rule, config, _pairs(flags.bind), flags.epochs)
        parts.append(as_text(facts["figures"]))
    if flags.code:
        facts["code"] = compile_rule(rule).code.strip()
        parts.append(facts["code"])
    return facts if flags.json else "\n\n".join(parts)


def _config(flags: Namespace) -> RowConfig | None:
    """How rows are read; None without a model and data."""
    names = ("prompt", "completion", "chat", "max_length", "bad_rows", "trust_remote_code")
    layout = {name: getattr(flags, name) for name in names}
    given = {name: value for name, value in layout.items() if value}
    if flags.model is None and flags.data is None:
        others = [*given, *(["bind"] if flags.bind else []), *(["epochs"] if flags.epochs != 1 else [])]
        if others:
            raise ConfigFault(
                f"--{others[0].replace('_', '-')} needs --model and --data, whose figures it is for"
            )
        return None
    if flags.model is None or flags.data is None:
        one, other = ("data", "model") if flags.model is None else ("model", "data")
        raise ConfigFault(f"--{one} needs --{other}: the figures are for a model and data")
    if flags.epochs < 1:
        raise ConfigFault(f"--epochs {flags.epochs}: must be 1 or more")
    try:
        return RowConfig(model=flags.model, data=flags.data, **given)
    except ValueError as error:
        last = str(error).splitlines()[-2 if "For further" in str(error) else -1]
        raise ConfigFault(last.strip()) from error


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, tied, folder = word.partition("=")
        if not (tied and name.strip() and folder.strip()):
            raise ConfigFault(f"--bind {word}: must be NAME=FOLDER")
        pairs[name.strip()] = folder.strip()
    return pairs


def _errors(error: PriorityError) -> list[dict[str, Any]]:
    return [
        {"code": d.code, "message": d.message, "line": d.line, "column": d.column, "help": d.help}
        for d in error.diagnostics
    ]
