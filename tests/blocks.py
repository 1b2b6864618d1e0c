"""The code blocks of a Markdown page, as tests run them.

```rule                 a rule that checks; with an `error` block after it, one that does not
```python               runs by itself, in the folder of the test
```python NAME          the same block is also written to the file NAME, as any block with a second word is
```console              lines after `$ ` are commands, the others their output; `...` stands for anything
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(?P<kind>\w*)(?: (?P<file>\S+))?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
EXEMPT = ("make", "git", "cd", "source", ".ci/run")  # what the tests cannot run: they would run the tests


@dataclass(frozen=True)
class Block:
    """A block of code: its place, its kind, the file that it is, its text."""

    page: Path
    line: int
    kind: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.parent.name}/{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a console block and the output that the page shows."""

    text: str
    output: str

    @property
    def words(self) -> list[str]:
        """The command as a shell splits it."""
        return shlex.split(self.text, comments=True)

    @property
    def exempt(self) -> bool:
        """Whether the tests leave it alone."""
        return self.words[0] in EXEMPT


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["kind"], m["file"] or "", m["text"])
        for m in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a console block; a line that ends in a backslash goes on in the next."""
    found: list[Command] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n\s*", "", part).partition("\n")
        found.append(Command(command, output))
    return found


def fits(shown: str, printed: str) -> bool:
    """Whether a page shows what is printed: `...` stands for anything, blanks at line ends for nothing."""
    plain = re.sub(r"[ \t]+$", "", printed, flags=re.MULTILINE).strip("\n")
    pattern = re.escape(shown.strip("\n")).replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, plain, re.DOTALL) is not None


def run_python(block: Block, folder: Path) -> None:
    """Run a block of Python in a namespace of its own."""
    if block.file:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    exec(compile(block.text, str(block), "exec"), {"__name__": "__page__"})


def run_console(block: Block, folder: Path, priority: Callable[[list[str]], str]) -> None:
    """Run the commands of a block in the folder; `priority` runs the command of that name and returns what
    it prints."""
    for command in commands(block):
        if command.exempt:
            continue
        if command.words[0] == "priority":
            printed = priority(command.words[1:])
        else:
            done = subprocess.run(
                command.text, shell=True, cwd=folder, capture_output=True, text=True, timeout=300
            )
            printed = done.stdout + done.stderr
        assert fits(command.output, printed), f"{block}: `{command.text}` printed\n{printed}"
