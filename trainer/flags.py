"""Command-line flags and YAML -> a validated config; every mistake names its flag, or its file and line.

The flags come from the config model by way of pydantic-settings. Flags go over the YAML file, environment
variables are no source.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from trainer.faults import ConfigFault, first_line

Config = TypeVar("Config", bound=BaseModel)
Path_ = tuple[str | int, ...]
DEEPEST, MOST_PARTS = 20, 10_000  # of a YAML file: levels, and values once aliases stand for what they name
UNSET = "unset"  # how the help prints a default of None; no value of a flag, "null" included, means None
METAVARS = {
    "data": "FILE",
    "eval_data": "FILE",
    "k": "N",
    "stop": "TEXT",
    "lora_targets": "NAME",
    "rule": "RULE",
    "rules": "RULE",
    "grid": "NAME=V,V",
    "seeds": "N,N",
    "eval_config": "FILE",
    "set": "NAME=NUMBER",
    "bind": "NAME=FOLDER",
    "cache": "DIR",
    "out": "FILE",
    "tracker": "NAME",
}


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigFault`, suggests the nearest flag and shows an example."""

    def __init__(self, prog: str, description: str, example: str):
        self.flags: list[str] = []
        super().__init__(
            prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument and remember its flags for suggestions."""
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigFault` in place of printing the usage."""
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown[:1] and message.startswith("unrecognized") and unknown[0].startswith("--"):
            raise unknown_flag(unknown[0].partition("=")[0], self.flags)
        raise ConfigFault(f"{message} ({self.prog} --help shows the flags)")


def unknown_flag(flag: str, known: Sequence[str]) -> ConfigFault:
    """The fault for a flag that does not exist, with the nearest one that does."""
    close = get_close_matches(flag, known, n=1)
    return ConfigFault(f"{flag}: unknown flag" + (f"; did you mean {close[0]}?" if close else ""))


def read_config(
    model: type[Config],
    argv: Sequence[str],
    prog: str,
    description: str,
    example: str,
    base: YamlFile | None = None,
) -> Config:
    """The config that a command line gives, flags over the file that --config names, or over `base`.

    Prints the help and exits on --help. Raises `ConfigFault` with one line for each mistake.
    """
    parser = CommandParser(prog, description, example)
    settings = _settings(model)
    source: CliSettingsSource[Any] = CliSettingsSource(
        settings, root_parser=parser, add_argument_method=_add_argument, cli_exit_on_error=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags go over it")
    flags = _Flags.read(model, argv)
    file = YamlFile.read(flags.config) if flags.config is not None else base or YamlFile("", {}, {})
    try:
        found = CliApp.run(settings, flags.argv, cli_settings_source=source, **flags.over(file.values))
        return model(**{name: getattr(found, name) for name in found.model_fields_set})
    except ValidationError as error:
        raise ConfigFault("\n".join(_messages(error, model, flags, file))) from error
    except SettingsError as error:
        raise ConfigFault(first_line(error)) from error


def _settings(model: type[BaseModel]) -> type[BaseSettings]:
    """The config model as settings whose only sources are the command line and the values of the file."""

    class Settings(BaseSettings, model):
        model_config = SettingsConfigDict(
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_exit_on_error=False,
            cli_parse_none_str=UNSET,
        )

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: Any, init_settings: Any, **others: Any
        ) -> tuple[Any, ...]:
            return (init_settings,)

    Settings.__doc__ = model.__doc__
    return Settings


def _add_argument(parser: Any, *names: str, **options: Any) -> Any:
    """Name a flag's value by what it is, not by its Python type, and leave out defaults that say nothing."""
    options["help"] = re.sub(r" \(default: (unset|False|\{\}|\(\))\)$", "", options.get("help", ""))
    names = tuple("-" + name if re.fullmatch("-[a-z]", name) else name for name in names)  # --k, not -k
    if "metavar" in options and "choices" not in options:
        name = names[0].lstrip("-").replace("-", "_")
        plain = {"str": "TEXT", "int": "N", "float": "NUMBER"}
        options["metavar"] = METAVARS.get(name, plain.get(str(options["metavar"]), options["metavar"]))
    return parser.add_argument(*names, **options)


@dataclass(frozen=True, slots=True)
class _Flags:
    """A command line made exact: scalars tied to their flags, lists and maps collected without splitting."""

    argv: list[str]
    lists: dict[str, list[str]]
    maps: dict[str, dict[str, str]]
    given: set[str]  # fields that a flag sets
    config: str | None

    @staticmethod
    def read(model: type[BaseModel], argv: Sequence[str]) -> _Flags:
        """Sort the words of a command line; `ConfigFault` for an unknown flag and a missing value."""
        fields = {"--" + name.replace("_", "-"): name for name in model.model_fields}
        switches = {flag for flag, name in fields.items() if bool in _outer_types(model, name)}
        switches |= {flag.replace("--", "--no-", 1) for flag in switches}
        found, lists, maps, given, config = [], {}, {}, set(), None
        words = iter(argv)
        for word in words:
            flag, tied, value = word.partition("=")
            if flag in switches:
                given.add(fields.get(flag) or fields[flag.replace("--no-", "--", 1)])
            if flag in switches or word in ("-h", "--help") or not word.startswith("--"):
                found.append(word)
                continue
            if flag != "--config" and flag not in fields:
                raise unknown_flag(flag, [*fields, "--config", "--help"])
            if not tied and (value := next(words, None)) is None:
                raise ConfigFault(f"{flag}: a value is missing")
            if flag == "--config":
                config = value
                continue
            name = fields[flag]
            given.add(name)
            kinds = _outer_types(model, name)
            if tuple in kinds:
                lists.setdefault(name, []).append(value)
            elif dict in kinds:
                maps.setdefault(name, {}).update([_pair(flag, name, value)])
            else:
                found.append(f"{flag}={value}")
        return _Flags(found, lists, maps, given, config)

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """A file's values with the flags over them: lists replaced, maps merged."""
        merged = {**values, **self.lists}
        for name, pairs in self.maps.items():
            below = values.get(name)
            merged[name] = {**below, **pairs} if isinstance(below, dict) else pairs
        return merged


def _outer_types(model: type[BaseModel], name: str) -> set[Any]:
    annotation = model.model_fields[name].annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return {get_origin(option) or option for option in options}


def _pair(flag: str, name: str, value: str) -> tuple[str, str]:
    key, tied, content = value.partition("=")
    if not tied or not key.strip() or not content.strip():
        raise ConfigFault(f"{flag} {value}: must be {METAVARS.get(name, 'NAME=VALUE')}")
    return key.strip(), content.strip()


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A YAML config: its values, and the line of each key and item for messages."""

    name: str
    values: dict[str, Any]
    lines: dict[Path_, int] = field(repr=False)

    @staticmethod
    def read(name: str, flag: str = "--config") -> YamlFile:
        """Read a config file; `ConfigFault` names file and line of what is not YAML, or given twice."""
        try:
            text = Path(name).read_text(encoding="utf-8")
            lines: dict[Path_, int] = {}
            # First, since it refuses what would be too much to build.
            _note_lines(yaml.compose(text, Loader=yaml.SafeLoader), (), lines, name)
            values = yaml.safe_load(text)
        except OSError as error:
            raise ConfigFault(f"{flag} {name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigFault(f"{flag} {name}: not UTF-8 text") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigFault(
                f"{name}:{line}: malformed YAML: {error.problem or first_line(error)}"
            ) from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ConfigFault(f"{name}: malformed YAML: {first_line(error)}") from error
        if not isinstance(values, dict):
            raise ConfigFault(f"{name}:1: a config is a list of `field: value` lines, this is not")
        return YamlFile(name, {str(key): value for key, value in values.items()}, lines)

    def place(self, path: Path_) -> str:
        """`file:line` of the innermost part of a path that the file has; empty where it has none."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else ""


def _note_lines(node: Any, path: Path_, lines: dict[Path_, int], name: str) -> None:
    """Note the line of each part; `ConfigFault` for keys given twice, and for more parts than a config has.

    Aliases let a few lines stand for more than any memory holds, or for parts of themselves.
    """
    if len(path) > DEEPEST or len(lines) > MOST_PARTS:
        what = f"nested more than {DEEPEST} deep" if len(path) > DEEPEST else f"over {MOST_PARTS:,} values"
        raise ConfigFault(f"{name}:{node.start_mark.line + 1}: {what}, which no config needs")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigFault(f"{name}:{line}: a key must be the name of a field")
            here = (*path, key.value)
            if here in lines:
                raise ConfigFault(f"{name}:{line}: `{key.value}` is given twice, first in line {lines[here]}")
            lines[here] = line
            _note_lines(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*path, number)] = item.start_mark.line + 1
            _note_lines(item, (*path, number), lines, name)


def _messages(error: ValidationError, model: type[BaseModel], flags: _Flags, file: YamlFile) -> list[str]:
    """One line a mistake: the place, what is wrong, what was given."""
    found = []
    for mistake in error.errors():
        path = tuple(part for part in mistake["loc"] if not isinstance(part, str) or part != "[key]")
        name = str(path[0]) if path else ""
        place = "--" + name.replace("_", "-")
        if name not in flags.given and (line := file.place(path)):
            place = f"{line}: {'.'.join(map(str, path))}"
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            close = get_close_matches(name.replace("-", "_"), model.model_fields, n=1)
            message = "unknown field" + (f"; did you mean `{close[0]}`?" if close else "")
        elif mistake["type"] == "missing":
            message = "is missing" + (f", on the command line and in {file.name}" if file.name else "")
        elif path:
            place += f" {path[1]}" if place.startswith("--") and len(path) > 1 else ""
            message = f"{message[:1].lower()}{message[1:]}, not {mistake['input']!r}"
        found.append(f"{place}: {message}" if path else message)
    return found
