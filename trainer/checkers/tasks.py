"""Rows of well-known evaluations -> prompt, response and answer: what `--task` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.checkers.choices import KEYS, choose, options_of
from trainer.faults import RowFault
from trainer.rows import Read, Row

Fields = Mapping[str, object]
BOX = "Reason step by step, and put the final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Task:
    """How an evaluation asks and checks: what of a row is prompt, response (for the nll) and answer.

    `needs` are the fields that tell its rows from others. `ask` is the prompt for a chat template, where it
    is another. `stop` ends a response that goes on after its answer, without a chat template.
    """

    summary: str
    needs: tuple[str, ...]
    prompt: Callable[[Fields], str]
    completion: Callable[[Fields], str]
    answer: Callable[[Fields], str]
    checker: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ask: Callable[[Fields], str] | None = None

    def reshaped(self, read: Read, chat: bool) -> Read:
        """A row as prompt and completion; a fault where it has not the fields of the task."""
        if isinstance(read, RowFault):
            return read
        if missing := [name for name in self.needs if name not in read.fields]:
            given = ", ".join(read.fields) or "(none)"
            return RowFault(
                read.place, f"{read.place}: no field `{missing[0]}` (--task); the fields are {given}"
            )
        prompt = self.ask if chat and self.ask is not None else self.prompt
        try:
            fields: dict[str, object] = {
                "prompt": prompt(read.fields),
                "completion": self.completion(read.fields),
            }
        except ValueError as error:
            return RowFault(read.place, f"{read.place}: {error}")
        return Row(read.place, fields)


def _text(row: Fields, name: str) -> str:
    """A field as text: a whole number without its decimals, line ends as they are on Linux."""
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).replace("\r\n", "\n")


def _math_answer(row: Fields) -> str:
    return _text(row, "answer" if "answer" in row else "solution")


def _options(row: Fields) -> str:
    listed = "\n".join(f"{letter}. {text}" for letter, text in options_of(row).items())
    return f"{_text(row, 'question')}\n{listed}\n"


def _letter(row: Fields) -> str:
    named = next((str(row[name]) for name in KEYS if row.get(name) is not None), "")
    found = choose(named, row, key=True)
    if not found:
        raise ValueError("no field names the right option (answer_idx, answer_key, cop, answer)")
    return min(found)


def _tests(row: Fields) -> str:
    given = row["test_list"]
    return "\n".join(map(str, given)) if isinstance(given, list) else str(given)


def _mbpp(row: Fields) -> str:
    asked = _text(row, "text" if "text" in row else "prompt")
    return f"{asked}\nThe code must pass these tests:\n{_tests(row)}\n"


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "question, answer; last number",
        ("question", "answer"),
        lambda row: _text(row, "question") + "\n",
        lambda row: _text(row, "answer"),
        lambda row: _text(row, "answer"),
        "numeric",
        512,
        ("\nQuestion:",),
    ),
    "math": Task(
        "problem, answer (MATH-500, AIME, AMC); expression in \\boxed{}",
        ("problem",),
        lambda row: f"{_text(row, 'problem')}\n{BOX}\n",
        lambda row: _text(row, "solution") if "solution" in row else f"\\boxed{{{_math_answer(row)}}}",
        _math_answer,
        "boxed",
        2048,
    ),
    "medmcqa": Task(
        "question, options, answer_idx; letter or option",
        ("question",),
        lambda row: f"{_options(row)}Answer:",
        lambda row: " " + _letter(row),
        _letter,
        "choice",
        512,
        ask=lambda row: f"{_options(row)}End with: the answer is (LETTER).",
    ),
    "humaneval": Task(
        "prompt, test, entry_point; tests in a sandbox",
        ("prompt", "test", "entry_point", "canonical_solution"),
        lambda row: _text(row, "prompt"),
        lambda row: _text(row, "canonical_solution"),
        lambda row: _text(row, "canonical_solution"),
        "python",
        512,
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```"),
        lambda row: f"Complete this Python function.\n\n```python\n{_text(row, 'prompt')}```",
    ),
    "mbpp": Task(
        "text, code, test_list; tests in a sandbox",
        ("code", "test_list"),
        lambda row: f"{_mbpp(row)}\n```python\n",
        lambda row: _text(row, "code") + "\n```",
        lambda row: _text(row, "code"),
        "python",
        512,
        ("\n```",),
        lambda row: f"Write Python code. {_mbpp(row)}",
    ),
}
ALIASES = ("aime24", "amc23")
"""Evaluations with the rows of `math`."""
TASKS |= dict.fromkeys(ALIASES, TASKS["math"])


def task_like(fields: Fields) -> str | None:
    """The task whose rows have such fields, where the usual names of prompt and response would miss it."""
    if {"options", "choices", "opa"} & fields.keys() and "question" in fields:
        return "medmcqa"
    for name in ("humaneval", "mbpp", "math"):
        if all(field in fields for field in TASKS[name].needs):
            return name
    return None
