"""Models and tokenizers load, or say which folder is wrong and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.faults import ConfigFault, ModelFault
from trainer.models import check_bindings, load_frozen, load_model

Maker = Callable[..., str]


def test_a_frozen_model_is_in_eval_mode_without_gradients(model: str, other_model: str, tokenizer: Any):
    loaded = load_frozen({"ref", "good"}, model, {"good": other_model}, tokenizer)
    assert set(loaded) == {"ref", "good"}
    for frozen in loaded.values():
        assert not frozen.training
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not torch.equal(loaded["ref"].lm_head.weight, loaded["good"].lm_head.weight)


def test_no_model_is_loaded_that_no_rule_reads(model: str, tokenizer: Any):
    assert load_frozen(set(), model, {}, tokenizer) == {}


BINDINGS = {
    "unbound": ({"good"}, {}, "the rule reads the model `good`: bind it with --bind good=FOLDER"),
    "unread": (
        {"ref"},
        {"good": "g"},
        r"--bind good=g: the rule does not read a model `good` \(it reads: ref\)",
    ),
    "online": (set(), {"on": "g"}, "`on` is the model being trained, which --model names"),
}


@pytest.mark.parametrize("case", BINDINGS)
def test_bindings_and_rule_must_agree(case: str):
    read, bind, message = BINDINGS[case]
    with pytest.raises(ConfigFault, match=message):
        check_bindings(read, bind)


def test_ref_needs_no_binding():
    check_bindings({"ref"}, {})


def _copy(model: str, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def _corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def _resize(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 32}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "does not load"),
    "cut weights": (lambda f: _corrupt(f / "model.safetensors"), "does not load"),
    "cut config": (lambda f: _corrupt(f / "config.json"), "does not load"),
    "a tensor is missing": (
        lambda f: _drop_tensor(f / "model.safetensors"),
        "lacking model.layers.1.mlp.up_proj",
    ),
    "another shape": (lambda f: _resize(f / "config.json"), "do(es)? not (load|fit)"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_model_folder_is_named(case: str, model: str, tmp_path: Path):
    folder = _copy(model, tmp_path)
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(ModelFault, match=message) as caught:
        load_model(str(folder))
    assert f"--model {folder}" in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such", "tests/no_such"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFault, match=f"^--model {name}: no such folder"):
        load_model(name)


def test_a_frozen_model_with_another_tokenizer_is_refused(
    model: str, tokenizer: Any, make_folder: Maker, tmp_path: Path
):
    make_folder(tmp_path, seed=2, text="zebras zigzag " * 50)
    with pytest.raises(
        ModelFault, match=r"--bind ref=.*: its tokenizer differs from the trained model's in \d+"
    ):
        load_frozen({"ref"}, model, {"ref": str(tmp_path)}, tokenizer)


def test_a_frozen_model_without_a_tokenizer_is_taken(
    model: str, tokenizer: Any, make_folder: Maker, tmp_path: Path
):
    make_folder(tmp_path, seed=2, text="")
    assert load_frozen({"ref"}, model, {"ref": str(tmp_path)}, tokenizer)
