"""`priority train --from RUN`: the run that a folder describes once more, on the same data and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from priority_dsl.library import kept_texts
from trainer.config import TrainConfig
from trainer.faults import ConfigFault
from trainer.records.manifest import changed, machine_now, versions
from trainer.records.manifest_file import read_manifest, rules_inside
from trainer.records.repeating import Asked
from trainer.runlog import silent, tell


@contextmanager
def as_before(of: Asked, config: TrainConfig) -> Iterator[None]:
    """Inside, rules that the run read from the library are what they were then.

    Raises `ConfigFault` where data or a model is not what the run read, unless that is allowed.
    """
    say = silent if config.quiet else tell
    known = read_manifest(of.run)
    if known is None:
        say(f"{of.run} has no manifest: whether data and models are the same is not known")
    else:
        _compare(of, known, config, say)
    with kept_texts(rules_inside(of.run)):
        yield


def _compare(of: Asked, known: dict[str, Any], config: TrainConfig, say: Callable[[str], None]) -> None:
    """Refuse other data and models, unless they are allowed or named by a flag; say what else differs."""
    given = {word.partition("=")[0] for word in of.words}
    for source, flag in changed(known, config).items():
        what = f"{source} is not what the run {of.run} read: its content has changed"
        if not of.allow_changed and flag.split()[0] not in given:
            raise ConfigFault(
                f"--from: {what}; bring it back, name another with {flag}, or repeat with --allow-changed"
            )
        say(what)
    now = versions()
    for name, was in known.get("versions", {}).items():
        if now.get(name) != was:
            say(f"{name} was {was} and is {now.get(name, 'not installed')}: numbers may differ")
    here = machine_now(config.device == "cpu")
    for name, was in known.get("machine", {}).items():
        if name in here and here[name] != was:
            say(f"{name}: the run had {was}, here it is {here[name]}: the last bits may differ")
