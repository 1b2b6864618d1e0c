"""`model slow = ema(R)`: the average by hand, its limits, and a run that is killed and resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainer.train
from priority_dsl import compile_rule
from trainer.columns import ColumnReader
from trainer.config import RowConfig, TrainConfig
from trainer.data import Reader
from trainer.faults import RunFault
from trainer.models import load_model
from trainer.moving import Moving
from trainer.train import Outcome, train

EMA = "param rho = 0.9 in [0, 1]; model slow = ema(rho); weight = p(slow)"
Run = Callable[..., Outcome]


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    def go(name: str, rule: str = EMA, **options: Any) -> Outcome:
        paths = {"model": model, "data": sums, "output": str(tmp_path / name), "cache": str(tmp_path / "c")}
        settings = {"max_steps": 5, "learning_rate": 1e-2, "quiet": True, "device": "cpu", "batch_size": 24}
        return train(TrainConfig(**{**paths, **settings, "rule": rule, **options}))

    return go


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def weights(outcome: Outcome) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(outcome.output)
    return torch.cat([p.detach().flatten() for p in loaded.parameters()])


def average(outcome: Outcome, step: int) -> dict[str, Tensor]:
    return load_file(outcome.output / "checkpoints" / f"step-{step}" / "average-slow.weights")


def test_five_steps_by_hand(run: Run, model: str, sums: str, tokenizer: Any):
    """Losses, weights and the average, from single rows, torch's AdamW and one line for the average."""
    plain: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "clip": 0.0}
    outcome = run("run", set={"rho": 0.7}, save_steps=5, **plain)
    config = RowConfig(model=model, data=(sums,))
    rows = Reader(config, tokenizer, 320, 64, ColumnReader({})).read([sums]).rows
    on, slow = load_model(model), load_model(model)
    optimizer = torch.optim.AdamW(on.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(5):
        total, tokens = torch.zeros(()), 0
        for row in rows:
            ids = torch.tensor([row.ids])
            at = torch.tensor([i for i, mark in enumerate(row.response) if mark])
            fast, held = (m(ids).logits[0].log_softmax(-1)[at - 1, ids[0, at]] for m in (on, slow))
            total, tokens = total - (held.exp().detach() * fast).sum(), tokens + len(at)
        (total / tokens).backward()
        losses.append(float(total / tokens))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for moved, value in zip(slow.parameters(), on.parameters(), strict=True):
                moved.copy_(0.7 * moved + 0.3 * value)
    assert [line["loss"] for line in lines(outcome)] == pytest.approx(losses, rel=1e-3)
    saved, expected = average(outcome, 5), dict(slow.named_parameters())
    assert set(saved) == set(expected)
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rho", "limit"), [(0.0, "dft"), (1.0, "prift_prob")])
@pytest.mark.parametrize("layout", [{}, {"batch_size": 5, "accumulation": 2}, {"loss": "dense"}], ids=str)
def test_the_limits_are_dft_and_prift_prob(rho: float, limit: str, layout: dict[str, Any], run: Run):
    averaged, other = run("ema", set={"rho": rho}, **layout), run("limit", limit, **layout)
    for one, two in zip(lines(averaged), lines(other), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-7)
    torch.testing.assert_close(weights(averaged), weights(other), rtol=1e-3, atol=1e-5)


def test_in_between_it_is_neither(run: Run):
    found = [lines(run(f"rho {rho}", set={"rho": rho}))[-1]["loss"] for rho in (0.0, 0.5, 0.9, 1.0)]
    assert len(set(found)) == 4


def test_rho_0_is_the_model_bit_for_bit(run: Run):
    outcome = run("run", set={"rho": 0.0}, save_steps=5)
    saved = load_file(outcome.output / "checkpoints" / "step-5" / "model.safetensors")
    for name, value in average(outcome, 5).items():
        assert torch.equal(value, saved[name])


def test_a_killed_run_that_is_resumed_is_the_same_bit_for_bit(run: Run, monkeypatch: pytest.MonkeyPatch):
    straight = run("straight", save_steps=2, max_steps=6)
    update = trainer.train.update

    def killed(of: Any, step: int) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return update(of, step)

    monkeypatch.setattr(trainer.train, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken", save_steps=2, max_steps=6)
    monkeypatch.undo()
    resumed = run("broken", save_steps=2, max_steps=6, resume=True)
    assert lines(resumed) == lines(straight)
    assert torch.equal(weights(resumed), weights(straight))
    for name, value in average(resumed, 6).items():
        assert torch.equal(value, average(straight, 6)[name])


def test_a_checkpoint_without_its_average_is_damaged(run: Run):
    outcome = run("run", save_steps=2, max_steps=2)
    (outcome.output / "checkpoints" / "step-2" / "average-slow.weights").write_bytes(b"no")
    with pytest.raises(
        RunFault, match=r"step-2: the checkpoint is damaged \(average-slow.weights is not what was written\)"
    ):
        run("run", save_steps=2, max_steps=4, resume=True)


def test_an_average_is_no_weight_file_of_the_model(run: Run):
    """The checkpoint still loads as a model, with the trained weights."""
    outcome = run("run", save_steps=5)
    loaded = AutoModelForCausalLM.from_pretrained(outcome.output / "checkpoints" / "step-5")
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), weights(outcome))


def test_what_is_not_trained_is_shared(model: str):
    on = load_model(model)
    on.get_input_embeddings().requires_grad_(False)
    moving = Moving(on, {"slow": 0.5}, apart=True, bf16=False)
    slow = moving.models["slow"].model
    assert slow.get_input_embeddings().weight is on.get_input_embeddings().weight
    assert not any(p.requires_grad for p in slow.parameters())
    assert not slow.training
    before = copy.deepcopy(on.state_dict())
    with torch.no_grad():
        for parameter in on.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    moving.update()
    for name, value in slow.state_dict().items():
        own = 0.0 if "embed_tokens" in name else 0.5
        torch.testing.assert_close(value, before[name] + own)


def test_several_averages_and_views_of_them(run: Run):
    rule = (
        "model slow = ema(0.9); model slower = ema(0.99); "
        "weight = p(slow) * p(slower) + p(unprompted(slow)) + attention(slow, prompt)"
    )
    assert compile_rule(rule).plan.kept == ("slow", "slower", "unprompted(slow)")
    outcome = run("run", rule, save_steps=5)
    one = {
        name: load_file(outcome.output / "checkpoints/step-5" / f"average-{name}.weights")
        for name in ("slow", "slower")
    }
    assert any(not torch.equal(one["slow"][k], one["slower"][k]) for k in one["slow"])
    online = run("spread", rule, batch_size=4, accumulation=6)
    assert lines(outcome)[-1]["loss"] == pytest.approx(lines(online)[-1]["loss"], rel=1e-3)


def test_a_half_precision_average_moves(run: Run):
    """Its head is read anew at every step: at rho 0 it stays the model."""
    averaged, dft = run("ema", set={"rho": 0.0}, dtype="bf16"), run("dft", "dft", dtype="bf16")
    for one, two in zip(lines(averaged), lines(dft), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)
