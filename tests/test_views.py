"""Views and what is bound, in the Python interface: by hand on dense logits and from heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from priority_dsl import PriorityError, check, compile_rule, explain
from priority_dsl.binding import bindings, bound_names
from priority_dsl.scoring import with_on_frozen

B, T, V, D = 2, 4, 7, 5
TARGETS = torch.tensor([[0, 3, -100, 6], [2, -100, 5, 1]])
LIVE = TARGETS >= 0


def logits(seed: int, size: int = V) -> Tensor:
    return torch.randn(B, T, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nll(z: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), TARGETS, reduction="none")


def bound(text: str) -> set[str]:
    return bound_names(*check(text).roots)


# Contrast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [V, V + 3])
def test_contrast_is_twice_a_less_b_over_what_both_have(size: int):
    on, ref = logits(0).requires_grad_(), logits(1, size)
    out = compile_rule("loss = nll(contrast(on, ref))").loss(on, TARGETS, models={"ref": ref})
    (found,) = torch.autograd.grad(out.total, on)
    expected = nll(2 * on - ref[..., :V]).sum()
    torch.testing.assert_close(out.total, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, on)[0])


def test_contrast_holds_a_frozen_model_still():
    on, ref = logits(0).requires_grad_(), logits(1).requires_grad_()
    rule = compile_rule("loss = nll(contrast(ref, on))")
    out = rule.loss(on, TARGETS, models={"ref": ref})
    assert torch.autograd.grad(out.total, [on, ref], allow_unused=True)[1] is None
    torch.testing.assert_close(out.total, nll(2 * ref - on).sum())


def test_a_token_that_a_excludes_is_excluded_and_one_that_b_excludes_is_not():
    on, ref = torch.zeros(1, 1, 3), torch.tensor([[[0.0, -math.inf, 1.0]]])
    rule, y = compile_rule("p(contrast(on, ref))"), torch.tensor([[1]])
    plain = torch.tensor([0.0, 0.0, -1.0]).softmax(-1)
    assert rule.weights(on, y, models={"ref": ref}).item() == pytest.approx(plain[1].item())
    assert rule.weights(ref, y, models={"ref": on}).item() == 0


def test_contrast_from_heads_is_contrast_of_logits():
    random = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(B, T, D, generator=random), torch.randn(V, D, generator=random)
    other = torch.randn(V, D, generator=random)
    rule = compile_rule("weight = sg(p_on); loss = weight * nll(tempered(contrast(on, ref), 2))")
    fused = rule.fused_loss(hidden, head, TARGETS, models={"ref": (hidden, other)})
    dense = rule.loss(hidden @ head.T, TARGETS, models={"ref": hidden @ other.T})
    torch.testing.assert_close(fused.total, dense.total)


# What is bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("p(unprompted(ref))", {"unprompted(ref)"}),
        ("p(tempered(unprompted(ref), 2)) * p_ref", {"unprompted(ref)", "ref"}),
        ("p(unprompted(tempered(ref, 2)))", {"unprompted(ref)"}),
        ("p(unprompted(contrast(on, ref)))", {"unprompted(on)", "unprompted(ref)"}),
        ("p(sg(unprompted(perturbed(on, 5))))", {"unprompted(perturbed(on, 5))"}),
        ("kl(perturbed(ref, 1), perturbed(ref, 1))", {"perturbed(ref, 1)", "perturbed(ref, 1, call=2)"}),
        ("column q: text; weight = p(reading(ref, q))", {"reading(ref, q)"}),
        ("model slow = ema(0.5); weight = p(slow)", {"slow"}),
        ("attention(ref, prompt)", {"ref"}),
    ],
)
def test_a_model_is_bound_by_name_and_a_view_that_reads_by_its_text(text: str, names: set[str]):
    assert bound(text) == names


def test_a_rule_requires_the_models_behind_its_views():
    rule = compile_rule('column q: text; model warm "one"; weight = p(reading(warm, q)) * p(unprompted(ref))')
    assert rule.requires.models == {"on", "warm", "ref"}
    assert rule.requires.columns == {"q"}
    assert rule.requires.statistics == {"p(reading(warm, q))", "p(unprompted(ref))"}


def test_views_are_given_by_their_text():
    alone, ref = logits(1), logits(2)
    rule = compile_rule("nll(unprompted(ref)) - nll(tempered(unprompted(ref), 2)) + p_ref")
    weights = rule.weights(None, TARGETS, models={"unprompted(ref)": alone, "ref": ref})
    expected = nll(alone) - nll(alone / 2) + (-nll(ref)).exp()
    torch.testing.assert_close(weights, expected.masked_fill(~LIVE, 0.0))


def test_a_missing_view_is_named_with_what_to_pass():
    rule = compile_rule("p(unprompted(ref))")
    with pytest.raises(PriorityError, match=r"PD501.*`unprompted\(ref\)`"):
        rule.weights(None, TARGETS, models={"ref": logits(0)})


@pytest.mark.parametrize("pair", [False, True])
def test_gradient_flows_into_a_view_of_the_trained_model_and_no_other(pair: bool):
    on, alone, ref = (logits(seed).requires_grad_() for seed in (0, 1, 2))
    rule = compile_rule(
        "loss = nll_on * sg(p(unprompted(on))) + 0.5 * nll(unprompted(on)) * p(unprompted(ref))"
    )
    assert rule.trained_views == {"unprompted(on)"}
    identity = torch.eye(V, dtype=torch.float64)
    models: dict[str, Any] = {"unprompted(on)": (alone, identity) if pair else alone, "unprompted(ref)": ref}
    out = (
        rule.fused_loss(on, identity, TARGETS, models=models)
        if pair
        else rule.loss(on, TARGETS, models=models)
    )
    found = torch.autograd.grad(out.total, [on, alone, ref], allow_unused=True)
    held = (-nll(alone)).exp().detach()
    expected = (nll(on) * held + 0.5 * nll(alone) * (-nll(ref)).exp().detach()).masked_fill(~LIVE, 0.0).sum()
    torch.testing.assert_close(out.total, expected)
    wanted = torch.autograd.grad(expected, [on, alone])
    for one, two in zip(found, wanted, strict=False):
        torch.testing.assert_close(one, two)
    assert found[2] is None


def test_a_weight_that_reads_a_view_of_the_trained_model_trains_through_the_nll_alone():
    on, alone = logits(0).requires_grad_(), logits(1).requires_grad_()
    rule = compile_rule("p(unprompted(on))")
    assert not rule.trained_views
    out = rule.loss(on, TARGETS, models={"unprompted(on)": alone})
    assert torch.autograd.grad(out.total, [on, alone], allow_unused=True)[1] is None


# The plan -----------------------------------------------------------------------------------------


def test_a_frozen_view_is_a_pass_of_its_own_and_a_stored_column():
    how = compile_rule("nll(unprompted(ref)) - nll_ref > 0").plan
    assert {of.models: of.names for of in how.passes} == {
        ("unprompted(ref)",): ("nll(unprompted(ref))",),
        ("ref",): ("nll(ref)",),
    }
    assert [(c.name, c.bits) for c in how.stored] == [("(nll(unprompted(ref)) - nll(ref)) > 0", 1)]
    assert how.kept == ()


def test_a_view_beside_a_model_that_stays_loaded_is_stored_all_the_same():
    how = compile_rule("weight = p(unprompted(ref)); loss = weight * nll_on + kl(ref, on)").plan
    assert how.kept == ("ref",)
    assert [of.models for of in how.passes] == [("unprompted(ref)",)]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("p(unprompted(on))", ("unprompted(on)",)),
        ("p(perturbed(ref, 5))", ("perturbed(ref, 5)",)),
        ("top(p(perturbed(ref, 5)), 0.5, dataset)", ()),
        ("model slow = ema(0.5); weight = p(slow)", ("slow",)),
        ("attention(on, prompt)", ()),
    ],
)
def test_what_is_read_at_each_step(text: str, kept: tuple[str, ...]):
    assert compile_rule(text).plan.kept == kept


def test_explain_says_what_a_step_costs():
    text = str(
        explain(check("model slow = ema(0.5); weight = attention(on, prompt) * p(slow) * p(unprompted(on))"))
    )
    assert "forward passes: 0 before training, 3 a step" in text
    assert "slow is kept beside on: an average of its weights, in one more forward pass a step" in text
    assert "unprompted(on) is read at each step, in a forward pass of its own" in text
    assert "attention(on, prompt) is read in the same forward pass: the last layer attends once more" in text


def test_scoring_freezes_views_and_draws_them_once():
    scored = with_on_frozen(check("model slow = ema(0.5); weight = p(perturbed(on, 5)) * p(slow)"))
    assert set(bindings(scored.weight)) == {"perturbed(on, 5, once)", "slow"}
    assert str(scored.weight.kind.stage) == "frozen"


# Attention ----------------------------------------------------------------------------------------

PAID = torch.tensor([[0.5, 0.25, 1.0, 0.0], [1.0, 0.5, 0.125, 0.75]], dtype=torch.float64)


def test_attention_is_given_as_a_stored_value():
    rule = compile_rule("attention(on, prompt)")
    out = rule.loss(logits(0), TARGETS, stored={"attention(on, prompt)": PAID})
    torch.testing.assert_close(out.weights, PAID.masked_fill(~LIVE, 0.0))
    hidden, head = logits(1, D), torch.randn(V, D, dtype=torch.float64)
    fused = rule.fused_loss(hidden, head, TARGETS, stored={"attention(on, prompt)": PAID})
    torch.testing.assert_close(
        fused.total, rule.loss(hidden @ head.T, TARGETS, stored={"attention(on, prompt)": PAID}).total
    )


@pytest.mark.parametrize("text", ["attention(on, prompt)", "top(attention(ref, prompt), 0.5, batch)"])
def test_missing_attention_is_named(text: str):
    rule = compile_rule(text)
    name = next(iter(rule.requires.statistics))
    models = {"ref": logits(1)}
    with pytest.raises(PriorityError) as raised:
        rule.loss(logits(0), TARGETS, models=models)
    assert "PD501" in str(raised.value)
    assert f'stored={{"{name}": values}}' in str(raised.value)
    with pytest.raises(PriorityError, match="PD501"):
        compile_rule(f"normalize = kept; weight = {text}").observe(logits(0), TARGETS, models=models)


def test_attention_in_a_batch_value_does_not_depend_on_the_spread():
    rule = compile_rule("weight = top(attention(on, prompt) * p_on, 0.5, batch); normalize = kept")
    z, rows = logits(0), torch.arange(B).unsqueeze(-1).expand(B, T)
    whole = rule.loss(z, TARGETS, examples=rows, stored={"attention(on, prompt)": PAID})
    parts = [
        {"logits": z[i : i + 1], "targets": TARGETS[i : i + 1], "examples": rows[i : i + 1],
         "stored": {"attention(on, prompt)": PAID[i : i + 1]}}
        for i in range(B)
    ]  # fmt: skip
    seen = [rule.observe(**part) for part in parts]
    step = seen[0] + seen[1]
    found = torch.cat([rule.loss(**part, step=step).weights for part in parts])
    assert torch.equal(found, whole.weights)
    assert whole.weights.sum() == 3


def test_a_pass_takes_what_is_read_inside_as_it_is_given():
    rule = compile_rule("attention(ref, prompt) * p_ref")
    (of,) = rule.plan.passes
    assert of.models == ("ref",)
    assert of.inside == ("attention(ref, prompt)",)
    hidden, head = logits(1, D), torch.randn(V, D, dtype=torch.float64)
    found = rule.statistics(of, {"ref": (hidden, head)}, TARGETS, stored={"attention(ref, prompt)": PAID})
    torch.testing.assert_close(found["attention(ref, prompt)"], PAID.masked_fill(~LIVE, 0.0))
    torch.testing.assert_close(found["nll(ref)"], nll(hidden @ head.T))
    stored = rule.stored_columns(TARGETS, statistics=found)
    weights = rule.weights(None, TARGETS, stored=stored)
    torch.testing.assert_close(
        weights, (PAID * (-nll(hidden @ head.T)).exp()).masked_fill(~LIVE, 0.0).float()
    )
