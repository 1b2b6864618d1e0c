"""Views that read anew and attention, against forward passes by hand on single rows, and in runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from priority_dsl import compile_rule
from priority_dsl.integrations.heads import take_apart
from priority_dsl.vocabulary.chance import drawn
from trainer.attention import LastAttention
from trainer.batches import IGNORED, Batch, collate
from trainer.columns import ColumnReader
from trainer.config import RowConfig, TrainConfig
from trainer.data import Example, Reader
from trainer.faults import DataFault, Fault, ModelFault
from trainer.models import load_model
from trainer.prompts import PromptReader
from trainer.train import Outcome, train
from trainer.trained import Call, Trained
from trainer.views import Views

BEGIN = 1
WORDS = [
    ("one two", "three"),
    ("what is 2 + 3 ?", "the answer is 5 ."),
    ("a", "model learned to count to ten"),
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of several lengths with another prompt in `other` and the row's own in `same`."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": p, "completion": f" {c}", "other": f"count : {p} {c[:3]}", "same": p} for p, c in WORDS * 2
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples(rule: Any, source: str, tokenizer: Any, **settings: Any) -> list[Example]:
    config = RowConfig(model="unused", data=(source,), **settings)
    prompts = PromptReader.of(rule, config, tokenizer, 64)
    return Reader(config, tokenizer, 320, 64, ColumnReader(rule.columns), prompts=prompts).read([source]).rows


def swept(text: str, source: str, model: str, tokenizer: Any, seed: int = 0, epoch: int = 0) -> list[Tensor]:
    """The weight of the response tokens of each row, from one batch of all rows, `ref` a frozen model."""
    rule = compile_rule(text)
    rows = examples(rule, source, tokenizer)
    return in_batch(rule, rows, model, tokenizer, seed, epoch)


def in_batch(
    rule: Any, rows: list[Example], model: str, tokenizer: Any, seed: int = 0, epoch: int = 0
) -> list[Tensor]:
    views = Views(rule, tokenizer, seed)
    apart = take_apart(load_model(model).eval(), False, print)
    batch = collate(rows, "response", rule.requires.columns)
    said, inside = views.frozen(dict.fromkeys(views.sights, apart), batch, epoch, views.inside)
    weights = rule.weights(None, batch.targets, models=said, stored=inside, columns=batch.columns)
    return [w[y != IGNORED] for w, y in zip(weights, batch.targets, strict=True)]


def response_of(row: Example) -> list[int]:
    return [token for token, mark in zip(row.ids, row.response, strict=True) if mark]


@torch.no_grad()
def nll_after(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The surprise of a response after a prompt, from a row of its own."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return -torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(response)])


# Other prompts ------------------------------------------------------------------------------------


def test_unprompted_is_the_response_alone_after_the_begin_token(rows_file: str, model: str, tokenizer: Any):
    found = swept("nll(unprompted(ref))", rows_file, model, tokenizer)
    whole = load_model(model).eval()
    for row, values in zip(examples(compile_rule("sft"), rows_file, tokenizer), found, strict=True):
        torch.testing.assert_close(values, nll_after(whole, [BEGIN], response_of(row)), rtol=1e-5, atol=1e-5)


def test_reading_is_the_response_after_the_prompt_in_the_column(rows_file: str, model: str, tokenizer: Any):
    text = "column other: text; weight = nll(reading(ref, other))"
    found = swept(text, rows_file, model, tokenizer)
    whole = load_model(model).eval()
    texts = [json.loads(line)["other"] for line in Path(rows_file).read_text().splitlines()]
    rows = examples(compile_rule("sft"), rows_file, tokenizer)
    for row, prompt, values in zip(rows, texts, found, strict=True):
        expected = nll_after(whole, tokenizer(prompt)["input_ids"], response_of(row))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"chat": True}, {"separator": " "}], ids=["plain", "chat", "separator"]
)
def test_reading_the_own_prompt_is_the_model(
    settings: dict[str, Any], rows_file: str, model: str, tokenizer: Any
):
    rule = compile_rule("column same: text; weight = nll(reading(ref, same)) - nll(ref)")
    rows = examples(rule, rows_file, tokenizer, **settings)
    for values in in_batch(rule, rows, model, tokenizer):
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-5)


def conversation(tmp_path: Path, *messages: tuple[str, str]) -> str:
    path = tmp_path / "chat.jsonl"
    said = [{"role": role, "content": content} for role, content in messages]
    path.write_text(json.dumps({"messages": said, "same": messages[-2][1]}) + "\n")
    return str(path)


def test_reading_keeps_the_system_message(tmp_path: Path, model: str, tokenizer: Any):
    source = conversation(tmp_path, ("system", "count"), ("user", "one"), ("assistant", "two"))
    rule = compile_rule("column same: text; weight = nll(reading(ref, same)) - nll(ref)")
    (values,) = in_batch(rule, examples(rule, source, tokenizer), model, tokenizer)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-5)


def test_reading_needs_one_response(tmp_path: Path, tokenizer: Any):
    turns = [("user", "one"), ("assistant", "two")]
    rule = compile_rule("column same: text; weight = p(reading(ref, same))")
    with pytest.raises(DataFault, match=r"chat\.jsonl:1: `reading` puts another text"):
        examples(rule, conversation(tmp_path, *turns, *turns), tokenizer)


def test_unprompted_reads_all_turns_in_order(tmp_path: Path, model: str, tokenizer: Any):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "ten")]
    rule = compile_rule("nll(unprompted(ref))")
    rows = examples(rule, conversation(tmp_path, *turns), tokenizer)
    (values,) = in_batch(rule, rows, model, tokenizer)
    expected = nll_after(load_model(model).eval(), [BEGIN], response_of(rows[0]))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_beyond_the_context_is_refused(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": " b", "other": "one two three " * 30}) + "\n")
    rule = compile_rule("column other: text; weight = p(reading(ref, other))")
    with pytest.raises(DataFault, match=r"long\.jsonl:1: the prompt in column `other` and the response have"):
        examples(rule, str(path), tokenizer)


def test_the_innermost_prompt_is_the_one_that_the_model_sees(rows_file: str, model: str, tokenizer: Any):
    outer = swept(
        "column other: text; weight = nll(reading(unprompted(ref), other))", rows_file, model, tokenizer
    )
    inner = swept("nll(unprompted(ref))", rows_file, model, tokenizer)
    for a, b in zip(outer, inner, strict=True):
        assert torch.equal(a, b)


# Noise --------------------------------------------------------------------------------------------


def test_perturbed_adds_the_noise_of_law_10(rows_file: str, model: str, tokenizer: Any):
    """The embeddings by hand, entry by entry, from the generator in plain integers."""
    seed, epoch, scale = 3, 2, 5.0
    found = swept("nll(perturbed(ref, 5))", rows_file, model, tokenizer, seed, epoch)
    whole = load_model(model).eval()
    for row, values in zip(examples(compile_rule("sft"), rows_file, tokenizer), found, strict=True):
        embedded = whole.get_input_embeddings()(torch.tensor([row.ids])).detach()
        length, width = embedded.shape[1:]
        bound = scale / math.sqrt(length * width)
        entries = [drawn(seed, epoch, row.index, i, (1,)) for i in range(length * width)]
        noise = (2 * torch.tensor(entries).reshape(length, width) - 1) * bound
        assert noise.abs().max() <= bound
        with torch.no_grad():
            logits = whole(inputs_embeds=embedded + noise).logits[0].log_softmax(-1)
        expected = [-logits[i - 1, row.ids[i]] for i, mark in enumerate(row.response) if mark]
        torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_perturbed_is_keyed_by_seed_epoch_and_place_and_by_no_layout(
    rows_file: str, model: str, tokenizer: Any
):
    text = "nll(perturbed(ref, 5))"
    rule = compile_rule(text)
    rows = examples(rule, rows_file, tokenizer)
    first = in_batch(rule, rows, model, tokenizer)
    alone = [in_batch(rule, [row], model, tokenizer)[0] for row in reversed(rows)][::-1]
    for a, b in zip(first, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for changed in ({"seed": 1}, {"epoch": 1}):
        assert not torch.allclose(
            torch.cat(first), torch.cat(in_batch(rule, rows, model, tokenizer, **changed))
        )
    two = compile_rule("let m = perturbed(ref, 5); weight = nll(m) - nll(perturbed(ref, 5))")
    same = compile_rule("let m = perturbed(ref, 5); weight = nll(m) - nll(m)")
    assert any(bool((v.abs() > 1e-3).any()) for v in in_batch(two, rows, model, tokenizer))
    assert not any(bool(v.any()) for v in in_batch(same, rows, model, tokenizer))


def test_equal_rows_are_perturbed_apart(rows_file: str, model: str, tokenizer: Any):
    found = swept("nll(perturbed(ref, 5))", rows_file, model, tokenizer)
    assert not torch.allclose(found[0], found[len(WORDS)])


def test_no_noise_is_the_model(rows_file: str, model: str, tokenizer: Any):
    for values in swept("nll(perturbed(ref, 0)) - nll(ref)", rows_file, model, tokenizer):
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-5)


# Attention ----------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.4}
NARROW = {**SHAPE, "hidden_size": 16, "intermediate_size": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**NARROW, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**NARROW, num_key_value_heads=1, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**NARROW, num_key_value_heads=1, head_dim=8)),
    "window": lambda: MistralForCausalLM(MistralConfig(**NARROW, num_key_value_heads=1, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    ),
}


def made_up(seed: int) -> list[Example]:
    """Rows whose response is in two parts, of several lengths."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for index, (a, b, c) in enumerate([(5, 4, 3), (2, 3, 6), (1, 9, 1)]):
        ids = torch.randint(3, 50, (a + b + c + 2,), generator=random).tolist()
        response = [*[False] * a, *[True] * b, *[False] * c, True, True]
        rows.append(Example(index, f"row {index}", ids, response, [None] * len(ids), {}))
    return rows


@torch.no_grad()
def paid_by_hand(model: Any, row: Example) -> Tensor:
    """The attention to earlier tokens outside the response, from an eager model's maps, at the targets."""
    model.set_attn_implementation("eager")
    last = model(torch.tensor([row.ids]), output_attentions=True).attentions[-1][0].mean(0)
    outside = torch.tensor([not mark for mark in row.response])
    of_token = [last[i, :i][outside[:i]].sum() for i, mark in enumerate(row.response) if mark and i > 0]
    return torch.stack(of_token)


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_the_eager_maps(name: str, tokenizer: Any):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    before = model.config._attn_implementation
    rule = compile_rule("attention(ref, prompt)")
    views, batch = Views(rule, tokenizer), collate(made_up(0), "response", ())
    _, inside = views.frozen({"ref": take_apart(model, False, print)}, batch, 0, views.inside)
    assert model.config._attn_implementation == before
    weights = rule.weights(None, batch.targets, stored=inside)
    for row, values, targets in zip(made_up(0), weights, batch.targets, strict=True):
        expected = paid_by_hand(model, row)
        assert 0.1 < expected.max() <= 1
        torch.testing.assert_close(values[targets != IGNORED], expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_maps_is_refused_with_the_reason():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(ModelFault, match=r"BloomForCausalLM: attention.* names no module"):
        LastAttention(bloom)


def test_a_model_whose_maps_say_something_else_is_refused():
    model = MODELS["llama"]()
    model.config.sliding_window = 2  # it attends to everything all the same
    with pytest.raises(ModelFault, match="does not attend as its maps say"):
        LastAttention(model)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
def test_attention_in_the_training_forward_changes_no_gradient(fused: bool, tokenizer: Any):
    torch.manual_seed(2)
    model = MODELS["llama"]()
    rule = compile_rule("attention(on, prompt)")
    batch = collate(made_up(1), "response", ())
    given = {"models": {}, "stored": {}, "examples": batch.examples, "epoch": 0}
    Trained(model, rule, fused, False, Views(rule, tokenizer))(Call(batch, given)).mean.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, tokens = torch.zeros(()), 0
    for row in made_up(1):
        weights = paid_by_hand(model, row)
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        at = [i for i, mark in enumerate(row.response) if mark and i > 0]
        total = total - sum(w * logits[i - 1, row.ids[i]] for w, i in zip(weights, at, strict=True))
        tokens += len(at)
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


# Views of the trained model -----------------------------------------------------------------------


def unprompted_by_hand(model: Any, row: Example) -> Tensor:
    response = response_of(row)
    logits = model(torch.tensor([[BEGIN, *response]])).logits[0].log_softmax(-1)
    return -torch.stack([logits[i, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("text", ["loss = nll(unprompted(on))", "p(unprompted(on))"])
def test_gradient_flows_through_a_view_in_the_loss_alone(text: str, fused: bool, tokenizer: Any):
    torch.manual_seed(3)
    model, rows, rule = MODELS["llama"](), made_up(2), compile_rule(text)
    batch = collate(rows, "response", ())
    given = {"models": {}, "stored": {}, "examples": batch.examples, "epoch": 0}
    Trained(model, rule, fused, False, Views(rule, tokenizer))(Call(batch, given)).mean.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, tokens = torch.zeros(()), 0
    for row in rows:
        alone = unprompted_by_hand(model, row)
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        nll = -torch.stack([logits[i - 1, row.ids[i]] for i, mark in enumerate(row.response) if mark])
        total = total + (alone if "loss" in text else alone.neg().exp().detach() * nll).sum()
        tokens += len(alone)
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(model: str, rows_file: str, tmp_path: Path) -> Callable[..., Outcome]:
    def go(name: str, rule: str, **options: Any) -> Outcome:
        paths = {
            "model": model,
            "data": rows_file,
            "output": str(tmp_path / name),
            "cache": str(tmp_path / "c"),
        }
        settings = {"max_steps": 3, "learning_rate": 1e-2, "quiet": True, "device": "cpu", "batch_size": 6}
        return train(TrainConfig(**{**paths, **settings, "rule": rule, **options}))

    return go


def losses(outcome: Outcome) -> list[float]:
    return [json.loads(line)["loss"] for line in (outcome.output / "log.jsonl").read_text().splitlines()]


def weights_of(outcome: Outcome) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(outcome.output)
    return torch.cat([p.detach().flatten() for p in loaded.parameters()])


RULES = {
    "unprompted": "nll(unprompted(ref)) > nll(ref)",
    "reading": "column other: text; weight = p(reading(ref, other))",
    "attention": "attention(ref, prompt)",
    "both": "attention(on, prompt) * p(unprompted(ref))",
    "noise": "p(perturbed(ref, 5)) * p(perturbed(on, 5))",
    "contrast": "p(contrast(on, ref))",
    "in the loss": "loss = nll_on + 0.1 * nll(unprompted(on))",
    "selection": "normalize = kept; weight = top(attention(on, prompt), 0.6, example)",
}


@pytest.mark.parametrize("name", RULES)
def test_a_run_is_the_same_however_it_is_laid_out(name: str, run: Callable[..., Outcome]):
    whole = run("whole", RULES[name])
    spread = run("spread", RULES[name], batch_size=2, accumulation=3, loss="dense")
    online = run("online", RULES[name], online_reference=True)
    assert losses(whole) == pytest.approx(losses(spread), rel=1e-4)
    torch.testing.assert_close(weights_of(whole), weights_of(spread), rtol=1e-3, atol=1e-4)
    assert losses(whole) == pytest.approx(losses(online), rel=1e-5)


def test_the_cache_knows_what_views_read(run: Callable[..., Outcome], rows_file: str, tmp_path: Path):
    """Another text in the column, or another seed of the noise, is not taken from the cache."""
    for name, text in (("reading", RULES["reading"]), ("once", "top(nll(perturbed(ref, 5)), 0.5, dataset)")):
        first = losses(run(f"{name} 1", text))
        assert losses(run(f"{name} 2", text)) == first
    changed = tmp_path / "changed.jsonl"
    lines = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    changed.write_text("".join(json.dumps({**line, "other": "ten"}) + "\n" for line in lines))
    assert losses(run("changed", RULES["reading"], data=str(changed))) != losses(
        run("again", RULES["reading"])
    )
    text = "top(nll(perturbed(ref, 20)), 0.5, dataset)"
    own = [losses(run(f"seed {seed}", text, seed=0, max_steps=1)) for seed in (0, 1)]
    assert own[0] == own[1]
    entries = len(list((tmp_path / "c" / "statistics").iterdir()))
    run("other seed", text, seed=1)
    assert len(list((tmp_path / "c" / "statistics").iterdir())) == entries + 1


def test_a_checkpoint_of_an_earlier_run_is_a_model(run: Callable[..., Outcome], model: str):
    first = run("first", "sft", save_steps=1)
    rule = 'model early "a checkpoint"; model late "another"; weight = p_early * p_late + p_ref'
    bound = {
        "early": str(first.output / "checkpoints" / "step-1"),
        "late": str(first.output / "checkpoints" / "step-3"),
    }
    assert len(losses(run("second", rule, bind=bound))) == 3
    with pytest.raises(Fault, match=r"--bind early=.*step-1.*step-2.*step-3"):
        run("third", rule, bind={**bound, "early": str(first.output / "checkpoints")})


def test_batches_carry_their_rows(tokenizer: Any):
    batch: Batch = collate(made_up(0), "response", (), blank=True)
    assert [row.index for row in batch.rows] == [0, 1, 2]


def test_a_token_of_the_prompt_pays_to_those_before_it_alone(tokenizer: Any):
    torch.manual_seed(1)
    model = MODELS["llama"]().eval()
    rule = compile_rule("over = all; weight = attention(ref, prompt)")
    views, row = Views(rule, tokenizer), made_up(0)[0]
    batch = collate([row], "all", ())
    _, inside = views.frozen({"ref": take_apart(model, False, print)}, batch, 0, views.inside)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        last = model(torch.tensor([row.ids]), output_attentions=True).attentions[-1][0].mean(0)
    assert not row.response[2]
    found = inside["attention(ref, prompt)"][0, 1]  # where token 2 is predicted
    torch.testing.assert_close(found, last[2, :2].sum(), rtol=1e-4, atol=1e-5)
    assert last[2, 2] > 1e-3
