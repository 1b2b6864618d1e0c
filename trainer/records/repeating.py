"""What `priority train --from RUN` asks for, read from the words of the command and the folder of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.faults import ConfigFault, first_line
from trainer.flags import YamlFile
from trainer.records.manifest_file import read_manifest

# What belongs to the one run, not to what it computes.
DROPPED = {"output", "resume", "overwrite", "quiet", "dry_run", "show", "push_to_hub", "hub_private"}
HEADER = "# run with "  # the line above a rule that names its parameters, which the config has too


@dataclass(frozen=True, slots=True)
class Asked:
    """A command line that repeats a run: the run, whether it may read other things, and the other words."""

    run: Path
    allow_changed: bool
    words: list[str]


def asked(words: list[str]) -> Asked | None:
    """What a command line of `priority train` asks of an earlier run; None where it has no --from."""
    run, allow, rest = None, False, []
    left = iter(words)
    for word in left:
        flag, tied, value = word.partition("=")
        if flag == "--from":
            run = value if tied else next(left, None)
            if not run:
                raise ConfigFault("--from: a value is missing")
        elif word == "--allow-changed":
            allow = True
        else:
            rest.append(word)
    if run is None:
        if allow:
            raise ConfigFault("--allow-changed needs --from, the run that is repeated")
        return None
    if any(word.partition("=")[0] == "--config" for word in rest):
        raise ConfigFault("--from and --config: give one; flags go over either")
    return Asked(Path(run), allow, rest)


def settings(of: Asked) -> YamlFile:
    """The settings of the run as a config file that flags go over.

    The rule is the text of rule.rule. With a --rule of its own, the parameters and bindings of the old one
    are left out. The output is RUN-repeat unless --output names it.
    """
    path = of.run / "config.yaml"
    if not path.is_file():
        raise ConfigFault(f"--from {of.run}: is not the folder of a run: it has no config.yaml")
    file = YamlFile.read(str(path), "--from")
    values = {
        name: value for name, value in file.values.items() if name not in DROPPED and _chosen(name, value)
    }
    values["output"] = f"{of.run}-repeat"
    if any(word.partition("=")[0] == "--rule" for word in of.words):
        values = {name: value for name, value in values.items() if name not in ("rule", "set", "bind")}
    else:
        values["rule"] = _rule(of.run / "rule.rule")
    known = read_manifest(of.run)
    where = Path(known["directory"]) if known and known.get("directory") else None
    return YamlFile(file.name, _found(values, where), file.lines)


def _chosen(name: str, value: Any) -> bool:
    """Whether a setting is other than its default, which some settings may not be given as."""
    field = TrainConfig.model_fields.get(name)
    default = None if field is None else field.get_default(call_default_factory=True)
    return field is None or value != (list(default) if isinstance(default, tuple) else default)


def _rule(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFault(f"--from: {path}: cannot be read: {first_line(error)}") from error
    return "".join(lines[1:] if lines and lines[0].startswith(HEADER) else lines)


def _found(values: dict[str, Any], where: Path | None) -> dict[str, Any]:
    """Settings whose relative paths are those of the run's own directory, where they are not found here."""

    def path(source: Any) -> Any:
        there = where is not None and isinstance(source, str) and not Path(source).exists()
        return str(where / source) if there and where is not None and (where / source).exists() else source

    moved = {}
    for name in ("model", "data", "eval_data", "bind", "chat_template"):
        value = values.get(name)
        if isinstance(value, list):
            moved[name] = [path(each) for each in value]
        elif isinstance(value, dict):
            moved[name] = {key: path(each) for key, each in value.items()}
        elif value is not None:
            moved[name] = path(value)
    return {**values, **moved}
