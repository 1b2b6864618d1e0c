"""What each checker takes for right, on texts and on the answers of real evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trainer.checkers.checking import Asked, check_all, tell_failures
from trainer.checkers.code_answers import code_of, program_of, row_tests
from trainer.checkers.numbers_in_text import bare, boxed_contents, value_of
from trainer.checkers.sandbox import Limits, active_layers, missing
from trainer.checkers.table import CHECKERS, Bounds, Verdict, find_checker
from trainer.checkers.tasks import TASKS
from trainer.faults import ConfigFault, RunFault
from trainer.layouts import Prompt

DATA = os.environ.get("PRIORITY_DATA")
real = pytest.mark.skipif(DATA is None, reason="PRIORITY_DATA is not set: real evaluations are not there")
sandboxed = pytest.mark.skipif(
    bool(missing(active_layers(), root=os.geteuid() == 0)), reason="this machine cannot hold untrusted code"
)

NUMERIC = {
    ("so #### 1,000", "#### 1000"): True,
    ("It is 5 and then 72.", "72"): True,
    ("72 apples, not 5", "72"): False,
    ("The answer is $1,234,567.50.", "1234567.5"): True,
    ("\\boxed{\\frac{3}{4}} of 8", "0.75"): True,
    ("it is 3/4", "0.75"): True,
    ("7/0 or 2", "2"): True,
    ("-5 degrees", "-5"): True,
    ("10-5", "5"): True,
    ("x2 is 4, H2O", "4"): True,
    ("12km", "12"): True,
    ("1e3", "1000"): True,
    ("50%", "50"): True,
    ("0.3333333", "1/3"): True,
    ("0.333", "1/3"): False,
    ("10000001", "10000002"): False,
    ("1{,}234", "1234"): True,
    ("1\\,234", "1234"): True,
    ("1, 2, 3", "3"): True,
    ("\u22123", "-3"): True,
    ("no number", "3"): False,
    ("", "3"): False,
    ("3.", "3"): True,
    (".5", "0.5"): True,
    ("#### 4 and then 9", "4"): True,
}


@pytest.mark.parametrize(("response", "reference"), NUMERIC)
def test_numeric(response: str, reference: str):
    assert CHECKERS["numeric"](response, reference, {}).right == NUMERIC[response, reference]


def test_numeric_needs_a_number_to_compare_with():
    with pytest.raises(ValueError, match="no number"):
        CHECKERS["numeric"]("3", "three", {})


def test_numbers_that_take_no_time_or_memory():
    assert (huge := value_of("1e999999999")) is None or huge < 10**1000
    assert value_of("9" * 4000 + ".5" * 2000) is not None


BOXES = {
    r"\boxed{1}": ["1"],
    r"\boxed{\frac{1}{2}} and \boxed {x^{2}}": [r"\frac{1}{2}", "x^{2}"],
    r"\fbox{a} \framebox{b}": ["a", "b"],
    r"\boxed{\{1\}}": [r"\{1\}"],
    r"\boxed{1": [],
    "boxed{1}": [],
    "": [],
}


@pytest.mark.parametrize("text", BOXES)
def test_boxes_with_braces_inside(text: str):
    assert boxed_contents(text) == BOXES[text]


def test_what_only_sets_an_expression_is_left_out():
    assert [bare(t) for t in ("104.", r"\textbf{(073)}", "$x$", r"\text{a}+\text{b}")] == [
        "104", "073", "x", r"\text{a}+\text{b}",
    ]  # fmt: skip


LETTERS = {
    "options": {"A": "the liver", "B": "a kidney", "C": "the liver and a kidney", "D": "D"},
    "answer_idx": "C",
}
CHOICES = {
    "C": True,
    " C.": True,
    "(C)": True,
    "**C**": True,
    "The answer is C.": True,
    "Answer: (C) the liver and a kidney": True,
    "First A, but the answer is B. No, the answer is C.": True,
    "\\boxed{C}": True,
    "The liver and a kidney": True,
    "It is the liver and a kidney, I think": True,
    "A": False,
    "the liver": False,
    "A patient has it": False,
    "D": False,
    "": False,
    "I do not know": False,
    "E": False,
}


@pytest.mark.parametrize("response", CHOICES)
def test_choice(response: str):
    assert CHECKERS["choice"](response, "C", LETTERS).right == CHOICES[response]


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["x", "y"], "answer": 1},
        {"options": ["x", "y"], "answer": "y"},
        {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"opa": "x", "opb": "y", "opc": None, "cop": 1},
        {"options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"},
    ],
)
def test_choice_reads_the_fields_of_known_rows(row: dict[str, Any]):
    reference = TASKS["medmcqa"].answer({"question": "?", **row})
    assert reference == "B"
    assert CHECKERS["choice"]("B", reference, row)
    assert CHECKERS["choice"]("The answer is y.", str(row.get("answer", "B")), row)
    assert not CHECKERS["choice"]("x", reference, row)


def test_choice_needs_options():
    with pytest.raises(ValueError, match="no options"):
        CHECKERS["choice"]("A", "A", {"question": "?"})


FENCED = (
    "Sure:\n```python\nx = 1\n```\nor\n```python\ndef f(a):\n    return a\n```\nand\n```\nprint(2)\n```\n"
)


def test_code_is_taken_out_of_what_stands_around_it():
    assert code_of(FENCED) == "print(2)\n"
    assert code_of(FENCED, "f") == "def f(a):\n    return a\n"
    assert code_of("x = 1\n") == "x = 1\n"
    assert code_of("```python\nx = 1") == "x = 1"
    assert code_of("x = 1\n```\nthat is it") == "x = 1\n"


ROW = {
    "prompt": 'import math\n\n\ndef g():\n    return 1\n\n\ndef f(a):\n    """Add one."""\n',
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
CODE = {
    "    return a + g()\n": True,
    "   return a + g()\n": True,
    "return a + g()\n": True,
    "def f(a):\n    return a + g()\n": True,
    "```python\ndef f(a):\n    return a + int(math.sqrt(1))\n```": True,
    "    return a\n": False,
    "": False,
    "def h(a):\n    return a + 1\n": False,
}


@sandboxed
@pytest.mark.parametrize("response", CODE)
def test_code_that_goes_on_or_stands_alone(response: str):
    assert CHECKERS["python"](response, "", ROW).right == CODE[response]


@sandboxed
def test_tests_as_a_list_with_a_set_up():
    row = {"test_list": ["assert f(k) == 2", "assert f(2) == 3"], "test_setup_code": "k = 1"}
    assert CHECKERS["python"]("def f(a): return a + 1", "", row)
    assert not CHECKERS["python"]("def f(a): return 2", "", row)
    with pytest.raises(ValueError, match="no tests"):
        CHECKERS["python"]("def f(a): return 2", "", {"text": "?"})


@sandboxed
def test_code_takes_no_longer_than_its_bounds():
    found = CHECKERS["python"]("while True: pass", "", {"test": "1"}, Bounds(Limits(0.5)))
    assert found == (False, "not done after 0.5 s", False)


SAME = {
    (r"\frac{14}{3}", "14/3"): True,
    ("x^2+2x+1", "(x+1)^2"): True,
    ("0.5", r"\frac12"): True,
    (r"2\sqrt2", r"\sqrt{8}"): True,
    ("5", "x=5"): True,
    ("(1,2)", "(2,1)"): False,
    ("5", "6"): False,
    ("5", "}{"): False,
}


@pytest.mark.parametrize(("wanted", "found"), SAME)
def test_boxed(wanted: str, found: str):
    pytest.importorskip("math_verify")
    assert CHECKERS["boxed"](f"so \\boxed{{{found}}}", wanted, {}).right == SAME[wanted, found]
    assert not CHECKERS["boxed"](f"so {wanted}", wanted, {}), "without a box it is wrong"


def test_boxed_ends_in_threads_and_outlives_them():
    pytest.importorskip("math_verify")
    row = Asked("here:1", {}, Prompt("", "", True), "1")
    texts = [["\\boxed{9^{9^{9^{9^{9}}}}}", "\\boxed{2-1}", "\\boxed{3}"]]
    for _ in range(2):  # the second time with the workers that are left
        verdicts = check_all(CHECKERS["boxed"], [row], texts, Bounds(Limits(2)), 3)
        assert [v.right for v in verdicts[0]] == [False, True, False]
    assert "not compared within" in verdicts[0][0].why


def test_boxed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    prepare = CHECKERS["boxed"].prepare
    assert prepare is not None
    with pytest.raises(ConfigFault, match=r"pip install 'priority_dsl\[maths\]'"):
        prepare(Bounds())


def test_an_unknown_checker_has_a_neighbour():
    with pytest.raises(
        ConfigFault, match=r"^--checker numerc: unknown; did you mean numeric\? known are exact"
    ):
        find_checker("numerc")


def test_a_checker_that_stops_costs_a_row_and_not_the_evaluation():
    def odd(response: str, reference: str, row: Any) -> bool:
        if response == "x":
            raise KeyError("y")
        return True

    asked = [Asked(f"f.jsonl:{i}", {}, Prompt("", "", True), "") for i in (1, 2)]
    check = find_checker("exact")
    check = type(check)("odd", "", odd)
    verdicts = check_all(check, asked, [["a", "b"], ["x", "c"]], Bounds())
    assert [[v.right for v in several] for several in verdicts] == [[True, True], [False, True]]
    said: list[str] = []
    assert tell_failures(verdicts, said.append) == 1
    assert said == ["f.jsonl:2: the checker stopped: KeyError: 'y' (counted as wrong)"]
    with pytest.raises(RunFault, match=r"^f\.jsonl:1: "):
        tell_failures(check_all(check, asked, [["x"], ["x"]], Bounds()), said.append)


def test_a_verdict_is_what_it_says():
    assert not Verdict(False, "why")
    assert Verdict(True)


# The answers of real evaluations ---------------------------------------------------------------------

FILES = {
    "gsm8k": ("eval/gsm8k_test.jsonl", 1319),
    "math": ("eval/math_oai.jsonl", 500),
    "aime24": ("eval/aime24.jsonl", 30),
    "amc23": ("eval/amc23.jsonl", 40),
    "medmcqa": ("eval/medmcqa_test.jsonl", 2816),
    "humaneval": ("eval/HumanEval.jsonl.gz", 164),
    "mbpp": ("sft/mbpp.jsonl", 974),
}


def gold_verdicts(task: str, rows: list[Any]) -> list[list[Verdict]]:
    """What the checker of a task says of each row's own response, as it is and as a model might give it."""
    kind = TASKS[task]
    asked = [Asked(row.place, row.fields, Prompt("", "", True), kind.answer(row.fields)) for row in rows]
    shapes = {
        "numeric": lambda text, answer: f"It is {text.rpartition('####')[2]}.",
        "boxed": lambda text, answer: f"So it is \\boxed{{{answer}}}.",
        "choice": lambda text, answer: f"Not sure, but the answer is ({answer}).",
        "python": lambda text, answer: f"Here it is:\n```python\n{text.removesuffix('```')}\n```\n",
    }
    texts = [
        [own := kind.completion(row.fields), shapes[kind.checker](own, of.answer)]
        for row, of in zip(rows, asked, strict=True)
    ]
    return check_all(CHECKERS[kind.checker], asked, texts, Bounds(Limits(60)))


def assert_gold(task: str, limit: int | None) -> None:
    from trainer.rows import read_rows

    assert DATA is not None
    checker = TASKS[task].checker
    if checker == "boxed":
        pytest.importorskip("math_verify")
    if checker == "python" and missing(active_layers(), root=os.geteuid() == 0):
        pytest.skip("this machine cannot hold untrusted code")
    name, count = FILES[task]
    rows = read_rows(str(Path(DATA) / name)).rows
    assert len(rows) == count
    rows = rows[:limit]
    verdicts = gold_verdicts(task, rows)
    wrong = [
        (row.place, verdict.why)
        for row, several in zip(rows, verdicts, strict=True)
        for verdict in several
        if not verdict.right
    ]
    assert wrong == []
    print(f"{task}: {len(rows)} of {count} rows, {2 * len(rows)} responses right")


@real
@pytest.mark.parametrize("task", FILES)
def test_the_answers_of_an_evaluation_are_right(task: str):
    assert_gold(task, 12 if TASKS[task].checker == "python" else 100)


@real
@pytest.mark.slow
@pytest.mark.parametrize("task", FILES)
def test_all_the_answers_of_an_evaluation_are_right(task: str):
    assert_gold(task, None)


def test_a_function_that_stands_alone_takes_the_place_of_the_prompts():
    row = {"prompt": "def f(a):\n", "entry_point": "f", "test": "def check(c): assert c(1) == 2"}
    assert "check(f)" in row_tests(row)
    assert program_of("def f(a): return 3", row).endswith("def f(a): return 3")
