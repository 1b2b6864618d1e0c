"""What README.md and the language reference show is what happens: every block of code runs.

The commands run in a folder that holds what a reader has: `MODEL`, a model, and the files that the page
itself shows (a block with a file name behind its kind is that file). No block needs a network.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from priority_dsl import PriorityError, check
from tests.blocks import Block, blocks, commands, fits, run_console, run_python
from tests.trainer.conftest import make_model, make_tokenizer
from trainer.cli import main

ROOT = Path(__file__).parents[1]
README, REFERENCE = ROOT / "README.md", ROOT / "grammar" / "README.md"
BLOCKS = [*blocks(README), *blocks(REFERENCE)]


def of(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    make_model(folder, seed=0, max_position_embeddings=256)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a reader: a model, and nothing else yet; nothing is in the cache."""
    shutil.copytree(model, tmp_path / "MODEL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:  # what a page wrote and imported is nobody else's
        if not getattr(sys.modules[name], "__file__", None) or str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.fixture
def priority(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """The command `priority` in this process; returns what it prints."""

    def run(words: list[str]) -> str:
        capsys.readouterr()
        main(words)
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.mark.parametrize("page", [README, REFERENCE], ids=["README", "reference"])
def test_a_page_runs_from_top_to_bottom(
    page: Path, folder: Path, priority: Callable[[list[str]], str]
) -> None:
    for block in blocks(page):
        if block.kind == "console":
            run_console(block, folder, priority)
        elif block.kind == "python":
            run_python(block, folder)
        elif block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize("block", of("rule"), ids=str)
def test_a_rule_is_what_the_page_says(block: Block) -> None:
    after = BLOCKS[BLOCKS.index(block) + 1 :]
    said = after[0].text if after and after[0].kind == "error" else None
    if said is None:
        check(block.text)
        return
    with pytest.raises(PriorityError) as caught:
        check(block.text.rstrip("\n"))
    assert str(caught.value) == said.rstrip("\n")


def test_the_pages_hold_what_is_run() -> None:
    assert {b.kind for b in BLOCKS} <= {"rule", "error", "python", "console", "yaml", "jsonl", "text"}
    assert len(of("python")) >= 4
    shown = [command for block in of("console") for command in commands(block)]
    names = {command.words[1] for command in shown if command.words[0] == "priority"}
    assert {"check", "new", "test", "train", "eval"} <= names
    assert {command.words[0] for command in shown} <= {"priority", "make", "ls", "tail", "source", "git"}


def test_what_does_not_run_is_noticed(folder: Path, priority: Callable[[list[str]], str]) -> None:
    broken = Block(README, 1, "console", "", "$ priority check dft\ndft\n  hard selection ...\n")
    with pytest.raises(AssertionError, match="soft reweighting"):
        run_console(broken, folder, priority)
    with pytest.raises(AssertionError):
        run_python(Block(README, 1, "python", "", "assert 1 == 2"), folder)
    assert fits("a ... z", "a b\nc z")
    assert not fits("a ... z", "a b\nc y")
