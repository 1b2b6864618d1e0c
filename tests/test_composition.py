"""Rules inside rules: the same as what is written out, names of their own, clear refusals."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given

from priority_dsl import PriorityError, check, compile_rule, library, list_rules
from priority_dsl.checked import text
from priority_dsl.composition import common
from priority_dsl.kinds import Range
from priority_dsl.plan import plan
from priority_dsl.testing import assert_equivalent, cases
from priority_dsl.testing.comparing import drawing
from priority_dsl.values import walk

# What reads rules, and the same written out.
PAIRS = {
    'rule("dft") * rule("prift_mass")': "p_on * (mass(ref) >= 0.5)",
    'rule("prift_mass", tau=0.2)': "mass(ref) >= 0.2",
    'param t = 2; weight = rule("talr_fixed", tau=t)': (  # the inner range holds of what is given
        "param t = 2 in (0, inf); weight = max(p_on ** (1/t), 0.01)"
    ),
    'rule("prift_mass") if rule("high_pass", epsilon=0.5) else 0.1': (
        "(mass(ref) >= 0.5) if nll_on >= 0.5 else 0.1"
    ),
    'rule("eaft", k=3, alpha=2) + rule("idft")': (
        "(topk_entropy(on, 3) / log(3)) ** 2 + p_on ** exp(-clip(logp_on + H_on, -1, 1))"
    ),
    'weight = rule("dft"); loss = weight * nll_on + 0.1 * rule("prift_prob") * H_on': (
        "weight = p_on; loss = weight * nll_on + 0.1 * p_ref * H_on"
    ),
    'loss = rule("dft") * nll_on': "loss = sg(p_on) * nll_on",
    'normalize = kept; over = all; weight = rule("wit", w_prompt=0.2)': (
        "normalize = kept; over = all; weight = 1 if response else 0.2"
    ),
}


@pytest.mark.parametrize("composed", PAIRS)
def test_a_rule_inside_is_what_is_written_out(composed):
    rule, plain = compile_rule(composed), compile_rule(PAIRS[composed])

    @drawing(60)
    @given(case=cases(plain, extreme=False))
    def compare(case):
        one, other = (r.loss(case.logits, case.targets, **case.settings) for r in (rule, plain))
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-9)

    compare()
    assert rule.regime == plain.regime
    assert rule.requires == plain.requires
    assert rule.range == plain.range
    assert (rule.over, rule.checked.normalize) == (plain.over, plain.checked.normalize)


def test_the_plan_is_that_of_what_is_written_out():
    composed, plain = (
        plan(check(r)) for r in ('rule("dft") * rule("prift_mass")', "p_on * (mass(ref) >= 0.5)")
    )
    assert composed == plain
    assert [c.name for c in composed.stored] == ["mass(ref) >= 0.5"]


def test_it_equals_a_method_by_hand():
    def by_hand(logits, targets):
        chance = logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (chance**0.5).clamp(min=0.2)

    assert_equivalent('rule("talr_fixed", tau=t, w_min=0.2)', by_hand, t=2.0, examples=60)


def test_a_sweep_reaches_the_inner_rule():
    for t in (0.2, 0.7):
        rule = compile_rule('param t = 0.5; weight = rule("prift_mass", tau=t)', t=t)
        assert rule.plan == compile_rule("param t = 0.5; weight = mass(ref) >= t", t=t).plan
        assert rule.params == {"t": t}


# Each rule of the library, read by another ------------------------------------------------------


@pytest.mark.parametrize("name", list_rules())
def test_every_rule_of_the_library(name):
    alone = check(name)
    kept = [s for s in alone.tree.statements if s.kind not in ("doc", "weight", "loss")]
    stated = [alone.source.text[slice(*s.span)] for s in kept if s.span]
    handed = "".join(f", {parameter}={parameter}" for parameter in alone.params)
    composed = "\n".join([*stated, f'weight = rule("{name}"{handed})'])
    if alone.loss is not None:
        with pytest.raises(PriorityError, match="has a loss of its own"):
            check(composed)
        return
    inside = check(composed)
    assert inside.regime == alone.regime
    assert inside.requires == alone.requires
    assert inside.range == alone.range
    assert (inside.models.keys(), inside.columns.keys()) == (alone.models.keys(), alone.columns.keys())
    assert inside.keep == alone.keep  # the outer rule's own, with the draws of its own text
    assert inside.groups == alone.groups


# Names ------------------------------------------------------------------------------------------


def test_names_of_the_inner_rule_are_its_own():
    checked = check('let surprise = 2; let g = 3; param tau = 7; weight = g * surprise * tau * rule("idft")')
    assert checked.params["tau"].value == 7
    assert set(checked.params) == {"tau"}
    with pytest.raises(PriorityError, match="unknown name `surprise`"):
        check('rule("idft") * surprise')


def test_an_implied_parameter_is_not_the_inner_rules():
    assert (
        check('rule("prift_mass") * tau', tau=0.1).weight == check("(mass(ref) >= 0.5) * tau", tau=0.1).weight
    )


def test_models_and_columns_come_along():
    assert check('rule("prift_cross")').models.keys() == check("prift_cross").models.keys()
    inside = check('rule("opencoder_table")').columns
    assert {n: (c.element, c.extent, c.range) for n, c in inside.items()} == {
        n: (c.element, c.extent, c.range) for n, c in check("opencoder_table").columns.items()
    }


def test_a_declaration_of_the_same_is_read_once():
    rule = compile_rule(
        'column label: {pos, neg}; weight = rule("forgetting_table") if label == neg else 0.5'
    )
    weights = rule.weights(None, torch.tensor([[1], [2]]), columns={"label": ["neg", "pos"]})
    assert weights.tolist() == [[-1.0], [0.5]]
    assert not [w for w in rule.checked.warnings if w.code == "PD408"]


def test_common_ranges():
    assert common(Range(-1, 2), Range(0, 1, low_open=True)) == Range(0, 1, low_open=True)
    assert common(Range(0, 1, high_open=True), Range(0, 1)) == Range(0, 1, high_open=True)
    assert common(Range.of((0.5,)), Range(0, 1)) == Range.of((0.5,))
    assert common(Range.of((0.5, 3.0)), Range(0, 1)) == Range.of((0.5,))


# A library of our own ---------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Takes rules by name as the whole library."""
    monkeypatch.setattr(library, "rules_folder", lambda: tmp_path)

    def fill(**rules: str) -> None:
        for name, rule in rules.items():
            (tmp_path / f"{name}.rule").write_text(rule)

    return fill


def errors(rule: str) -> list[str]:
    with pytest.raises(PriorityError) as caught:
        check(rule)
    return [str(d) for d in caught.value.diagnostics]


def test_a_rule_that_reads_itself(shelf):
    shelf(
        a='weight = rule("b") * 2',
        b='weight = rule("c")',
        c='weight = p_on + rule("a")',
        d='weight = rule("d")',
    )
    (found,) = errors("d")
    assert found.startswith("error[PD213]: the rule `d` reads itself: `d` reads `d`\n  --> d.rule:1:10\n")
    (found,) = errors('1 + rule("a")')
    assert found == (
        "error[PD213]: the rule `a` reads itself: `a` reads `b` reads `c` reads `a`\n"
        "  --> c.rule:1:17\n"
        "   |\n"
        ' 1 | weight = p_on + rule("a")\n'
        "   |                 ^^^^^^^^^ this closes the circle\n"
        "   = help: a rule of the library reads only rules that do not read it\n"
        '           read by `rule("c")` at b.rule:1:10\n'
        '           read by `rule("b")` at a.rule:1:10\n'
        '           read by `rule("a")` at <rule>:1:5'
    )


def test_rules_in_rules_in_rules(shelf):
    shelf(
        outer='param t = 0.5 in [0, 1]\nweight = rule("inner", s=t / 2)',
        inner="param s = 1 in [0, 1]\nweight = p_on ** s",
    )
    assert text(check('param u = 0.4; weight = rule("outer", t=u)').weight) == "sg((p(on) ** (u / 2)))"
    assert check('rule("outer", t=0.4)').range == Range(0.0, 1.0)
    (found,) = errors('rule("outer", t=2)')
    assert "the value given for `t` is 2, outside [0, 1]" in found


def test_an_error_inside_has_its_place_and_the_calls_that_lead_to_it(shelf):
    shelf(broken="param k = 1\nweight = p_onn * k", middle='weight = 2 * rule("broken")')
    (found,) = errors('rule("middle")')
    assert "unknown name `p_onn`" in found
    assert "--> broken.rule:2:10" in found
    assert found.endswith(
        'read by `rule("broken")` at middle.rule:1:14\n           read by `rule("middle")` at <rule>:1:1'
    )
    shelf(torn="weight = (p_on")
    (found,) = errors('rule("torn") + p_on')
    assert "--> torn.rule:1:10" in found
    assert 'read by `rule("torn")`' in found


def test_warnings_inside_are_shown(shelf):
    shelf(risky="weight = 1 / H_on")
    (warning,) = check('min(rule("risky"), 5)').warnings
    assert (warning.code, warning.source.name, warning.line) == ("PD405", "risky.rule", 1)


DEMANDS = {
    "over = all": ("over = all", "over = response"),
    "normalize = kept": ("normalize = kept", "normalize = weights"),
    "keep = mean(p_ref, example) > 0.1": (
        "keep = mean(p_ref, example) > 0.1",
        "keep = mean(p_ref, example) > 0.2",
    ),
    "normalize = groups(label == a)": ("normalize = groups(label == a)", "normalize = groups(label == b)"),
}


@pytest.mark.parametrize("demand", DEMANDS)
def test_what_a_rule_says_of_the_whole_must_be_said_here(demand, shelf):
    column = "column label: {a, b}\n"
    shelf(picky=f"{column}{demand}\nweight = p_on if label == a else 0.5")
    same, other = DEMANDS[demand]
    check(f'{column}weight = rule("picky")\n{same}')
    check(f'{column}{same}\nweight = rule("picky")')
    for outer in ("", f"{other}\n"):
        (found,) = errors(f'{column}{outer}weight = rule("picky")')
        assert found.startswith(f"error[PD213]: the rule `picky` says `{demand}`, and this rule does not")
        assert f"write `{demand}` in this rule too" in found


def test_a_default_that_is_stated_asks_for_nothing(shelf):
    shelf(plain="over = response\nnormalize = tokens\nweight = p_on")
    check('rule("plain")')


def test_a_keep_of_parameters_is_compared_as_it_is_bound(shelf):
    shelf(picky="param q = 0.1\nkeep = mean(p_ref, example) > q\nweight = p_on")
    check('keep = mean(p_ref, example) > 0.3; weight = rule("picky", q=0.3)')
    check('param s = 0.3; keep = mean(p_ref, example) > s; weight = rule("picky", q=s)')
    assert "PD213" in errors('keep = mean(p_ref, example) > 0.1; weight = rule("picky", q=0.3)')[0]


def test_declarations_that_differ(shelf):
    shelf(
        one='model big "a larger model"\ncolumn label: {a, b}\nweight = p_big if label == a else 1',
        two='model big "a model of more data"\nweight = p_big',
        three="column big: number in [0, 1]\nweight = big",
        four="weight = 1 if label == c else 0",
        five="weight = 1 if label == d else 0",
        six="column label: {a, b} per token\nweight = label == a",
    )
    (found,) = errors('rule("one") * rule("two")')
    assert "`big` is not the same model in `two` and in `one`" in found
    assert 'declare it as `two` does: `model big "a model of more data"`' in found
    (found,) = errors('rule("two") * rule("three")')
    assert "`big` is a column of `three` and a model of `two`" in found
    (found,) = errors('model big "mine"; weight = rule("one") * p_big')
    assert "in `one` and in this rule" in found
    assert "PD214" in errors('rule("one") + rule("six")')[0]
    assert "PD214" in errors('rule("one") + rule("four")')[0]
    assert check('rule("four") + rule("five")').columns["label"].categories == ("c", "d")
    assert check('1 if label == e else rule("four")').columns["label"].categories == ("e", "c")


def test_columns_that_two_rules_imply_are_one(shelf):
    shelf(four="weight = 1 if label == c else 0", five="weight = 1 if label == d else 0")
    rule = compile_rule('rule("four") + 2 * rule("five")')
    targets = torch.tensor([[1], [2], [3]])
    assert rule.weights(None, targets, columns={"label": ["c", "d", "x"]}).tolist() == [[1], [2], [0]]


def test_chance_inside_draws_for_each_call(shelf):
    shelf(coin="let c = bernoulli(0.5)\nweight = c * 2 - c", coins='weight = rule("coin") * rule("coin")')
    places = {
        v.option("place")
        for v in walk(check('rule("coins") + bernoulli(0.5)').weight)
        if v.word == "bernoulli"
    }
    assert places == {(1, 1, 1), (1, 2, 1), (1,)}
    once = compile_rule('let r = rule("coin"); weight = r - r')
    twice = compile_rule('weight = rule("coin") - rule("coin")')
    targets = torch.ones(1, 50, dtype=torch.long)
    assert not once.weights(None, targets).any()
    assert twice.weights(None, targets).any()


def test_many_calls_are_checked_in_time():
    many = " + ".join(['rule("dft")'] * 90)
    began = time.perf_counter()
    check(f"weight = ({many})")
    assert time.perf_counter() - began < 5


def test_a_keep_with_other_draws_is_the_same_and_another_keep_is_not():
    own = check("tshirt")
    stated = [s for s in own.tree.statements if s.kind not in ("doc", "weight")]
    text = "\n".join(own.source.text[slice(*s.span)] for s in stated if s.span)
    weight = '\nweight = 2 * rule("tshirt", n=n, scale=scale, share=share)'
    assert check(text + weight).range.high == 2
    two_draws = text.replace(
        "unprompted(near)", "unprompted(perturbed(ref, scale))"
    )  # where one is read twice
    assert two_draws != text
    with pytest.raises(PriorityError, match="PD213"):
        check(two_draws + weight)
