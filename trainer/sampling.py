"""Responses drawn from a model, in batches, and what they show: entropy, and KL to a base model.

Legend: B sequences, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from priority_dsl.integrations.heads import take_apart
from priority_dsl.vocab_pass import sweep
from trainer.faults import ModelFault
from trainer.runlog import tell


@dataclass(frozen=True, slots=True)
class Sample:
    """A drawn response: its text without special tokens, the prompt's ids, its own with the end token."""

    text: str
    prompt: list[int]
    ids: list[int]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    samples: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    special_tokens: bool = True,
    show: bool = False,
    stop: Sequence[str] = (),
    own_chance: bool = False,
) -> list[list[Sample]]:
    """Draw `samples` responses to each prompt: one list a prompt, in order.

    `temperature` 0 takes the likeliest token. `special_tokens=False` for prompts from a chat template, which
    has written them. The same seed and batch size give the same responses on the same machine; with
    `own_chance` each response has a chance of its own, from seed, prompt and its number, so that batch size
    and other prompts change nothing but rounding. The global random state is left as it was. A response ends
    before the first text of `stop` (its ids go on to where that was complete). `show` draws a progress bar.
    Raises `ModelFault` for a prompt without a token, or one that leaves no room in the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = [tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ModelFault(f"the prompt {prompt!r} has no token to start from (the tokenizer adds none)")
        if context is not None and len(ids) >= context:
            raise ModelFault(f"a prompt of {len(ids)} tokens leaves no room in the context of {context}")
    # Prompts of about the same length go together, which saves padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    queue = [(i, number) for i in order for number in range(samples)]
    found: list[list[Sample]] = [[] for _ in prompts]
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "eos_token_id": sorted(_end_tokens(model, tokenizer)),
        "pad_token_id": _end_token(tokenizer),
        "repetition_penalty": 1.0,  # the model's own preferences would bend what is measured
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    }
    own = own_chance and temperature > 0
    if own:
        settings = {name: v for name, v in settings.items() if name not in ("temperature", "top_p", "top_k")}
        settings["do_sample"] = False  # what is drawn is made the likeliest
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        tqdm(total=len(queue), unit="sample", disable=not show) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(queue), batch_size):
            rows = queue[start : start + batch_size]
            asked = [encoded[i] for i, _ in rows]
            extra = {}
            if own:
                chances = [_chances(seed, prompts[i], number, max_new_tokens) for i, number in rows]
                extra["logits_processor"] = [OwnChance(chances, max(map(len, asked)), temperature, top_p)]
            if stop:
                extra["stopping_criteria"] = [Stop(stop, tokenizer, max(map(len, asked)))]
            drawn = _generate(model, asked, settings, context, extra)
            for (i, _), ids in zip(rows, drawn, strict=True):
                ids = ids[: _until(ids, stop, tokenizer)] if stop else ids
                text = tokenizer.decode(ids, skip_special_tokens=True)
                found[i].append(Sample(before(text, stop), encoded[i], ids))
            bar.update(len(rows))
    return found


def _generate(
    model: Any,
    prompts: list[list[int]],
    settings: dict[str, Any],
    context: int | None,
    extra: dict[str, Any],
) -> list[list[int]]:
    """The ids drawn after each prompt, up to and with the first end token; prompts are padded on the left."""
    width = max(map(len, prompts))
    pad = settings["pad_token_id"]
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    room = settings["max_new_tokens"] if context is None else min(settings["max_new_tokens"], context - width)
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, **{**settings, "max_new_tokens": room}, **extra
        )
    ends = set(settings["eos_token_id"])
    drawn = []
    for ids in output[:, width:].tolist():
        stop = next((t for t, token in enumerate(ids) if token in ends), len(ids) - 1)
        drawn.append(ids[: stop + 1])
    return drawn


def before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def _until(ids: list[int], stop: Sequence[str], tokenizer: Any) -> int:
    """How many ids it takes until a text that ends the response is complete; all where none is."""
    if before(whole := tokenizer.decode(ids, skip_special_tokens=True), stop) == whole:
        return len(ids)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(ids[:middle], skip_special_tokens=True)
        low, high = (low, middle) if any(end in text for end in stop) else (middle + 1, high)
    return low


class Stop:
    """Ends the rows [B] of a batch whose response holds one of some texts; generation calls it every step."""

    def __init__(self, stop: Sequence[str], tokenizer: Any, width: int):
        self._stop, self._tokenizer, self._width = stop, tokenizer, width
        self._reach = max(map(len, stop)) + 8  # tokens, each of a character at least, split ones aside

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether each row ends here."""
        tails = self._tokenizer.batch_decode(
            input_ids[:, max(self._width, input_ids.shape[1] - self._reach) :], skip_special_tokens=True
        )
        ended = [any(end in tail for end in self._stop) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


def _chances(seed: int, prompt: str, number: int, steps: int) -> torch.Tensor:
    """A uniform number in [0, 1) for each token of a response, from what alone decides it."""
    key = hashlib.sha256(f"{seed} {number} {prompt}".encode(errors="surrogatepass")).digest()
    source = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.rand(steps, generator=source, dtype=torch.float64)


class OwnChance:
    """Draws the next token of each row by the row's own chance and leaves only that one possible."""

    def __init__(self, chances: list[torch.Tensor], width: int, temperature: float, top_p: float):
        self._chances, self._width = torch.stack(chances), width
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of which only the drawn token's is finite."""
        p, order = (scores.double() / self._temperature).softmax(-1).sort(dim=-1, descending=True)
        mass = p.cumsum(-1)
        kept = torch.where(mass - p < self._top_p, p, 0.0)  # the likeliest whose mass reaches the share
        below = kept.cumsum(-1)
        u = self._chances[:, input_ids.shape[1] - self._width].to(below.device)[:, None] * below[:, -1:]
        place = torch.searchsorted(below, u, right=True).clamp(max=scores.shape[-1] - 1)
        drawn = order.gather(-1, place)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelFault("the tokenizer has no end token (eos_token in tokenizer_config.json)")
    return tokenizer.eos_token_id


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config."""
    known = model.generation_config.eos_token_id
    return {
        _end_token(tokenizer),
        *(known if isinstance(known, list) else [known] if known is not None else []),
    }


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """How a model spreads its probability over the tokens of responses: nats a token, means over all of them.

    `kl` is KL(model || base), None without a base.
    """

    entropy: float
    kl: float | None
    tokens: int


@torch.no_grad()
def token_figures(
    model: Any,
    responses: Sequence[Sample],
    base: Any = None,
    *,
    batch_size: int = 64,
    say: Callable[[str], None] = tell,
) -> TokenFigures:
    """Mean entropy of a model at each token of its responses, and its KL to a base model there.

    Both are over whole distributions, in float32 and at temperature 1. Without a token all figures are 0.
    Full logits are never held, unless a model cannot be taken apart, which `say` is told. Raises `ModelFault`
    where the base has another number of logits.
    """
    entropy, kl, tokens = 0.0, 0.0, 0
    ordered = sorted((r for r in responses if r.ids), key=lambda r: len(r.prompt) + len(r.ids))
    given = {"model": model} if base is None else {"model": model, "base": base}
    parts = {name: take_apart(each, False, say) for name, each in given.items()}
    for start in range(0, len(ordered), batch_size):
        input_ids, live = (t.to(model.device) for t in _aligned(ordered[start : start + batch_size]))
        said = {name: each(input_ids) for name, each in parts.items()}
        models = {name: (hidden.flatten(0, 1), head) for name, (hidden, head) in said.items()}
        found = sweep(_spread, models, live.flatten().long(), live.flatten())
        entropy += float(found[0].sum())
        kl += float(found[1].sum())
        tokens += int(live.sum())
    count = max(tokens, 1)
    return TokenFigures(entropy / count, kl / count if base is not None else None, tokens)


def _spread(logits: dict[str, torch.Tensor], _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of the model and its KL to the base at each of some tokens [R], from logits [R, V]."""
    logp = logits["model"].log_softmax(-1)
    p = logp.exp()
    entropy = -torch.special.xlogy(p, p).sum(-1)
    if "base" not in logits:
        return entropy, torch.zeros_like(entropy)
    logq = logits["base"].log_softmax(-1)
    if logq.shape != logp.shape:
        raise ModelFault(f"the base has {logq.shape[-1]} logits and the model {logp.shape[-1]}")
    return entropy, torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)


def _aligned(rows: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [B, T], padded on the right, and where [B, T] a token of the response is predicted."""
    width = max(len(row.prompt) + len(row.ids) for row in rows) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    live = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        read = [*row.prompt, *row.ids][:-1]
        input_ids[i, : len(read)] = torch.tensor(read)
        live[i, len(row.prompt) - 1 : len(read)] = True
    return input_ids, live
