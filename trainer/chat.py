"""Conversations -> text and turns: which characters the assistant wrote, its end token included.

The mask comes from the template's `{% generation %}` block where it has one, else from rendering the
conversation turn by turn. What cannot be verified is refused: a wrong mask trains the wrong tokens silently.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.faults import DataFault, first_line

ROLES = ("system", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_TEMPLATE = (
    "a row with messages needs a chat template and the tokenizer has none; "
    "give one with --chat-template FILE, or use rows with prompt and completion"
)
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
class Response:
    """One turn of the assistant: its text is the characters `[start, end)` of a rendered row.

    The turn is `[opened, closed)`: what a template writes around the text and the end token too. `origin` is
    where the row's own text of the turn, of `length` characters, begins; None where the template shows it
    otherwise than the row has it.
    """

    opened: int
    start: int
    end: int
    closed: int
    origin: int | None
    length: int

    @property
    def text(self) -> slice:
        """Where the text stands in the rendered row."""
        return slice(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as one text with who speaks where, in order, and the assistant's turns in it.

    `plain` text takes the tokenizer's own special tokens and an end token after it; a chat template has
    written them into the text already.
    """

    text: str
    speakers: tuple[Turn, ...]
    responses: tuple[Response, ...]
    plain: bool

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Who speaks where, and what is supervised."""
        return (*self.speakers, *(Turn(r.opened, r.closed, "assistant", True) for r in self.responses))


def render_chat(messages: object, tokenizer: Any, place: str) -> Rendered:
    """Render a conversation with the tokenizer's chat template and find the assistant's characters.

    Its responses hold what the assistant wrote and the end token after it, nothing else. Raises
    `DataFault` where a message is malformed, the template fails, or turns or end tokens cannot be found.
    """
    known = _checked(messages, place)
    text = _render(tokenizer, known, place)
    ends = _turn_ends(tokenizer, known, text, place)
    if GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked_spans(tokenizer, known, text, place)
    else:
        spans = _rendered_spans(tokenizer, known, text, ends, place)
    ending = _ending(tokenizer)
    written = [message["content"] or "" for message in known if message["role"] == "assistant"]
    responses = [_response(text, span, own, ending) for span, own in zip(spans, written, strict=True)]
    closing = re.search(rf"({ending})\s*\Z", text[slice(*spans[0])])
    speakers = _speakers(known, ends, text, re.escape(closing[1]) if closing else r"(?!)")
    return Rendered(text, tuple(speakers), tuple(responses), plain=False)


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
            raise DataFault(
                f"{where} has the unknown role {reprlib.repr(message['role'])}; known are {', '.join(ROLES)}"
            )
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
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        text.encode()
    except UnicodeEncodeError as error:
        raise DataFault(f"{place}: a message holds half of a surrogate pair, which is not text") from error
    except Exception as error:  # a template runs in a sandbox and raises whatever its code does
        raise DataFault(
            f"{place}: the chat template refuses this conversation: {first_line(error)}"
        ) from error
    return text


def _turn_ends(tokenizer: Any, messages: list[dict[str, Any]], text: str, place: str) -> list[int | None]:
    """Where each message ends in the text; None where the template does not render the beginning alike."""
    ends: list[int | None] = []
    for count, message in enumerate(messages[:-1], start=1):
        try:
            beginning = _render(tokenizer, messages[:count], place)
        except DataFault:  # some templates refuse a conversation that stops early
            ends.append(None)
            continue
        shared = _shared(beginning, text)
        start = ends[-1] if ends else 0
        # Of messages that are rendered into one turn, as of several tools, the turn's end is the last one's.
        merged = message["role"] != "assistant" and message["content"] and start is not None
        if shared == len(beginning) or (merged and message["content"].strip() in text[start:shared]):
            ends.append(shared)
        else:
            ends.append(None)
    return [*ends, len(text)]


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common before they first differ."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _speakers(messages: list[dict[str, Any]], ends: list[int | None], text: str, closing: str) -> list[Turn]:
    """Who speaks where, header and end token of a turn included; parts without a known end are left out.

    A turn ends with the pattern `closing` after its text, even where the template then opens the next one. A
    turn that is closed before the first message's text is a system prompt of the template's own.
    """
    turns: list[Turn] = []
    start: int | None = 0
    for message, end in zip(messages, ends, strict=True):
        if start is not None and end is not None:
            said = _last(rf"{re.escape((message['content'] or '').strip())}\s*{closing}\s*", text, start, end)
            own = None if turns or said is None else _last(rf"{closing}\s*", text, start, said[0])
            if own is not None and message["role"] != "system":
                turns.append(Turn(start, own[1], "system"))
                start = own[1]
            end = end if said is None else said[1]
            turns.append(Turn(start, end, message["role"]))
        start = end
    return turns


def _last(pattern: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    """Where the last match in a part of the text begins and ends."""
    found = None
    for match in re.compile(pattern).finditer(text, start, end):
        found = match.span()
    return found


def _response(text: str, turn: tuple[int, int], own: str, ending: str) -> Response:
    """The text of an assistant's turn without the end token, and where the row's own text stands in it."""
    opened, closed = turn
    closing = re.search(rf"\s*{ending}\s*\Z", text[opened:closed])
    end = closed if closing is None else opened + closing.start()
    start = end - len(text[opened:end].lstrip())
    plain = own.strip()
    before, after = own[: own.find(plain)], own[own.find(plain) + len(plain) :]
    found = text.find(plain, start, end) if plain and text[start:end].count(plain) == 1 else None
    origin = None if found is None else found - len(before)
    if found is not None and (found, found + len(plain)) == (start, end):
        start -= len(before) if text[opened:start].endswith(before) else 0
        end += len(after) if text[end:closed].startswith(after) else 0
    return Response(opened, start, end, closed, origin, len(own))


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
