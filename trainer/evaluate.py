"""What a model can do: held-out nll, Avg@k and Pass@k of samples, entropy, KL to a base, rank of pairs."""

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
from trainer.checkers.checking import Asked, check_all, tell_failures, write_responses
from trainer.checkers.estimates import mean_pass_at_k, pass_at_k, standard_error
from trainer.checkers.sandbox import Limits
from trainer.checkers.table import Bounds, Check, find_checker
from trainer.checkers.tasks import TASKS, task_like
from trainer.columns import ColumnReader
from trainer.config import EvalConfig
from trainer.data import Example, Examples, Reader
from trainer.faults import ConfigFault, DataFault, RowFault
from trainer.layouts import layout_of, render_prompt
from trainer.models import Quantize, context_of, load_model, load_tokenizer, quieten, vocabulary_of
from trainer.preferences import rank, reads_pairs
from trainer.rows import Read, Row, RowFile, open_rows
from trainer.runlog import silent, tell
from trainer.sampling import Sample, sample, token_figures
from trainer.vllm_engine import draw, refuse_missing

__all__ = ["HeldOut", "evaluate", "held_out", "mean_pass_at_k", "pass_at_k", "table"]


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


def evaluate(config: EvalConfig) -> dict[str, float]:
    """The figures that the config asks for, by name, in the order in which they are shown.

    A figure over prompts or pairs has its standard error beside it, under its name and `_stderr`, where there
    are two or more.
    """
    quieten()
    say = silent if config.quiet else tell
    check, bounds = _checker(config, say)
    if config.engine == "vllm":
        refuse_missing(config)
    pairs = config.task is None and reads_pairs(config)
    if pairs and (config.samples or config.entropy or config.base is not None):
        raise ConfigFault("--samples, --entropy and --base are for rows with one response, these are pairs")
    tokenizer = load_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, quantize=Quantize.of(config), trust=config.trust_remote_code)
    limits = [n for n in (context_of(model), config.max_length) if n is not None]
    reader = Reader(
        config,
        tokenizer,
        vocabulary_of(model),
        min(limits, default=None),
        ColumnReader({}),
        pairs=pairs,
        reshape=_reshape(config),
    )
    examples = _read(reader, config)
    say(f"data: {examples}")
    rows = examples.rows[: None if config.limit is None else config.limit * reader.responses]
    if pairs:
        figures = _preferences(_ready(model, config), rows, config, say)
    else:
        bad = {fault.place for fault in examples.bad}
        figures = _figures(model, tokenizer, rows, bad, config, check, bounds, say)
    if config.output is not None:
        _write(config.output, figures)
    return figures


def _read(reader: Reader, config: EvalConfig) -> Examples:
    """The examples; where the rows cannot be read as they are, the fault names the task that reads them."""
    try:
        return reader.read(config.data)
    except DataFault as fault:
        plain = config.task is None and config.completion is None
        first = next((row for row in open_rows(config.data[0]) if isinstance(row, Row)), None)
        like = task_like(first.fields) if plain and first is not None else None
        if like is None:
            raise
        raise DataFault(f"{fault}\nthese rows look like those of --task {like}") from fault


def _figures(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    bad: set[str],
    config: EvalConfig,
    check: Check | None,
    bounds: Bounds,
    say: Callable[[str], None],
) -> dict[str, float]:
    """The figures of rows with one response."""
    asked = _asked(config, tokenizer, bad, say) if config.samples else []
    drawn: list[list[Sample]] = []
    if config.samples and config.engine == "vllm":  # before the model takes memory of the device
        drawn = draw_responses(model, tokenizer, asked, config, say)
    model = _ready(model, config)
    base = None
    if config.base is not None:
        base = _ready(load_model(config.base, "--base", trust=config.trust_remote_code), config)
    plain = held_out(model, rows, batch_size=config.batch_size, bf16=config.dtype == "bf16", say=say)
    figures: dict[str, float] = {
        "nll": plain.nll,
        "perplexity": math.exp(min(plain.nll, 700.0)),  # a float ends there
        "accuracy": plain.accuracy,
        "tokens": plain.tokens,
    }
    responses = [Sample("", *_halves(row)) for row in rows]
    if config.samples:
        drawn = drawn or draw_responses(model, tokenizer, asked, config, say)
        figures |= _scores(asked, drawn, config, check, bounds, say)
        responses = [response for several in drawn for response in several]
    if config.entropy or base is not None:
        spread = token_figures(model, responses, base, batch_size=config.batch_size, say=say)
        figures |= {"entropy": spread.entropy} if config.entropy else {}
        figures |= {"kl": spread.kl} if spread.kl is not None else {}
    return figures


def _checker(config: EvalConfig, say: Callable[[str], None]) -> tuple[Check | None, Bounds]:
    """The checker with its bounds; `ConfigFault` for what this machine lacks for it."""
    bounds = Bounds(Limits(config.check_seconds, config.check_memory << 20), config.unsafe_checker)
    if config.check_name is None or not config.samples:
        return None, bounds
    check = find_checker(config.check_name)
    if check.prepare is not None and (note := check.prepare(bounds)):
        say(note)
    return check, bounds


def _reshape(config: EvalConfig) -> Callable[[Read], Read] | None:
    if config.task is None:
        return None
    task = TASKS[config.task]
    return lambda row: task.reshaped(row, config.chat)


def _asked(config: EvalConfig, tokenizer: Any, bad: set[str], say: Callable[[str], None]) -> list[Asked]:
    """The rows that responses are drawn to, those that cannot be used left out."""
    asked: list[Asked] = []
    reshape = _reshape(config)
    for source in config.data:
        layout = None
        for row in open_rows(source):
            if config.limit is not None and len(asked) == config.limit:
                break
            shaped = row if reshape is None else reshape(row)
            if isinstance(row, RowFault) or isinstance(shaped, RowFault) or row.place in bad:
                continue
            if layout is None:
                layout = layout_of(RowFile(source, [shaped]), config)
                if config.task is None and (like := task_like(row.fields)) is not None:
                    say(f"{source}: the rows look like those of --task {like}, which asks and checks them so")
            prompt = render_prompt(shaped, layout, tokenizer, config.chat)
            answer = TASKS[config.task].answer(row.fields) if config.task is not None else prompt.reference
            asked.append(Asked(row.place, row.fields, prompt, answer))
    if len({row.prompt.plain for row in asked}) > 1:
        raise ConfigFault("--data: conversations and plain text cannot be sampled together")
    return asked


def draw_responses(
    model: Any, tokenizer: Any, asked: Sequence[Asked], config: EvalConfig, say: Callable[[str], None]
) -> list[list[Sample]]:
    """Draw responses to each row; empty ones where the prompt leaves no room, which is said."""
    task = TASKS[config.task] if config.task is not None else None
    stop = config.stop or (task.stop if task is not None and not config.chat else ())
    longest = config.max_new_tokens
    if task is not None and "max_new_tokens" not in config.model_fields_set:
        longest = task.max_new_tokens
    plain = bool(asked) and asked[0].prompt.plain
    encoded = [tokenizer(row.prompt.text, add_special_tokens=plain)["input_ids"] for row in asked]
    context = context_of(model)
    fits = [i for i, ids in enumerate(encoded) if context is None or len(ids) < context]
    if len(fits) < len(asked):
        say(
            f"{len(asked) - len(fits)} of {len(asked)} prompts leave no room in the context of {context}, "
            "so they have no response"
        )
    prompts = [asked[i].prompt.text for i in fits]
    if config.engine == "vllm":
        drawn = draw(config, prompts, [encoded[i] for i in fits], longest, stop)
    else:
        drawn = sample(
            model,
            tokenizer,
            prompts,
            config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=longest,
            batch_size=config.batch_size,
            seed=config.seed,
            special_tokens=plain,
            show=not config.quiet and sys.stderr.isatty(),
            stop=stop,
            own_chance=True,
        )
    found = dict(zip(fits, drawn, strict=True))
    return [found.get(i, [Sample("", ids, [])] * config.samples) for i, ids in enumerate(encoded)]


def _scores(
    asked: Sequence[Asked],
    drawn: Sequence[Sequence[Sample]],
    config: EvalConfig,
    check: Check | None,
    bounds: Bounds,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Avg@n and Pass@k with their standard errors, and how often the checker stopped."""
    verdicts = []
    if check is not None:
        texts = [[response.text for response in several] for several in drawn]
        verdicts = check_all(check, asked, texts, bounds, config.workers)
    if config.responses is not None:
        write_responses(config.responses, asked, drawn, verdicts)
    if check is None:
        return {}
    failed = tell_failures(verdicts, say)
    correct = [sum(map(bool, several)) for several in verdicts]
    figures = _with_error(f"avg@{config.samples}", [pass_at_k(config.samples, c, 1) for c in correct])
    for k in config.k or sorted({1, config.samples}):
        figures |= _with_error(f"pass@{k}", [pass_at_k(config.samples, c, k) for c in correct])
    return figures | ({"checker_errors": failed} if failed else {})


def _with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """A mean and its standard error over prompts or pairs."""
    error = standard_error(values)
    figures = {name: sum(values) / max(len(values), 1)}
    return figures | ({} if error is None else {f"{name}_stderr": error})


def _preferences(
    model: Any, rows: Sequence[Example], config: EvalConfig, say: Callable[[str], None]
) -> dict[str, float]:
    """The figures of pairs: the nll of the chosen responses, and how both are ranked."""
    found = rank(model, rows, batch_size=config.batch_size, bf16=config.dtype == "bf16", say=say)
    chosen = sum(sum(row.response[1:]) for row in rows[0::2])
    nll = -math.fsum(found.chosen) / max(chosen, 1)
    figures = {"pairs": len(found.chosen), "nll_chosen": nll, "tokens": found.tokens}
    figures |= _with_error("preference_accuracy", [float(likelier) for likelier in found.preferred])
    return figures | _with_error("preference_margin", found.margins)


def _ready(model: Any, config: EvalConfig) -> Any:
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device)


def _halves(row: Example) -> tuple[list[int], list[int]]:
    """A row as prompt and response, parted at its first supervised token after the first."""
    start = next(i for i, marked in enumerate(row.response) if marked and i > 0)
    return row.ids[:start], row.ids[start:]


def _write(path: str, figures: dict[str, float]) -> None:
    try:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"--output {path}: cannot be written: {error.strerror}") from error


def table(figures: Mapping[str, float]) -> str:
    """The figures as lines of name and value; shares in percent, with the standard error over prompts."""
    values = {name: value for name, value in figures.items() if not name.endswith("_stderr")}
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        line = f"{name:{width}}  {_shown(name, value)}"
        if (error := figures.get(f"{name}_stderr")) is not None:
            line += f" ± {_shown(name, error)}"
        lines.append(line)
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if name.startswith(("accuracy", "avg@", "pass@", "preference_accuracy")):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
