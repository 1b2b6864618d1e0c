"""`priority merge`: an adapter folder and its base as one model folder, which needs neither."""

from __future__ import annotations

from pathlib import Path

from trainer.adapters import base_of, is_adapter, put_on
from trainer.faults import ConfigFault, first_line
from trainer.models import load_model, load_tokenizer, quieten


def merge(model: str, output: str) -> None:
    """Add an adapter to the weights of its base, in float32, and write the model with the tokenizer.

    Raises `ConfigFault` for a folder that is no adapter and an output that is there already.
    """
    quieten()
    target = Path(output)
    if not is_adapter(model):
        raise ConfigFault(f"--model {model}: is no adapter folder (adapter_config.json without config.json)")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigFault(f"--output {output}: is not empty")
    base = base_of(model, "--model")
    adapter = put_on(load_model(base, f"--model {model}, base model"), model, "--model")
    tokenizer = load_tokenizer(model)
    whole = adapter.handle.merge_and_unload()
    try:
        whole.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except OSError as error:
        raise ConfigFault(f"--output {output}: cannot be written: {first_line(error)}") from error
