"""A response that holds code, and a row that holds tests -> the two programs that the sandbox runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

FENCE = re.compile(r"^[ \t]*```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)", re.MULTILINE)


def code_of(response: str, entry: str | None = None) -> str:
    """The code of a response: its last fenced block, of those that define `entry` where some do; else all.

    A response that goes on in a fence which the prompt opened ends at the closing one.
    """
    fences = list(MARK.finditer(response))
    if len(fences) % 2 and not fences[0][1] and response[: fences[0].start()].strip():
        return response[: fences[0].start()]  # it begins inside a fence
    blocks = FENCE.findall(response)
    if not blocks:
        return response
    fitting = [block for block in blocks if entry is not None and _defines(block, entry)]
    return (fitting or blocks)[-1]


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^[ \t]*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None
    )


def program_of(response: str, row: Mapping[str, object]) -> str:
    """The program that a response makes of its row.

    A row with `entry_point` has a prompt that begins a function: code that defines it takes the place of the
    function, with the imports and helpers before it; other code goes on where the prompt stops.
    """
    entry, prompt = row.get("entry_point"), row.get("prompt")
    if not isinstance(entry, str) or not isinstance(prompt, str):
        return code_of(response)
    code = code_of(response, entry)
    if _defines(code, entry):
        start = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b", prompt, re.MULTILINE)
        return prompt[: start.start() if start else 0] + "\n" + code
    return prompt + _indented(code)


def _indented(body: str) -> str:
    """A body whose first line has its indentation, which some tokenizers drop in part."""
    first = body.lstrip("\n")
    shown = first.lstrip(" ")
    if first.startswith("\t") or len(first) - len(shown) >= 4 or not shown:
        return body
    return "    " + shown


def row_tests(row: Mapping[str, object]) -> str:
    """The tests of a row: `test` with a call of `check` on `entry_point`, or `test_list` with its set-up.

    Raises ValueError for a row without tests.
    """
    test, several = row.get("test"), row.get("test_list")
    if isinstance(test, str) and test.strip():
        call = f"\ncheck({row['entry_point']})\n" if isinstance(row.get("entry_point"), str) else "\n"
        return test + call
    if isinstance(several, list) and several:
        given = row.get("test_imports")
        imports = given if isinstance(given, list) else []
        setup = row.get("test_setup_code") or ""
        return "\n".join([*map(str, imports), str(setup), *map(str, several), ""])
    raise ValueError("the row has no tests (fields test, or test_list)")
