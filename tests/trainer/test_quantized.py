"""`--quantize`: the base in 4 or 8 bits under an adapter, by bitsandbytes; what is missing is said."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.adapters import Base
from trainer.cli import main
from trainer.config import EvalConfig, TrainConfig
from trainer.evaluate import evaluate
from trainer.faults import ConfigFault
from trainer.models import Quantize, load_model
from trainer.train import Outcome, train

pytest.importorskip("peft")
Run = Callable[..., Outcome]
NF4 = Quantize("4bit", bf16=False)


@pytest.fixture
def run(make_folder: Callable[..., str], sums: str, tmp_path: Path) -> Run:
    wide = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # a block of 4-bit scales
    model = make_folder(tmp_path / "wide", seed=4, **wide)

    def go(name: str, **options: Any) -> Outcome:
        settings = {"max_steps": 4, "learning_rate": 1e-2, "quiet": True, "device": "cpu", "batch_size": 8}
        paths = {"model": model, "data": sums, "output": str(tmp_path / name), "cache": str(tmp_path / "c")}
        return train(TrainConfig(**{**paths, **settings, "rule": "weight = mass(ref)", "lora": 4, **options}))

    return go


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]


def test_without_bitsandbytes_it_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    for bits in ("4bit", "8bit"):
        with pytest.raises(
            ConfigFault, match=rf"--quantize {bits} needs bitsandbytes: pip install 'priority_dsl\[qlora\]'"
        ):
            run("run", quantize=bits)
    assert main(["eval", "--model", str(tmp_path / "wide"), "--data", str(tmp_path / "sums.jsonl"),
                 "--quantize", "4bit"]) == 2  # fmt: skip
    assert "needs bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_asked_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    """Up to the call, where bitsandbytes is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    four, eight = NF4.settings(), Quantize("8bit", bf16=True).settings()
    asked = four["quantization_config"]
    assert (asked.load_in_4bit, asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert asked.bnb_4bit_compute_dtype == torch.float32
    assert (
        Quantize("4bit", bf16=True).settings()["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    )
    assert eight["quantization_config"].load_in_8bit
    assert set(four) == {"quantization_config", "device_map"}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_over_few_bits(bits: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The reference is the quantised base bit for bit; its statistics are not those of the whole weights."""
    pytest.importorskip("bitsandbytes")
    held = load_model(str(tmp_path / "wide"), quantize=Quantize(bits, bf16=False)).eval()
    kinds = {type(part).__name__ for part in held.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    seen, says = [], Base.says

    def checked(self: Base, batch: Any, epoch: int) -> Any:
        said, inside = says(self, batch, epoch)
        hidden, head = said["ref"]
        with torch.no_grad():
            seen.append(torch.equal(head.logits(hidden), head.logits(held.base_model(batch.input_ids)[0])))
        return said, inside

    monkeypatch.setattr(Base, "says", checked)
    run("online", quantize=bits, rule="loss = nll_on + kl(ref, on)", save_steps=2)
    assert len(seen) >= 4
    assert all(seen)
    whole = run("whole")
    stored = run("stored", quantize=bits, model=str(tmp_path / "wide"))
    assert len(list((tmp_path / "c" / "statistics").iterdir())) == 2, "each precision has a place of its own"
    assert lines(stored)[0]["weight_mean"] != lines(whole)[0]["weight_mean"]
    settings: dict[str, Any] = {"data": str(tmp_path / "sums.jsonl"), "device": "cpu", "quiet": True}
    own = evaluate(EvalConfig(model=str(stored.output), quantize=bits, **settings))
    assert own["nll"] == pytest.approx(
        evaluate(EvalConfig(model=str(stored.output), **settings))["nll"], rel=0.2
    )
    run("online", quantize=bits, rule="loss = nll_on + kl(ref, on)", save_steps=2, max_steps=6, resume=True)
