"""What a run was made of, in RUN/manifest.json: versions, machine, and digests of everything that it read.

With config.yaml, rule.rule and rules/, the texts of the library that the rule reads, it is enough to repeat
the run (`priority train --from RUN`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from priority_dsl.composition import texts_inside
from priority_dsl.library import SUFFIX
from trainer.atomic import write_file
from trainer.faults import ConfigFault, ModelFault, first_line
from trainer.fingerprints import folder_fingerprint, template_fingerprint, tokenizer_fingerprint
from trainer.records.manifest_file import MANIFEST, RULES, read_manifest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from priority_dsl.rule import CompiledRule
    from trainer.config import TrainConfig

PACKAGES = ("priority_dsl", "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "peft")
GIT_SECONDS = 5


def write_manifest(
    folder: Path,
    config: TrainConfig,
    rule: CompiledRule,
    accelerator: Accelerator,
    tokenizer: Any,
    computed: Mapping[str, int],
) -> None:
    """Write RUN/manifest.json and RUN/rules; a resumed run keeps its first manifest and adds its start to it.

    `computed` counts the rows that went through frozen models for this run, by what was kept of them; what
    the cache knew is not counted. Raises `ConfigFault` where the folder cannot be written.
    """
    start = _start(accelerator)
    try:
        known = read_manifest(folder) if config.resume else None
        if known is None:
            known = {"format": 1, **start, **_inputs(config, tokenizer), "computed": computed}
        else:
            known |= _inputs(config, tokenizer)  # held-out data may be others
            known.setdefault("resumed", []).append(start)
        write_file(folder / MANIFEST, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        for name, text in texts_inside(rule.checked.tree).items():
            (folder / RULES).mkdir(exist_ok=True)
            write_file(folder / RULES / f"{name}{SUFFIX}", text)
    except OSError as error:
        raise ConfigFault(f"--output {folder}: cannot be written: {first_line(error)}") from error


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _start(accelerator: Accelerator) -> dict[str, Any]:
    """What started the run, where, and on what."""
    cuda = accelerator.device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": str(Path.cwd()),
        "commit": _commit(),
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if cuda else accelerator.device.type,
            "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes,
        },
    }


def machine_now(cpu: bool) -> dict[str, Any]:
    """Device and threads that a run would have here."""
    cuda = torch.cuda.is_available() and not cpu
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}


def _commit() -> str | None:
    """The commit of the working directory, a + behind it where files differ; None outside git."""
    try:
        asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        said = [
            subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout
            for words in asked
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() + ("+" if said[1].strip() else "")


def _inputs(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    template = [config.chat_template] if config.chat_template is not None else []
    return {
        "models": {name: read_of(source, "model") for name, source in models_of(config).items()},
        "data": [read_of(source, "data") for source in config.data],
        "eval_data": [read_of(source, "data") for source in config.eval_data],
        "chat_template": [read_of(source, "data") for source in template],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
    }


def models_of(config: TrainConfig) -> dict[str, str]:
    """The folder (or hub name) of every model of a run: the trained one as `model`, others as bound."""
    return {"model": config.model, **config.bind}


def read_of(source: str, what: str) -> dict[str, Any]:
    """What is known of something that a run reads: the name to show, and a digest of the content.

    `name` is the last part of a local path, or the name on the hub; the digest is None where what is read is
    not on this machine.
    """
    path = Path(source)
    if not path.exists():
        return {"source": source, "name": source, "local": False, "digest": None}
    digest = _folder_digest(path) if what == "model" else file_digest(path)
    return {"source": source, "name": path.resolve().name, "local": True, "digest": digest}


def _folder_digest(path: Path) -> str | None:
    try:
        return folder_fingerprint(path)
    except ModelFault:  # an adapter has no config of its own
        whole = hashlib.sha256()
        for part in sorted([*path.glob("*.safetensors"), *path.glob("adapter_config.json")]):
            whole.update(f"{part.name}:{file_digest(part)};".encode())
        return whole.hexdigest()[:32]


def file_digest(path: Path) -> str | None:
    """The digest of a file's bytes; None for what is no plain file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def changed(known: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """What a run would read now that is not what the run of a manifest read, each with its flag.

    Sources are compared by their content where it is on this machine, so a file may have moved.
    """
    now: dict[str, Sequence[str]] = {
        "--data": config.data,
        "--eval-data": config.eval_data,
        "--chat-template": [config.chat_template] if config.chat_template is not None else [],
    }
    before = {"--data": "data", "--eval-data": "eval_data", "--chat-template": "chat_template"}
    found = {}
    for flag, sources in now.items():
        for source, was in zip(sources, known.get(before[flag], []), strict=False):
            if _differs(was, read_of(source, "data")):
                found[source] = flag
    for name, source in models_of(config).items():
        was = known.get("models", {}).get(name)
        if was is not None and _differs(was, read_of(source, "model")):
            found[source] = "--model" if name == "model" else f"--bind {name}="
    return found


def _differs(was: dict[str, Any], now: dict[str, Any]) -> bool:
    return was.get("digest") is not None and now["local"] and now["digest"] != was["digest"]
