"""What a caller may give a rule: shapes, columns, examples, models; what is said where it does not fit."""

from __future__ import annotations

import pytest
import torch

from priority_dsl import PriorityError, compile_rule

TARGETS = torch.tensor([[1, 2, -100], [3, 4, 0]])
LOGITS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def refused(code: str):
    return pytest.raises(PriorityError, match=code)


def test_undeclared_columns_take_their_extent_from_what_is_given():
    rule = compile_rule("-1 if label == neg")
    assert rule.weights(None, TARGETS, columns={"label": ["neg", "pos"]}).tolist() == [[-1, -1, 0], [1, 1, 1]]
    per_token = [["neg", "pos", "neg"], ["pos", "pos", "neg"]]
    assert rule.weights(None, TARGETS, columns={"label": per_token}).tolist() == [[-1, 1, 0], [1, 1, -1]]
    codes = torch.tensor([[0, -1, 0], [-1, -1, 0]])
    assert rule.columns["label"].categories == ("neg",)
    assert rule.weights(None, TARGETS, columns={"label": codes}).tolist() == [[-1, 1, 0], [1, 1, -1]]


def test_declared_columns_keep_to_their_extent():
    token = compile_rule("column s: number per token; weight = s")
    with refused("PD503"):
        token.weights(None, TARGETS, columns={"s": [1.0, 2.0]})
    example = compile_rule("column s: number; s * 1")
    assert example.weights(None, TARGETS, columns={"s": [1.0, 2.0]}).tolist() == [[1, 1, 0], [2, 2, 2]]
    assert example.weights(None, TARGETS, columns={"s": TARGETS.float()}).tolist() == [[1, 2, 0], [3, 4, 0]]


def test_packed_rows_need_values_shaped_like_the_targets():
    rule = compile_rule("column s: number; s * 1")
    packed = torch.tensor([[0, 1, 1], [2, 2, 2]])
    with refused("PD503"):
        rule.weights(None, TARGETS, columns={"s": [1.0, 2.0]}, examples=packed)
    ids_of_rows = torch.tensor([[7, 7, 7], [3, 3, 3]])
    assert rule.weights(None, TARGETS, columns={"s": [1.0, 2.0]}, examples=ids_of_rows)[1, 0] == 2


def test_position_and_length_follow_the_examples_not_the_rows():
    targets = torch.tensor([[1, 1, -100, 1, 1, 1]])
    examples = torch.tensor([[5, 5, 5, 9, 9, 9]])
    assert compile_rule("1 * position").weights(None, targets, examples=examples).tolist() == [
        [0, 1, 0, 0, 1, 2]
    ]
    lengths = compile_rule("1 * length").weights(None, targets, examples=examples)
    assert lengths.tolist() == [[2, 2, 0, 3, 3, 3]]
    split = torch.tensor([[5, 9, 5, 9, 5, 9]])
    assert compile_rule("1 * position").weights(None, targets, examples=split).tolist() == [
        [0, 0, 0, 1, 1, 2]
    ]


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0,), (0, 3), (3, 0)])
def test_any_leading_shape(shape):
    targets, logits = torch.zeros(shape, dtype=torch.long), torch.randn(*shape, 5, requires_grad=True)
    out = compile_rule("p_on * position + length").loss(logits, targets)
    assert out.weights.shape == out.nll.shape == torch.Size(shape)
    out.mean.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["tokens", "kept", "weights", "examples", "none"])
def test_micro_batches_add_up_to_the_step(normalize):
    """The law that every trainer lives by: sum over micro-batches / counts of the step."""
    torch.manual_seed(0)
    rule = compile_rule(f"normalize = {normalize}; weight = max(p_on - 0.2, 0) * (1 + position)")
    targets = torch.randint(0, 5, (6, 7))
    targets[0] = targets[2, 3:] = targets[4, :2] = -100
    logits = torch.randn(6, 7, 5, dtype=torch.float64, requires_grad=True)
    whole = rule.loss(logits, targets)
    (expected,) = torch.autograd.grad(whole.mean, logits)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    seen = [rule.observe(logits[p] if rule.observes_model else None, targets[p]) for p in parts]
    step = seen[0] + seen[1] + seen[2]
    means = [rule.loss(logits[p], targets[p], step=step.all_reduce()).mean for p in parts]
    total = means[0] + means[1] + means[2]
    (got,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(total, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sft", "dft", "prift_mass", "asft", "wit", "eaft"])
@pytest.mark.parametrize("empty", ["all ignored", "no rows"])
def test_nothing_supervised_gives_zero_with_a_graph(name, empty):
    targets = torch.full((2, 3), -100) if empty == "all ignored" else torch.zeros(0, 3, dtype=torch.long)
    logits = torch.randn(*targets.shape, 5, requires_grad=True)
    rule = compile_rule(name)
    response = torch.zeros(targets.shape, dtype=torch.bool)
    out = rule.loss(logits, targets, models={"ref": logits.detach()}, columns={"response": response})
    assert out.mean == 0
    assert out.total == 0
    out.mean.backward()
    assert (logits.grad == 0).all()


def test_what_does_not_fit_is_said():
    rule = compile_rule("mass(ref) >= 0.5")
    with refused("PD501"):
        rule.weights(LOGITS, TARGETS)
    with refused("PD503"):
        rule.weights(LOGITS, TARGETS, models={"ref": LOGITS[:, 1:]})
    with refused("PD503"):
        rule.weights(LOGITS, TARGETS.float(), models={"ref": LOGITS})
    with refused("PD503"):
        rule.weights(LOGITS, TARGETS, models={"ref": LOGITS}, examples=TARGETS[0])
    with refused("PD506"):
        rule.weights(LOGITS, TARGETS + 100, models={"ref": LOGITS})
    flag = compile_rule("column f: bool; weight = f")
    with refused("PD504"):
        flag.weights(None, TARGETS, columns={"f": [0.5, 1]})
    with refused("PD504"):
        flag.weights(None, TARGETS, columns={"f": [True, None]})
    with refused("PD504"):
        compile_rule("label == a").weights(None, TARGETS, columns={"label": torch.rand(2, 3)})
    with refused("PD504"):
        compile_rule("column label: {a, b}; weight = label == a").weights(
            None, TARGETS, columns={"label": ["a", "c"]}
        )
    with refused("PD502.*\n.*label"):
        compile_rule("label == a").weights(None, TARGETS, columns={"labels": ["a", "b"]})


def test_a_weight_that_is_not_finite_names_rule_example_and_position():
    logits = LOGITS.clone()
    logits[1, 2, 0] = -torch.inf
    with pytest.raises(PriorityError, match=r"inf.*nll_on \* 2.*example 1, position 2"):
        compile_rule("nll_on * 2").weights(logits, TARGETS)
    with pytest.raises(PriorityError, match="PD505"):
        compile_rule("nll_on * 2").loss(logits, TARGETS)


def test_models_may_be_given_as_hidden_and_head():
    hidden, head = torch.randn(2, 3, 4), torch.nn.Linear(4, 5)
    for name in ("prift_prob", "asft"):
        rule = compile_rule(name)
        dense = rule.loss(LOGITS, TARGETS, models={"ref": head(hidden).detach()})
        pair = rule.loss(LOGITS, TARGETS, models={"ref": (hidden, head)})
        torch.testing.assert_close(pair.total, dense.total)
        assert not pair.total.requires_grad


def test_only_on_gets_gradient():
    on, ref = LOGITS.clone().requires_grad_(), LOGITS.flip(0).clone().requires_grad_()
    rule = compile_rule("loss = kl(ref, on) + p_ref * nll_on")
    rule.loss(on, TARGETS, models={"ref": ref}).mean.backward()
    assert on.grad is not None
    assert ref.grad is None
    assert (on.grad[0, 2] == 0).all()


def test_a_rule_survives_pickle():
    import pickle

    rule = pickle.loads(pickle.dumps(compile_rule("prift_mass", tau=0.3)))
    assert rule.params == {"tau": 0.3}
    assert rule.name == "prift_mass"
    assert rule.weights(LOGITS, TARGETS, models={"ref": LOGITS}).shape == TARGETS.shape
