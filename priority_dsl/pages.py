"""The tables of the pages, made from the registry, the codes and the rule files; never typed.

A page is Markdown by hand with places for tables in it:

    <!-- generated: NAME -->
    ...
    <!-- end -->

`python -m priority_dsl.pages --write` fills the places of every page of a checkout, `--check` says which
page is stale. A word, a code or a rule file that is added shows in its table by itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from priority_dsl import library, nodes
from priority_dsl.api import check
from priority_dsl.checked import CheckedRule
from priority_dsl.codes import CODES
from priority_dsl.declarations import joinable
from priority_dsl.kinds import Element, Range
from priority_dsl.plan import plan
from priority_dsl.printer import format_rule
from priority_dsl.registry import ALIASES, REGISTRY, Reading, Statistic, Word
from priority_dsl.spelling import RESERVED

PLACE = re.compile(r"<!-- generated: (?P<name>\S+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)
MARK = re.compile(r"<!-- (generated:|end\b)")
LONGEST = 120  # characters of an example in a table; what is longer is cut

# Groups of words in the order of the language; a group that is not listed comes last.
GROUPS = (
    "statistics views attention arithmetic conditions gradient reductions scopes order text time chance "
    "pairs composition"
).split()
FAMILIES = {
    "PD1": "The text",
    "PD2": "Names",
    "PD3": "Kinds and values",
    "PD4": "Warnings",
    "PD5": "What a call gives",
}
REGIMES = ("uniform", "hard selection", "soft reweighting", "signed", "loss rule")


def pages() -> list[Path]:
    """The pages of this checkout that have generated tables; an installed package has no root page."""
    root = library.rules_folder().parent
    return [root / "README.md", library.grammar_path().parent / "README.md", root / "rules" / "README.md"]


def render(page: str) -> str:
    """The text of a page with every table as it should be now.

    Raises ValueError for a table that nobody makes, and for a mark without its partner.
    """
    for place in PLACE.finditer(page):
        if place["name"] not in TABLES:
            raise ValueError(f"there is no table `{place['name']}`, but {', '.join(TABLES)}")
        if MARK.search(place["table"]):
            raise ValueError(f"the table `{place['name']}` has no `<!-- end -->`")
    if MARK.search(PLACE.sub("", page)):
        raise ValueError("a mark `<!-- generated: NAME -->` or `<!-- end -->` stands alone")
    return PLACE.sub(lambda m: f"<!-- generated: {m['name']} -->\n{TABLES[m['name']]()}\n<!-- end -->", page)


# Tables -----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a column without content is left out."""
    body = [[re.sub(r"\s+", " ", cell).strip().replace("|", "\\|") for cell in row] for row in rows]
    filled = [i for i in range(len(head)) if any(row[i] for row in body)]
    lines = [[head[i] for i in filled], ["---"] * len(filled), *([row[i] for i in filled] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """A text as code in a cell, cut where it is very long."""
    return f"`{text if len(text) <= LONGEST else text[:24].rstrip() + ' ...'}`"


def stacked(lines: Iterable[str]) -> str:
    """Several lines in one cell."""
    return "<br>".join(lines)


def shown(range: Range) -> str:
    """A range as a reader wants it: four digits are enough."""
    return re.sub(r"\d+\.\d{5,}", lambda m: f"{float(m[0]):.4g}", str(range))


def words() -> str:
    """All words by group: how each is written, what it is, its range, an example, its source."""
    groups = sorted({w.group for w in REGISTRY.words.values()}, key=lambda g: (*_place(g), g))
    return "\n\n".join(f"### {g[:1].upper()}{g[1:]}\n\n{_group(g)}" for g in groups)


def _place(group: str) -> tuple[int]:
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS),)


def _group(group: str) -> str:
    chosen = [w for w in REGISTRY.words.values() if w.group == group and not getattr(w, "derived", False)]
    rows = [[_written(w), w.doc, range_of(w), code(w.example), w.source] for w in chosen]
    return table(["written", "what it is", "range", "example", "source"], rows)


def _written(word: Word) -> str:
    forms = [word.signature]
    for name in [word.name, *(alias for alias, target in ALIASES.items() if target == word.name)]:
        forms += [f"{name}(m)"] * (name != word.name) + [f"{name}_m"] * (name in joinable())
    return ", ".join(code(form) for form in forms)


def range_of(word: Word) -> str:
    """The values of a word; of one whose values depend on its arguments, those of its example."""
    if isinstance(word, Reading):
        return ", ".join(word.values) if word.element == Element.CATEGORY else shown(word.range)
    if isinstance(word, Statistic) and isinstance(word.range, Range):
        return shown(word.range)
    return shown(check(word.example).range)


def codes() -> str:
    """The table of codes by family: what each means, a text that has it and one that has not."""
    found = []
    for family, title in FAMILIES.items():
        rows = [
            [name, f"**{c.title}**. {c.explanation}", code(c.bad), code(c.good)]
            for name, c in sorted(CODES.items())
            if name.startswith(family)
        ]
        found.append(f"### {title}\n\n" + table(["code", "what it means", "has it", "has it not"], rows))
    return "\n\n".join(found)


def reserved() -> str:
    """The words that nothing can be named."""
    return " ".join(f"`{word}`" for word in sorted(RESERVED, key=str.lower))


# The library ------------------------------------------------------------------------------------


def _library() -> list[tuple[str, CheckedRule]]:
    return [(name, check(name)) for name in library.list_rules()]


def definition(rule: CheckedRule) -> list[str]:
    """What a rule computes, in canonical text: its lets, weight, loss and tokens, one statement a line."""
    kept = tuple(
        s.model_copy(update={"comments": (), "trailing": None})
        for s in rule.tree.statements
        if isinstance(s, nodes.Let | nodes.Weight | nodes.Loss | nodes.Over | nodes.Keep)
    )
    lines = format_rule(nodes.Rule(statements=kept)).splitlines()
    return [lines[0].removeprefix("weight = ")] if len(lines) == 1 else lines


def _reads(rule: CheckedRule) -> str:
    models = sorted(rule.requires.models - {"on"})
    return ", ".join([*models, *(f"column {name}" for name in sorted(rule.requires.columns))])


def _parameters(rule: CheckedRule) -> str:
    return stacked(code(f"{n} = {p.value:g} in {p.range}") for n, p in rule.params.items())


def _plan(rule: CheckedRule) -> str:
    """What is stored before training, and which frozen models stay loaded."""
    how = plan(rule)
    stored = [f"stores {code(c.name)}, {c.bits} bit{'s' * (c.bits > 1)} a token" for c in how.stored]
    return stacked([*stored, *(f"{name} stays loaded" for name in how.kept)])


def taxonomy() -> str:
    """The library by regime, as the checker derives it."""
    head = ["rule", "signal", "definition", "parameters", "divided by", "reads beside `on`", "plan"]
    found = []
    for regime in REGIMES:
        rows = [
            [
                f"[`{name}`]({name}.rule)",
                rule.regime.signal,
                stacked(f"`{line}`" for line in definition(rule)),
                _parameters(rule),
                rule.normalize,
                _reads(rule),
                _plan(rule),
            ]
            for name, rule in _library()
            if rule.regime.name == regime
        ]
        if rows:
            found.append(f"### {regime[:1].upper()}{regime[1:]}: {len(rows)}\n\n{table(head, rows)}")
    return "\n\n".join(found)


def sources() -> str:
    """What each rule of the library does, and where it comes from."""
    rows = [[f"`{name}`", rule.doc, stacked(rule.cites)] for name, rule in _library()]
    return table(["rule", "what it does", "source"], rows)


def rules() -> str:
    """The library in short: what a row of `priority rules` says, with the definition."""
    rows = [
        [f"`{name}`", rule.regime.name, rule.regime.signal, stacked(f"`{d}`" for d in definition(rule))]
        for name, rule in _library()
    ]
    return table(["rule", "regime", "signal", "definition"], rows)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (words, codes, reserved, taxonomy, sources, rules)
}


# The command ------------------------------------------------------------------------------------


def stale(paths: Iterable[Path]) -> list[Path]:
    """The pages whose tables are not what they should be; ValueError (with the page) for broken marks."""
    return [path for path in paths if (text := _read(path)) != _rendered(path, text)]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _rendered(path: Path, text: str) -> str:
    try:
        return render(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of all pages, or say which page is stale (exit code 1)."""
    parser = argparse.ArgumentParser(
        "python -m priority_dsl.pages", description=(__doc__ or "").split("\n")[0]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is stale")
    what.add_argument("--write", action="store_true", help="write the tables")
    flags = parser.parse_args(argv)
    try:
        found = stale(pages())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in found:
        if flags.write:
            path.write_text(_rendered(path, _read(path)), encoding="utf-8")
        print(f"{'wrote' if flags.write else 'stale:'} {path.name} in {path.parent.name}")
    if found and flags.check:
        print("`make pages` writes them")
    return 1 if found and flags.check else 0


if __name__ == "__main__":
    sys.exit(main())
