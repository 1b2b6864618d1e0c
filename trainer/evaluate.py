"""What a model can do: held-out nll and accuracy, Avg@k and Pass@k of samples, entropy, KL to a base."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from priority_dsl.integrations.heads import plain_figures, take_apart
from trainer.batches import IGNORED, collate
from trainer.checkers import Checker, find_checker
from trainer.columns import ColumnReader
from trainer.config import EvalConfig
from trainer.data import Example, Reader
from trainer.faults import ConfigFault, RunFault, first_line
from trainer.layouts import layout_of, render_prompt
from trainer.models import Quantize, context_of, load_model, load_tokenizer, quieten, vocabulary_of
from trainer.rows import read_rows
from trainer.runlog import silent, tell
from trainer.sampling import Sample, sample, token_figures


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Plain nll in nats a token and accuracy (share of likeliest tokens) over the supervised tokens."""

    nll: float
    accuracy: float
    tokens: int


def held_out(
    model: Any,
    rows: Sequence[Example],
    *,
    batch_size: int = 32,
    bf16: bool = False,
    say: Callable[[str], None] = tell,
) -> HeldOut:
    """Measure a model on rows: the mean plain nll and the accuracy of their supervised tokens.

    Statistics are float32. Rows are taken by length, which changes nothing but the time. Full logits are
    never held, unless the model cannot be taken apart, which `say` is told.
    """
    nll, right, tokens = 0.0, 0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    parts = take_apart(model, bf16, say)
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], "response", ()).to(model.device)
        live = batch.targets != IGNORED
        of_tokens, likeliest = plain_figures(*parts(batch.input_ids), batch.targets, live)
        nll += float(of_tokens.sum())
        right += int(likeliest.sum())
        tokens += int(live.sum())
    return HeldOut(nll / max(tokens, 1), right / max(tokens, 1), tokens)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a correct one.

    `correct` of `samples` are correct: 1 - C(samples - correct, k) / C(samples, k), the unbiased estimator.
    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    Source: Chen et al., arXiv:2107.03374, Eq. (1).
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass_at_k needs 0 <= correct <= samples and 1 <= k <= samples, not {samples, correct, k}"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Pass@k over problems, each with its number of correct samples; 0 without a problem. k = 1 is Avg."""
    return sum(pass_at_k(samples, c, k) for c in correct) / max(len(correct), 1)


def count_correct(
    checker: Checker,
    drawn: Sequence[Sequence[Sample]],
    references: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    places: Sequence[str],
) -> list[int]:
    """How many responses to each prompt are right; `RunFault` names the row where a checker fails."""
    found = []
    for responses, reference, row, place in zip(drawn, references, rows, places, strict=True):
        try:
            found.append(sum(bool(checker(response.text, reference, row)) for response in responses))
        except Exception as error:  # a person's own checker may raise anything
            raise RunFault(
                f"{place}: the checker stopped: {type(error).__name__}: {first_line(error)}"
            ) from error
    return found


def evaluate(config: EvalConfig) -> dict[str, float]:
    """The figures that the config asks for, by name, in the order in which they are shown."""
    quieten()
    say = silent if config.quiet else tell
    checker = find_checker(config.checker) if config.checker is not None else None
    tokenizer = load_tokenizer(config.model, config.chat_template, config.trust_remote_code)
    trust = config.trust_remote_code
    model = _ready(load_model(config.model, quantize=Quantize.of(config), trust=trust), config)
    base = _ready(load_model(config.base, "--base", trust=trust), config) if config.base is not None else None
    limits = [n for n in (context_of(model), config.max_length) if n is not None]
    reader = Reader(config, tokenizer, vocabulary_of(model), min(limits, default=None), ColumnReader({}))
    examples = reader.read(config.data)
    say(f"data: {examples}")
    rows = examples.rows[: config.limit]
    plain = held_out(model, rows, batch_size=config.batch_size, bf16=config.dtype == "bf16", say=say)
    figures: dict[str, float] = {"nll": plain.nll, "accuracy": plain.accuracy, "tokens": plain.tokens}
    responses = [Sample("", *_halves(row)) for row in rows]
    if config.samples:
        drawn, correct = _draw(model, tokenizer, config, checker)
        responses = [response for several in drawn for response in several]
        if checker is not None:
            figures[f"avg@{config.samples}"] = mean_pass_at_k(correct, config.samples, 1)
            for k in config.k or sorted({1, config.samples}):
                figures[f"pass@{k}"] = mean_pass_at_k(correct, config.samples, k)
    if config.entropy or base is not None:
        spread = token_figures(model, responses, base, batch_size=config.batch_size, say=say)
        figures |= {"entropy": spread.entropy} if config.entropy else {}
        figures |= {"kl": spread.kl} if spread.kl is not None else {}
    if config.output is not None:
        _write(config.output, figures)
    return figures


def _ready(model: Any, config: EvalConfig) -> Any:
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device)


def _halves(row: Example) -> tuple[list[int], list[int]]:
    """A row as prompt and response, parted at its first supervised token after the first."""
    start = next(i for i, marked in enumerate(row.response) if marked and i > 0)
    return row.ids[:start], row.ids[start:]


def _draw(
    model: Any, tokenizer: Any, config: EvalConfig, checker: Checker | None
) -> tuple[list[list[Sample]], list[int]]:
    """Draw responses to the prompt of each row, and count the right ones where there is a checker."""
    rows, prompts = [], []
    for source in config.data:
        file = read_rows(source)
        layout = layout_of(file, config)
        rows += file.rows[: None if config.limit is None else config.limit - len(rows)]
        prompts += [render_prompt(row, layout, tokenizer, config.chat) for row in rows[len(prompts) :]]
    if len({prompt.plain for prompt in prompts}) > 1:
        raise ConfigFault("--data: conversations and plain text cannot be sampled together")
    drawn = sample(
        model,
        tokenizer,
        [prompt.text for prompt in prompts],
        config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        special_tokens=prompts[0].plain,
        show=not config.quiet and sys.stderr.isatty(),
    )
    if checker is None:
        return drawn, []
    references = [prompt.reference for prompt in prompts]
    return drawn, count_correct(checker, drawn, references, [r.fields for r in rows], [r.place for r in rows])


def _write(path: str, figures: dict[str, float]) -> None:
    try:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"--output {path}: cannot be written: {error.strerror}") from error


def table(figures: Mapping[str, float]) -> str:
    """The figures as lines of name and value; shares in percent."""
    shares = ("accuracy", "avg@", "pass@")
    shown = {
        name: f"{value:.1%}"
        if name.startswith(shares)
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4f}"
        for name, value in figures.items()
    }
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())
