"""Characters -> tokens: regexes, ranges and quoted texts, against a definition by brute force on bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from priority_dsl import compile_rule
from trainer.batches import collate
from trainer.chat import render_chat
from trainer.columns import ColumnReader
from trainer.config import TrainConfig
from trainer.data import Example, Examples, Reader, encode_texts
from trainer.faults import BadRows, DataFault
from trainer.layouts import Layout, render_row
from trainer.rows import Row
from trainer.spans import TextTokens, mark_tokens

END = 2  # </s>
# Letters, accents as marks of their own, CJK, an emoji of several code points, Arabic, a flag.
ALPHABET = [
    *"abc 12#\n", "é", "e\u0301", "漢", "字", "ß", "👩\u200d👩\u200d👧", "😀",
    "🇩🇪", "ن", "\u0301", "\t", "  ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join)


def byte_level(trim: bool = False, normal: Any = None) -> Any:
    """A byte-level BPE tokenizer with some merges, also across the bytes of one character."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normal is not None:
        core.normalizer = normal
    learned = ["".join(ALPHABET), "漢 漢a 字 ab ab#", "👩👩😀 \n\n  a  b", "e\u0301e\u0301 éé"] * 3
    core.train_from_iterator(
        learned,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def bytes_of(token: str) -> int:
    """How many bytes a byte-level token stands for: one a character of its name."""
    return len(token)


def characters(ids: list[int], text: str, tokenizer: Any) -> list[set[int]]:
    """The characters of each token: those of whose bytes it has one."""
    of_byte = [i for i, c in enumerate(text) for _ in c.encode()]
    found, place = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        found.append(set(of_byte[place : place + bytes_of(token)]))
        place += bytes_of(token)
    assert place == len(of_byte), "the tokens are the text"
    return found


def tokens_of(prompt: str, response: str, tokenizer: Any) -> tuple[TextTokens, list[int]]:
    """A row of text as training reads it, with its end token."""
    row = Row("rows.jsonl:1", {"prompt": prompt, "completion": response})
    rendered = render_row(row, Layout("completion", "prompt", separator=""), tokenizer, chat=False)
    [(ids, offsets)] = encode_texts([rendered], tokenizer)
    assert ids == tokenizer(prompt + response)["input_ids"], "marking tokens changes none"
    return TextTokens(rendered, offsets, len(ids) + 1), ids


TOKENIZERS = {"offsets whole": byte_level(), "offsets trimmed": byte_level(trim=True)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300)
@given(prompt=TEXTS, response=TEXTS, cuts=st.lists(st.integers(0, 40), min_size=2, max_size=4))
def test_ranges_mark_the_tokens_whose_characters_they_overlap(kind, prompt, response, cuts):
    response += "."
    tokens, ids = tokens_of(prompt, response, TOKENIZERS[kind])
    own = [
        {i - len(prompt) for i in c if i >= len(prompt)}
        for c in characters(ids, prompt + response, TOKENIZERS[kind])
    ]
    ranges = [(min(cut, len(response)), min(cuts[0], len(response))) for cut in cuts[1:]]
    inside = {i for a, b in ranges for i in range(a, b)}
    assert tokens.marked([ranges]) == [*(bool(c & inside) for c in own), False]

    quote = response[min(cuts) :][: cuts[0] % 5 + 1]
    if quote:
        first, last = response.find(quote), len(response)
        every = {i for a in range(last) if response.startswith(quote, a) for i in range(a, a + len(quote))}
        assert tokens.within([quote], "here") == [*(bool(c & every) for c in own), False]
        pattern = "".join(f"\\U{ord(c):08x}" for c in quote)
        behind, ahead = set(range(first + len(quote), last)), set(range(first))
        assert tokens.matched("after", pattern, "", "") == [*(bool(c & behind) for c in own), True]
        assert tokens.matched("before", pattern, "", "") == [*(bool(c & ahead) for c in own), False]
    nowhere = [tokens.matched(word, "never there", "", "") for word in ("span", "after", "before")]
    assert nowhere[0] == nowhere[1] == [False] * (len(ids) + 1)
    assert nowhere[2] == [*(bool(c) for c in own), True]


@pytest.mark.parametrize(
    ("text", "range_", "marked"),
    [
        ("xe\u0301y", (2, 3), "é"),  # the mark alone: its letter's token has it
        ("x\u1112\u1161\u11aby", (3, 4), "한"),
        ("xa\u0323\u0301y", (2, 3), "ạ"),
        ("xe\u0301y", (0, 1), "x"),
    ],
)
def test_a_mark_that_the_tokenizer_merges_belongs_to_its_letter(text, range_, marked):
    tokenizer = byte_level(normal=normalizers.NFC())
    tokens, ids = tokens_of("", text, tokenizer)
    chosen = [i for i, mark in zip(ids, tokens.marked([[range_]]), strict=False) if mark]
    assert unicodedata.normalize("NFC", tokenizer.decode(chosen)) in {
        unicodedata.normalize("NFC", m) for m in marked
    }


def test_trimmed_offsets_are_only_lent(tmp_path: Path):
    tokenizer = byte_level(trim=True)
    before = tokenizer.backend_tokenizer.to_str()
    tokens_of("a ", " b \n", tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before, "the run saves the tokenizer as it was"


# Through the reader ------------------------------------------------------------------------------


@pytest.fixture
def read(model: str, tokenizer: Any, write: Callable[..., str]):
    """Reads rows under a rule into examples."""

    def from_rows(
        rows: list[dict[str, Any]], rule: str, limit: int | None = None, **options: Any
    ) -> Examples:
        config = TrainConfig(model=model, data=write("rows.jsonl", rows), rule=rule, **options)
        compiled = compile_rule(rule)
        columns = ColumnReader(compiled.columns, compiled.checked.source.name)
        reader = Reader(config, tokenizer, 320, limit, columns, roles="role" in compiled.requires.columns)
        return reader.read(config.data)

    return from_rows


def marked(example: Example, tokenizer: Any, name: str) -> str:
    """The tokens that a column marks, as text without spaces (some are tokens of their own)."""
    values = example.columns[name]
    assert isinstance(values, list)
    chosen = [i for i, mark in zip(example.ids, values, strict=True) if mark]
    return tokenizer.decode(chosen).replace(" ", "")


SUM = {"prompt": "what is 1 + 2 ?", "completion": " so 1 + 2 = 3 #### 3 ."}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ('span("[0-9]")', " 1 2 3 3"),
        ('span("([0-9]) =")', " 2"),
        ('span("(=)|#")', " ="),  # a match without the group covers nothing
        ('span("")', ""),
        ('span("1(?= [+])")', " 1"),
        ('after("#### ")', " 3 .</s>"),
        ('after("[.]$")', "</s>"),
        ('after("(?<= 2 )")', " = 3 #### 3 .</s>"),  # an empty match has a place; `after` begins there
        ('after("nowhere")', ""),
        ('before(" = ")', " so 1 + 2"),
        ('before("^")', ""),
        ('before("nowhere")', " so 1 + 2 = 3 #### 3 .</s>"),
        ('span("(?i)SO")', " so"),
    ],
)
def test_regexes_by_hand(rule: str, text: str, read: Any, tokenizer: Any):
    example = read([SUM], rule).rows[0]
    assert example.ids == [*tokenizer(SUM["prompt"] + SUM["completion"])["input_ids"], END]
    assert marked(example, tokenizer, rule) == text.replace(" ", "")


def test_a_regex_sees_the_response_alone(read: Any, tokenizer: Any):
    example = read([{"prompt": "#### 1", "completion": " 2 #### 3"}], 'after("#### ")').rows[0]
    assert marked(example, tokenizer, 'after("#### ")') == "3</s>"


def test_weights_of_a_rule_with_a_regex_are_aligned_with_the_targets(read: Any, tokenizer: Any):
    rule = compile_rule('1 if after("#### ") else 0.5')
    example = read([SUM], rule.text).rows[0]
    batch = collate([example], "response", rule.requires.columns)
    weights = rule.weights(None, batch.targets, columns=batch.columns)[0].tolist()
    whole = [0.0, *weights]
    heavy = tokenizer.decode([i for i, w in zip(example.ids, whole, strict=True) if w == 1.0])
    assert heavy.strip() == "3 .</s>"
    assert sum(w == 0.5 for w in whole) == sum(example.response) - sum(w == 1.0 for w in whole)


def test_what_lies_behind_the_cut_still_decides(read: Any, tokenizer: Any):
    row = {"prompt": "a", "completion": " b c d e f #### g"}
    whole = read([row], 'before("####")').rows[0].columns['before("####")']
    cut = read([row], 'before("####")', limit=5).rows[0]
    assert cut.columns['before("####")'] == whole[:5] == [False, False, True, True, True]
    assert not any(read([row], 'before("b")', limit=5).rows[0].columns['before("b")'][3:])


TALK = [
    {"role": "system", "content": "count"},
    {"role": "user", "content": "what is 1 + 2 ? ####"},
    {"role": "assistant", "content": "so #### 3"},
    {"role": "user", "content": "and 4 ?"},
    {"role": "assistant", "content": "no idea"},
]


def test_each_assistant_turn_is_searched_for_itself(read: Any, tokenizer: Any):
    def of(rule: str) -> str:
        return marked(read([{"messages": TALK}], rule).rows[0], tokenizer, rule)

    assert of('after("#### ")') == "3<|im_end|>"
    assert of('before("####")') == "sonoidea<|im_end|>"
    assert of('span("^..")') == "sono"
    assert of('span("count|user|assistant")') == "", "template, system and user are no response"


def test_regexes_under_over_all_are_false_outside_the_response(read: Any):
    rule = compile_rule('over = all; weight = 1 if before("nowhere") else 0')
    example = read([{"messages": TALK}], rule.text).rows[0]
    assert example.columns['before("nowhere")'] == example.response


HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'bot:' }}{% generation %}"
    "{{ ' ' + m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'bot:' }}{% endif %}"
)
TRIMMED = HEAD + "{{ m['content'] | trim + '<|im_end|>\n' }}" + TAIL
WRAPPED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ 'think . ' + m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}" + TAIL
)
UPPER = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | upper + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}" + TAIL
)


@pytest.mark.parametrize(
    ("template", "anchored", "ranged"),
    [
        (None, " ", "one"),
        (SPACED, " ", "one"),
        (TRIMMED, "o", "one"),  # the space is not there, so the text begins with its first letter
        (WRAPPED, "t", "one"),  # what the template adds is written too, and ranges count the row's own text
    ],
)
def test_templates(template, anchored, ranged, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = [{"role": "user", "content": "ten ?"}, {"role": "assistant", "content": " one to ten "}]
    rendered = render_chat(talk, tokenizer, "f:1")
    [(ids, offsets)] = encode_texts([rendered], tokenizer)
    tokens = TextTokens(rendered, offsets, len(ids))

    def of(marks: list[bool]) -> str:
        return tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark])

    assert tokens.texts[0].startswith(anchored)
    assert tokens.texts[0].strip().endswith("one to ten")
    assert of(tokens.within([[1, 4]], "here")).strip() == ranged
    assert of(tokens.within([[0, 12]], "here")).strip().startswith("one to ten")
    assert of(tokens.within(["to"], "here")).strip() == "to"
    ending = of(tokens.matched("after", "to ten", "", "")).strip()
    assert ending in ("</s>", "<|im_end|>")


def test_ranges_of_a_response_that_the_template_changes_are_refused(tokenizer: Any, monkeypatch: Any):
    monkeypatch.setattr(tokenizer, "chat_template", UPPER)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "one"}]
    rendered = render_chat(talk, tokenizer, "f:1")
    [(ids, offsets)] = encode_texts([rendered], tokenizer)
    tokens = TextTokens(rendered, offsets, len(ids))
    with pytest.raises(DataFault, match="here has character ranges, and the chat template changes"):
        tokens.within([[0, 1]], "here")
    assert any(tokens.within(["ONE"], "here"))


# Who speaks --------------------------------------------------------------------------------------


def spoken(messages: list[dict[str, Any]], tokenizer: Any) -> list[tuple[str, str | None]]:
    """The rendered row in pieces by who speaks."""
    rendered = render_chat(messages, tokenizer, "f:1")
    every = [(i, i + 1) for i in range(len(rendered.text))]
    _, roles = mark_tokens(every, rendered.turns)
    pieces: list[tuple[str, str | None]] = []
    for letter, role in zip(rendered.text, roles, strict=True):
        if pieces and pieces[-1][1] == role:
            pieces[-1] = (pieces[-1][0] + letter, role)
        else:
            pieces.append((letter, role))
    return pieces


def test_template_text_belongs_to_the_turn_that_it_opens_or_closes(tokenizer: Any):
    assert spoken(TALK[:3], tokenizer) == [
        ("<|im_start|>system\ncount<|im_end|>\n", "system"),
        ("<|im_start|>user\nwhat is 1 + 2 ? ####<|im_end|>\n", "user"),
        ("<|im_start|>assistant\nso #### 3<|im_end|>\n", "assistant"),
    ]


def test_a_system_prompt_of_the_template_and_a_header_written_early(tokenizer: Any, monkeypatch: Any):
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe a help .<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% if m['role'] == 'user' %}{{ '<|im_start|>assistant\n' }}{% endif %}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = ("<|im_start|>system\nbe a help .<|im_end|>\n", "system")
    rest = [
        ("<|im_start|>user\na<|im_end|>\n", "user"),
        ("<|im_start|>assistant\nb<|im_end|>\n", "assistant"),
    ]
    assert spoken(talk, tokenizer) == [system, *rest]
    named = ("<|im_start|>system\nbe a help .<|im_end|>\n", "system")
    assert spoken([{"role": "system", "content": "be a help ."}, *talk], tokenizer) == [named, *rest]


def test_tool_messages_that_share_a_turn(tokenizer: Any, monkeypatch: Any):
    template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'tool' %}"
        "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<out>' + m['content'] + '</out>' }}"
        "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "c"},
        {"role": "tool", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    assert spoken(talk, tokenizer) == [
        ("<|im_start|>user\na<|im_end|>\n", "user"),
        ("<|im_start|>assistant\nb<|im_end|>\n", "assistant"),
        ("<|im_start|>user\n<out>c</out>\n<out>d</out><|im_end|>\n", "tool"),
        ("<|im_start|>assistant\ne<|im_end|>\n", "assistant"),
    ]


# Columns of spans --------------------------------------------------------------------------------

MARKED = "column h: spans; weight = -0.2 if h else 1"


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ([], ""),
        ([[1, 3]], "so"),
        ([[1, 3], [14, 18]], "so####"),
        ([[4, 4]], ""),
        (["so", "3"], "so33"),
        ([[1, 2], "####"], "s####"),
        ([[0, 22]], "so1+2=3####3."),
    ],
)
def test_spans_are_ranges_and_quotes(spans: Any, text: str, read: Any, tokenizer: Any):
    example = read([SUM | {"h": spans}], MARKED).rows[0]
    assert marked(example, tokenizer, "h") == text


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ("so", r"must be a list of \[start, end\] and of quoted texts, this is a text"),
        (None, "has no value"),
        ([3], r"holds 3, which is neither \[start, end\] nor a quoted text"),
        ([[1, 2, 3]], "neither"),
        ([[1.0, 2.0]], "neither"),
        ([[True, 2]], "neither"),
        ([[5, 3]], r"holds \[5, 3\], which is no range of the response's 22 characters"),
        ([[-1, 3]], "no range"),
        ([[0, 23]], "no range"),
        (["nowhere"], '"nowhere"'),
        ([""], '""'),
    ],
)
def test_bad_spans_are_refused_with_their_place(spans: Any, reason: str, read: Any):
    with pytest.raises(DataFault, match=reason) as caught:
        read([SUM | {"h": []}, SUM | {"h": spans}], MARKED)
    assert "rows.jsonl:2: column `h`" in str(caught.value)


def test_all_quotes_that_are_not_there_are_listed(read: Any):
    rows = [SUM | {"h": quotes} for quotes in (["so"], ["no", "so", "not"], [], ["漢字"])]
    with pytest.raises(BadRows) as caught:
        read(rows, MARKED)
    what = "column `h` quotes what is not in the response, letter by letter"
    places = [line.rpartition("rows.jsonl")[2] for line in str(caught.value).splitlines()]
    assert places[:2] == [f':2: {what}: "no", "not"', f':4: {what}: "漢字"']


def test_several_assistant_turns_take_quotes_and_no_ranges(read: Any, tokenizer: Any):
    example = read([{"messages": TALK, "h": ["idea", "so"]}], MARKED).rows[0]
    assert marked(example, tokenizer, "h") == "soidea"
    with pytest.raises(DataFault, match="has character ranges, and the row 2 assistant messages; quote"):
        read([{"messages": TALK, "h": [[0, 2]]}], MARKED)


def test_spans_in_csv_are_json(model: str, tokenizer: Any, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,h\na, b c,"[[1, 2], ""c""]"\na, b,so\n')
    config = TrainConfig(model=model, data=str(path), rule=MARKED)
    reader = Reader(config, tokenizer, 320, None, ColumnReader(compile_rule(MARKED).columns))
    with pytest.raises(DataFault, match=r"rows.csv:3: column `h` must be a list, written as JSON"):
        reader.read(config.data)
    path.write_text('prompt,completion,h\na, b c,"[[1, 2], ""c""]"\n')
    assert marked(reader.read(config.data).rows[0], tokenizer, "h") == "bc"


def test_tokenised_rows_bring_the_bools(read: Any):
    rule = 'column h: spans; weight = 1 if after("#### ") or h else 0'
    row = {"input_ids": [5, 6, 7], "h": [False, True, False], 'after("#### ")': [False, False, True]}
    columns = read([row], rule).rows[0].columns
    assert columns == {"h": [False, True, False], 'after("#### ")': [False, False, True]}
    with pytest.raises(
        DataFault, match=r"rows.jsonl:1: the row is tokenised, .* look for `after\(\"#### \"\)`"
    ):
        read([{"input_ids": [5, 6, 7], "h": [True] * 3}], rule)
    with pytest.raises(DataFault, match="column `h`, token 0 must be true or false"):
        read([row | {"h": [[0, 1], [1, 2], [2, 3]]}], rule)


# Regexes that run away ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ['span("(a|aa)+$")', 'after("(a|aa)+$")', 'before("(a|aa)+$")'])
def test_a_regex_that_runs_away_is_stopped_with_rule_and_row(rule: str, read: Any):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": "!" + "a" * 60 + "? "}]
    with pytest.raises(
        DataFault, match=r"rows.jsonl:2: rule `<rule>`: the regex of `\w+\(\".*took more than 1 s"
    ):
        read(rows, rule)


# Real data ---------------------------------------------------------------------------------------

HALUEVAL = "column hallucination_spans: spans; weight = -0.2 if hallucination_spans else 1"
MADE = [
    {
        "user_query": "Wo liegt 東京？",
        "chatgpt_response": "Tōkyō (東京) liegt in Süd-Korea 🇰🇷, nicht in Japan 🇯🇵.",
        "hallucination": "yes",
        "hallucination_spans": ["Süd-Korea 🇰🇷", "nicht in Japan", "京"],
    },
    {
        "user_query": "cafe\u0301?",
        "chatgpt_response": "Le cafe\u0301 👩\u200d👩\u200d👧 est na\u00efve.",
        "hallucination": "yes",
        "hallucination_spans": ["e\u0301 👩", "\u00ef"],
    },
]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_halueval_tokens_inside_weigh_what_the_rule_says(kind: str, data_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / kind)
    lines = (data_dir / "labelled" / "halueval_general.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [*map(json.loads, lines), *MADE]
    literal = [all(q and q in row["chatgpt_response"] for q in row["hallucination_spans"]) for row in rows]
    assert sum(len(r["hallucination_spans"]) for r in rows[: len(lines)]) == 941

    def reader(chosen: list[dict[str, Any]]) -> tuple[Reader, str]:
        path = tmp_path / "halueval.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        config = TrainConfig(
            model="unused", data=str(path), rule=HALUEVAL, prompt="user_query", completion="chatgpt_response"
        )
        return Reader(config, tokenizer, 200_000, None, ColumnReader(rule.columns)), str(path)

    rule = compile_rule(HALUEVAL)
    of_all, path = reader(rows)
    with pytest.raises(BadRows) as caught:
        of_all.read([path])
    bad = [fault.place.removeprefix(f"{path}:") for fault in caught.value.bad]
    assert [*map(int, bad)] == [number for number, there in enumerate(literal, start=1) if not there]
    quotes = [str(fault).partition("letter by letter: ")[2] for fault in caught.value.bad]
    assert sum(len(json.loads(f"[{listed}]")) for listed in quotes) == 119

    wanted = [row for row, there in zip(rows, literal, strict=True) if there]
    wanted = [row for row in wanted if row["hallucination_spans"]] + wanted[:100]
    of_some, path = reader(wanted)
    inside = 0
    for row, example in zip(wanted, of_some.read([path]).rows, strict=True):
        prompt = f"{row['user_query']}\n"
        text = prompt + row["chatgpt_response"]
        assert example.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id], "no token id changed"
        batch = collate([example], "response", rule.requires.columns)
        weights = [0.0, *rule.weights(None, batch.targets, columns=batch.columns)[0].tolist()]
        expected = [
            (-0.2 if hit else 1.0) if mine else 0.0
            for hit, mine in zip(by_bytes(row, prompt, example.ids, tokenizer), example.response, strict=True)
        ]
        assert weights == pytest.approx(expected), row["chatgpt_response"]
        inside += sum(w < 0 for w in weights)
    assert inside > 10_000


def by_bytes(row: dict[str, Any], prompt: str, ids: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens have a byte of a quoted text; Qwen2 composes accents first (NFC), so do we."""
    normal = "NFC" if tokenizer.backend_tokenizer.normalizer else None
    text = prompt + row["chatgpt_response"]
    hit = [False] * len(text)
    for quote in row["hallucination_spans"]:
        at = text.find(quote, len(prompt))
        while at >= 0:
            hit[at : at + len(quote)] = [True] * len(quote)
            at = text.find(quote, at + 1)
    of_byte: list[bool] = []
    place = 0
    while place < len(text):  # a letter with the marks that follow it is normalised as one
        end = place + 1
        while normal and end < len(text) and unicodedata.combining(text[end]):
            end += 1
        piece = text[place:end]
        if normal and unicodedata.normalize(normal, piece) != piece:
            of_byte += [any(hit[place:end])] * len(unicodedata.normalize(normal, piece).encode())
        else:
            of_byte += [h for c, h in zip(piece, hit[place:end], strict=True) for _ in c.encode()]
        place = end
    found, place = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids[:-1]):
        found.append(any(of_byte[place : place + len(token)]))
        place += len(token)
    assert place == len(of_byte)
    return [*found, False]
