"""Binding times: what is stored, what stays online, and that both ways give the same numbers."""

from __future__ import annotations

import json

import pytest
import torch

from priority_dsl import check, compile_rule, explain, list_rules
from priority_dsl.explain import explain_json
from priority_dsl.plan import plan
from priority_dsl.testing.case import inside_of
from priority_dsl.vocab_pass import Head

# By hand, from the formulas: stage of the weight, statistics kept by the pass over each model, what training
# reads instead, and the models that stay loaded. A rule that is not listed reads `on` or columns only.
BY_HAND = {
    "asft": ("online", {}, [], ["ref"]),
    "asft_table": ("online", {}, [], ["ref"]),
    "bottom_entropy_ref": ("run", {"ref": ["entropy(ref)"]}, [32], []),
    "bottom_p_ref": ("run", {"ref": ["nll(ref)"]}, [32], []),
    "eaft_ref": ("frozen", {"ref": ["topk_entropy(ref, 20)"]}, [32], []),
    "forgetting": ("run", {"ref": ["nll(ref)"], "warm": ["nll(warm)"]}, [1], []),
    "idft_ref": ("frozen", {"ref": ["entropy(ref)", "nll(ref)"]}, [32], []),
    "ignorance": ("constant", {}, [], [f"reading({m}, perturbed_text)" for m in ("on", "ref")]),
    "kd_decomposed": ("frozen", {}, [], ["teacher"]),
    "prift_cross": ("frozen", {"other": ["nll(other)"]}, [32], []),
    "prift_ema": ("online", {}, [], ["slow"]),
    "prift_mass": ("frozen", {"ref": ["mass(ref)"]}, [1], []),
    "prift_mass_release": ("frozen", {"ref": ["mass(ref, ties=exclude)"]}, [1], []),
    "prift_prob": ("frozen", {"ref": ["nll(ref)"]}, [32], []),
    "rho1": ("online", {"curated": ["nll(curated)"]}, [32], []),
    "rho1_table": ("online", {"ref": ["nll(ref)"]}, [32], []),
    "selectkd": ("online", {}, [], ["teacher"]),
    "sstoken": ("online", {"ref": ["nll(ref)"]}, [32], []),
    "sstoken_table": ("online", {"ref": ["nll(ref)"]}, [32], []),
    "selectkd_table": ("frozen", {"teacher": ["nll(teacher)"]}, [32], []),
    "srft_table": ("online", {"rl": ["entropy(rl)"]}, [32], []),
    "swift_table": ("online", {"ref": ["nll(ref)"]}, [32], []),
    "t3s": ("frozen", {"early": ["nll(early)"], "ref": ["nll(ref)"]}, [1], []),
    "talr_fixed_ref": ("frozen", {"ref": ["nll(ref)"]}, [32], []),
    "talr_ref": ("run", {"ref": ["nll(ref)"]}, [32, 32], []),  # nll, and its mean over the example
    "token_cleaning": ("frozen", {"ref": ["nll(ref)"], "warm": ["nll(warm)"]}, [1], []),
    "tshirt_table": (
        "frozen",
        {"ref": ["nll(ref)"], "unprompted(ref)": ["nll(unprompted(ref))"]},
        [1],
        [],
    ),
    "top_entropy_ref": ("run", {"ref": ["entropy(ref)"]}, [32], []),
    "top_p_ref": ("run", {"ref": ["nll(ref)"]}, [32], []),
}
CONTRAST = "nll(contrast(positive, negative))"
OF_PAIRS = {
    "cdpo": ("constant", {"negative": [CONTRAST], "ref": ["nll(ref)"]}, [32, 32, 32], []),  # s, logp, 1 - s
    "critical_token": ("constant", {"negative": [CONTRAST], "ref": ["nll(ref)"]}, [32, 32], []),
    "dpo": ("constant", {"ref": ["nll(ref)"]}, [32], []),
    "factuality_preference": ("constant", {"ref": ["nll(ref)"]}, [32], []),
    "fdpo": ("constant", {"ref": ["nll(ref)"]}, [32], []),
    "swift": ("constant", {"ref": ["nll(ref)"], "teacher": ["nll(teacher)"]}, [32, 32, 32], []),
    "tis_dpo": (
        "constant",
        {"negative": ["nll(negative)"], "positive": ["nll(positive)"], "ref": ["nll(ref)"]},
        [32, 32, 32],
        [],
    ),
}
NO_FROZEN_MODEL = {
    "constant": {"diq", "gem", "instruction_mining", "opencoder", "robustft", "selectit", "sft", "tshirt"},
    "data": {
        "atdp_table", "critical_token_table", "diq_table", "faithful_table", "forgetting_table",
        "ignorance_table", "instruction_mining_table", "opencoder_table", "robustft_table",
        "selectit_table", "sftkey_table", "t3s_table", "token_cleaning_table", "wit",
    },
    "run": {"sftkey"},
    "online": {
        "bottom_entropy", "bottom_p", "dft", "dft_table", "eaft", "eaft_axolotl", "eaft_llamafactory",
        "entrodrop", "entrodrop_table", "entropy_scaling", "high_pass", "idft", "idft_release", "pear",
        "profit", "ranktuner", "srft", "talr", "talr_fixed", "top_entropy", "top_p",
    },
}  # fmt: skip

# Forward passes beyond one a pass: `keep` of 30 neighbours with and without the prompt; a contrast is of two.
MORE_FORWARDS = {"tshirt": 60, "cdpo": 1, "critical_token": 1}


@pytest.mark.parametrize("name", list_rules())
def test_plans_of_the_library(name):
    checked = check(name)
    how = plan(checked)
    stage, passes, bits, kept = {**BY_HAND, **OF_PAIRS}.get(name) or (
        next(s for s, names in NO_FROZEN_MODEL.items() if name in names),
        {},
        [],
        [],
    )
    assert str(checked.weight.kind.stage) == stage
    assert {p.models[0]: sorted(p.names) for p in how.passes} == passes
    assert [column.bits for column in how.stored] == bits
    assert list(how.kept) == kept
    facts = explain_json(checked)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cost"]["forward_passes_before"] == len(passes) + MORE_FORWARDS.get(name, 0)
    assert facts["cost"]["forward_passes_a_step"] == 1 + len(kept)
    assert str(checked.regime) in explain(name)


@pytest.mark.parametrize(
    ("rule", "stored", "kept"),
    [
        ("sigmoid(p_on - p_ref)", ["p(ref)"], []),
        ("exp(logratio(on, ref))", ["logp(ref)"], []),
        ("p_ref ** ramp(0, 0.5)", ["nll(ref)"], []),
        ("mass(ref) >= 0.5 and position < 2", ["(mass(ref) >= 0.5) and (position < 2)"], []),
        ("mass(ref) >= 0.5 and p_on > 0.1", ["mass(ref) >= 0.5"], []),
        ("kl(ref, on) < 0.5", [], ["ref"]),
        ("p_ref * (kl(ref, on) < 0.5)", [], ["ref"]),
        ('model t "x"; weight = p(t) * (kl(ref, on) < 0.5)', ["p(t)"], ["ref"]),
        ('model t "x"; weight = kl(ref, t) * p_ref', ["kl(ref, t) * p(ref)"], []),
        ("nll(tempered(ref, 1 + progress)) * 0.1", [], ["ref"]),
        ("p_ref if tau > 1 else p_on", [], []),
    ],
)
def test_what_is_stored(rule, stored, kept):
    given = {"tau": 0.5} if "tau" in rule else {}
    how = compile_rule(rule, **given).plan
    assert [column.name for column in how.stored] == stored
    assert list(how.kept) == kept


def test_models_that_one_statistic_reads_together_run_together():
    how = compile_rule('model t "x"; weight = kl(ref, t) * p_ref * entropy(t)').plan
    assert [(p.models, sorted(p.names)) for p in how.passes] == [
        (("ref", "t"), ["entropy(t)", "kl(ref, t)", "nll(ref)"])
    ]


STORED_RULES = [
    *(name for name, (_, passes, *_) in BY_HAND.items() if passes and not compile_rule(name).plan.surveys),
    "p_ref ** ramp(0, 0.5)",
    "mass(ref) >= 0.5 and position < 2 and p_on > 0.01",
    "rank(ref) * p(tempered(ref, 2)) + margin_ref + pmax_ref + expected_rank_ref + same_top(ref, ref, k=3)",
    "loss = sg(H_ref) * nll_on + (0 if label == neg else p_ref) * p_on",
    "normalize = kept; weight = mass(ref) >= 0.5",
    "normalize = weights; weight = p_ref - 0.1",
]


@pytest.mark.parametrize("text", STORED_RULES)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_stored_is_recomputed(text, rows):
    """Through the pass and stored columns, and through a model at hand: the same loss and gradient."""
    torch.manual_seed(1)
    rule = compile_rule(text)
    width, vocabulary = 6, 30
    targets = torch.randint(0, vocabulary, (3, 5))
    targets[0, :2] = targets[2] = -100
    logits = torch.randn(3, 5, vocabulary, dtype=torch.float64, requires_grad=True)
    names = rule.requires.models - {"on"} | {n for of in rule.plan.passes for n in of.models}
    pairs = {
        n: (
            torch.randn(3, 5, width, dtype=torch.float64),
            torch.randn(vocabulary, width, dtype=torch.float64),
        )
        for n in names
    }
    dense = {n: hidden @ weight.T for n, (hidden, weight) in pairs.items()}
    columns = {"label": ["neg", "pos", "neg"]}
    inside = {n: torch.rand(3, 5, dtype=torch.float64) for n in sorted(inside_of(rule.checked))}
    kept = {}
    for of in rule.plan.passes:
        kept.update(rule.statistics(of, {n: pairs[n] for n in of.models}, targets, rows=rows))
        assert all((v[targets == -100] == 0).all() for v in kept.values())
    stored = {**rule.stored_columns(targets, statistics=kept, columns=columns), **inside}
    expected = rule.loss(logits, targets, models=dense, columns=columns, stored=inside, progress=0.3)
    (gradient,) = torch.autograd.grad(expected.total, logits)
    got = rule.loss(logits, targets, stored=stored, columns=columns, progress=0.3)
    torch.testing.assert_close(got.weights, expected.weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.total, expected.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.denominator, expected.denominator)
    torch.testing.assert_close(torch.autograd.grad(got.total, logits)[0], gradient, rtol=1e-10, atol=1e-12)
    seen = rule.observe(
        logits if rule.observes_on else None, targets, stored=stored, columns=columns, progress=0.3
    )
    again = rule.loss(logits, targets, stored=stored, columns=columns, progress=0.3, step=seen)
    torch.testing.assert_close(again.mean, expected.mean, rtol=1e-6, atol=1e-6)  # counted in float32


def test_a_pair_at_hand_gives_the_same_bits_as_the_pass():
    torch.manual_seed(2)
    rule = compile_rule("p_ref * H_on")
    targets = torch.randint(0, 700, (4, 90))
    targets[:, :11] = -100
    logits, hidden, weight = torch.randn(4, 90, 700), torch.randn(4, 90, 24), torch.randn(700, 24)
    statistics = rule.statistics(rule.plan.passes[0], {"ref": (hidden, weight)}, targets)
    stored = rule.stored_columns(targets, statistics=statistics)
    at_hand = rule.weights(logits, targets, models={"ref": (hidden, weight)})
    assert torch.equal(rule.weights(logits, targets, stored=stored), at_hand)


def test_stored_bools_are_bools():
    rule = compile_rule("prift_mass")
    targets = torch.tensor([[1, -100, 2]])
    stored = rule.stored_columns(targets, statistics={"mass(ref)": torch.tensor([[0.7, 0.9, 0.2]])})
    assert stored["mass(ref) >= tau"].tolist() == [[True, False, False]]
    assert stored["mass(ref) >= tau"].dtype == torch.bool


def test_heads_as_they_are_in_the_wild():
    torch.manual_seed(3)
    hidden, linear = torch.randn(7, 5, dtype=torch.float64), torch.nn.Linear(5, 11, dtype=torch.float64)
    plain = hidden @ linear.weight.T + linear.bias
    torch.testing.assert_close(Head.of(linear).logits(hidden), plain)
    torch.testing.assert_close(Head.of(linear.weight).logits(hidden), hidden @ linear.weight.T)
    capped = Head(linear.weight, linear.bias, scale=0.25, cap=2.0)
    torch.testing.assert_close(capped.logits(hidden), 2.0 * torch.tanh(0.25 * plain / 2.0))
    assert Head(linear.weight.bfloat16()).logits(hidden.bfloat16()).dtype == torch.float32
