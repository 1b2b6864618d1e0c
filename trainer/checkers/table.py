"""Whether a sampled response is right: a table of checkers, each a function that says so, no judgement."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any, NamedTuple

from trainer.checkers.choices import choose
from trainer.checkers.numbers_in_text import bare, boxed_contents, same_number, value_of
from trainer.checkers.sandbox import Limits, active_layers, missing, run_python
from trainer.faults import ConfigFault
from trainer.functions import load_function

Row = Mapping[str, object]
DEFAULT = Limits()


class Verdict(NamedTuple):
    """Whether a response is right, and if not, why, in a few words; `failed` where the checker stopped."""

    right: bool
    why: str = ""
    failed: bool = False

    def __bool__(self) -> bool:
        return self.right


# Takes the response, the reference response and the fields of the row; says whether the response is right.
Checker = Callable[[str, str, Row], "bool | Verdict"]
FINAL = re.compile(r"####\s*(-?[$]?[\d,]*\.?\d+)")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What checking one response may take, and whether code runs where it cannot be kept from harm."""

    limits: Limits = DEFAULT
    unsafe: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """A checker of the table: what makes a response right, in a line, and the function that says so.

    `bounded` functions also take `bounds` and run something outside this process, so that several can run at
    once; `prepare` says, before anything is drawn, what this machine lacks for it (`ConfigFault`) or has.
    """

    name: str
    summary: str
    function: Callable[..., bool | Verdict]
    bounded: bool = False
    prepare: Callable[[Bounds], str] | None = None

    def __call__(self, response: str, reference: str, row: Row, bounds: Bounds | None = None) -> Verdict:
        """Whether a response is right."""
        extra = {"bounds": bounds or Bounds()} if self.bounded else {}
        found = self.function(response, reference, row, **extra)
        return found if isinstance(found, Verdict) and not found.right else Verdict(bool(found))


CHECKERS: dict[str, Check] = {}
"""The checkers by name, in the order of definition; help, pages and did-you-mean read it."""


def checker(summary: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function into the table under its name, `python_tests` as `python`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.partition("_")[0]
        CHECKERS[name] = Check(name, summary, function, **settings)
        return function

    return register


def find_checker(name: str) -> Check:
    """The checker of that name, or a person's own as `module:function`."""
    if name in CHECKERS:
        return CHECKERS[name]
    if ":" not in name:
        close = get_close_matches(name, CHECKERS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigFault(
            f"--checker {name}: unknown; {hint}known are {', '.join(CHECKERS)}; your own is module:function"
        )
    return Check(name, "a function of one's own", load_function("--checker", name))


@checker("the text of the reference")
def exact(response: str, reference: str, row: Row) -> bool:
    """Whether the response is the reference, white space at both ends aside."""
    return response.strip() == reference.strip()


@checker("the number after ####")
def gsm8k(response: str, reference: str, row: Row) -> bool:
    """Whether the number after the last `####` is the reference's; a response without one is wrong."""
    found, wanted = final_number(response), final_number(reference)
    return found is not None and found == wanted


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, without dollar sign and thousands separators; None without one."""
    numbers = FINAL.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "").replace("$", "")) if numbers else None
    except InvalidOperation:
        return None


@checker("the last number, after #### or in \\boxed{} where there is one")
def numeric(response: str, reference: str, row: Row) -> Verdict:
    """Whether the final number is the reference's, units, separators and notation aside.

    Whole numbers must be equal, others within a millionth. Raises ValueError for a reference without one.
    """
    wanted = value_of(reference)
    if wanted is None:
        raise ValueError(f"the reference has no number: {reference[:60]!r}")
    found = value_of(response)
    if found is None:
        return Verdict(False, "no number")
    return Verdict(same_number(found, wanted), f"{found}, not {wanted}")


def _maths_is_there(bounds: Bounds) -> str:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigFault(
            "--checker boxed: needs the library math-verify: pip install 'priority_dsl[maths]' "
            "(numeric and exact need nothing)"
        )
    return ""


@checker("the expression in the last \\boxed{}, by math-verify", bounded=True, prepare=_maths_is_there)
def boxed(response: str, reference: str, row: Row, bounds: Bounds) -> Verdict:
    """Whether the expression in the last box is mathematically the reference's; without a box it is wrong."""
    from trainer.checkers.maths import same_expression

    boxes, known = boxed_contents(response), boxed_contents(reference) or [reference]
    if not boxes:
        return Verdict(False, "no \\boxed{}")
    found, wanted = bare(boxes[-1]), bare(known[-1])
    if found == wanted != "":
        return Verdict(True)
    try:
        return Verdict(same_expression(wanted, found, bounds.limits), found[:60])
    except TimeoutError:
        return Verdict(False, f"not compared within {bounds.limits.seconds:g} s")


@checker("the letter or the text of the right option (fields options, choices, opa to opd)")
def choice(response: str, reference: str, row: Row) -> Verdict:
    """Whether the response chooses the right option of the row; ValueError for a row without options."""
    found, wanted = choose(response, row), choose(reference, row, key=True)
    if not wanted:
        raise ValueError(f"no option is the reference {reference[:60]!r}")
    if not found:
        return Verdict(False, "no option chosen")
    return Verdict(bool(found & wanted), "/".join(sorted(found)))


def _sandbox_holds(bounds: Bounds) -> str:
    layers = active_layers()
    lacking = missing(layers, root=os.geteuid() == 0)
    if lacking and not bounds.unsafe:
        raise ConfigFault(
            f"--checker python: this machine keeps code that a model wrote not from: {', '.join(lacking)} "
            f"(layers: {', '.join(layers) or 'none'}); run it in a container of its own, and there with "
            "--unsafe-checker"
        )
    beware = f"; NOT KEPT FROM: {', '.join(lacking)} (--unsafe-checker)" if lacking else ""
    return f"sandbox: {', '.join(layers)}{beware}"


@checker(
    "code that passes the row's tests (test, test_list), in a sandbox", bounded=True, prepare=_sandbox_holds
)
def python_tests(response: str, reference: str, row: Row, bounds: Bounds) -> Verdict:
    """Whether the code in the response passes the tests of the row, run where it can do no harm."""
    from trainer.checkers.code_answers import program_of, row_tests

    tests = row_tests(row)
    outcome = run_python(program_of(response, row), tests, bounds.limits, bounds.unsafe)
    if outcome.refused:
        raise RuntimeError(outcome.reason)
    return Verdict(outcome.passed, outcome.reason)
