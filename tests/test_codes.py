"""Every code of the table is raised by its bad example, and not by its good one; no other code exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import priority_dsl
from priority_dsl import PriorityError, check, compile_rule
from priority_dsl.codes import CODES

PACKAGE = Path(priority_dsl.__file__).parent


def codes_of(example: str, is_call: bool) -> dict[str, priority_dsl.Diagnostic]:
    """What an example raises or warns of, by code."""
    targets = torch.tensor([[1, 2, -100], [3, 4, 0]])
    names = {
        "check": check,
        "compile_rule": compile_rule,
        "logits": torch.randn(2, 3, 5),
        "ref": torch.randn(2, 3, 5),
        "targets": targets,
        "rows": torch.tensor([[0, 0, 0], [1, 1, 1]]),
        "kept": targets > 2,
        "top": compile_rule("top(p_on, 0.5, batch)"),
        "counts": compile_rule("sft").observe(None, targets),
    }
    try:
        result = eval(example, names) if is_call else check(example)
    except PriorityError as error:
        return {d.code: d for d in error.diagnostics}
    return {} if is_call else {d.code: d for d in result.warnings}


@pytest.mark.parametrize("code", CODES)
def test_examples_of_a_code(code):
    entry = CODES[code]
    found = codes_of(entry.bad, entry.is_call)
    assert code in found, f"{entry.bad!r} gave {list(found)}"
    assert found[code].message
    assert found[code].help, "every mistake has a way out"
    if not entry.is_call and code not in ("PD201", "PD202"):
        assert found[code].span is not None, "every mistake in a text has a place"
    assert code not in codes_of(entry.good, entry.is_call)
    assert not [c for c in codes_of(entry.good, entry.is_call) if c < "PD400" or c >= "PD500"]


def test_the_table_and_the_source_name_the_same_codes():
    source = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "codes.py")
    assert set(re.findall(r"PD\d{3}", source)) - {"PD203"} <= set(CODES)
    used = set(re.findall(r'"(PD\d{3})"', source))
    assert used == set(CODES)


def test_every_entry_is_written_out():
    for code, entry in CODES.items():
        assert re.fullmatch(r"PD[1-5]\d\d", code)
        assert entry.title
        assert entry.explanation.endswith(".")
