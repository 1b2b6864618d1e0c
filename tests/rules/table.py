"""One table of all library rules: regime, plan, and whether its hand-written test and its training run pass.

`make table` (or `python -m tests.rules.table`) runs the tests of `tests/rules` and prints it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from priority_dsl import check, list_rules
from priority_dsl.pages import table
from priority_dsl.plan import Plan, plan

FOLDER = Path(__file__).parent
TRAINING = "test_trains"


class Outcomes:
    """Listens to a run of the tests: which passed and failed, by rule, apart for training runs."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, bool], dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count one finished test for every rule that its name names."""
        if report.when != "call" and report.outcome != "failed":
            return
        test, _, parameters = report.nodeid.partition("::")[2].partition("[")
        trains = test == TRAINING
        for name in set(re.split(r"[-\[\] ]", parameters)) & set(list_rules()):
            if report.outcome in ("passed", "failed"):
                self.of[name, trains][report.outcome] += 1

    def shown(self, name: str, trains: bool) -> str:
        """How many tests of a rule passed; what failed is said."""
        counts = self.of[name, trains]
        if counts["failed"]:
            return f"{counts['failed']} FAILED"
        return f"{counts['passed']} passed" if counts["passed"] else "none"


def summary(how: Plan) -> str:
    """A plan in a few words."""
    said = [f"{' and '.join(p.models)} once" for p in (*how.keep, *how.passes)]
    said += [f"{sum(c.bits for c in how.stored)} bits a token"] * bool(how.stored)
    said += [f"{name} at each step" for name in how.kept]
    return ", ".join(dict.fromkeys(said)) or "nothing before training"


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; the exit code is pytest's, or 1 where a rule has no test or run."""
    outcomes = Outcomes()
    code = pytest.main(["-q", "--no-header", "--tb=short", str(FOLDER), *arguments], plugins=[outcomes])
    rows, bare = [], []
    for name in list_rules():
        checked = check(name)
        tested, trained = outcomes.shown(name, False), outcomes.shown(name, True)
        bare += [name] * ("none" in (tested, trained))
        rows.append([name, str(checked.regime), summary(plan(checked)), tested, trained])
    print(table(["rule", "regime", "before training", "tests", "training runs"], rows))
    print(f"{len(rows)} rules; without a test or a training run: {', '.join(bare) or 'none'}")
    return int(code) or int(bool(bare))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
