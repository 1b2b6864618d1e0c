"""A trained model on the Hugging Face hub: what is uploaded, cleaned of the places of this machine.

Only what makes the model, its rule and its story known goes up: no checkpoints, no cache, no paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.faults import ConfigFault, RunFault, first_line
from trainer.records.card import CARD, public
from trainer.records.manifest_file import MANIFEST, RULES, read_manifest
from trainer.runlog import LOG_NAME

PLAIN = (CARD, "rule.rule", f"{RULES}/*.rule", LOG_NAME)
MODEL = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "*.model", "chat_template.jinja",
)  # fmt: skip
PLACES = {"output", "cache", "resume", "overwrite", "quiet", "push_to_hub", "hub_private"}  # of a config
OF_THIS_MACHINE = {"command", "directory", "commit", "resumed"}  # of a manifest


def check_login(repo: str) -> None:
    """Refuse an upload for which nobody is logged in, before a run begins; looks at this machine alone."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigFault(
            f"--push-to-hub {repo}: nobody is logged in; `hf auth login`, or set HF_TOKEN, before the run"
        )


def uploads(folder: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a run, by its path in the repository: files as they are, or cleaned content."""
    found: dict[str, Path | bytes] = {}
    for pattern in (*PLAIN, *MODEL):
        for path in sorted(folder.glob(pattern)):
            found[path.relative_to(folder).as_posix()] = path
    for name in [name for name in found if name.endswith("config.json")]:
        found[name] = _without_places(json.loads((folder / name).read_text(encoding="utf-8")))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    first = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()[0]
    kept = {name: _public(value) for name, value in config.items() if name not in PLACES}
    found["config.yaml"] = f"{first}\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}".encode()
    known = read_manifest(folder)
    if known is not None:
        kept = {name: _public(value) for name, value in known.items() if name not in OF_THIS_MACHINE}
        found[MANIFEST] = (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode()
    return dict(sorted(found.items()))


def _public(value: Any) -> Any:
    """A value of a config with the last part of each path in place of the path."""
    if isinstance(value, str):
        return value if "\n" in value else public(value)
    if isinstance(value, list):
        return [_public(each) for each in value]
    if isinstance(value, dict):
        return {name: _public(each) for name, each in value.items()}
    return value


def _without_places(config: Mapping[str, Any]) -> bytes:
    """A config of transformers or peft, in which `..._name_or_path` is the last part of a path."""
    kept = {n: _public(v) if n.endswith("name_or_path") else v for n, v in config.items()}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload the model of a finished run as one commit; returns its address.

    Raises `RunFault` for whatever the hub or the network refuses; the folder stays as it is.
    """
    if not (folder / CARD).exists() or not (folder / "config.yaml").exists():
        raise ConfigFault(
            f"{folder}: is not the folder of a finished run (README.md and config.yaml are missing)"
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    files = uploads(folder)
    operations = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in files.items()]
    try:
        hub = HfApi()
        hub.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        done = hub.create_commit(
            repo, operations, commit_message=f"{folder.resolve().name}: trained with priority_dsl"
        )
    except Exception as error:  # the hub, the network and the login each raise their own
        raise RunFault(
            f"push to {repo}: {type(error).__name__}: {first_line(error)}; the model in {folder} is whole: "
            f"`priority push {folder} {repo}` tries again"
        ) from error
    return str(done.commit_url)
