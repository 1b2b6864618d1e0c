"""Equalities between library rules that hold by mathematics, and examples small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from priority_dsl import compile_rule
from tests.rules.draws import Draw, draw
from tests.rules.test_rules import arguments
from tests.rules.twins import KEEPS

SEEDS = range(6)
SHARES = [
    f"{end}_{of}{model}" for end in ("top", "bottom") for of in ("p", "entropy") for model in ("", "_ref")
]


def outcome(rule: Any, given: Draw) -> tuple[Tensor, Tensor, float, Tensor]:
    """Weights, total, denominator and gradient."""
    logits = given.leaf()
    out = rule.loss(logits, given.targets, **arguments(rule.name, rule, given))
    out.total.backward()
    assert logits.grad is not None
    return out.weights, out.total.detach(), float(out.denominator), logits.grad


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("talr_fixed", {"tau": 1, "w_min": 0}), ("dft", {})),
        (("talr_fixed", {"w_min": 1}), ("sft", {})),
        (("talr_fixed_ref", {"tau": 1, "w_min": 0}), ("prift_prob", {})),
        (("idft_release", {"warm": 1, "trans": 0}), ("dft", {})),
        (("prift_mass", {"tau": 0}), ("sft", {})),
        (("prift_mass_release", {"tau": 0}), ("sft", {})),
        (("profit", {"tau": 0}), ("sft", {})),
        (("asft", {"beta": 0}), ("dft", {})),
        (("eaft", {"alpha": 0}), ("sft", {})),
        (("eaft_axolotl", {"alpha": 0}), ("sft", {})),
        (("robustft_table", {"gamma": 0}), ("sft", {})),
        (("wit", {"w_prompt": 1, "w_response": 1}), ("sft", {})),
        (("talr", {"w_min": 1}), ("sft", {})),
        (("talr_ref", {"w_min": 1}), ("sft", {})),
        *(((name, {"share": 1}), ("sft", {})) for name in (*SHARES, "rho1", "token_cleaning")),
        (("entrodrop", {"rate": 0}), ("sft", {})),
        (("pear", {"low": 0, "high": 0, "gamma": 1}), ("sft", {})),
        *(((name, {}), ("sft", {})) for name in KEEPS),
    ],
    ids=lambda rule: f"{rule[0]}{rule[1] or ''}",
)
def test_is_another_rule(one: tuple[str, dict[str, float]], other: tuple[str, dict[str, float]]) -> None:
    (name, settings), (other_name, other_settings) = one, other
    for seed in SEEDS:
        given = draw(seed)
        for a, b in zip(
            outcome(compile_rule(name, **settings), given),
            outcome(compile_rule(other_name, **other_settings), given),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_distillation_without_the_rest_is_prift_with_that_teacher() -> None:
    for seed in SEEDS:
        given = draw(seed)
        given.models["other"] = given.models["teacher"]
        for a, b in zip(
            outcome(compile_rule("kd_decomposed", beta=0), given),
            outcome(compile_rule("prift_cross"), given),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_full_distillation_is_cross_entropy_to_the_teacher() -> None:
    for seed in SEEDS:
        given = draw(seed)
        _, total, count, gradient = outcome(compile_rule("kd_decomposed", beta=1), given)
        logits = given.leaf()
        supervised = given.targets != -100
        teacher = torch.softmax(given.models["teacher"][supervised], dim=-1)
        expected = torch.nn.functional.cross_entropy(
            logits[supervised].nan_to_num(neginf=-1e4), teacher, reduction="sum"
        )
        expected.backward()
        torch.testing.assert_close(total, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-10, atol=1e-10)
        assert count == supervised.sum()


def test_axolotl_trains_three_times_as_hard_as_llamafactory() -> None:
    for seed in SEEDS:
        given = draw(seed)
        axolotl, llamafactory = (
            outcome(compile_rule(f"eaft_{n}"), given) for n in ("axolotl", "llamafactory")
        )
        torch.testing.assert_close(axolotl[0], 3 * llamafactory[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(axolotl[1], 3 * llamafactory[1], rtol=1e-12, atol=0)
        assert axolotl[2] == llamafactory[2]
        torch.testing.assert_close(axolotl[3], 3 * llamafactory[3], rtol=1e-12, atol=1e-15)


def test_llamafactory_is_eaft_but_for_the_rounded_constant() -> None:
    given = draw(2)
    exact, rounded = (outcome(compile_rule(name), given)[0] for name in ("eaft", "eaft_llamafactory"))
    torch.testing.assert_close(exact * math.log(20) / 3, rounded, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("online", "frozen"),
    [
        ("dft", "prift_prob"),
        ("eaft", "eaft_ref"),
        ("idft", "idft_ref"),
        ("talr_fixed", "talr_fixed_ref"),
        ("dft", "asft"),
        ("talr", "talr_ref"),
        *((name, f"{name}_ref") for name in SHARES if not name.endswith("_ref")),
    ],
)
def test_starts_as_its_online_form(online: str, frozen: str) -> None:
    """At the first step `ref` is `on`: a rule that reads the frozen model trains as its online form does."""
    given = draw(4)
    given.models["ref"] = given.logits
    for a, b in zip(outcome(compile_rule(online), given), outcome(compile_rule(frozen), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_table_dft_is_the_complement_of_dft() -> None:
    given = draw(5)
    both = outcome(compile_rule("dft"), given)[0] + outcome(compile_rule("dft_table"), given)[0]
    torch.testing.assert_close(both, (given.targets != -100).double())


# Mass of the paper and of the released code -----------------------------------------------------


def mass_at_least(name: str, ref: list[float], tau: float, target: int = 0) -> bool:
    ref_logits = torch.tensor([[ref]], dtype=torch.float64).log()
    weights = compile_rule(name, tau=tau).weights(
        torch.zeros_like(ref_logits), torch.tensor([[target]]), models={"ref": ref_logits}
    )
    return bool(weights.item())


@pytest.mark.parametrize(
    ("ref", "paper", "release"),
    [
        pytest.param([0.1] * 10, 1.0, 0.1, id="uniform over ten"),
        pytest.param([0.499992] * 2 + [2e-6] * 8, 1.0, 0.500008, id="top tie of two"),
        pytest.param([1 / 3] * 3, 1.0, 1 / 3, id="top tie of three"),
        pytest.param([0.5, 0.3, 0.2], 1.0, 1.0, id="no tie"),
    ],
)
def test_mass_of_the_most_likely_token(ref: list[float], paper: float, release: float) -> None:
    """The mass itself, found as the largest threshold that still selects the token."""
    assert mass_at_least("prift_mass", ref, tau=paper)
    below, above = release - 1e-9, min(release + 1e-9, 1.0)
    assert mass_at_least("prift_mass_release", ref, tau=below)
    assert release == 1.0 or not mass_at_least("prift_mass_release", ref, tau=above)


def test_mass_keeps_or_drops_a_tie_at_the_top() -> None:
    """At PriFT's threshold the released code drops a top tie of three that the paper's definition keeps."""
    tie = [0.32, 0.32, 0.32, 0.04]
    assert mass_at_least("prift_mass", tie, tau=0.5)
    assert not mass_at_least("prift_mass_release", tie, tau=0.5)


def test_mass_of_a_token_between_others() -> None:
    ref = [0.5, 0.2, 0.2, 0.1]
    assert mass_at_least("prift_mass", ref, tau=0.49, target=1)  # 0.2 + 0.2 + 0.1
    assert not mass_at_least("prift_mass", ref, tau=0.51, target=1)
    assert mass_at_least("prift_mass_release", ref, tau=0.29, target=1)  # 0.2 + 0.1
    assert not mass_at_least("prift_mass_release", ref, tau=0.31, target=1)


# Traps: one case each where a plausible mistake shows ---------------------------------------------


def at_probability(p: float) -> tuple[Tensor, Tensor]:
    """Logits over two tokens that give the target, token 0, the probability p."""
    return torch.tensor([[[p, 1 - p]]], dtype=torch.float64).log(), torch.tensor([[0]])


def test_dft_divides_by_tokens_and_not_by_weights() -> None:
    logits, targets = at_probability(0.25)
    out = compile_rule("dft").loss(logits, targets)
    assert out.mean.item() == pytest.approx(0.25 * math.log(4))


def test_profit_divides_by_all_supervised_tokens() -> None:
    low, high = at_probability(0.05)[0], at_probability(0.5)[0]
    out = compile_rule("profit").loss(torch.cat([low, high], dim=1), torch.tensor([[0, 0]]))
    assert float(out.denominator) == 2
    assert out.mean.item() == pytest.approx(math.log(2) / 2)


def test_table_rho1_leaves_out_what_has_not_changed() -> None:
    logits, targets = at_probability(0.5)
    better = at_probability(0.4)[0]
    rule = compile_rule("rho1_table")
    assert rule.weights(logits, targets, models={"ref": logits}).item() == 0
    assert rule.weights(logits, targets, models={"ref": better}).item() == 1


def test_asft_divergence_starts_from_the_reference() -> None:
    """KL(ref || on), not the other way round, and not through the weight."""
    logits, targets = at_probability(0.25)
    ref = at_probability(0.5)[0]
    out = compile_rule("asft", beta=2).loss(logits, targets, models={"ref": ref})
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert out.total.item() == pytest.approx(0.25 * math.log(4) + 2 * divergence)


def test_idft_of_a_token_as_likely_as_a_sample_is_dft() -> None:
    """Where the log-probability is minus the entropy the exponent is one."""
    logits = torch.zeros(1, 1, 8, dtype=torch.float64)
    for name in ("idft", "idft_release"):
        weight = compile_rule(name).weights(logits, torch.tensor([[3]]), progress=0.9)
        assert weight.item() == pytest.approx(1 / 8)


def test_idft_raises_a_likely_token_and_lowers_an_unlikely_one() -> None:
    likely, targets = at_probability(0.9)
    unlikely = at_probability(0.1)[0]
    rule = compile_rule("idft")
    assert rule.weights(likely, targets).item() > 0.9
    assert rule.weights(unlikely, targets).item() < 0.1


def test_ranktuner_of_a_uniform_model_is_dft() -> None:
    """All tokens rank first, and that is what the model expects."""
    logits = torch.zeros(1, 1, 5, dtype=torch.float64)
    assert compile_rule("ranktuner").weights(logits, torch.tensor([[2]])).item() == pytest.approx(0.2)


def test_ranktuner_by_hand() -> None:
    """p = 0.25 at rank 2, expected rank 0.75 * 1 + 0.25 * 2 = 1.25."""
    logits, targets = at_probability(0.25)
    gain = 1 / math.log2(2.25) - 1 / math.log2(3)
    assert compile_rule("ranktuner").weights(logits, targets).item() == pytest.approx(0.25 * 2**gain)


def test_wit_without_the_prompt_is_sft_over_the_response() -> None:
    given = draw(1)
    response = torch.tensor(given.columns["response"])
    out = compile_rule("wit", w_response=1, w_prompt=0).loss(
        given.logits, given.targets, columns=given.columns
    )
    plain = compile_rule("sft").loss(given.logits, given.targets.masked_fill(~response, -100))
    torch.testing.assert_close(out.mean, plain.mean)
    assert float(out.denominator) == float(plain.denominator)


def test_labels_turn_the_sign_of_whole_examples() -> None:
    logits, targets = torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3], [1, -100, 3]])
    weights = compile_rule("forgetting_table").weights(logits, targets, columns={"label": ["neg", "pos"]})
    assert weights.tolist() == [[-1, -1, -1], [1, 0, 1]]


# Values of a step and of the data set --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fixed", "read"), [("talr", "talr_fixed", None), ("talr_ref", "talr_fixed_ref", "ref")]
)
def test_talr_is_its_fixed_form_at_the_median_of_the_examples(
    name: str, fixed: str, read: str | None
) -> None:
    for seed in SEEDS:
        given = draw(seed)
        logits = given.models[read] if read else given.logits
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), given.targets.reshape(-1), reduction="none"
        ).reshape(given.targets.shape)
        counts = (given.targets != -100).sum(-1)
        means = (losses.sum(-1) / counts)[counts > 0]
        tau = torch.quantile(means, 0.5).item()
        for a, b in zip(
            outcome(compile_rule(name), given), outcome(compile_rule(fixed, tau=tau), given), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_talr_where_every_token_is_certain() -> None:
    """A median loss of 0 is no division by 0: what is certain has the weight 1."""
    logits = torch.tensor([[[0.0, -math.inf], [0.0, -math.inf]]])
    out = compile_rule("talr").loss(logits.requires_grad_(), torch.tensor([[0, 0]]))
    out.mean.backward()
    assert out.weights.tolist() == [[1.0, 1.0]]
    assert out.mean.item() == 0


@pytest.mark.parametrize("of", ["p", "entropy", "p_ref", "entropy_ref"])
def test_the_highest_and_the_lowest_half_are_the_whole(of: str) -> None:
    """Of an even number of tokens without ties, each is in one of the halves."""
    random = torch.Generator().manual_seed(7)
    logits, ref = torch.randn(2, 3, 5, 11, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 11, (3, 5), generator=random)
    targets[0, 0] = -100  # 14 of 15
    top, bottom = (
        compile_rule(f"{end}_{of}").weights(logits, targets, models={"ref": ref}) for end in ("top", "bottom")
    )
    assert (top + bottom).equal((targets != -100).double())
    assert top.sum() == 7


def test_of_equal_tokens_the_earlier_row_of_the_data_set_is_kept() -> None:
    """Whatever the order of the batch: rows 5 and 2 of the data set, two tokens each, all alike."""
    logits, targets = torch.zeros(2, 2, 4), torch.tensor([[1, 1], [1, 1]])
    examples = torch.tensor([[5, 5], [2, 2]])
    for name in ("top_p", "bottom_p", "top_entropy", "bottom_entropy"):
        kept = compile_rule(name, share=0.75).weights(logits, targets, examples=examples)
        assert kept.tolist() == [[1, 0], [1, 1]], name


def test_entropy_scaling_has_the_mean_weight_one() -> None:
    for seed in SEEDS:
        given = draw(seed)
        weights, *_ = outcome(compile_rule("entropy_scaling"), given)
        assert weights.sum().item() == pytest.approx(float((given.targets != -100).sum()))


def test_srft_has_one_weight_for_the_step_and_half_of_it_where_the_model_is_sure() -> None:
    given = draw(3)
    weights = outcome(compile_rule("srft"), given)[0][given.targets != -100]
    assert len(weights.unique()) == 1
    sure = torch.tensor([[[0.0, -math.inf]]])
    assert compile_rule("srft").weights(sure, torch.tensor([[0]])).item() == 0.5


def test_pear_of_the_policy_that_wrote_the_data_only_discounts() -> None:
    given = draw(4)
    supervised = given.targets != -100
    written = torch.log_softmax(given.logits, -1).gather(-1, given.targets.clamp(min=0).unsqueeze(-1))
    given.columns["behaviour_logp"] = written.squeeze(-1).masked_fill(~supervised, 0.0)
    weights, *_ = outcome(compile_rule("pear", gamma=0.5), given)
    for row, counted in zip(weights, supervised, strict=True):
        later = torch.arange(int(counted.sum())).flip(0).double()
        torch.testing.assert_close(row[counted], 0.5**later)


def test_forgetting_of_everything_positive_is_sft() -> None:
    given = draw(2)
    _, total, denominator, gradient = outcome(compile_rule("forgetting", share=1), given)
    _, plain, count, slope = outcome(compile_rule("sft"), given)
    assert denominator == 1
    torch.testing.assert_close(total, plain / count)
    torch.testing.assert_close(gradient, slope / count)


def test_forgetting_starts_without_unlearning_and_averages_each_group() -> None:
    """Two tokens of probability 1/4; the one that the warmed-up model finds likelier is positive."""
    logits, targets = torch.zeros(1, 2, 4, dtype=torch.float64), torch.tensor([[0, 0]])
    warm = torch.stack([torch.tensor([2.0, 0, 0, 0]), torch.zeros(4)]).double().unsqueeze(0)
    given = Draw(logits, targets, {"ref": logits, "warm": warm}, {}, 0.0, (0,), 0, 0)
    rule = compile_rule("forgetting", share=0.5)
    weights, total, _, _ = outcome(rule, given)
    assert weights.tolist() == [[1, 0]]
    assert total.item() == pytest.approx(math.log(4))
    weights, total, _, _ = outcome(rule, replace(given, progress=0.5))
    assert weights.tolist() == [[1, -0.125]]
    assert total.item() == pytest.approx(math.log(4) * (1 - 0.125))


def test_token_cleaning_rounds_down() -> None:
    """60% of 14 tokens are 8.4: floor keeps 8, the ceiling of `rho1` 9."""
    given = draw(1)
    given = replace(given, targets=given.targets.clone())
    supervised = (given.targets != -100).nonzero().tolist()
    for at in supervised[14:]:
        given.targets[tuple(at)] = -100
    assert len(supervised) >= 14
    assert outcome(compile_rule("token_cleaning"), given)[2] == 8
    assert outcome(compile_rule("rho1"), given)[2] == 9


def test_entrodrop_drops_more_as_the_run_goes_on_and_others_each_epoch() -> None:
    given = draw(0)
    rule = compile_rule("entrodrop", share=1, rate=1)
    kept = [outcome(rule, replace(given, progress=p))[0].sum() for p in (0.0, 0.5, 0.99)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    draws = {tuple(outcome(rule, replace(given, epoch=e))[0].reshape(-1).tolist()) for e in range(4)}
    assert len(draws) > 1


def test_entrodrop_never_drops_a_token_of_high_entropy() -> None:
    given = draw(5)
    rule = compile_rule("entrodrop", rate=1, middle=0, slope=100)
    weights, *_ = outcome(rule, replace(given, progress=0.9))
    high = outcome(compile_rule("top_entropy", share=0.4), given)[0]
    assert (weights[high == 1] == 1).all()
    assert (weights == 0).sum() > (given.targets == -100).sum()
