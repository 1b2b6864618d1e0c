"""The specification is the test: `tests/language/*.md` hold prose, rules, and what is said of them.

A block `rule` is followed by a block `kind` (what the checker derives) or `error` (what it reports, word
for word; warnings too). To write the expected blocks anew after a change of a message, look at the
difference and keep it: `UPDATE_LANGUAGE=1 pytest tests/test_language.py`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from priority_dsl import CheckedRule, PriorityError, check

FOLDER = Path(__file__).parent / "language"
BLOCKS = re.compile(r"```rule\n(.*?)```\n\n```(kind|error)\n(.*?)```\n", re.DOTALL)


def cases() -> list[tuple[Path, int, str, str]]:
    """Every rule with what is expected: file, number of the block, rule, expected text."""
    found = []
    for path in sorted(FOLDER.glob("*.md")):
        for number, match in enumerate(BLOCKS.finditer(path.read_text())):
            found.append((path, number, match[1], match[3]))
    return found


def said(rule: str) -> tuple[str, str]:
    """What is said of a rule: the kind of block and its text."""
    try:
        return "kind", described(check(rule.rstrip("\n"), **given(rule)))
    except PriorityError as error:
        return "error", f"{error}\n"


def given(rule: str) -> dict[str, float]:
    """Values given with a rule, from comments `# given tau=2`."""
    return {name: float(value) for name, value in re.findall(r"# given (\w+)=(\S+)", rule)}


def described(checked: CheckedRule) -> str:
    """Everything that the checker derives for a rule."""
    kind = checked.weight.kind
    lines = [
        f"{checked.regime}: {kind.range} per {kind.extent}, {kind.stage}",
        *(f"loss per {v.kind.extent} in {v.kind.range}, {v.kind.stage}" for v in (checked.loss,) if v),
        *(f"reads {', '.join(sorted(names))}" for names in [reads(checked)] if names),
        *(str(warning) for warning in checked.warnings),
    ]
    return "\n".join(lines) + "\n"


def reads(checked: CheckedRule) -> set[str]:
    """The statistics and columns of a rule."""
    return set(checked.requires.statistics | checked.requires.columns)


@pytest.mark.parametrize(
    ("path", "number", "rule", "expected"), cases(), ids=lambda v: getattr(v, "stem", None)
)
def test_language(path, number, rule, expected):
    assert said(rule)[1] == expected


def test_there_is_a_specification():
    assert len(cases()) >= 100


@pytest.mark.skipif("UPDATE_LANGUAGE" not in os.environ, reason="only to write the expected blocks anew")
def test_update():
    for path in FOLDER.glob("*.md"):
        text = BLOCKS.sub(
            lambda m: "```rule\n{}```\n\n```{}\n{}```\n".format(m[1], *said(m[1])), path.read_text()
        )
        path.write_text(text)


@pytest.mark.parametrize(
    ("path", "number", "rule", "expected"), cases(), ids=lambda v: getattr(v, "stem", None)
)
def test_every_mistake_has_a_place_and_a_way_out(path, number, rule, expected):
    for finding in expected.replace("\nwarning[", "\n\nerror[").split("error[")[1:]:
        assert "= help: " in finding
        assert " --> " in finding or finding[:5] in ("PD201", "PD206")
