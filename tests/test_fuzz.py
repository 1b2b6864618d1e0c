"""Anything may be written: parse and check answer with a rule or a PriorityError, quickly.

Every text is also sent through `format_rule` and JSON where it parses.
"""

from __future__ import annotations

import random
import string
import time

import pytest

from priority_dsl import PriorityError, Rule, check, compile_rule, explain, format_rule, list_rules, parse
from priority_dsl.library import rules_folder
from priority_dsl.nodes import KEYWORDS, SCOPES
from priority_dsl.registry import REGISTRY

SLOWEST = 1.0  # seconds of processor time
LEAVES = ["on", "ref", "p_on", "H_ref", "label", "tau", "inf", "1", "0.5"]
WORDS = [*sorted(KEYWORDS | SCOPES), *REGISTRY.names(), *LEAVES]
SIGNS = [
    *"+-*/<>=!()[]{},;:#\"'\n \t\\^&|~@$%.?", "**", "<=", "==", "!=", '"""', "->", "é", "😀",
    "\x00", "\ud800",
]  # fmt: skip


def survive(text: str) -> bool:
    """Parse and check a text; whether it is a rule. Fails on any other exception and on a slow answer.

    What is slow by chance, on a machine with other work, is not slow three times.
    """
    for _ in range(3):
        start = time.process_time()
        is_rule = _is_rule(text)
        taken = time.process_time() - start
        if taken < SLOWEST:
            return is_rule
    pytest.fail(f"{taken:.1f} s for {text[:80]!r}")


def _is_rule(text: str) -> bool:
    try:
        tree = parse(text)
        printed = format_rule(tree)
        assert parse(printed) == tree
        check(tree)
        return True
    except PriorityError as error:
        if not error.diagnostics or not str(error):
            pytest.fail("an error without a word")
        return False


def random_text(draw: random.Random) -> str:
    """A few characters, or words and signs of the language in any order."""
    if draw.random() < 0.4:
        alphabet = string.printable + "é😀ßπ\x00\ufeff\u2028"
        return "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 60)))
    return "".join(
        draw.choice(WORDS if draw.random() < 0.6 else SIGNS) + draw.choice(["", " "])
        for _ in range(draw.randint(1, 30))
    )


def mutated(text: str, draw: random.Random) -> str:
    """A valid rule with a few letters, words or lines lost, doubled, swapped or replaced."""
    for _ in range(draw.randint(1, 4)):
        where, length = draw.randint(0, len(text)), draw.randint(0, 12)
        piece = text[where : where + length]
        new = draw.choice(["", piece * 2, draw.choice(WORDS), draw.choice(SIGNS), piece[::-1], piece.upper()])
        text = text[:where] + new + text[where + length :]
    return text


def test_random_texts():
    draw = random.Random(1)
    for _ in range(5000):
        survive(random_text(draw))


def test_mutated_rules():
    draw = random.Random(2)
    library = [(rules_folder() / f"{name}.rule").read_text() for name in list_rules()]
    still_rules = sum(survive(mutated(draw.choice(library), draw)) for _ in range(5000))
    assert 250 < still_rules < 4750, "the mutations must both keep and break rules"


LONG = {
    "brackets": "(" * 19_000,
    "nested": "(" * 90 + "p_on" + ")" * 90,
    "too nested": "(" * 9_000 + "p_on" + ")" * 9_000,
    "minus": "-" * 19_000 + "p_on",
    "not": "not " * 4_000 + "p_on",
    "power": "p_on" + " ** p_on" * 2_000,
    "sum": "p_on" + " + p_on" * 2_000,
    "sum of 90": "p_on" + " + p_on" * 90,
    "calls": "exp(" * 3_000 + "p_on" + ")" * 3_000,
    "ifs": "1 if p_on > 0 else " * 900 + "1",
    "comparisons": "p_on" + " < p_on" * 2_000,
    "quotes": '"' * 19_999,
    "comment": "#" * 19_999,
    "one line": "weight = p_on" + " " * 19_000,
    "too long": "p_on + " * 10_000,
    "newlines": "\n" * 19_990 + "p_on > 0",
    "semicolons": ";" * 19_990,
    "unknown names": "\n".join(f"let b{i} = a{i}" for i in range(1_200)),
    "lets": "\n".join(["let b0 = p_on", *(f"let b{i} = b{i - 1} + b{i - 1}" for i in range(1, 700)), "b699"]),
    "doubled sets": "\n".join(
        [
            "let b0 = 1 if p_on > 0.5 else 2",
            *(f"let b{i} = b{i - 1} * b{i - 1}" for i in range(1, 700)),
            "b699",
        ]
    ),
    "models": "\n".join([*(f'model m{i} "x"' for i in range(900)), "p(m0) + p(m899)"]),
    "params": "\n".join([*(f"param q{i} = {i}" for i in range(900)), "q0 + q899"]),
    "columns": "\n".join([*(f"column c{i}: number" for i in range(700)), "c0 + c699"]),
    "members": "label in {" + ", ".join(f"v{i}" for i in range(2_000)) + "}",
    "repeated": "p_on\n" * 3_900,
    "digits": "9" * 19_000,
    "huge": "1e999999999 * p_on",
    "power tower": "9 ** 9 ** 9 ** 9 ** 9",
    "name": "a" * 19_999,
    "underscores": "_" * 19_999 + " + 1",
}


@pytest.mark.parametrize("name", LONG)
def test_long_and_deep_texts(name):
    survive(LONG[name])


def test_nothing_grows_with_what_lets_repeat():
    """600 lets that each double the one before: planning, explaining and compiling stay linear."""
    lines = ["let b0 = p_on * p_ref", *(f"let b{i} = b{i - 1} + b{i - 1}" for i in range(1, 600))]
    text = "\n".join([*lines, "weight = b599 > 1", "loss = weight * nll_on + b599"])
    start = time.process_time()
    explain(text)
    assert compile_rule(text).plan.stored
    assert time.process_time() - start < 20 * SLOWEST


def test_chains_have_a_limit_that_is_said():
    assert survive(LONG["sum of 90"])
    with pytest.raises(PriorityError, match="PD106"):
        check(LONG["sum"])


def test_json_in_and_out():
    for name in list_rules():
        tree = parse((rules_folder() / f"{name}.rule").read_text())
        assert Rule.model_validate_json(tree.model_dump_json()) == tree
