"""Where a rule's text comes from, and what never touches the file system."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from priority_dsl import check, library
from priority_dsl.composition import texts_inside
from priority_dsl.diagnostics import PriorityError, Source
from priority_dsl.library import grammar_path, list_rules, resolve, rules_folder
from priority_dsl.nodes import LONGEST
from priority_dsl.parser import parse
from priority_dsl.printer import format_rule

WORDS = ["p_on", "p_ref", "mass_ref", "entropy"]


def refused(argument: str, words=WORDS) -> tuple[str, str]:
    """The code and the rendered text of the only finding."""
    with pytest.raises(PriorityError) as caught:
        resolve(argument, words)
    (only,) = caught.value.diagnostics
    return only.code, str(caught.value)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two rules, beside it a folder that is none of its business."""
    inside = tmp_path / "site" / "priority_dsl" / "rules"
    inside.mkdir(parents=True)
    (inside / "dft.rule").write_text("weight = sg(p_on)\n", encoding="utf-8")
    (inside / "prift_mass.rule").write_text("mass(ref) >= 0.5", encoding="utf-8")
    (inside / "README.md").write_text("", encoding="utf-8")
    (inside / "not-a-name.rule").write_text("1", encoding="utf-8")
    (tmp_path / "site" / "rules").mkdir()
    (tmp_path / "site" / "outside.rule").write_text("1", encoding="utf-8")
    monkeypatch.setattr(library, "PACKAGE", inside.parent)
    return inside


def test_a_name_is_a_rule_of_the_library(small_library: Path):
    assert list_rules() == ["dft", "prift_mass"]
    assert resolve("dft") == Source("weight = sg(p_on)\n", "dft.rule")
    assert resolve(" prift_mass\t").name == "prift_mass.rule"


def test_installed_and_checkout(small_library: Path):
    assert rules_folder() == small_library
    assert grammar_path() == small_library.parent.parent / "grammar" / "priority.lark"  # none inside
    shutil.rmtree(small_library)
    assert rules_folder() == small_library.parent.parent / "rules"


def test_the_real_folders():
    assert grammar_path().is_file()
    assert rules_folder().is_dir()


@pytest.mark.parametrize("name", list_rules())
def test_every_rule_of_the_library_is_canonical(name: str):
    source = resolve(name)
    assert format_rule(parse(source.text, source.name)) == source.text


def test_unknown_names(small_library: Path):
    code, text = refused("prift_mas")
    assert code == "PD201"
    assert "did you mean `prift_mass`?" in text
    code, text = refused("p_on")
    assert code == "PD201"
    assert "`weight = p_on`" in text
    assert "`weight = entropy`" in refused("entrpy")[1]
    assert "`weight = nothing_like_it`" in refused("nothing_like_it", ())[1]


@pytest.mark.parametrize("name", ["../outside", "dft/../dft", "not-a-name", "/dft", "C:dft", "dft.txt", ""])
def test_what_is_no_name_is_text(small_library: Path, name: str):
    assert resolve(name) == Source(name)


@pytest.mark.parametrize(
    "text",
    [
        "mass(ref) >= 0.5",
        "(p_on)",
        "0.5",
        "inf",
        "dft\n",
        "\ndft",
        "weight = 1 # see other.rule\n",
        "weight = 1\n# other.rule",
        'cite "a.rule"; 1',
        "../dft",
    ],
)
def test_text_never_touches_the_file_system(monkeypatch: pytest.MonkeyPatch, text: str):
    def touched(*_args, **_kwargs):
        raise AssertionError("the file system was asked")

    for name in ("open", "stat", "glob", "is_dir", "is_file", "exists"):
        monkeypatch.setattr(Path, name, touched)
    monkeypatch.setattr(os, "stat", touched)
    assert resolve(text) == Source(text)
    with pytest.raises(AssertionError, match="was asked"):  # the guard works
        resolve("dft")


def test_a_path(tmp_path: Path):
    file = tmp_path / "my rule.rule"
    file.write_bytes("\ufeff# ü\r\nmass(ref) >= 0.5".encode())
    assert resolve(str(file)) == Source("# ü\r\nmass(ref) >= 0.5", str(file))
    file.write_text("a &", encoding="utf-8")
    source = resolve(str(file))
    with pytest.raises(PriorityError) as caught:
        parse(source.text, source.name)
    assert f"{file}:1:3" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path, small_library: Path):
    (tmp_path / "talr.rule").write_text("1", encoding="utf-8")
    code, text = refused(str(tmp_path / "tarl.rule"))
    assert code == "PD202"
    assert "did you mean `talr.rule`?" in text
    assert "under its name alone: `dft`" in refused(str(tmp_path / "dft.rule"))[1]
    assert refused(str(tmp_path / "no" / "x.rule"))[0] == "PD202"
    assert refused(".rule")[0] == "PD202"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe1", "not UTF-8"),
        (b"weight = \xe9", "not UTF-8"),
        (b"1" + b" " * LONGEST, "longer than 20,000 characters"),
        (b"\xc3\xa9" * LONGEST * 3, "longer than 20,000 characters"),
        (b"1" * 10_000_000, "longer than 20,000 characters"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "x.rule"
    file.write_bytes(content)
    code, text = refused(str(file))
    assert code == "PD202"
    assert message in text


def test_the_longest_file(tmp_path: Path):
    file = tmp_path / "x.rule"
    file.write_text("é" * LONGEST, encoding="utf-8")
    assert len(resolve(str(file)).text) == LONGEST


def test_what_is_no_plain_file(tmp_path: Path):
    folder = tmp_path / "x.rule"
    folder.mkdir()
    assert "is a folder" in refused(str(folder))[1]
    pipe = tmp_path / "pipe.rule"
    os.mkfifo(pipe)
    assert "not a plain file" in refused(str(pipe))[1]
    for odd in ("a\0.rule", "\ud800.rule", "x" * 5000 + ".rule", str(folder / "y.rule")):
        assert refused(odd)[0] == "PD202"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path):
    file = tmp_path / "x.rule"
    file.write_text("1", encoding="utf-8")
    file.chmod(0)
    assert "Permission denied" in refused(str(file))[1]


def test_kept_texts_stand_in_for_the_library() -> None:
    assert resolve("dft").text != "1 - p_on"
    with library.kept_texts({"dft": "1 - p_on", "gone": "p_ref"}):
        assert resolve("dft") == Source("1 - p_on", "dft.rule")
        assert "gone" in list_rules()
        with library.kept_texts({"dft": "2 * p_on"}):
            assert resolve("dft").text == "2 * p_on"
        assert resolve("dft").text == "1 - p_on"
        assert check('rule("gone")').requires.models == {"on", "ref"}
    assert "gone" not in list_rules()
    assert resolve("dft").text != "1 - p_on"


def test_the_texts_of_rules_inside_are_found_at_any_depth() -> None:
    with library.kept_texts({"middle": 'rule("dft") * rule("sft")', "outer": '2 * rule("middle")'}):
        found = texts_inside(check('rule("outer") + 0.5 * rule("dft")').tree)
    assert list(found) == ["dft", "middle", "outer", "sft"]
    assert found["middle"] == 'rule("dft") * rule("sft")'
    assert texts_inside(check("dft").tree) == {}
