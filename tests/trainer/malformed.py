"""Malformed data files and configs, drawn with a seed: good files in which one thing is broken.

A mutation of a row says how the row is written instead; one of a file what becomes of its bytes. Each is
drawn in some variations, at a place that the seed chooses.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

Row = dict[str, Any]
Mutation = Callable[[Random, Row], Any]  # a row -> another one, or the bytes of its line


@dataclass(frozen=True)
class Family:
    """Good rows of one layout, the rule that reads them, and how single rows of them can be broken."""

    rows: list[Row]
    rule: str
    mutations: dict[str, Mutation]


@dataclass(frozen=True)
class Case:
    """A file with one mistake: its bytes, what a message must name, and the lines that are still good."""

    name: str
    file: str
    content: bytes
    rule: str
    names: str  # how the message begins, after `error: `
    clean: bytes | None = None  # the file without the bad row; None where the whole file is bad
    words: list[str] = field(default_factory=list)


def changed(**values: Any) -> Mutation:
    """Give fields other values."""
    return lambda _random, row: row | values


def without(name: str) -> Mutation:
    """Leave a field out."""
    return lambda _random, row: {key: value for key, value in row.items() if key != name}


def raw(make: Callable[[Random, bytes], bytes]) -> Mutation:
    """Change the bytes of the line."""
    return lambda random, row: make(random, json.dumps(row, ensure_ascii=False).encode())


def one_of(name: str, *values: Any) -> Mutation:
    """Give a field one of some values that it must not have."""
    return lambda random, row: row | {name: random.choice(values)}


def message(**values: Any) -> Mutation:
    """Change one message of a conversation; a value of None for `drop` leaves the key out."""

    def change(random: Random, row: Row) -> Row:
        turns = [dict(turn) for turn in row["messages"]]
        turns[random.randrange(len(turns))] |= values
        return row | {"messages": turns}

    return change


def _insert(random: Random, line: bytes, what: bytes) -> bytes:
    """Bytes put somewhere into the text of the prompt."""
    place = line.index(b"what") + random.randrange(1, 8)
    return line[:place] + what + line[place:]


WRONG_TEXTS = (0, 3.5, True, ["a"], {"a": "b"}, [], {})
HALVES = ("\ud800", "\udfff", "\ude00\ud83d", "a\ud83d")
DEEP = "[" * 700 + "]" * 700

LINES: dict[str, Mutation] = {
    "cut": raw(lambda r, line: line[: r.randrange(1, len(line) - 1)]),
    "doubled brace": raw(lambda r, line: line + r.choice([b"}", b"]", b",", b" {}", b"x"])),
    "single quotes": raw(lambda _r, line: line.replace(b'"', b"'")),
    "bare words": raw(lambda r, line: r.choice([b"prompt: a", b"hello", b"<html>", b"// note", b"\\"])),
    "not an object": raw(lambda r, _line: r.choice([b"[1]", b"3", b'"a"', b"null", b"true", b"[]", b"NaN"])),
    "invalid UTF-8": raw(
        lambda r, line: _insert(r, line, r.choice([b"\xe4", b"\xff", b"\xc3(", b"\xed\xa0\x80"]))
    ),
    "zero byte": raw(lambda r, line: _insert(r, line, b"\0")),
    "control character": raw(lambda r, line: _insert(r, line, bytes([r.randrange(1, 32)]))),
    "field twice": raw(lambda _r, line: line[:-1] + b', "prompt": "again"}'),
    "nested without end": raw(lambda r, _line: r.choice([b"[", b'{"a":']) * 50_000),
    "number without end": raw(lambda _r, line: line[:-1] + b', "n": ' + b"9" * 5000 + b"}"),
}

TEXT = Family(
    [
        {
            "prompt": f"what is {i} + {i} ?",
            "completion": f" the answer is {2 * i}",
            "w": i / 8,
            "ok": i % 2 == 0,
            "label": "pos" if i % 3 else "neg",
            "note": "añb 漢字 👩\u200d👩\u200d👧 \u202eabc\u202c e\u0301 \u200b \ufeff",
        }
        for i in range(6)
    ],
    "column w: number in [0, 1]; column ok: bool; column label: {pos, neg}; "
    "weight = w if ok and label == pos else 0.5",
    LINES
    | {
        "no prompt": without("prompt"),
        "no completion": without("completion"),
        "no fields": lambda _random, _row: {},
        "prompt of another kind": one_of("prompt", *WRONG_TEXTS, None),
        "completion of another kind": one_of("completion", *WRONG_TEXTS, None, ""),
        "half a surrogate in the prompt": one_of("prompt", *HALVES),
        "half a surrogate in the completion": one_of("completion", *HALVES),
        "another layout": lambda r, _row: r.choice(
            [
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                {"input_ids": [5, 6]},
                {"text": "a"},
                {"question": "a", "answer": "b"},
            ]
        ),
        "deep value": raw(
            lambda _r, line: (
                line.replace(b'" the', b'" the').replace(b'"prompt": "', b'"x": "')[:-1]
                + b', "prompt": '
                + DEEP.encode()
                + b"}"
            )
        ),
        "no number": without("w"),
        "number of another kind": one_of("w", "0.5", True, None, [0.5], {"a": 1}, "", [[1]], [None]),
        "number not finite": raw(
            lambda r, line: (
                line[:-1].replace(b'"w"', b'"v"')
                + b', "w": '
                + r.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999"])
                + b"}"
            )
        ),
        "number too large": raw(
            lambda r, line: (
                line[:-1].replace(b'"w"', b'"v"') + b', "w": 1' + b"0" * r.choice([2, 20, 400]) + b"}"
            )
        ),
        "number out of range": one_of("w", -0.001, 1.001, 7, -1),
        "truth of another kind": one_of("ok", 1, 0, "true", None, [], [True], {}),
        "category undeclared": one_of("label", "bad", "", "POS", " pos", "pos\u200b", "\ud800"),
        "category of another kind": one_of("label", 1, None, True, ["pos"], {"pos": 1}),
    },
)

TALKS = Family(
    [
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": f"what {i}"},
                {"role": "assistant", "content": f"the answer {i}"},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "so 7"},
            ]
        }
        for i in range(4)
    ],
    "sft",
    {
        "messages of another kind": one_of(
            "messages", "hi", None, 3, {}, {"role": "user"}, [], [[]], ["a"], [None]
        ),
        "unknown role": message(role="bot"),
        "role of another kind": lambda r, row: message(role=r.choice([None, 1, ["user"], {}, "", "User"]))(
            r, row
        ),
        "content of another kind": lambda r, row: message(content=r.choice([1, None, [], {}, True, ["a"]]))(
            r, row
        ),
        "parts in the content": message(content=[{"type": "text", "text": "a"}]),
        "half a surrogate": lambda r, row: message(content=r.choice(HALVES))(r, row),
        "no content": lambda r, row: {"messages": [*row["messages"][:-1], {"role": "assistant"}]},
        "no role": lambda r, row: {"messages": [{"content": "a"}, *row["messages"][1:]]},
        "empty answer": lambda r, row: {
            "messages": [*row["messages"][:-1], {"role": "assistant", "content": ""}]
        },
        "no answer": lambda r, row: {"messages": row["messages"][:2]},
        "another layout": lambda r, row: {"prompt": "a", "completion": "b"},
        "no messages": lambda r, row: {},
    },
)

TOKENS = Family(
    [
        {
            "input_ids": [5 + i, 6, 7, 8],
            "labels": [-100, 6, 7, 8],
            "role": ["user", "assistant", "assistant", "assistant"],
            "w": [0.0, 0.5, 1.0, 0.25],
        }
        for i in range(4)
    ],
    "column w: number in [0, 1] per token; weight = w if role == assistant else 0",
    {
        "id outside": one_of("input_ids", [5, 6, 7, 320], [-1, 6, 7, 8], [5, 6, 7, 10**30], [5, 6, 7, 2**63]),
        "ids of another kind": one_of(
            "input_ids",
            3,
            "5 6 7 8",
            None,
            [],
            {},
            [5.0, 6, 7, 8],
            ["5", 6, 7, 8],
            [True, 6, 7, 8],
            [[5], 6, 7, 8],
            [None, 6, 7, 8],
        ),
        "labels of another length": one_of("labels", [6], [-100] * 5, [-100, 6, 7, 8, 9]),
        "labels shifted": changed(labels=[6, 7, 8, -100]),
        "labels of another kind": one_of("labels", "all", [-100, "6", 7, 8], [-100, 6.0, 7, 8], {}, 1, []),
        "nothing supervised": one_of("labels", [-100] * 4, [5, -100, -100, -100]),
        "padded": one_of("attention_mask", [1, 1, 1, 0], [0, 1, 1, 1]),
        "mask of another kind": one_of("attention_mask", "1111", [], 1, ["1"] * 4),
        "roles of another length": changed(role=["user"]),
        "roles of another kind": one_of("role", [1, 2, 3, 4], "user", None),
        "column of another length": one_of("w", [0.5], [0.5] * 5, []),
        "column of another kind": one_of("w", "no", ["0"] * 4, [0, 0, None, 0], [0, [1], 0, 0], {"a": 1}),
        "column not finite": changed(w=[0.0, float("nan"), 0.0, 0.0]),
    },
)

PAIRS = Family(
    [{"prompt": f"what is {i} ?", "chosen": f" the answer is {i}", "rejected": " no"} for i in range(4)],
    "dpo",
    {
        "no chosen": without("chosen"),
        "no rejected": without("rejected"),
        "no prompt": without("prompt"),
        "response of another kind": lambda r, row: (
            row | {r.choice(["chosen", "rejected"]): r.choice([*WRONG_TEXTS, None, ""])}
        ),
        "prompt of another kind": one_of("prompt", *WRONG_TEXTS, None),
        "half a surrogate": lambda r, row: row | {r.choice(["chosen", "rejected"]): r.choice(HALVES)},
    },
)

SPANS = Family(
    [{"prompt": "so ?", "completion": "the answer is seven", "h": [[0, 3], "seven"]} for _ in range(3)],
    "column h: spans; weight = 0 if h else 1",
    {
        "spans of another kind": one_of(
            "h", "so", None, 3, {}, [3], [None], [[1]], [[1, 2, 3]], [[1.0, 2]], [[[1]]]
        ),
        "range outside": one_of("h", [[5, 3]], [[-1, 3]], [[0, 20]], [[0, 10**30]]),
        "text not there": one_of("h", ["nowhere"], [""], ["Seven"], ["seven\u200b"]),
    },
)

FAMILIES = {"text": TEXT, "talks": TALKS, "tokens": TOKENS, "pairs": PAIRS, "spans": SPANS}


def as_lines(rows: list[Any]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases whose file no other case before them has: some mutations have no choice to make."""
    found: dict[tuple[str, bytes], Case] = {}
    for case in cases:
        found.setdefault((case.file, case.content), case)
    return [*found.values()]


def bad_rows(variations: int) -> Iterator[Case]:
    """Each mutation at rows that the seed chooses; not the first row, which shows the layout."""
    for kind, family in FAMILIES.items():
        for name, mutate in family.mutations.items():
            for number in range(variations):
                random = Random(f"{kind} {name} {number}")
                rows: list[Any] = list(family.rows)
                place = random.randrange(1, len(rows))
                rows[place] = mutate(random, rows[place])
                yield Case(
                    f"{kind}: {name} {number}",
                    "d.jsonl",
                    as_lines(rows),
                    family.rule,
                    f"d.jsonl:{place + 1}",
                    as_lines([row for i, row in enumerate(rows) if i != place]),
                )


# Whole files ------------------------------------------------------------------------------------


def as_csv(rows: list[Row]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[Row]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


GOOD = as_lines(TEXT.rows)
CELLS = as_csv(TEXT.rows)
Spoiled = dict[str, tuple[str, Callable[[Random], bytes]]]


def _flipped(random: Random, content: bytes) -> bytes:
    """Some bytes in the middle of a packed file changed, so that its checksum is not right."""
    broken = bytearray(content)
    for place in random.sample(range(10, len(broken)), 5):
        broken[place] ^= random.randrange(1, 256)
    return bytes(broken)


FILES: Spoiled = {
    "empty": ("d.jsonl", lambda _r: b""),
    "blank": ("d.jsonl", lambda r: r.choice([b" ", b"\n\n", b"\t\r\n", b"\xef\xbb\xbf\n"])),
    "UTF-16": ("d.jsonl", lambda r: GOOD.decode().encode(r.choice(["utf-16", "utf-16-le", "utf-16-be"]))),
    "UTF-32": ("d.jsonl", lambda r: GOOD.decode().encode(r.choice(["utf-32", "utf-32-le", "utf-32-be"]))),
    "UTF-16 in csv": ("d.csv", lambda r: CELLS.decode().encode(r.choice(["utf-16", "utf-16-le"]))),
    "gzip without its name": ("d.jsonl", lambda _r: gzip.compress(GOOD)),
    "zip": ("d.jsonl", lambda _r: b"PK\x03\x04" + GOOD),
    "parquet without its name": ("d.csv", lambda _r: as_parquet(TEXT.rows)),
    "gzip that is none": ("d.jsonl.gz", lambda _r: GOOD),
    "gzip cut": ("d.jsonl.gz", lambda r: (packed := gzip.compress(GOOD))[: r.randrange(3, len(packed) - 1)]),
    "gzip flipped": ("d.jsonl.gz", lambda r: _flipped(r, gzip.compress(GOOD))),
    "zlib": ("d.jsonl.gz", lambda _r: zlib.compress(GOOD)),
    "parquet that is none": (
        "d.parquet",
        lambda r: r.choice([GOOD, b"PAR1", b"PAR1" * 9, b"x", r.randbytes(99)]),
    ),
    "parquet cut": ("d.parquet", lambda r: (made := as_parquet(TEXT.rows))[: r.randrange(5, len(made) - 1)]),
    "parquet packed and cut": ("d.parquet.gz", lambda r: gzip.compress(as_parquet(TEXT.rows)[:-9])),
    "random bytes": ("d.jsonl", lambda r: b"\x80" + r.randbytes(500)),
    "random bytes in json": ("d.json", lambda r: b"\x80" + r.randbytes(500)),
    "json cut": (
        "d.json",
        lambda r: (made := json.dumps(TEXT.rows).encode())[: r.randrange(1, len(made) - 1)],
    ),
    "json of another kind": ("d.json", lambda r: r.choice([b"{}", b"3", b"null", b'"a"', b'{"data": []}'])),
    "json lines named json": ("d.json", lambda _r: GOOD),
    "json of no rows": ("d.json", lambda _r: b"[]"),
    "json with a field twice": ("d.json", lambda _r: b'[{"prompt": "a", "prompt": "b", "completion": "c"}]'),
    "csv of a header": ("d.csv", lambda _r: CELLS.splitlines(keepends=True)[0]),
    "csv without names": ("d.csv", lambda r: r.choice([b",,,\n", b"\n"]) + CELLS),
    "csv with a name twice": ("d.csv", lambda r: CELLS.replace(b"note", r.choice([b"prompt", b"w"]), 1)),
    "csv with a name in latin-1": ("d.csv", lambda _r: CELLS.replace(b"note", b"n\xf6te", 1)),
    "csv with a broken name": ("d.csv", lambda _r: CELLS.replace(b"note", b'"no"te', 1)),
    "another kind of file": ("d.tsv", lambda _r: GOOD),
}


def bad_files(variations: int) -> Iterator[Case]:
    """Each way to spoil a whole file."""
    for name, (file, make) in FILES.items():
        for number in range(variations):
            yield Case(f"file: {name} {number}", file, make(Random(f"{name} {number}")), TEXT.rule, file)


def _cell(number: int, line: bytes) -> tuple[bytes, bytes]:
    """The file with a line of cells put in as the row `number`, and without that row."""
    lines = CELLS.splitlines(keepends=True)
    return b"".join([*lines[:number], line, *lines[number + 1 :]]), b"".join(
        [*lines[:number], *lines[number + 1 :]]
    )


CELL_ROWS: dict[str, list[bytes]] = {
    "cells": [b"a,b\n", b"a,b,c\n", b"a, b,0.5,true,pos,n,more\n", b"a\n", b",\n"],
    "quote": [b'a,"b"c,0.5,true,pos,n\n', b'"a" ,b,0.5,true,pos,n\n'],
    "latin-1": [b"a,\xe4,0.5,true,pos,n\n", b"\xff, b,0.5,true,pos,n\n"],
    "empty": [b"a,,0.5,true,pos,n\n", b"a, b,,true,pos,n\n", b"a, b,0.5,,pos,n\n", b"a, b,0.5,true,,n\n"],
    "number": [
        b"a, b,much,true,pos,n\n",
        b"a, b,nan,true,pos,n\n",
        b"a, b,2,true,pos,n\n",
        b"a, b,1e999,true,pos,n\n",
    ],
    "truth": [b"a, b,0.5,maybe,pos,n\n", b"a, b,0.5,2,pos,n\n"],
    "category": [b"a, b,0.5,true,bad,n\n"],
}


def bad_cells() -> Iterator[Case]:
    """Rows of csv."""
    for name, lines in CELL_ROWS.items():
        for number, line in enumerate(lines):
            place = 1 + number % 5
            content, clean = _cell(place, line)
            yield Case(f"csv: {name} {number}", "d.csv", content, TEXT.rule, f"d.csv:{place + 1}", clean)


# Configs ----------------------------------------------------------------------------------------

CONFIG = {"model": "MODEL", "data": "[d.jsonl]", "rule": "dft", "max_steps": "1", "device": "cpu"}
WRONG_VALUES: dict[str, tuple[str, ...]] = {
    "integer": (
        "often",
        "1.5",
        "-1",
        "[1]",
        "{a: 1}",
        ".nan",
        ".inf",
        "2026-01-01",
        "true",
        '"3x"',
        "1e400",
        "~ x",
    ),
    "number": ("much", "-1", "[1]", "{a: 1}", ".nan", ".inf", "-.inf", "2026-01-01", '""', "1e400"),
    "switch": ("maybe", "2", "[true]", "{a: true}", "1.5", '""'),
    "choice": ("other", "[adamw]", "{a: b}", "3", '""', "1.5"),
    "text": ("[a]", "{a: b}", "3", "2.5", "true", '""', '"a\\0b"', "2026-01-01"),
    "list": ("{a: b}", "3.5", "[[a]]", "[{a: b}]", "[3]", '[""]', '["a\\0b"]', "[]"),
    "map": ("[a]", "a", "3", "{a: [1]}", "{a: {b: 1}}"),
}
FIELDS = {
    "integer": ("max_steps", "batch_size", "accumulation", "log_steps", "save_steps", "epochs"),
    "number": ("learning_rate", "clip", "weight_decay"),
    "switch": ("chat", "strict", "quiet", "overwrite"),
    "choice": ("dtype", "too_long", "bad_rows", "loss", "schedule"),
    "text": ("model", "rule", "output", "cache"),
    "list": ("data",),
    "map": ("set", "bind"),
}
TEXTS: dict[str, tuple[bytes, str]] = {
    "an unknown field": (b"max_stepz: 3\n", "c.yaml:6: max_stepz: unknown field"),
    "a field twice": (b"seed: 1\nseed: 2\n", "c.yaml:7: `seed` is given twice"),
    "a tab": (b"set:\n\ttau: 1\n", "c.yaml:7: malformed YAML"),
    "an open list": (b"data: [a\n", "c.yaml:"),
    "an open text": (b'output: "a\n', "c.yaml:"),
    "an open map": (b"set: {tau: 1\n", "c.yaml:"),
    "a colon": (b"output: a: b\n", "c.yaml:6: malformed YAML"),
    "a stray word": (b"word\n", "c.yaml:"),
    "an object of Python": (b"output: !!python/object/apply:os.system [true]\n", "c.yaml:6: malformed YAML"),
    "a name of Python": (b"output: !!python/name:os.system\n", "c.yaml:6: malformed YAML"),
    "an unknown tag": (b"output: !mine a\n", "c.yaml:6: malformed YAML"),
    "an unknown alias": (b"output: *none\n", "c.yaml:6: malformed YAML"),
    "two documents": (b"---\nseed: 1\n", "c.yaml:"),
    "a list as key": (b"? [a]\n: 1\n", "c.yaml:6: a key must be the name of a field"),
    "a date that is none": (b"output: 2001-99-99\n", "c.yaml"),
    "a zero byte": (b"output: a\0b\n", "c.yaml"),
    "latin-1": (b"output: \xe4\n", "--config c.yaml: not UTF-8"),
    "nested without end": (
        b"set: " + b"{a: " * 400 + b"1" + b"}" * 400 + b"\n",
        "c.yaml:6: nested more than 20",
    ),
    "nested beyond the parser": (b"set: " + b"[" * 30_000 + b"\n", "c.yaml"),
    "an alias of itself": (b"set: &a {b: *a}\n", "c.yaml:6: nested more than 20"),
    "aliases without end": (
        b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 10)) for i in range(98, 107)),
        "over 10,000 values",
    ),
    "merges without end": (
        b"a: &a {x: 1}\n"
        + b"".join(
            b"%c: &%c {<<: [%s]}\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 10)) for i in range(98, 107)
        ),
        "over 10,000 values",
    ),
    "a number of many digits": (b"seed: " + b"9" * 5000 + b"\n", "c.yaml"),
    "a large seed": (b"seed: 99999999999999999999\n", "c.yaml:6: seed"),
    "flags that exclude each other": (b"resume: true\noverwrite: true\n", "--resume"),
}
WHOLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "c.yaml:1: a config is a list of"),
    "a list": (b"- model: a\n", "c.yaml:1: a config is a list of"),
    "a word": (b"model\n", "c.yaml:1: a config is a list of"),
    "a number": (b"3\n", "c.yaml:1: a config is a list of"),
    "UTF-16": ("model: a\n".encode("utf-16"), "--config c.yaml: not UTF-8"),
    "gzip": (gzip.compress(b"model: a\n"), "--config c.yaml: not UTF-8"),
    "JSON cut": (b'{"model": "a", "da', "c.yaml:1: malformed YAML"),
}


def bad_configs() -> Iterator[tuple[str, bytes, str]]:
    """Configs by name: their bytes, and what the message must hold."""
    for kind, names in FIELDS.items():
        for number, value in enumerate(WRONG_VALUES[kind]):
            name = names[number % len(names)]
            fields = {key: given for key, given in CONFIG.items() if key != name} | {name: value}
            text = "".join(f"{key}: {given}\n" for key, given in fields.items())
            yield f"{kind}: {name}: {value}", text.encode(), f"c.yaml:{len(fields)}: {name}"
    base = "".join(f"{key}: {value}\n" for key, value in CONFIG.items()).encode()
    for what, (more, named) in TEXTS.items():
        yield what, base + more, named
    for what, (content, named) in WHOLE.items():
        yield what, content, named
