"""What would silently bypass a rule is refused, with a way out; a library that is missing is named."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from priority_dsl import compile_rule
from priority_dsl.integrations import (
    IntegrationError,
    PrioritySFTTrainer,
    PriorityTrainer,
    use_rule,
    versions,
)
from tests.integrations.conftest import settings

Fresh = Callable[[], Any]
ROOT = Path(__file__).parents[2]


def made(fresh: Fresh, data: Dataset, folder: Path, rule: str = "dft", **others: Any) -> PriorityTrainer:
    models = others.pop("models", None)
    extra = {k: others.pop(k) for k in ("compute_loss_func", "compute_metrics") if k in others}
    arguments = TrainingArguments(**settings(folder, **others))
    return PriorityTrainer(
        fresh(), arguments, train_dataset=data, rule=compile_rule(rule), models=models, **extra
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dpo", "about pairs"),
        ("weight = p(unprompted(ref))", "a forward pass of its own"),
        ("model slow = ema(0.9); weight = p_slow", "moving average"),
    ],
)
def test_rules(rule: str, message: str, fresh: Fresh, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match=message):
        made(fresh, data, tmp_path, rule)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ({"compute_metrics": lambda _: {}}, "compute_metrics"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
    ids=["loss", "metrics", "smoothing"],
)
def test_settings_of_trainer(
    setting: dict[str, Any], message: str, fresh: Fresh, data: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(IntegrationError, match=message):
        made(fresh, data, tmp_path, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"completion_only_loss": False}, "completion_only_loss=False"),
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 32}, "wrapped"),
    ],
    ids=["loss", "prompts", "wrapped"],
)
def test_settings_of_sft(
    setting: dict[str, Any], message: str, fresh: Fresh, data: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(IntegrationError, match=message):
        PrioritySFTTrainer(
            fresh(),
            SFTConfig(**settings(tmp_path, **setting)),
            train_dataset=data.select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            rule=compile_rule("dft"),
        )


@pytest.mark.parametrize(
    ("name", "value", "message"), [("_n_gpu", 2, "torchrun"), ("use_liger_kernel", True, "use_liger_kernel")]
)
def test_settings_that_need_what_is_not_here(
    name: str, value: Any, message: str, fresh: Fresh, data: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(fresh(), TrainingArguments(**settings(tmp_path)), train_dataset=data)
    setattr(trainer.args, name, value)
    with pytest.raises(IntegrationError, match=message):
        use_rule(trainer, compile_rule("dft"))


def test_a_trainer_with_a_loss_of_its_own(fresh: Fresh, data: Dataset, tmp_path: Path) -> None:
    class Theirs(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    trainer = Theirs(fresh(), TrainingArguments(**settings(tmp_path)), train_dataset=data)
    with pytest.raises(IntegrationError, match="a `compute_loss` of its own"):
        use_rule(trainer, compile_rule("dft"))
    plain = Trainer(fresh(), TrainingArguments(**settings(tmp_path)), train_dataset=data)
    use_rule(plain, compile_rule("dft"))
    with pytest.raises(IntegrationError, match="has a rule already"):
        use_rule(plain, compile_rule("1"))


def test_models(fresh: Fresh, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match=r'models=\{"ref": model\}, or call with_stored'):
        made(fresh, data, tmp_path, "prift_mass")
    with pytest.raises(IntegrationError, match=r'models=\{"ref": model\}$'):
        made(fresh, data, tmp_path, "asft")
    model = fresh()
    with pytest.raises(IntegrationError, match="is the model that is trained"):
        PriorityTrainer(
            model,
            TrainingArguments(**settings(tmp_path)),
            train_dataset=data,
            rule=compile_rule("asft"),
            models={"ref": model},
        )


def test_full_logits_are_asked_for(fresh: Fresh, data: Dataset, tmp_path: Path) -> None:
    def whole() -> Any:
        model = fresh()
        head = model.lm_head

        class Custom(type(head)):  # an output layer that is no plain linear layer
            pass

        model.lm_head.__class__ = Custom
        return model

    with pytest.raises(IntegrationError, match="full_logits=True"):
        made(whole, data, tmp_path)
    arguments = {"train_dataset": data, "eval_dataset": data, "rule": compile_rule("dft")}
    losses = []
    for model, allowed in ((whole(), True), (fresh(), False)):
        trainer = PriorityTrainer(
            model, TrainingArguments(**settings(tmp_path, 2, max_steps=2)), full_logits=allowed, **arguments
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses.append([trainer.state.log_history[0]["loss"], metrics["eval_loss"], metrics["eval_accuracy"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_versions_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    for name, (low, high) in versions.SUPPORTED.items():
        assert f"{name}>={low},<{high}" in lines
        versions.require(name)
    for found in ("4.57.6", "6.0.0", "6.0.0.dev0", "4.99rc1"):
        monkeypatch.setattr(versions, "version", lambda _, found=found: found)
        with pytest.raises(ImportError, match=f"transformers {found} is not supported"):
            versions.require("transformers")
    for found in ("5.0.0", "5.0.0rc1", "5.23.0+local"):
        monkeypatch.setattr(versions, "version", lambda _, found=found: found)
        versions.require("transformers")


BLOCKED = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import importlib.metadata as metadata
known = metadata.version
def version(name):
    if name in {blocked}:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
import priority_dsl.integrations as integrations
loaded = set(sys.modules) - {blocked}
assert not loaded & {{"transformers", "trl", "peft", "datasets", "torch"}}
{then}
"""
NAMED = """
try:
    integrations.{name}
except ImportError as error:
    assert "{library}>=" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("blocked", "then"),
    [
        ("{'transformers', 'trl', 'peft', 'datasets', 'accelerate'}", "integrations.with_stored"),
        ("{'trl', 'peft'}", "integrations.PriorityTrainer"),
        ("{'trl', 'peft'}", NAMED.format(name="PrioritySFTTrainer", library="trl")),
        ("{'transformers'}", NAMED.format(name="PriorityTrainer", library="transformers")),
    ],
    ids=["none", "without trl", "no trl", "no transformers"],
)  # fmt: skip
def test_a_missing_library_is_named_when_it_is_asked_for(blocked: str, then: str) -> None:
    code = BLOCKED.format(blocked=blocked, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
