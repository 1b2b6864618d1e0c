"""The mask of a conversation: exactly what the assistant wrote, its end token included, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.chat import render_chat
from trainer.data import encode_texts, mark_tokens
from trainer.faults import DataFault

TALK = [
    {"role": "system", "content": "count"},
    {"role": "user", "content": "what is 1 + 2 ?"},
    {"role": "assistant", "content": "the answer is 3"},
    {"role": "user", "content": "and 4 ?"},
    {"role": "assistant", "content": "7 ."},
]
ENDED = ["the answer is 3<|im_end|>", "7 .<|im_end|>"]
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    HEAD
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}" + TAIL
)
MARKED_WITHOUT_END = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}" + TAIL
)


@pytest.fixture
def chat(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """The tokenizer with a chat template of the test's choice."""

    def with_template(template: str | None) -> Any:
        if template is not None:
            monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return with_template


def supervised(messages: list[dict[str, str]], tokenizer: Any) -> list[str]:
    """The supervised stretches of a conversation, as text."""
    rendered = render_chat(messages, tokenizer, "f:1")
    return [rendered.text[t.start : t.end] for t in rendered.turns if t.response]


@pytest.mark.parametrize(
    "template", [None, MARKED, MARKED_WITHOUT_END], ids=["rendered", "marked", "widened"]
)
def test_the_mask_is_the_assistants_text_and_its_end_token(template: str | None, chat: Any):
    assert supervised(TALK, chat(template)) == ENDED


def test_the_mask_is_the_one_that_transformers_gives_for_a_marked_template(chat: Any):
    tokenizer = chat(MARKED)
    ours = render_chat(TALK, tokenizer, "f:1")
    ids, offsets = encode_texts([ours], tokenizer)[0]
    response, roles = mark_tokens(offsets, ours.turns)
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert response == [bool(m) for m in theirs["assistant_masks"]]
    assert sum(response) > 5
    assert [r for r, before in zip(roles, [None, *roles], strict=False) if r != before] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_a_special_token_inside_a_message_does_not_end_it(chat: Any):
    talk = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "a <|im_end|> b"}]
    assert supervised(talk, chat(None)) == ["a <|im_end|> b<|im_end|>"]


def test_a_template_that_trims_a_message_is_understood(chat: Any):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  y \n"}]
    trimming = HEAD + "{{ m['content'] | trim + '<|im_end|>\n' }}" + TAIL
    assert supervised(talk, chat(trimming)) == ["y<|im_end|>"]


REFUSED = {
    "no end token": (HEAD + "{{ m['content'] + '\n' }}" + TAIL, TALK, "without an end token"),
    "marked, no end token": (
        HEAD + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\n' }}" + TAIL,
        [TALK[-1]],
        "without an end token",
    ),
    "changes the text": (
        HEAD + "{{ m['content'] | upper + '<|im_end|>\n' }}" + TAIL,
        TALK,
        "changes the text",
    ),
    "hides earlier turns": (
        "{{ messages | length }}" + HEAD + "{{ m['content'] + '<|im_end|>\n' }}" + TAIL,
        TALK,
        "does not show where",
    ),
    "marks too much": (
        HEAD + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}" + TAIL,
        TALK,
        "marks 5 generation blocks for 2 assistant messages",
    ),
    "refuses": ("{{ raise_exception('roles must alternate') }}", TALK, "roles must alternate"),
    "broken": ("{% for %}", TALK, "chat template"),
    "begins with the assistant": (None, [TALK[2]], "begins and ends"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_verified_is_refused_with_the_place(case: str, chat: Any):
    template, messages, reason = REFUSED[case]
    with pytest.raises(DataFault, match=reason) as caught:
        render_chat(messages, chat(template), "talk.jsonl:7")
    assert str(caught.value).startswith("talk.jsonl:7: ")


@pytest.mark.parametrize("source", ["models/stories260K", "tokenizers/qwen2"])
def test_real_templates(source: str, data_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / source)
    end = tokenizer.eos_token
    stretches = supervised(TALK[1:], tokenizer)
    assert [s.strip() for s in stretches] == [f"the answer is 3{end}", f"7 .{end}"]
