"""Numbers that go wrong in naive code: offsets, gaps, infinities, nothing to count, low precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from priority_dsl import PriorityError, compile_rule
from priority_dsl.registry import REGISTRY, Statistic
from priority_dsl.rule import LossOutput

INF = math.inf


def weight(rule: str, *logits: float, y: int = 0, dtype: torch.dtype = torch.float64, **models) -> float:
    """The weight of one token."""
    bound = {name: torch.tensor([[row]], dtype=dtype) for name, row in models.items()}
    z = torch.tensor([[logits]], dtype=dtype)
    return compile_rule(f"weight = {rule}").weights(z, torch.tensor([[y]]), models=bound).item()


def loss(rule: str, logits: Tensor, targets: list, **given) -> tuple[LossOutput, Tensor]:
    """The loss of a rule text and its gradient in the logits."""
    leaf = logits.clone().requires_grad_()
    out = compile_rule(rule).loss(leaf, torch.tensor(targets).reshape(logits.shape[:-1]), **given)
    return out, torch.autograd.grad(out.total, leaf)[0]


# Offsets and gaps -------------------------------------------------------------------------------

ONE_MODEL = sorted(
    n
    for n, w in REGISTRY.words.items()
    if isinstance(w, Statistic) and w.models == 1 and n != "topk_entropy" and not w.inside
)


@pytest.mark.parametrize("name", ONE_MODEL)
@pytest.mark.parametrize("offset", [1e3, -1e3, 4096.0])
def test_an_offset_of_the_logits_costs_no_digits(name: str, offset: float) -> None:
    row = torch.tensor([0.25, -1.5, 2.0, 0.25, -0.125])  # the sums are exact in float32
    plain = weight(f"{name}(on)", *row.tolist(), y=3, dtype=torch.float32)
    moved = weight(f"{name}(on)", *(row + offset).tolist(), y=3, dtype=torch.float32)
    assert moved == pytest.approx(plain, rel=1e-6)


def test_entropy_is_centred() -> None:
    row = (torch.linspace(-1.0, 1.0, 200) * 4).round() / 4 + 1e3
    wanted = torch.special.entr(row.double().softmax(-1)).sum().item()
    assert weight("H_on", *row.tolist(), dtype=torch.float32) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_of_p_survives_a_gap_of_104_nats(dtype: torch.dtype) -> None:
    gap = (0.0, 104.0)  # exp(-104) is 0 in float32
    assert weight("p_on ** 0.1", *gap, dtype=dtype) == pytest.approx(math.exp(-10.4), rel=1e-5)
    assert weight("sqrt(p_on)", *gap, dtype=dtype) == pytest.approx(math.exp(-52), rel=1e-5)
    assert weight("sg(p_on) ** -0.1", *gap, dtype=dtype) == pytest.approx(math.exp(10.4), rel=1e-5)
    assert weight("log(p_on)", *gap, dtype=dtype) == pytest.approx(-104, rel=1e-6)
    assert weight("log2(p_on)", *gap, dtype=dtype) == pytest.approx(-104 / math.log(2), rel=1e-6)


def test_the_gradient_of_a_power_of_p_survives_the_gap() -> None:
    z = torch.tensor([[0.0, 104.0]], dtype=torch.float32)
    _, gradient = loss("loss = p_on ** 0.1", z, [0])
    slope = 0.1 * math.exp(-10.4)  # d exp(-nll/10) / dz at the target, times 1 - p
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-4)
    _, gradient = loss("loss = -log(p_on)", z, [0])
    assert gradient[0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)


def test_powers_of_p_at_the_ends() -> None:
    impossible, certain = (-INF, 0.0), (0.0, -INF)
    assert weight("p_on ** 0", *impossible) == 1
    assert weight("p_on ** 0.5", *impossible) == 0
    assert weight("p_on ** 0.5", *certain) == 1
    assert weight("p_on ** -3", *certain) == 1
    assert weight("exp(log(p_on))", *impossible) == 0


# Ties -------------------------------------------------------------------------------------------


def test_mass_at_ties() -> None:
    uniform = (0.0,) * 10
    assert weight("mass_on", *uniform, y=3) == 1.0
    assert weight("mass(on, ties=exclude)", *uniform, y=3) == pytest.approx(0.1, abs=1e-15)
    top_of_two = (10.0, 10.0, *(-1.0,) * 2)
    own = math.exp(10) / (2 * math.exp(10) + 2 * math.exp(-1))
    below = 2 * math.exp(-1) / (2 * math.exp(10) + 2 * math.exp(-1))
    assert weight("mass_on", *top_of_two) == 1.0
    assert weight("mass(on, ties=exclude)", *top_of_two) == pytest.approx(own + below, rel=1e-12)
    assert own + below == pytest.approx(0.500008, abs=5e-7)
    second = (1.0, 0.0, 0.0, -1.0)
    level = [math.exp(v) / sum(map(math.exp, second)) for v in second]
    assert weight("mass_on", *second, y=1) == pytest.approx(level[1] + level[2] + level[3], rel=1e-12)
    assert weight("mass(on, ties=exclude)", *second, y=1) == pytest.approx(level[1] + level[3], rel=1e-12)


def test_ranks_at_ties() -> None:
    assert weight("rank_on", 1.0, 1.0, 1.0, 0.0, y=2) == 1
    assert weight("rank_on", 1.0, 1.0, 1.0, 0.0, y=3) == 4
    assert weight("expected_rank(on)", 0.0, 0.0, 0.0) == 1
    assert weight("margin_on", 2.0, 2.0, 1.0) == 0


def test_mass_is_one_in_low_precision() -> None:
    z = torch.randn(3, 7, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    top = z.argmax(-1)
    assert (compile_rule("mass(on) + 0").weights(z, top) == 1).all()


# Infinities -------------------------------------------------------------------------------------


def test_a_target_at_minus_infinity_with_weight_zero_adds_nothing() -> None:
    z = torch.tensor([[-INF, 1.0, 2.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    out, gradient = loss("weight = p_on", z, [0, 1])
    assert out.nll[0] == INF
    assert out.weights[0] == 0
    assert out.losses[0] == 0
    assert out.total.isfinite()
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[1].abs().sum() > 0
    assert loss("weight = nll_on < 5", z, [0, 1])[1][0].tolist() == [0.0, 0.0, 0.0]


def test_a_target_at_minus_infinity_that_counts_is_an_infinite_loss() -> None:
    out, _ = loss("sft", torch.tensor([[-INF, 1.0]]), [0])
    assert out.total == INF


def test_minus_infinity_elsewhere_changes_nothing() -> None:
    z = torch.tensor([[0.5, -INF, 2.0, -INF]], dtype=torch.float64)
    for text in ("weight = H_on", "loss = kl(ref, on)", "loss = cross_entropy(on, ref)", "loss = pmax(on)"):
        out, gradient = loss(text, z, [2], models={"ref": z + torch.tensor([0.0, 0.0, 1.0, 0.0])})
        assert out.total.isfinite()
        assert gradient.isfinite().all()
        assert gradient[0, 1] == gradient[0, 3] == 0


@pytest.mark.parametrize(
    "term", ["kl(ref, on)", "kl(on, ref)", "cross_entropy(ref, on)", "cross_entropy(on, ref)", "nll(on)"]
)
def test_zero_without_gradient_times_infinity(term: str) -> None:
    """Law 4: value and gradient are exactly 0, not NaN, where the other factor is infinite."""
    z = torch.tensor([[-INF, 0.0, 1.0], [0.0, -INF, 1.0]], dtype=torch.float64)
    ref = z.flip(0)
    for text in (f"weight = 0 * p_ref; loss = weight * {term}", f"loss = {term} * (progress > 0)"):
        out, gradient = loss(text, z, [0, 0], models={"ref": ref})
        assert out.losses.tolist() == [0.0, 0.0]
        assert out.total == 0
        assert gradient.tolist() == [[0.0] * 3] * 2


def test_a_branch_that_is_not_taken_adds_nothing() -> None:
    z = torch.tensor([[-INF, 0.0, 1.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    out, gradient = loss("loss = nll_on if nll_on < 10 else 0 * progress", z, [0, 0])
    assert out.losses[0] == 0
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[1].abs().sum() > 0
    out, gradient = loss("loss = p_on if nll_on > 10 else 1 / nll_on", z, [0, 0])
    assert out.total.isfinite()
    assert gradient.isfinite().all()


def test_an_infinite_slope_does_not_reach_the_value() -> None:
    """sqrt(kl) where a run starts: the loss is 0, and no derivative is taken for 0."""
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out, gradient = loss("loss = sqrt(kl(ref, on))", z, [0, 1], models={"ref": z.clone()})
    assert out.total == 0
    assert gradient.isfinite().all()


def test_a_weight_that_is_not_finite_stops() -> None:
    with pytest.raises(PriorityError, match="position 1") as caught:
        compile_rule("weight = nll_on").weights(
            torch.tensor([[[0.0, 1.0], [-INF, 1.0]]]), torch.tensor([[0, 0]])
        )
    assert caught.value.diagnostics[0].code == "PD505"


# What the graph's source must not turn round ----------------------------------------------------


def test_a_negative_number_to_a_power() -> None:
    assert weight("(-2) ** rank_on", 0.0, 1.0) == 4.0  # as a line of Python, -2.0 ** x is -(2.0 ** x)
    assert weight("(-2) ** (rank_on + 1)", 0.0, 1.0) == -8.0
    assert weight("-2 ** rank_on", 0.0, 1.0) == -4.0
    assert weight("2 - -1 * p_on", 0.0) == 3.0


def test_a_branch_that_parameters_choose_is_known_to_what_reads_it() -> None:
    rule = "param tau = 1; weight = 5 if not ((1 if tau < 2 else p_on) < 0.9) else 7"
    for tau, wanted in ((1.0, 5.0), (3.0, 7.0)):
        found = compile_rule(rule, tau=tau).weights(torch.zeros(1, 1, 2), torch.tensor([[0]]))
        assert found.item() == wanted


# Nothing to count -------------------------------------------------------------------------------

EVERY_NORMALIZE = ["tokens", "kept", "weights", "none", "examples"]


@pytest.mark.parametrize("normalize", EVERY_NORMALIZE)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,), (2, 3)])
def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(normalize: str, shape: tuple[int, ...]) -> None:
    z = torch.full((*shape, 5), math.nan, requires_grad=True)
    targets = torch.full(shape, -100)
    out = compile_rule(f"weight = p_on; normalize = {normalize}").loss(z, targets)
    assert out.total == 0
    assert out.mean == 0
    assert out.weights.shape == out.nll.shape == out.losses.shape == shape
    out.mean.backward()
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_an_empty_selection_is_a_loss_of_zero() -> None:
    z = torch.randn(2, 3, 5, requires_grad=True)
    out = compile_rule("weight = p_on > 1; normalize = kept").loss(z, torch.zeros(2, 3, dtype=torch.long))
    out.mean.backward()
    assert out.denominator == 0
    assert out.mean == 0
    assert (z.grad == 0).all()  # type: ignore[union-attr]


def test_a_vocabulary_of_one_token() -> None:
    z = torch.zeros(1, 3, 1, dtype=torch.float64)
    ref = {"ref": torch.ones(1, 3, 1, dtype=torch.float64)}
    out, gradient = loss("asft", z, [0, 0, 0], models=ref)
    assert out.total == 0
    assert (gradient == 0).all()
    assert weight("mass_on", 3.0) == weight("p_on", 3.0) == weight("pmax(on)", 3.0) == 1
    assert weight("H_on", 3.0) == weight("topk_entropy(on, 20)", 3.0) == 0
    assert weight("1 if margin_on > 5 else 0", 3.0) == 1  # nothing else could be said


def test_nan_logits_at_ignored_tokens_reach_nothing() -> None:
    z = torch.randn(2, 4, 6, dtype=torch.float64)
    z[0, 1] = z[1, 3] = math.nan
    ref = z.clone()
    targets = [[1, -100, 2, 3], [0, 4, 5, -100]]
    for name in ("sft", "asft", "prift_mass", "ranktuner"):
        out, gradient = loss(name, z, targets, models={"ref": ref})
        assert out.total.isfinite()
        assert gradient.isfinite().all()
        assert (gradient[0, 1] == 0).all()
        assert (gradient[1, 3] == 0).all()


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_float32_for_logits_of_32_bits_or_fewer(dtype: torch.dtype) -> None:
    z = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(3)).to(dtype)
    targets = torch.randint(0, 50, (2, 4), generator=torch.Generator().manual_seed(4))
    rule = compile_rule("asft")
    leaf = z.clone().requires_grad_()
    ref = {"ref": z.flip(0)}
    out = rule.loss(leaf, targets, models=ref)
    out.total.backward()
    assert out.weights.dtype == out.nll.dtype == out.total.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    exact = rule.loss(z.double(), targets, models={"ref": ref["ref"].double()})
    assert exact.weights.dtype == torch.float64
    torch.testing.assert_close(out.weights.double(), exact.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.nll.double(), exact.nll, rtol=1e-5, atol=1e-6)


def test_numbers_of_a_rule_are_float64() -> None:
    """Law 14: 2 ** 0.1 ** 30 and the like are folded in float64, and overflow is infinite."""
    assert weight("p_on * (1 / 3)", 0.0) == 1 / 3
    assert weight("min(10 ** 400, 2)", 0.0) == 2.0
    assert weight("(3 ** 40 + 1) - 3 ** 40", 0.0, dtype=torch.float32) == 0.0  # a Python integer would give 1
