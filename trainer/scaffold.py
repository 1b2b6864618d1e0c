"""`priority new`: a rule file and its test, which pass as they are and are there to be edited."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.faults import ConfigFault

RULE = '''"""{name}: say in one sentence which tokens count, and why."""
cite "where the formula stands, or: own idea"
param floor = 0.1 in [0, 1]
weight = max(p_on, floor)
'''

TEST = '''"""{name}.rule equals the same weights written by hand, and keeps its promises."""

from pathlib import Path

from priority_dsl.testing import assert_equivalent

RULE = str(Path(__file__).with_name("{name}.rule"))


def by_hand(logits, targets, models, columns):
    """Weights like `targets`, in plain torch; logits [..., V] predict targets [...], -100 is ignored."""
    p = logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return p.clamp(min=0.1)


def test_{name}_equals_the_formula_by_hand():
    assert_equivalent(RULE, by_hand)
'''


def write_rule(name: str, folder: Path) -> list[Path]:
    """Write NAME.rule and test_NAME.py; `ConfigFault` where the name is no word or a file exists."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ConfigFault(f"{name}: a rule's name has letters, digits and _ and begins with a letter")
    texts = {folder / f"{name}.rule": RULE, folder / f"test_{name}.py": TEST}
    for path in texts:
        if path.exists():
            raise ConfigFault(f"{path}: exists already; choose another name or folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text.format(name=name), encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"{folder}: cannot be written: {error.strerror}") from error
    return list(texts)
