"""Conversations -> text and turns: which characters the assistant wrote, its end token included.

The mask comes from the template's `{% generation %}` block where it has one, else from rendering the
conversation turn by turn. What cannot be verified is refused: a wrong mask trains the wrong tokens silently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from trainer.faults import DataFault, first_line

ROLES = ("system", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAY_OUT = (
    "put {% generation %} and {% endgeneration %} around the assistant's text and its end token in a chat "
    "template of your own (--chat-template FILE), or use rows with prompt and completion"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """Characters `[start, end)` of a rendered row: who speaks, and whether they are supervised."""

    start: int
    end: int
    role: str
    response: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as one text with its turns in order.

    `plain` text takes the tokenizer's own special tokens and an end token after it; a chat template has
    written them into the text already.
    """

    text: str
    turns: tuple[Turn, ...]
    plain: bool


def render_chat(messages: object, tokenizer: Any, place: str) -> Rendered:
    """Render a conversation with the tokenizer's chat template and find the assistant's characters.

    Turns with `response` hold what the assistant wrote and the end token after it, nothing else. Raises
    `DataFault` where a message is malformed, the template fails, or turns or end tokens cannot be found.
    """
    known = _checked(messages, place)
    if not tokenizer.chat_template:
        raise DataFault(
            f"{place}: a row with messages needs a chat template and the tokenizer has none; "
            "give one with --chat-template FILE, or use rows with prompt and completion"
        )
    text = _render(tokenizer, known, place)
    ends = _turn_ends(tokenizer, known, text, place)
    if GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked_spans(tokenizer, known, text, place)
    else:
        spans = _rendered_spans(tokenizer, known, text, ends, place)
    return Rendered(
        text, (*_speakers(known, ends), *(Turn(a, b, "assistant", True) for a, b in spans)), plain=False
    )


def render_opening(messages: Sequence[dict[str, Any]], tokenizer: Any, place: str) -> str:
    """The text of a conversation up to where the assistant begins to write."""
    if not messages:
        raise DataFault(f"{place}: the conversation begins with the assistant, so there is nothing to answer")
    return _render(tokenizer, messages, place, prompt=True)


def _checked(messages: object, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataFault(f"{place}: `messages` must be a list of objects with role and content")
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataFault(f"{where} must be an object with role and content")
        if message["role"] not in ROLES:
            raise DataFault(f"{where} has the unknown role {message['role']!r}; known are {', '.join(ROLES)}")
        content = message["content"]
        calls_only = content is None and message.get("tool_calls")
        if not isinstance(content, str) and not calls_only:
            raise DataFault(f"{where}: `content` must be text")
        if message["role"] == "assistant" and not (content or calls_only):
            raise DataFault(f"{where}: an assistant message without text, so a row without a response")
    if all(message["role"] != "assistant" for message in messages):
        raise DataFault(
            f"{place}: a row without a response: none of its {len(messages)} messages is the assistant's"
        )
    return messages


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], place: str, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataFault(
            f"{place}: the chat template refuses this conversation: {first_line(error)}"
        ) from error


def _turn_ends(tokenizer: Any, messages: list[dict[str, Any]], text: str, place: str) -> list[int | None]:
    """Where each message ends in the text; None where the template does not render the beginning alike."""
    ends: list[int | None] = []
    for count in range(1, len(messages)):
        try:
            beginning = _render(tokenizer, messages[:count], place)
        except DataFault:  # some templates refuse a conversation that stops early
            beginning = None
        ends.append(len(beginning) if beginning is not None and text.startswith(beginning) else None)
    return [*ends, len(text)]


def _speakers(messages: list[dict[str, Any]], ends: list[int | None]) -> list[Turn]:
    """Who speaks where, header and end token of a turn included; parts without a known end are left out."""
    turns, start = [], 0
    for message, end in zip(messages, ends, strict=True):
        if start is not None and end is not None:
            turns.append(Turn(start, end, message["role"]))
        start = end
    return turns


def _marked_spans(
    tokenizer: Any, messages: list[dict[str, Any]], text: str, place: str
) -> list[tuple[int, int]]:
    """The assistant's characters as generation blocks mark them, widened by an end token that follows."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    ending = _ending(tokenizer)
    spans: list[tuple[int, int]] = []
    for start, end in rendered[1][0]:
        if not re.search(rf"{ending}\s*\Z", text[start:end]):
            after = re.match(ending, text[end:])
            if after is None:
                raise DataFault(f"{place}: {_no_end(text[start:end])}; {WAY_OUT}")
            end += after.end()
        spans.append((start, end))
    if len(spans) != sum(message["role"] == "assistant" for message in messages):
        raise DataFault(
            f"{place}: the chat template marks {len(spans)} generation blocks for "
            f"{sum(m['role'] == 'assistant' for m in messages)} assistant messages; {WAY_OUT}"
        )
    return spans


def _rendered_spans(
    tokenizer: Any, messages: list[dict[str, Any]], text: str, ends: list[int | None], place: str
) -> list[tuple[int, int]]:
    """The assistant's characters: what a turn adds to its prompt, which must be its text and an end token."""
    ending = _ending(tokenizer)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:number], place, prompt=True) if number else None
        end = ends[number]
        if prompt is None or end is None or not text.startswith(prompt):
            raise DataFault(
                f"{place}: the chat template does not show where assistant message {number + 1} begins "
                f"and ends; {WAY_OUT}"
            )
        written = text[len(prompt) : end]
        content = re.escape((message["content"] or "").strip())
        match = re.match(rf"\s*{content}(?P<rest>.*?{ending}|)\s*\Z", written, re.DOTALL)
        if match is None:
            raise DataFault(
                f"{place}: the chat template changes the text of assistant message {number + 1}, "
                f"so its tokens cannot be found; {WAY_OUT}"
            )
        if not re.fullmatch(rf"\s*{ending}", match["rest"]):
            raise DataFault(f"{place}: {_no_end(written)}; {WAY_OUT}")
        spans.append((len(prompt), len(prompt) + match.end("rest")))
    return spans


def _ending(tokenizer: Any) -> str:
    """A pattern for the tokens that can end a turn: the special tokens, begin and unknown token excepted."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {tokenizer.bos_token, tokenizer.unk_token}
    if tokenizer.eos_token:
        special.add(tokenizer.eos_token)
    return (
        "(?:" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")" if special else r"(?!)"
    )


def _no_end(written: str) -> str:
    return (
        f"the chat template ends an assistant message without an end token (...{written[-30:]!r}), "
        "so the model would never learn to stop"
    )
