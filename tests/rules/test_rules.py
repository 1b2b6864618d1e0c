"""Each library rule, compiled, against its twin: weights, loss, denominator, gradient; and its regime."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from priority_dsl import PriorityError, compile_rule, format_rule, list_rules
from tests.rules.by_hand import Result
from tests.rules.draws import Draw, draw
from tests.rules.pairs import PAIRS
from tests.rules.twins import OVER_DATASET, TWINS, by_twin, gained_most

FOLDER = Path(__file__).parents[2] / "rules"
NAMES = sorted(path.stem for path in FOLDER.glob("*.rule") if path.stem not in PAIRS)
SEEDS = range(6)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# Settings beside the defaults, ends of the ranges among them.
SETTINGS: dict[str, list[dict[str, float]]] = {
    "profit": [{"tau": 0}, {"tau": 0.03}, {"tau": 1}],
    "talr_fixed": [{"tau": 0.3, "w_min": 0.2}, {"tau": 7, "w_min": 0}, {"w_min": 1}],
    "talr_fixed_ref": [{"tau": 0.3, "w_min": 0.2}, {"tau": 7, "w_min": 0}],
    "eaft": [{"k": 2}, {"k": 5, "alpha": 2}, {"k": 500, "alpha": 0.5}, {"alpha": 0}],
    "eaft_ref": [{"k": 2}, {"k": 5, "alpha": 2}, {"k": 500, "alpha": 0.5}, {"alpha": 0}],
    "eaft_llamafactory": [{"alpha": 0.5}, {"alpha": 2}, {"alpha": 0}],
    "eaft_axolotl": [{"alpha": 0.5}, {"alpha": 2}, {"alpha": 0}],
    "asft": [{"beta": 0}, {"beta": 2.5}],
    "asft_table": [{"delta": 0.001}, {"delta": 1}],
    "idft_release": [
        {"warm": 0, "trans": 0},
        {"warm": 0, "trans": 1, "beta": 0.3},
        {"warm": 0.5, "trans": 0, "beta": 4},
        {"warm": 1, "trans": 0},
    ],
    "prift_mass": [{"tau": 0}, {"tau": 0.9}, {"tau": 1}],
    "sftkey": [{"s": 0}, {"s": 1}],
    "prift_mass_release": [{"tau": 0}, {"tau": 0.2}, {"tau": 0.9}],
    "kd_decomposed": [{"beta": 0}, {"beta": 0.2}, {"beta": 1}],
    "wit": [{"w_prompt": 0}, {"w_response": 0, "w_prompt": 1}, {"w_response": 0.5, "w_prompt": 0.25}],
    "sstoken": [{"gamma": 0}, {"gamma": 1}, {"rho": 0.07}, {"gamma": 0.2, "rho": 1}],
    "sstoken_table": [{"rho": 0.01}, {"rho": 0.3}, {"rho": 1}],
    "prift_ema": [{"rho": 0}, {"rho": 1}],
    "gem": [{"beta": 0.05}, {"beta": 1}],
    "selectkd": [{"b": 0}, {"b": 1}, {"k": 1, "b": 0.3}, {"k": 100}],
    "ignorance": [{"beta": 0}, {"beta": 3}],
    "high_pass": [{"epsilon": 1e-6}, {"epsilon": 2.5}],
    "robustft_table": [{"gamma": 0}, {"gamma": 3}],
    "opencoder_table": [{"tau": 0}, {"tau": 0.9}, {"tau": 1}],
    "talr": [{"w_min": 0}, {"w_min": 0.3}, {"w_min": 1}],
    "talr_ref": [{"w_min": 0}, {"w_min": 0.3}],
    **{
        f"{end}_{of}{model}": [{"share": 0.001}, {"share": 0.3}, {"share": 1}]
        for end in ("top", "bottom")
        for of in ("p", "entropy")
        for model in ("", "_ref")
    },
    "rho1": [{"share": 0.001}, {"share": 0.25}, {"share": 1}],
    "token_cleaning": [{"share": 0.001}, {"share": 0.25}, {"share": 1}],
    "forgetting": [{"share": 0.2}, {"share": 1}, {"strength": 0}, {"share": 0.01, "strength": 2}],
    "entrodrop": [
        {"rate": 0},
        {"rate": 1, "share": 1, "middle": 0},
        {"share": 0.2, "rate": 0.9, "middle": 1, "slope": 0.5},
    ],
    "entrodrop_table": [{"lam": 0}, {"lam": 0.3}, {"lam": 50}],
    "srft": [{"factor": 0}, {"factor": 3}],
    "pear": [{"low": 0, "high": 0}, {"low": -1, "high": 2, "gamma": 1}, {"low": -9, "high": 9, "gamma": 0.1}],
    "critical_token_table": [{"delta": -0.25}, {"delta": 0.25}],
    "selectit_table": [{"tau": 0.5}, {"tau": 2}],
    "tshirt_table": [{"tau": 0.3, "k": 2}, {"tau": -9, "tau_chunk": 0.5, "k": 3}, {"k": 1}],
    "diq_table": [{"difficult": -1}, {"influential": 0.25}],
    "instruction_mining_table": [{"tau": 0.5}, {"tau": 2}],
}
CASES = [(name, settings) for name in NAMES for settings in ({}, *SETTINGS.get(name, []))]

# By hand from the formulas: values {0, 1} hard, none negative soft, some negative signed, one value uniform;
# intrinsic reads models, external columns or roles. Then the models beside `on`, and the columns.
HARD, SOFT, SIGNED, UNIFORM, LOSS = "hard", "soft", "signed", "uniform", "loss"
IN, OUT, NEITHER = {"intrinsic"}, {"external"}, set[str]()
EXPECTED: dict[str, tuple[str, set[str], set[str], set[str]]] = {
    "sft": (UNIFORM, NEITHER, set(), set()),
    "dft": (SOFT, IN, set(), set()),
    "dft_table": (SOFT, IN, set(), set()),
    "profit": (HARD, IN, set(), set()),
    "talr_fixed": (SOFT, IN, set(), set()),
    "eaft": (SOFT, IN, set(), set()),
    "eaft_llamafactory": (SOFT, IN, set(), set()),
    "eaft_axolotl": (SOFT, IN, set(), set()),
    "asft": (SOFT, IN, {"ref"}, set()),
    "asft_table": (HARD, IN, {"ref"}, set()),
    "idft": (SOFT, IN, set(), set()),
    "idft_release": (SOFT, IN, set(), set()),
    "prift_prob": (SOFT, IN, {"ref"}, set()),
    "prift_mass": (HARD, IN, {"ref"}, set()),
    "prift_mass_release": (HARD, IN, {"ref"}, set()),
    "eaft_ref": (SOFT, IN, {"ref"}, set()),
    "idft_ref": (SOFT, IN, {"ref"}, set()),
    "talr_fixed_ref": (SOFT, IN, {"ref"}, set()),
    "prift_cross": (SOFT, IN, {"other"}, set()),
    "kd_decomposed": (SOFT, IN, {"teacher"}, set()),
    "ranktuner": (SOFT, IN, set(), set()),
    "wit": (SOFT, OUT, set(), {"response"}),
    "rho1_table": (HARD, IN, {"ref"}, set()),
    "swift_table": (SOFT, IN, {"ref"}, set()),
    "selectkd_table": (SOFT, IN, {"teacher"}, set()),
    "srft_table": (SOFT, IN, {"rl"}, set()),
    "entropy_scaling": (SOFT, IN, set(), set()),
    "high_pass": (HARD, IN, set(), set()),
    "forgetting_table": (SIGNED, OUT, set(), {"label"}),
    "ignorance_table": (SIGNED, OUT, set(), {"made_up"}),
    "faithful_table": (HARD, OUT, set(), {"factual"}),
    "robustft_table": (SOFT, OUT, set(), {"noise"}),
    "atdp_table": (SOFT, OUT, set(), {"utility", "budget"}),
    "opencoder_table": (HARD, OUT, set(), {"passes", "score"}),
    "sftkey": (HARD, OUT, set(), {'span("<answer>(.*?)</answer>")'}),
    "sftkey_table": (HARD, OUT, set(), {"key_answer"}),
    "talr": (SOFT, IN, set(), set()),
    "talr_ref": (SOFT, IN, {"ref"}, set()),
    "top_p": (HARD, IN, set(), set()),
    "bottom_p": (HARD, IN, set(), set()),
    "top_entropy": (HARD, IN, set(), set()),
    "bottom_entropy": (HARD, IN, set(), set()),
    "top_p_ref": (HARD, IN, {"ref"}, set()),
    "bottom_p_ref": (HARD, IN, {"ref"}, set()),
    "top_entropy_ref": (HARD, IN, {"ref"}, set()),
    "bottom_entropy_ref": (HARD, IN, {"ref"}, set()),
    "rho1": (HARD, IN, {"curated"}, set()),
    "prift_ema": (SOFT, IN, {"slow"}, set()),
    "sstoken": (HARD, IN, {"ref"}, set()),
    "sstoken_table": (HARD, IN, {"ref"}, set()),
    "gem": (LOSS, IN, set(), set()),
    "selectkd": (SOFT, IN, {"teacher"}, set()),
    "ignorance": (LOSS, IN | OUT, {"ref"}, {"perturbed_text"}),
    "token_cleaning": (HARD, IN, {"ref", "warm"}, set()),
    "token_cleaning_table": (HARD, OUT, set(), {"memorised"}),
    "t3s": (HARD, IN, {"ref", "early"}, set()),
    "t3s_table": (HARD, OUT, set(), {"learned_early"}),
    "entrodrop": (HARD, IN, set(), set()),
    "entrodrop_table": (HARD, IN, set(), set()),  # the taxonomy lists it as soft
    "srft": (SOFT, IN, set(), set()),
    "pear": (SOFT, IN | OUT, set(), {"behaviour_logp"}),
    "forgetting": (SIGNED, IN, {"ref", "warm"}, set()),
    "critical_token_table": (HARD, OUT, set(), {"impact"}),
    "selectit": (HARD, OUT, set(), {"score"}),
    "selectit_table": (HARD, OUT, set(), {"score"}),
    "opencoder": (HARD, OUT, set(), {"passes", "score"}),
    "diq": (HARD, OUT, set(), {"difficulty", "influence"}),
    "diq_table": (HARD, OUT, set(), {"difficulty", "influence"}),
    "instruction_mining": (HARD, OUT, set(), {"predicted_loss"}),
    "instruction_mining_table": (HARD, OUT, set(), {"predicted_loss"}),
    "robustft": (HARD, OUT, set(), {"relabelled", "uncertainty"}),
    "tshirt": (HARD, IN, {"ref"}, set()),
    "tshirt_table": (HARD, IN, {"ref"}, set()),
}

# Rules whose weight is zero for a target that every model excludes: its infinite loss must not count at all.
ZERO_WHERE_IMPOSSIBLE: dict[str, dict[str, float]] = {
    name: {}
    for name in (
        *("dft", "profit", "asft", "idft", "idft_release", "prift_prob", "prift_mass", "prift_mass_release"),
        *("idft_ref", "prift_cross", "kd_decomposed", "ranktuner", "rho1_table", "selectkd_table"),
        *("top_p", "top_p_ref"),
    )
} | {
    "talr_fixed": {"w_min": 0},
    "talr_fixed_ref": {"w_min": 0, "tau": 3},
    "talr": {"w_min": 0},
    "talr_ref": {"w_min": 0},
}


@cache
def compiled(name: str, settings: tuple[tuple[str, float], ...] = ()) -> Any:
    return compile_rule(name, **dict(settings))


def by_hand(name: str, rule: Any, logits: Tensor, given: Draw) -> Result:
    moment = {"rows": given.rows, "progress": given.progress, "seed": given.seed, "epoch": given.epoch}
    return by_twin(name, logits, given.targets, given.models, given.columns, rule.params, moment)


def stored(name: str, rule: Any, given: Draw) -> dict[str, Tensor]:
    """The columns over the data set, which one call cannot know, by hand; the draw is the whole data set."""
    if "attention(on, prompt)" in rule.requires.statistics:
        return {"attention(on, prompt)": given.columns["attention"].to(given.logits.dtype)}
    if name not in OVER_DATASET:
        return {}
    down = OVER_DATASET[name]
    chosen = gained_most(given.targets, given.models, given.rows, rule.params["share"], down)
    names = [column.name for column in rule.plan.stored]
    assert any("dataset" in column for column in names)
    return {column: ~chosen if column.startswith("not ") else chosen for column in names}


def arguments(name: str, rule: Any, given: Draw) -> dict[str, Any]:
    """What a call needs beside logits and targets."""
    return {
        "models": given.models,
        "columns": given.columns,
        "examples": given.examples,
        "stored": stored(name, rule, given),
        "progress": given.progress,
        "epoch": given.epoch,
        "seed": given.seed,
    }


def assert_equals_twin(name: str, settings: dict[str, float], given: Draw) -> None:
    """Weights, total, mean, denominator and the gradient of the total, compiled and by hand."""
    rule = compiled(name, tuple(settings.items()))
    logits, twin_logits = given.leaf(), given.leaf()
    out = rule.loss(logits, given.targets, **arguments(name, rule, given))
    weights, loss, denominator = by_hand(name, rule, twin_logits, given)
    total = loss.sum()
    out.total.backward()
    total.backward()

    tolerance = TOLERANCE[given.logits.dtype]

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            torch.as_tensor(actual).detach().double(),
            expected.detach().double(),
            rtol=tolerance,
            atol=tolerance,
        )

    assert out.weights.dtype == given.logits.dtype
    close(out.weights, weights)
    close(out.total, total)
    assert float(out.denominator) == denominator
    close(out.mean, total / denominator if denominator else torch.zeros(()))
    assert logits.grad is not None
    assert twin_logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    close(logits.grad, twin_logits.grad)


def test_every_rule_file_has_a_twin_and_a_hand_derived_regime() -> None:
    assert set(NAMES) == set(TWINS) == set(EXPECTED)
    assert set(NAMES) <= {str(name) for name in list_rules()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{s}" if s else n for n, s in CASES])
def test_equals_twin(name: str, settings: dict[str, float], dtype: torch.dtype) -> None:
    for seed in SEEDS:
        assert_equals_twin(name, settings, draw(seed, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_weights_alone_are_those_of_the_loss(name: str) -> None:
    given, rule = draw(1), compiled(name)
    weights = rule.weights(given.logits, given.targets, **arguments(name, rule, given))
    torch.testing.assert_close(weights, by_hand(name, rule, given.logits, given)[0], rtol=1e-10, atol=1e-10)
    assert not weights.requires_grad


@pytest.mark.parametrize(("name", "settings"), ZERO_WHERE_IMPOSSIBLE.items())
def test_an_impossible_target_without_weight_adds_nothing(name: str, settings: dict[str, float]) -> None:
    for seed in SEEDS:
        given = draw(seed, impossible_target=True)
        assert torch.isinf(given.logits[2, 3, given.targets[2, 3]])
        assert_equals_twin(name, settings, given)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(name: str) -> None:
    given = draw(0)
    logits = given.leaf()
    nothing = torch.full_like(given.targets, -100)
    rule = compiled(name)
    out = rule.loss(logits, nothing, **arguments(name, rule, replace(given, targets=nothing)))
    out.mean.backward()
    assert out.mean.item() == out.total.item() == 0.0
    assert not out.weights.any()
    assert logits.grad is None or not logits.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_regime_is_the_one_derived_by_hand(name: str) -> None:
    kind, signals, _, _ = EXPECTED[name]
    regime = str(compiled(name).regime)
    assert {word for word in (HARD, SOFT, SIGNED, UNIFORM, "loss") if word in regime} == {kind}, regime
    words = {"intrinsic", "external"} if "both" in regime else set(regime.strip(")").split("(")[1:])
    assert words == signals, regime


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_its_formula_names(name: str) -> None:
    _, _, models, columns = EXPECTED[name]
    rule = compiled(name)
    assert set(rule.requires.models) - {"on"} == models
    assert set(rule.requires.columns) == columns
    assert rule.over == ("all" if name == "wit" else "response")


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_in_the_derived_range(name: str) -> None:
    rule = compiled(name)
    for seed in SEEDS:
        given = draw(seed)
        weights = by_hand(name, rule, given.logits, given)[0][given.targets != -100]
        outside = [w for w in weights.tolist() if not rule.range.covers(w)]
        assert not outside, f"{outside} not in {rule.range}"


@pytest.mark.parametrize("name", NAMES)
def test_file_explains_itself(name: str) -> None:
    text = (FOLDER / f"{name}.rule").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert '\ncite "' in text
    assert format_rule(text) == text, "not in the canonical form: run `priority fmt`"


def test_defaults_are_those_that_the_sources_print() -> None:
    printed = {
        "profit": {"tau": 0.1},
        "talr_fixed": {"w_min": 0.01},
        "talr_fixed_ref": {"w_min": 0.01},
        "eaft": {"k": 20},
        "eaft_ref": {"k": 20},
        "asft": {"beta": 0.05},
        "prift_mass": {"tau": 0.5},
        "prift_mass_release": {"tau": 0.5},
        "talr": {"w_min": 0.01},
        "talr_ref": {"w_min": 0.01},
        **{f"{end}_{of}": {"share": 0.5} for end in ("top", "bottom") for of in ("p", "entropy")},
        "rho1": {"share": 0.6},
        "token_cleaning": {"share": 0.6},
        "forgetting": {"share": 0.7, "strength": 0.25},
        "srft": {"factor": 0.5},
        "pear": {"low": -0.08, "high": 0.3, "gamma": 0.999},
        "selectit": {"share": 0.2},
    }
    for name, values in printed.items():
        assert {key: compiled(name).params[key] for key in values} == values, name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("profit", {"tau": 1.5}),
        ("talr_fixed", {"tau": 0}),
        ("eaft", {"k": 1}),
        ("asft", {"beta": -1}),
        ("asft_table", {"delta": 0}),
        ("idft_release", {"warm": 1.1}),
        ("prift_mass", {"tau": -0.1}),
        ("kd_decomposed", {"beta": 2}),
        ("wit", {"w_prompt": -0.5}),
        ("opencoder_table", {"tau": 1.5}),
        ("talr", {"w_min": 1.5}),
        ("top_p", {"share": 0}),
        ("rho1", {"share": 1.2}),
        ("entrodrop", {"rate": 2}),
        ("entrodrop_table", {"lam": -1}),
        ("pear", {"gamma": 0}),
        ("forgetting", {"strength": -1}),
    ],
)
def test_a_parameter_outside_its_range_is_refused(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(PriorityError, match=next(iter(settings))):
        compile_rule(name, **settings)
