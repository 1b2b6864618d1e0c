"""The pages are current, and every word that they list has what a reader needs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings

from priority_dsl import check, compile_rule, library, list_rules, pages
from priority_dsl.codes import CODES
from priority_dsl.registry import ALIASES, REGISTRY, Reduction, Word
from priority_dsl.testing.case import Case, cases

WORDS = list(REGISTRY.words.values())
PAGES = pages.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_page_is_current(path: Path) -> None:
    assert not pages.stale([path]), f"{path} is stale: `make pages` writes its tables"


def test_every_table_is_on_a_page() -> None:
    used = {m["name"] for path in PAGES for m in pages.PLACE.finditer(path.read_text(encoding="utf-8"))}
    assert used == set(pages.TABLES)


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.name)
def test_every_word_has_what_a_reader_needs(word: Word) -> None:
    assert word.doc.endswith("."), "a sentence"
    rule = compile_rule(word.example)
    assert not [w for w in rule.checked.warnings if w.code not in ("PD401", "PD402")]
    named = [word.written if isinstance(word, Reduction) else word.name, *_aliases(word)]
    shown = [_symbol(word).strip("px[]")] if _symbol(word) else named
    assert any(name in word.example for name in shown), f"`{word.example}` does not show {shown}"

    @settings(max_examples=3, derandomize=True, database=None, deadline=None)
    @given(cases(rule, extreme=False))
    def weighs(case: Case) -> None:
        whole = case.with_data_set(rule)
        weights = rule.weights(whole.logits, whole.targets, **whole.settings)
        assert all(rule.range.covers(w) for w in weights[whole.valid].tolist())

    weighs()


def _symbol(word: Word) -> str:
    return getattr(word, "symbol", "")


def _aliases(word: Word) -> list[str]:
    return [alias for alias, name in ALIASES.items() if name == word.name]


def test_nothing_is_left_out() -> None:
    words, codes, rules = pages.words(), pages.codes(), pages.taxonomy()
    for word in WORDS:
        assert getattr(word, "derived", False) or pages.code(word.signature) in words
    assert re.findall(r"^\| (PD\d+)", codes, re.MULTILINE) == sorted(CODES)
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", rules, re.MULTILINE)) == list_rules()
    assert re.findall(r"^\| `(\w+)` \|", pages.sources(), re.MULTILINE) == list_rules()


def test_the_catalogue_is_derived() -> None:
    rows = {m[1]: m[0] for m in re.finditer(r"^\| \[`(\w+)`\].*$", pages.taxonomy(), re.MULTILINE)}
    assert (
        "| intrinsic | `mass(ref) >= tau` | `tau = 0.5 in [0, 1]` | tokens | ref | stores"
        in rows["prift_mass"]
    )
    assert "`weight = p_on`<br>`loss = weight * nll_on + beta * kl(ref, on)`" in rows["asft"]
    assert "| kept | column response |" in rows["wit"]
    assert rows["prift_mass"].endswith("stores `mass(ref) >= tau`, 1 bit a token |")
    assert rows["asft"].endswith("| ref stays loaded |")
    hard = pages.taxonomy().partition("### Hard selection")[2].partition("###")[0]
    for name in list_rules():
        assert (f"[`{name}`]" in hard) == (check(name).regime.name == "hard selection")


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pages in a folder of their own."""
    found = []
    for path in PAGES:
        found.append(tmp_path / path.parent.name / path.name)
        found[-1].parent.mkdir()
        shutil.copy(path, found[-1])
    monkeypatch.setattr(pages, "pages", lambda: found)
    return found


def test_a_stale_page_is_noticed_and_written(copies: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert pages.main(["--check"]) == 0
    good = copies[1].read_text(encoding="utf-8")
    copies[1].write_text(good.replace("The hyperbolic tangent", "The tangent"), encoding="utf-8")
    assert pages.main(["--check"]) == 1
    assert "stale: README.md in grammar" in capsys.readouterr().out
    assert pages.main(["--write"]) == 0
    assert copies[1].read_text(encoding="utf-8") == good
    assert pages.main(["--check"]) == 0


def test_a_new_rule_makes_the_catalogue_stale(
    copies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_copy = tmp_path / "library"
    shutil.copytree(library.rules_folder(), library_copy)
    (library_copy / "another.rule").write_text('"""Another."""\nweight = p_on\n', encoding="utf-8")
    monkeypatch.setattr(library, "rules_folder", lambda: library_copy)
    assert copies[2] in pages.stale(copies)
    assert copies[1] not in pages.stale(copies)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: wrods -->\n<!-- end -->\n", "there is no table `wrods`"),
        ("<!-- generated: codes -->\nno end\n", "stands alone"),
        ("text\n<!-- end -->\n", "stands alone"),
        ("<!-- generated: codes -->\n<!-- generated: words -->\n<!-- end -->\n", "has no `<!-- end -->`"),
    ],
)
def test_broken_marks(
    text: str, message: str, copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copies[0].write_text(text, encoding="utf-8")
    assert pages.main(["--write"]) == 1
    assert message in capsys.readouterr().err
    assert copies[0].read_text(encoding="utf-8") == text


def test_a_cell_cannot_break_its_table() -> None:
    made = pages.table(["a", "b", "c"], [["x | y", "two\n lines", ""]])
    assert made == "| a | b |\n| --- | --- |\n| x \\| y | two lines |"
