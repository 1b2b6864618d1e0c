"""The model card, README.md of a run: the rule in full and what follows from it, figures, settings, citation.

It is made from the folder of the run alone and is the same each time. Paths of this machine stay out of it:
only the last part of a path is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from priority_dsl import check
from priority_dsl.explain import explain_json, explain_rule
from priority_dsl.library import kept_texts, list_rules
from trainer.atomic import write_file
from trainer.config import HUB_NAME
from trainer.examples import SUMMARY
from trainer.records.manifest_file import read_manifest, rules_inside
from trainer.runlog import LOG_NAME

CARD = "README.md"
PRIVATE = {"output", "cache", "resume", "overwrite", "quiet", "rule", "set", "model", "data", "eval_data",
           "bind", "chat_template", "push_to_hub", "hub_private", "dry_run", "show"}  # fmt: skip
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def write_card(folder: Path) -> Path:
    """Write README.md into the folder of a finished run, in place of one that is there."""
    path = folder / CARD
    write_file(path, card(folder))
    return path


def card(folder: Path) -> str:
    """The card as text: YAML metadata and Markdown. `folder` holds a run's config, rule, manifest and log."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    known: dict[str, Any] = read_manifest(folder) or {}
    inside = rules_inside(folder)
    text = (folder / "rule.rule").read_text(encoding="utf-8")
    with kept_texts(inside):
        rule = check(text, **config["set"])
        facts, explained = explain_json(rule), explain_rule(rule)
    models = known.get("models", {})
    base = models.get("model", {"name": public(config["model"]), "local": True})
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text + "".join(inside.values()))), default=0))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made = environment.get_template("card.md.j2").render(
        metadata=_metadata(folder, config, known, base, facts["regime"]),
        title=folder.resolve().name,
        base=f"`{base['name']}`",
        regime=str(rule.regime),
        range=facts["range"],
        extent=facts["extent"],
        description=facts["description"],
        fence=fence,
        rule=text.rstrip("\n"),
        inside={name: inner.rstrip("\n") for name, inner in inside.items()},
        parameters=facts["parameters"],
        explained=explained.removeprefix(facts["text"]).strip("\n"),
        figures=figures(_lines(folder / LOG_NAME)),
        read=_read(known),
        counted=_counted(folder),
        settings=_settings(config),
        folder=folder.resolve().name,
        versions=", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items()),
        machine=_machine(known.get("machine", {})),
        citations=_citations(rule.cites, inside),
        bibtex="\n\n".join(bibtex(_citations(rule.cites, inside))),
    )
    return re.sub(r"\n{3,}", "\n\n", made).rstrip("\n") + "\n"


def public(source: str) -> str:
    """A source without the place where it lies: the last part of a path, or the name on a hub."""
    path = Path(source)
    local = path.is_absolute() or source.startswith((".", "~")) or path.exists()
    return path.name if local and path.name else source


def _metadata(
    folder: Path, config: Mapping[str, Any], known: Mapping[str, Any], base: Mapping[str, Any], regime: str
) -> str:
    """The YAML of the card. What is only on this machine is no link, so it is left out."""
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    named = [d["name"].partition("@")[0].partition(":")[0] for d in known.get("data", []) if not d["local"]]
    name = config["rule"].strip()
    tags = ["priority_dsl", "token-priority", regime.replace(" ", "-")]
    found: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*tags, *([f"rule:{name}"] if name in list_rules() else [])],
    }
    if not base["local"] and HUB_NAME.fullmatch(base["name"]):
        found["base_model"] = base["name"]
    if names := sorted({name for name in named if HUB_NAME.fullmatch(name)}):
        found["datasets"] = names
    if license := _license(base):
        found["license"] = license
    return yaml.safe_dump(found, sort_keys=True, allow_unicode=True)


def _license(base: Mapping[str, Any]) -> str | None:
    """The licence that the base model's own card names; None where it has no card here, or one without."""
    if not base["local"]:
        return None
    try:
        text = (Path(base["source"]) / CARD).read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = header.get("license")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, AttributeError, IndexError):
        return None
    return found if isinstance(found, str) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(log: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a log says at a glance, by name: steps, first and last figures, the last held-out ones."""
    steps = [line for line in log if "nll" in line]
    held_out = [line for line in log if "eval_nll" in line]
    found: dict[str, str] = {}
    if steps:
        first, last = steps[0], steps[-1]
        found["optimizer steps"] = f"{last['step']}"
        found["training nll, first and last step"] = f"{_number(first['nll'])}, {_number(last['nll'])}"
        found["weighted loss, first and last step"] = f"{_number(first['loss'])}, {_number(last['loss'])}"
        found["mean weight, last step"] = _number(last["weight_mean"])
    if held_out:
        last = held_out[-1]
        found["held-out nll"] = _number(last["eval_nll"])
        found["held-out accuracy"] = f"{last['eval_accuracy']:.1%}"
        if "eval_preference_accuracy" in last:
            found["held-out preference accuracy"] = f"{last['eval_preference_accuracy']:.1%}"
            found["held-out preference margin"] = _number(last["eval_preference_margin"])
    return found


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _read(known: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the run read, a line each: what it is, its name, the beginning of its digest."""
    several = [
        ("model" if name == "model" else f"model `{name}`", of)
        for name, of in known.get("models", {}).items()
    ]
    for what in ("data", "eval_data", "chat_template"):
        several += [
            (what.replace("eval_data", "held-out data").replace("_", " "), of) for of in known.get(what, [])
        ]
    return [
        {"what": what, "name": _cell(of["name"]), "digest": (of["digest"] or "")[:12]} for what, of in several
    ]


def _counted(folder: Path) -> str:
    """How much was read, from the run's data.json."""
    try:
        known = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    said = [
        f"{what}: {known[part]['rows']:,} rows, {known[part]['tokens']:,} tokens"
        for part, what in (("data", "Training data"), ("held_out", "held-out data"))
        if known.get(part, {}).get("rows")
    ]
    return f"{'; '.join(said)}." if said else ""


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that were in force, without those that say where things lie."""
    shown = {n: v for n, v in config.items() if n not in PRIVATE and v not in (None, False, [], {}, "")}
    return {name: _setting(value) for name, value in shown.items()}


def _setting(value: Any) -> str:
    """A setting as a cell: lists without brackets, a text that ends in a space in quotes."""
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if isinstance(value, str):
        value = public(value) if value.strip() == value else repr(value)
    return _cell(value)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    processes = "1 process" if machine["processes"] == 1 else f"{machine['processes']} processes"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"It ran on {machine['device']}, {processes} of {threads}."


def _citations(cites: Iterable[str], inside: Mapping[str, str]) -> list[str]:
    """What the rule cites, and what the rules that it reads cite, each once."""
    with kept_texts(inside):
        inner = [cite for text in inside.values() for cite in check(text).cites]
    return list(dict.fromkeys([*cites, *inner]))


def bibtex(cites: Iterable[str]) -> list[str]:
    """An entry for each citation that names a paper on arXiv, one a paper."""
    entries: dict[str, str] = {}
    for cite in cites:
        found = ARXIV.search(cite)
        if found is None:
            continue
        title = cite[: found.start()].strip(" ,;") or found[1]
        key = re.sub(r"\W+", "", title.split(",")[0]).lower() + found[1].replace(".", "")
        note = cite[found.end() :].strip(" ,;")
        fields = {"title": title, "eprint": found[1], "archivePrefix": "arXiv"} | (
            {"note": note} if note else {}
        )
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        entries.setdefault(found[1], f"@misc{{{key},\n{body}\n}}")
    return list(entries.values())
