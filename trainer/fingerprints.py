"""What a frozen statistic depends on, as digests: the model's weights and config, tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import CONFIG, base_of, is_adapter
from trainer.faults import ModelFault, first_line

# What a config says of how it was made and how it is loaded, not of what the model computes.
INCIDENTAL = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}


def folder_fingerprint(folder: Path) -> str:
    """The digest of a model folder: the contents of its weight files, its config, of an adapter its base.

    Raises `ModelFault` where they cannot be read.
    """
    whole = hashlib.sha256()
    try:
        adapter = is_adapter(str(folder))
        config = json.loads((folder / (CONFIG if adapter else "config.json")).read_text(encoding="utf-8"))
        if adapter:  # the same file on another base is another model
            base = base_of(str(folder), "the adapter")
            config["base_model_name_or_path"] = (
                folder_fingerprint(Path(base)) if Path(base).is_dir() else base
            )
        whole.update(_config(config))
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                whole.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    except (OSError, ValueError) as error:
        raise ModelFault(f"{folder}: the model cannot be read: {first_line(error)}") from error
    return whole.hexdigest()[:32]


def memory_fingerprint(model: Any) -> str:
    """The digest of a model in memory: its parameters and buffers by name, and its config."""
    whole = hashlib.sha256(_config(model.config.to_dict()))
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return whole.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The digest of a fast tokenizer: vocabulary, merges, normaliser, special tokens."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {name: part for name, part in whole.items() if name not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([state, special])


def template_fingerprint(tokenizer: Any) -> str:
    """The digest of the chat template in force."""
    return _digest(tokenizer.chat_template)


def _config(config: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in config.items() if name not in INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
