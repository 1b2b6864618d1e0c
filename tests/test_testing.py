"""What users test their own rules with: it passes what is right and names what is wrong."""

from __future__ import annotations

import doctest
import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import priority_dsl.reference
from priority_dsl import PriorityError, check, compile_rule, list_rules
from priority_dsl.testing import (
    Case,
    Scope,
    assert_equivalent,
    case,
    cases,
    check_properties,
    drawing,
    equivalence,
    expressions,
    properties,
    rules,
    whole_rules,
)

PAGES = [
    priority_dsl.reference,
    drawing,
    equivalence,
    properties,
    case,
    whole_rules,
]


@pytest.mark.parametrize("module", PAGES, ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_run(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_oracle_needs_no_torch() -> None:
    program = "import sys, priority_dsl.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Strategies -------------------------------------------------------------------------------------


@given(expressions())
def test_expressions_are_numbers(text: str) -> None:
    _checks(f"weight = {text}")


@given(expressions(condition=True, scope=Scope(models=("on", "ref"), numbers=("tau",))))
def test_conditions_are_conditions(text: str) -> None:
    checked = _checks(f"param tau = 0.5; weight = 1 if {text} else 0")
    assert checked is None or checked.range.is_boolean


def _checks(text: str):
    """The checked rule; None where a drawn text says something like 1 / 0, which is an error."""
    try:
        return check(text)
    except PriorityError as error:
        if {d.code for d in error.diagnostics} != {"PD309"}:
            raise
        return None


@settings(max_examples=50)
@given(rules())
def test_rules_check(text: str) -> None:
    assert check(text).source.text == text


def test_drawn_rules_have_every_statement() -> None:
    seen: set[str] = set()

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(rules())
    def look(text: str) -> None:
        seen.update(statement.kind for statement in check(text).tree.statements)

    look()
    assert seen == {"doc", "cite", "param", "model", "column", "let", "weight", "loss", "over", "normalize"}


COLUMNS = """
model teacher "a stronger model"
column label: {pos, neg}
column source: category per token
column marked: bool
column score: number in (0, 1] per token
weight = score if label == neg and marked and source == web and role == assistant else p(teacher)
"""


@given(cases(check(COLUMNS)))
def test_cases_fit_the_declarations(drawn: Case) -> None:
    rows, tokens, size = drawn.logits.shape
    assert drawn.targets.shape == (rows, tokens)
    assert set(drawn.models) == {"teacher"}
    assert set(drawn.columns) == {"label", "source", "marked", "score", "role"}
    assert ((drawn.targets == -100) | ((drawn.targets >= 0) & (drawn.targets < size))).all()
    assert drawn.columns["score"].shape == (rows, tokens)
    assert ((drawn.columns["score"] > 0) & (drawn.columns["score"] <= 1)).all()
    assert drawn.columns["marked"].shape in ((rows,), (rows, tokens))
    assert set(_flat(drawn.columns["label"])) <= {"pos", "neg"}
    assert set(_flat(drawn.columns["source"])) <= {"web", "unseen"}
    again = eval(repr(drawn), {"Case": Case, "torch": torch, "inf": math.inf, "nan": math.nan})
    assert torch.equal(again.logits.nan_to_num(nan=7.0), drawn.logits.nan_to_num(nan=7.0))
    assert again.columns.keys() == drawn.columns.keys()


def _flat(values: list) -> list:
    return [v for row in values for v in (row if isinstance(row, list) else [row])]


# assert_equivalent ------------------------------------------------------------------------------


def log_p(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def mass(logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1))
    share = (logits.softmax(-1) * (logits <= z)).sum(-1)
    return share.masked_fill(~(logits > z).any(-1), 1.0)


def test_equal_weights_pass() -> None:
    assert_equivalent("sg(p_on)", lambda logits, targets: log_p(logits, targets).exp())
    assert_equivalent("weight = mass(ref)", lambda models, targets: mass(models["ref"], targets), examples=50)
    assert_equivalent("prift_mass", lambda models, targets: mass(models["ref"], targets) >= 0.25, tau=0.25)
    assert_equivalent(
        "column score: number in [0, 1] per token; weight = score if progress < 0.5 else epoch",
        lambda columns, progress, epoch: columns["score"] if progress < 0.5 else 0 * columns["score"] + epoch,
    )


@pytest.mark.parametrize("normalize", ["tokens", "kept", "weights", "none", "examples"])
def test_equal_losses_pass(normalize: str) -> None:
    def dft(logits: Tensor, targets: Tensor) -> Tensor:
        return -log_p(logits, targets) * log_p(logits, targets).exp().detach()

    assert_equivalent(f"weight = p_on; normalize = {normalize}", dft, of="loss", examples=60)


def test_a_wrong_weight_is_named() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_equivalent("weight = mass(on)", lambda logits, targets: mass(logits, targets) * 1.001)
    message = str(caught.value)
    assert re.search(
        r"the weight of row \d, position \d \(target \d\): the rule gives 1\.0, the function by", message
    )
    assert "by hand 1.001" in message
    assert "rule: weight = mass(on)" in message
    assert "batch: Case(logits=torch.tensor(" in message


def test_a_strict_comparison_is_found() -> None:
    def strict(logits: Tensor, targets: Tensor) -> Tensor:
        z = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1))
        own = logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (logits.softmax(-1) * (logits < z)).sum(-1) + own

    assert_equivalent("weight = mass(on, ties=exclude)", strict)
    with pytest.raises(AssertionError, match="the weight of row"):
        assert_equivalent("weight = mass(on)", strict)


def test_a_forgotten_detach_is_found() -> None:
    def attached(logits: Tensor, targets: Tensor) -> Tensor:
        return -log_p(logits, targets) * log_p(logits, targets).exp()

    with pytest.raises(AssertionError, match="the gradient of the loss in logit"):
        assert_equivalent("dft", attached, of="loss")
    assert_equivalent("loss = p_on * nll_on", attached, of="loss")


def test_a_loss_without_gradient_is_found() -> None:
    with pytest.raises(AssertionError, match="the gradient of the loss in logit"):
        assert_equivalent("sft", lambda logits, targets: -log_p(logits, targets).detach(), of="loss")


def test_a_function_of_the_wrong_shape_is_told() -> None:
    with pytest.raises(AssertionError, match="not like the targets"):
        assert_equivalent("sft", lambda logits: logits)
    with pytest.raises(AssertionError, match="gives float, not a tensor"):
        assert_equivalent("sft", lambda logits: 1.0)


def test_a_weight_that_is_not_finite_is_told() -> None:
    with pytest.raises(AssertionError, match="PD505"):
        assert_equivalent(
            "weight = 1 / (1 - pmax(on))",
            lambda logits: (1 / (1 - logits.softmax(-1).amax(-1))).clamp(max=1e9),
        )


# check_properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_rules())
def test_the_library_keeps_its_promises(name: str) -> None:
    assert check_properties(name, examples=20) == list(properties.PROPERTIES)


def test_a_broken_promise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = compile_rule("weight = p_on")
    monkeypatch.setattr(type(rule), "range", check("weight = mass(on) >= 2 * p_on").range)
    with pytest.raises(AssertionError) as caught:
        check_properties(rule)
    assert str(caught.value).startswith("weights are finite and in their range: no\na weight is ")
