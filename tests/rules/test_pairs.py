"""Each library rule about pairs against its twin: losses, gradient, what it reads; identities; a run each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from priority_dsl import compile_rule, format_rule
from priority_dsl.rule import LossOutput
from tests.rules.pairs import PAIRS, Problem, draw
from tests.rules.test_train import tiny  # noqa: F401  (a fixture)
from trainer.cli import main

FOLDER = Path(__file__).parents[2] / "rules"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SETTINGS: dict[str, list[dict[str, float]]] = {
    "dpo": [{"beta": 2}],
    "tis_dpo": [{"mu": 0}, {"k": 2, "mu": 0.5, "low": -3, "high": 0.2}],
    "swift": [{"beta": 0.5, "k": 0.5}],
    "fdpo": [{"lam": 0}, {"beta": 1, "lam": 0.7}],
}
CASES = [(name, settings) for name in PAIRS for settings in ({}, *SETTINGS.get(name, []))]
READS = {
    "dpo": {"ref"},
    "factuality_preference": {"ref"},
    "fdpo": {"ref"},
    "tis_dpo": {"ref", "positive", "negative"},
    "cdpo": {"ref", "positive", "negative"},
    "critical_token": {"ref", "positive", "negative"},
    "swift": {"ref", "teacher"},
}


def compiled(name: str, given: Problem, **settings: float) -> tuple[LossOutput, Tensor]:
    """What the rule gives for the rows in another order, and the gradient in the first one."""
    order = torch.randperm(len(given.targets), generator=torch.Generator().manual_seed(1))
    leaf = given.logits.detach().clone().requires_grad_()
    out = compile_rule(name, **settings).loss(
        leaf[order],
        given.targets[order],
        models={model: logits[order] for model, logits in given.models.items()},
        columns={"chosen": order % 2 == 0, "h": given.h[order]},
        examples=(order // 2).unsqueeze(-1).expand(given.targets.shape),
    )
    (gradient,) = torch.autograd.grad(out.mean, leaf)
    return out, gradient


def test_every_rule_about_pairs_has_a_twin() -> None:
    about_pairs = (p.stem for p in FOLDER.glob("*.rule") if compile_rule(p.stem).checked.reads_pairs)
    assert set(about_pairs) == set(PAIRS) == set(READS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{s}" if s else n for n, s in CASES])
def test_equals_twin(name: str, settings: dict[str, float], dtype: torch.dtype) -> None:
    for seed in range(6):
        given = draw(seed, dtype)
        out, gradient = compiled(name, given, **settings)
        losses = PAIRS[name](given, **{**compile_rule(name).params, **settings})
        (wanted,) = torch.autograd.grad(losses.mean(), given.logits)
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(out.mean.detach().double(), losses.mean().detach(), **close)
        torch.testing.assert_close(out.total.detach().double(), losses.sum().detach(), **close)
        assert float(out.denominator) == len(losses)
        torch.testing.assert_close(gradient.double(), wanted.double(), **close)
        assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_derived_and_how_the_file_looks(name: str) -> None:
    rule = compile_rule(name)
    assert str(rule.regime) == "loss rule (both)"
    assert set(rule.requires.models) - {"on"} == READS[name]
    assert set(rule.requires.columns) == {"chosen", *(["h"] if name == "fdpo" else [])}
    assert rule.checked.normalize == "terms"
    assert rule.plan.kept == ()  # all that frozen models say is stored beforehand
    text = (FOLDER / f"{name}.rule").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert '\ncite "' in text
    assert format_rule(text) == text, "not in the canonical form: run `priority fmt`"


def same(one: tuple[LossOutput, Tensor], other: tuple[LossOutput, Tensor]) -> bool:
    return torch.allclose(one[0].mean, other[0].mean) and torch.allclose(one[1], other[1])


def test_identities() -> None:
    for seed in range(4):
        given = draw(seed)
        dpo = compiled("dpo", given)
        assert same(compiled("factuality_preference", given), dpo)
        assert same(compiled("tis_dpo", given, mu=0), dpo)
        assert same(compiled("tis_dpo", given, low=0, high=0), dpo)
        assert same(compiled("swift", given, mu=0), dpo)
        assert same(compiled("tis_dpo", given, mu=0, k=3), compiled("dpo", given, beta=0.3))
        alike = Problem(given.logits, given.targets, given.models, torch.zeros_like(given.h))
        assert same(compiled("fdpo", alike), dpo)
        worse = torch.tensor([False, True] * 3)
        assert same(compiled("fdpo", Problem(given.logits, given.targets, given.models, worse), lam=0), dpo)
        turned = Problem(given.logits, given.targets, given.models, ~worse)
        assert not same(compiled("fdpo", turned, lam=0), dpo)


@pytest.mark.parametrize("name", PAIRS)
def test_trains(name: str, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """A few steps of `priority train`; with all models alike, the first loss is that of no preference."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, no", "h_chosen": False}
        | {"h_rejected": False}
        for i in range(6)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--model", str(tiny), "--data", str(data), "--output", str(tmp_path / "run")]
    how = ["--rule", name, "--max-steps", "3", "--batch-size", "3", "--learning-rate", "0.01"]
    bound = [word for model in sorted(READS[name] - {"ref"}) for word in ("--bind", f"{model}={tiny}")]
    assert main(["train", *where, *how, *bound, "--device", "cpu", "--quiet"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in steps[:1]] == pytest.approx([0.693147], abs=1e-5)
    before, after = (AutoModelForCausalLM.from_pretrained(at).state_dict() for at in (tiny, tmp_path / "run"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
