"""Regexes in a rule: what they mean in a text, how checking them ends, what a call is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from priority_dsl import PriorityError, Rule, compile_rule, format_rule, parse
from priority_dsl.patterns import BadPattern, compiled, ranges
from priority_dsl.testing import assert_equivalent

TARGETS = torch.tensor([[1, 2, -100], [3, 4, 0]])
AFTER = 'after("#### ")'


@given(
    st.text("ab#1 \n", max_size=30), st.sampled_from(["a", "#+", "(a)b", "(?:ab)+", "1?", "b$", "^a", "\\s+"])
)
def test_ranges_are_those_of_pythons_own_regexes(text: str, pattern: str):
    found = [match.span(1 if "(a)" in pattern else 0) for match in re.finditer(pattern, text)]
    assert ranges("span", pattern, text) == found
    first, end = re.search(pattern, text), len(text) + 1
    assert ranges("after", pattern, text) == ([] if first is None else [(first.end(), end)])
    assert ranges("before", pattern, text) == [(0, end if first is None else first.start())]


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:a{1000}){1000}){1000}", "a{10000000000}", "a{9999999}", "(?x)(a{1 0 0 0}){1000}{1000}",
        "(" * 5000 + ")" * 5000, "[" * 9000, "(?:" * 4000 + "a" + "{2}" * 4000, "a{" + "9" * 5000 + "}",
    ],
    ids=range(8),
)  # fmt: skip
def test_no_regex_hangs_the_checker(pattern: str):
    start = time.monotonic()
    with pytest.raises(BadPattern):
        compiled(pattern)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(?:a?){40}a{40}b|(a|aa)+$"])
def test_a_search_ends_in_time(pattern: str):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        ranges("span", pattern, "a" * 60 + "!", seconds=0.1)
    assert time.monotonic() - start < 5


def test_many_matches_count_as_one_search():
    with pytest.raises(TimeoutError):
        ranges("span", "(?=(a*?)*?b)a", "a" * 3000 + "b" + "a" * 3000, seconds=0.05)
    assert ranges("before", "a", "a" * 1_000_000, seconds=1) == [(0, 0)]


def test_text_and_tree_keep_a_regex():
    text = r'let key = span("\"(\d+)\" \\n"); weight = 1 if key else 0.5'
    assert format_rule(text) == text.replace("; ", "\n") + "\n"
    tree = parse(text)
    assert Rule.model_validate_json(tree.model_dump_json()) == tree
    [name] = compile_rule(text).requires.columns
    assert compile_rule(text).columns[name].pattern == ("span", r'"(\d+)" \\n')


def test_a_call_gives_what_the_regex_asks_as_a_column():
    rule = compile_rule(f"1 if {AFTER} else 0.5")
    assert rule.requires.columns == {AFTER}
    marks = torch.tensor([[False, True, True], [True, False, False]])
    weights = rule.weights(None, TARGETS, columns={AFTER: marks})
    assert weights.tolist() == [[0.5, 1.0, 0.0], [1.0, 0.5, 0.5]]
    assert torch.equal(rule.weights(None, TARGETS, columns={AFTER: marks.tolist()}), weights)
    with pytest.raises(PriorityError, match=re.escape(f"pass columns={{'{AFTER}': ...}}")) as caught:
        rule.weights(None, TARGETS)
    assert caught.value.diagnostics[0].code == "PD502"
    with pytest.raises(PriorityError, match="PD503"):
        rule.weights(None, TARGETS, columns={AFTER: [True, False]})


def test_regexes_that_differ_in_signs_alone_are_columns_of_their_own():
    rule = compile_rule('1 if span("#+") else 0.5 if span("##") else 0.25')
    marks = torch.tensor([[True, False, False], [False, True, False]])
    weights = rule.weights(None, TARGETS, columns={'span("#+")': marks, 'span("##")': marks.roll(1, -1)})
    assert weights.tolist() == [[1.0, 0.5, 0.0], [0.25, 1.0, 0.5]]


def test_stored_values_that_differ_in_signs_alone_are_inputs_of_their_own():
    rule = compile_rule("1 if mass(ref) >= 0.5 else p_on if mass(ref) < 0.5 else 2")
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    ref = logits.flip(0)
    stored = {c.name: torch.tensor([[True, False, False]] * 2) for c in rule.plan.stored}
    assert len(stored) == 2
    weights = rule.weights(logits, TARGETS, models={"ref": ref}, stored=stored)
    assert weights[:, 0].tolist() == [1.0, 1.0]
    assert weights[:, 1].tolist() == [2.0, 2.0]


def test_equals_a_function_by_hand():
    def by_hand(logits, models, columns):
        p, marks = logits.softmax(-1).amax(-1), columns[AFTER] | ~columns['before("x")']
        return torch.where(marks, p, torch.full_like(p, 0.25))

    assert_equivalent(f'pmax_on if {AFTER} or not before("x") else 0.25', by_hand)


def test_checking_a_regex_loads_no_torch():
    code = "import sys, priority_dsl; priority_dsl.check('after(\"#### \")'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
