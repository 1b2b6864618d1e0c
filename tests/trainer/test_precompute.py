"""Frozen models run once, before training; what training reads is what they would have said at each step."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

import trainer.portions
import trainer.precompute
import trainer.train
from priority_dsl import compile_rule
from priority_dsl.integrations.heads import take_apart
from trainer.batches import IGNORED, collate
from trainer.cache import listed
from trainer.cli import main
from trainer.columns import ColumnReader
from trainer.config import RowConfig, TrainConfig
from trainer.data import Example, Reader
from trainer.models import load_model, load_tokenizer
from trainer.portions import batches_by_length, key_of, shards
from trainer.precompute import Known, Precompute, Source, statistics_of, with_stored
from trainer.runlog import RunLog
from trainer.train import Outcome, train

MASS = "mass(ref) >= tau"


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Callable[..., Outcome]:
    """Trains on the sums with a cache of the test's own; `name` is the output folder."""

    def go(name: str, rule: str = "mass(ref) >= 0.5", **options: Any) -> Outcome:
        settings = {"max_steps": 3, "learning_rate": 1e-2, "quiet": True, "device": "cpu", **options}
        paths = {
            "model": model,
            "data": sums,
            "output": str(tmp_path / name),
            "cache": str(tmp_path / "cache"),
        }
        return train(TrainConfig(**{**paths, "rule": rule, **settings}))

    return go


def log(outcome: Outcome) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(outcome: Outcome) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(outcome.output)
    return torch.cat([p.detach().flatten() for p in loaded.parameters()])


@dataclass
class Seen:
    """What was observed of models: rows through frozen ones, before and during training, and parameters."""

    before: int = 0
    during: int = 0
    frozen_parameters: int = 0
    steps: int = 0


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts rows through models in eval mode (the frozen ones), and parameters without gradient at steps."""
    seen, patch = Seen(), pytest.MonkeyPatch()
    forward, update = LlamaModel.forward, trainer.train.update

    def counting(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        if not any(p.requires_grad for p in self.parameters()):
            setattr(seen, when := "during" if seen.steps else "before", getattr(seen, when) + len(input_ids))
        elif not seen.steps:
            seen.steps = 1  # the first step has begun
        return forward(self, input_ids=input_ids, **rest)

    def looking(run_: Any, step: int) -> float:
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and not o.requires_grad]
        seen.frozen_parameters = max(seen.frozen_parameters, sum(p.numel() for p in alive))
        seen.steps += 1
        return update(run_, step)

    patch.setattr(LlamaModel, "forward", counting)
    patch.setattr(trainer.train, "update", looking)
    try:
        yield seen
    finally:
        patch.undo()


CHECK = 1  # the row of the check that body and head belong together


def test_the_reference_is_gone_before_the_first_step_and_a_second_run_needs_none(run: Callable[..., Outcome]):
    with watched() as first:
        one = run("a")
    assert (first.before, first.during, first.frozen_parameters) == (24 + 2 * CHECK, 0, 0)
    assert first.steps > 1, "the counters were there"
    with watched() as second:
        two = run("b")
    assert (second.before, second.during, second.frozen_parameters) == (0, 0, 0)
    assert log(one) == log(two)
    assert torch.equal(weights(one), weights(two))
    with watched() as online:
        three = run("c", online_reference=True)
    assert (online.during, online.frozen_parameters > 0) == (24 + 2 * CHECK, True), "the counters can count"
    assert log(one) == log(three)
    assert torch.equal(weights(one), weights(three))


RULES = {
    "hard": "mass(ref) >= 0.5",
    "soft": "sg(p_ref) ** 0.5",
    "mixed": "sigmoid(p_on - p_ref) if rank(ref) > 3 else entropy(ref)",
    "text": "mass(ref) if label == a else 0.5",
    "kept": "weight = mass(ref) >= 0.5; loss = weight * nll(on) + 0.1 * kl(ref, on)",
    "kept and another": 'model good "g"; weight = p(good) * p(ref); loss = weight * nll(on) + kl(ref, on)',
    "two at once": 'model good "g"; weight = kl(good, ref) > 0.1',
    "normalised": "weight = p_ref; normalize = weights",
    "all": "over = all; weight = mass(ref) if response else 0.5",
    "examples": "weight = mass(ref) >= 0.3; normalize = examples",
}


@pytest.mark.parametrize("name", RULES)
def test_stored_and_online_train_to_the_same(
    name: str, run: Callable[..., Outcome], write: Callable[..., str], other_model: str
):
    rows = [
        {"prompt": f"what is {i} ?", "completion": " the answer" * (1 + i % 5), "label": "ab"[i % 2]}
        for i in range(16)
    ]
    shared = {"data": write("rows.jsonl", rows), "batch_size": 4, "accumulation": 2, "learning_rate": 1e-3}
    if "good" in RULES[name]:
        shared["bind"] = {"good": other_model}
    stored = run("stored", RULES[name], eval_data=shared["data"], **shared)
    online = run("online", RULES[name], eval_data=shared["data"], online_reference=True, **shared)
    for one, other in zip(log(stored), log(online), strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    torch.testing.assert_close(weights(stored), weights(online), rtol=0, atol=2e-5)


def test_a_model_whose_distribution_training_reads_stays_and_needs_no_pass(run: Callable[..., Outcome]):
    with watched() as seen:
        run("a", RULES["kept"])
    assert seen.before == 0
    assert seen.during == 24 + 2 * CHECK
    assert seen.frozen_parameters > 0


def test_weights_that_only_read_stored_columns_are_counted_without_a_forward(run: Callable[..., Outcome]):
    calls = []
    patch = pytest.MonkeyPatch()
    forward = LlamaModel.forward
    patch.setattr(LlamaModel, "forward", lambda self, **given: calls.append(1) or forward(self, **given))
    run("warm", "weight = p_ref; normalize = weights", batch_size=4, accumulation=2)
    calls.clear()
    run("a", "weight = p_ref; normalize = weights", batch_size=4, accumulation=2)
    patch.undo()
    assert len(calls) == 3 * 2 + 2 * CHECK, "three steps of two micro-batches, each once, and the check"


# The numbers ------------------------------------------------------------------------------------


def examples(model: str, data: str) -> list[Example]:
    config = RowConfig(model=model, data=(data,))
    return Reader(config, load_tokenizer(model), 320, 64, ColumnReader({})).read([data]).rows


def precompute(rule: Any, model: str, cache: Path, said: list[str], **options: Any) -> Precompute:
    settings = {"bind": {}, "tokenizer": load_tokenizer(model), "bf16": False, "batch_size": 8, **options}
    made = RunLog(cache, main=True, quiet=True)
    made.note = said.append  # type: ignore[method-assign]
    return Precompute(rule, Source(model, cache=cache, **settings), Accelerator(cpu=True), made)


@pytest.mark.parametrize("text", ["mass(ref) >= 0.5", "exp(-entropy(ref)) * p_ref ** 0.3", "rank(ref) <= 9"])
def test_on_the_same_batches_stored_weights_are_the_bits_of_online_ones(text: str, model: str, sums: str):
    rule, rows = compile_rule(text), examples(model, sums)
    (of,) = rule.plan.passes
    headed = take_apart(load_model(model).eval(), False, print)
    for start in range(0, len(rows), 7):
        part = rows[start : start + 7]
        batch = collate(part, "response", ())
        found = statistics_of(rule, of, {"ref": headed}, batch)
        known: Known = {
            name: {key_of(r, "response"): v for r, v in zip(part, values, strict=True)}
            for name, values in found.items()
        }
        stored = collate(with_stored(rule, part, known), "response", ())
        online = rule.weights(None, batch.targets, models={"ref": headed(batch.input_ids)})
        assert torch.equal(rule.weights(None, stored.targets, stored=stored.stored), online)
        dense = rule.weights(None, batch.targets, models={"ref": headed.model(batch.input_ids).logits})
        torch.testing.assert_close(online, dense, rtol=0, atol=2e-5)


def test_statistics_belong_to_their_token_whatever_the_batch(model: str, sums: str, tmp_path: Path):
    rule, rows = compile_rule("mass(ref) * entropy(ref) * p_ref"), examples(model, sums)
    known = precompute(rule, model, tmp_path, []).run(rows)
    headed = take_apart(load_model(model).eval(), False, print)
    (of,) = rule.plan.passes
    assert set(known) == set(of.names)
    for row in rows:  # one by one and without padding
        batch = collate([row], "response", ())
        for name, (alone,) in statistics_of(rule, of, {"ref": headed}, batch).items():
            np.testing.assert_allclose(known[name][key_of(row, "response")], alone, rtol=0, atol=2e-5)
            assert len(alone) == int((batch.targets != IGNORED).sum())


def test_a_bool_statistic_is_kept_as_a_bit(model: str, other_model: str, sums: str, tmp_path: Path):
    rule = compile_rule('model good "g"; weight = 1 if same_top(good, ref, k=100) else 0.5')
    rows = examples(model, sums)
    known = precompute(rule, model, tmp_path, [], bind={"good": other_model}).run(rows)
    (values,) = known.values()
    assert {v.dtype for v in values.values()} == {np.dtype(bool)}
    assert 0 < np.concatenate([*values.values()]).mean() < 1


def test_a_row_that_occurs_twice_runs_once(model: str, write: Callable[..., str], tmp_path: Path):
    data = write(
        "twice.jsonl", [{"prompt": "a", "completion": " b"}] * 5 + [{"prompt": "a", "completion": " c"}]
    )
    rows, said = examples(model, data), []
    known = precompute(compile_rule("weight = p_ref"), model, tmp_path, said).run(rows)
    assert "2 rows through" in said[0]
    assert len(known["nll(ref)"]) == 2


def test_batches_hold_the_budget_and_fall_alike_when_whole_ones_are_gone():
    def row(i: int, length: int) -> Example:
        return Example(i, "", [i] * length, [True] * length, [None] * length, {})

    rows = {f"{i:03}": row(i, 3 + i * i % 50) for i in range(120)}
    batches = [*batches_by_length(rows, 200)]
    assert sorted(key for batch in batches for key in batch) == sorted(rows)
    assert all(len(b) * max(len(rows[k].ids) for k in b) <= 200 for b in batches)
    assert [*batches_by_length({"long": row(0, 999)}, 200)] == [["long"]]
    assert len(batches) > 8
    done = {key for batch in batches[1::3] for key in batch}
    left = {key: row for key, row in rows.items() if key not in done}
    assert [*batches_by_length(left, 200)] == [b for i, b in enumerate(batches) if i % 3 != 1]
    assert [b for shard in shards(batches, rows) for b in shard] == batches


# What the cache depends on ----------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the number of rows of each batch of a pass."""
    seen: list[int] = []

    def counting(rule: Any, of: Any, models: Any, batch: Any, views: Any) -> Any:
        seen.append(len(batch.targets))
        return statistics_of(rule, of, models, batch, views)

    monkeypatch.setattr(trainer.precompute, "statistics_of", counting)
    return seen


def rows_of(forwards: list[int]) -> int:
    count = sum(forwards)
    forwards.clear()
    return count


def edited(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reweighted(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "nothing": (lambda f: None, 0),
    "a weight": (reweighted, 24),
    "the config": (lambda f: edited(f / "config.json", lambda c: c.update(rms_norm_eps=1e-4)), 24),
    "what the config says of itself": (
        lambda f: edited(f / "config.json", lambda c: c.update(transformers_version="9")),
        0,
    ),
    "the tokenizer": (
        lambda f: edited(f / "tokenizer.json", lambda t: t["model"]["merges"].pop()),
        24,
    ),
    "the template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        24,
    ),
    "another file": (lambda f: (f / "README.md").write_text("new"), 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_computes_again_exactly_what_it_must(
    what: str, run: Callable[..., Outcome], model: str, tmp_path: Path, forwards: list[int]
):
    change, expected = CHANGES[what]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    run("a", model=str(folder))
    assert rows_of(forwards) == 24
    change(folder)
    run("b", model=str(folder))
    assert rows_of(forwards) == expected


def test_the_same_model_elsewhere_under_another_name_is_known(
    run: Callable[..., Outcome], model: str, tmp_path: Path, forwards: list[int]
):
    run("a")
    assert rows_of(forwards) == 24
    folder = shutil.copytree(model, tmp_path / "copy")
    run("b", 'model good "g"; weight = mass(good) >= 0.2', bind={"good": str(folder)})
    assert rows_of(forwards) == 0


OTHER_RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "tau": ({"rule": MASS, "set": {"tau": 0.9}}, 0),
    "use of the statistic": ({"rule": "mass(ref) * p_on"}, 0),
    "batch size": ({"batch_size": 3}, 0),
    "seed": ({"seed": 5}, 0),
    "another statistic": ({"rule": "mass(ref) * nll(ref) > 1"}, 24),
    "a tie rule": ({"rule": "mass(ref, ties=exclude) >= 0.5"}, 24),
    "precision": ({"dtype": "bf16"}, 24),
    "all tokens": ({"rule": "over = all; weight = mass(ref) >= 0.5"}, 24),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_the_cache_is_kept_under_what_the_values_depend_on(
    what: str, run: Callable[..., Outcome], forwards: list[int]
):
    options, expected = OTHER_RUNS[what]
    run("a", MASS, set={"tau": 0.5})
    assert rows_of(forwards) == 24
    run("b", **options)
    assert rows_of(forwards) == expected


def test_a_parameter_inside_a_statistic_is_part_of_the_key(run: Callable[..., Outcome], forwards: list[int]):
    rule = "param t = 2 in (0, inf); weight = mass(tempered(ref, t)) >= 0.5"
    run("a", rule)
    run("b", rule)
    assert rows_of(forwards) == 24
    run("c", rule, set={"t": 3})
    assert rows_of(forwards) == 24


def test_a_row_that_is_changed_or_added_runs_alone(
    run: Callable[..., Outcome], sums: str, forwards: list[int]
):
    run("a")
    rows_of(forwards)
    lines = Path(sums).read_text().splitlines()
    lines[3] = lines[3].replace("answer", "result")
    added = json.dumps({"prompt": "what is", "completion": " new"})
    Path(sums).write_text("\n".join([added, *reversed(lines)]) + "\n")
    second = run("b", max_steps=None)
    assert rows_of(forwards) == 2
    fresh = run("c", max_steps=None, cache=str(Path(sums).parent / "fresh"))
    for one, other in zip(log(second), log(fresh), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_only_the_rows_that_the_run_visits_are_computed(
    run: Callable[..., Outcome], sums: str, forwards: list[int]
):
    run("a", max_steps=2, batch_size=4)
    assert rows_of(forwards) == 8
    run("b", max_steps=2, batch_size=4, eval_data=sums)
    assert rows_of(forwards) == 16, "the held-out rows too, each once"


def test_a_damaged_shard_is_computed_again(
    run: Callable[..., Outcome], tmp_path: Path, forwards: list[int], capsys: pytest.CaptureFixture[str]
):
    first = run("a")
    (shard,) = (tmp_path / "cache").rglob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-9])
    rows_of(forwards)
    second = run("b", quiet=False)
    assert rows_of(forwards) == 24
    assert "is damaged; its rows are computed again" in capsys.readouterr().err
    assert log(first) == log(second)


def test_a_pass_that_stops_goes_on_where_it_was(
    run: Callable[..., Outcome], tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
):
    whole = run("whole", cache=str(tmp_path / "other"))
    monkeypatch.setattr(trainer.portions, "SHARD_TOKENS", 1)
    monkeypatch.setattr(trainer.precompute, "BATCH_TOKENS", 1)
    options = {"batch_size": 2, "accumulation": 4}
    straight = run("straight", cache=str(tmp_path / "straight"), **options)
    rows_of(forwards)
    counting = trainer.precompute.statistics_of

    def stopping(*given: Any) -> Any:
        if sum(forwards) >= 10:
            raise KeyboardInterrupt
        return counting(*given)

    monkeypatch.setattr(trainer.precompute, "statistics_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", **options)
    done = rows_of(forwards)
    monkeypatch.setattr(trainer.precompute, "statistics_of", counting)
    again = run("again", **options)
    assert 10 <= done < 24
    assert rows_of(forwards) == 24 - done
    assert log(again) == log(straight)
    assert torch.equal(weights(again), weights(straight))
    for one, other in zip(log(again), log(whole), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_the_cache_writes_nowhere_else(run: Callable[..., Outcome], tmp_path: Path):
    run("a")
    kept = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file()}
    assert kept == {"a", "cache", "sums.jsonl"}
    files = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".arrow"}
    assert files == {"entry.json"}
    assert [(e.statistic, e.rows, e.precision) for e in listed(tmp_path / "cache")] == [
        ("mass(ref)", 24, "fp32")
    ]


def test_bf16_statistics_are_those_of_a_bf16_forward(model: str, sums: str, tmp_path: Path):
    rule, rows = compile_rule("weight = p_ref"), examples(model, sums)
    half = precompute(rule, model, tmp_path, [], bf16=True).run(rows)["nll(ref)"]
    full = precompute(rule, model, tmp_path, []).run(rows)["nll(ref)"]
    apart = [np.abs(half[k] - full[k]).max() for k in half]
    assert 0 < max(apart) < 0.3
    assert {v.dtype for v in half.values()} == {np.dtype(np.float32)}


# The commands -----------------------------------------------------------------------------------


def rows_in(path: Path) -> Iterable[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


def test_score_writes_what_a_hand_computes(model: str, other_model: str, sums: str, tmp_path: Path):
    out, cache = tmp_path / "w.parquet", str(tmp_path / "cache")
    words = [
        "score",
        "--model",
        model,
        "--data",
        sums,
        "--cache",
        cache,
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    rule = "p_on * (mass(ref) >= tau)"
    assert main([*words, "--rule", rule, "--set", "tau=0.3", "--bind", f"ref={other_model}", "--quiet"]) == 0
    found = [*rows_in(out)]
    compiled = compile_rule(rule, tau=0.3)
    on, ref = (load_model(folder).eval() for folder in (model, other_model))
    assert len(found) == 24
    for written, row in zip(found, examples(model, sums), strict=True):
        assert written["input_ids"] == row.ids
        assert written["target"] == [False, *row.response[1:]]
        batch = collate([row], "response", ())
        with torch.no_grad():
            logits, models = on(batch.input_ids).logits, {"ref": ref(batch.input_ids).logits}
        weight = compiled.weights(logits, batch.targets, models=models)[0].tolist()
        assert written["weight"] == pytest.approx([0.0, *weight], abs=2e-5)
        nll = torch.nn.functional.cross_entropy(
            logits[0], torch.tensor(row.ids[1:]), reduction="none"
        ).tolist()
        shown = [None, *(v if mark else None for v, mark in zip(nll, row.response[1:], strict=True))]
        assert written["nll(on)"] == pytest.approx(shown, abs=2e-5)
        assert written["tokens"] == load_tokenizer(model).convert_ids_to_tokens(row.ids)
    assert {e.statistic for e in listed(tmp_path / "cache")} == {"nll(on)", "mass(ref)"}


def test_score_of_a_rule_of_the_whole_distribution_and_of_data_alone(model: str, sums: str, tmp_path: Path):
    words = ["--model", model, "--data", sums, "--cache", str(tmp_path), "--quiet", "--device", "cpu"]
    assert main(["score", *words, "--rule", "kl(on, ref) < 1", "--out", str(tmp_path / "a.parquet")]) == 0
    first = next(iter(rows_in(tmp_path / "a.parquet")))
    assert [w for w, mark in zip(first["weight"], first["target"], strict=True) if mark].count(1.0) > 0
    assert main(["score", *words, "--rule", "over = all; weight = 1 if response else 0.5",
                 "--out", str(tmp_path / "b.parquet")]) == 0  # fmt: skip
    first = next(iter(rows_in(tmp_path / "b.parquet")))
    assert first["weight"][:2] == [0.0, 0.5]
    assert first["weight"][-1] == 1.0


def test_explain_gives_the_figures_of_a_model_and_data(
    model: str, sums: str, capsys: pytest.CaptureFixture[str]
):
    words = ["explain", "prift_mass", "--model", model, "--data", sums, "--epochs", "3"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    size = sum(p.numel() for p in load_model(model).parameters())
    rows = examples(model, sums)
    supervised = sum(sum(row.response[1:]) for row in rows)
    assert found["parameters"] == {"on": size, "ref": size}
    assert (found["rows"], found["supervised_tokens"]) == (24, supervised)
    assert (found["cached_bytes"], found["stored_bytes"]) == (4 * supervised, -(-supervised // 8))
    assert found["extra_compute"] == pytest.approx(1 / 9), "PriFT: 1 / (3 E)"
    assert found["extra_compute_online"] == pytest.approx(1 / 3)
    assert main([*words, "--code"]) == 0
    text = capsys.readouterr().out
    assert "11.1% more than plain training of 3 epochs" in text
    assert "def forward" in text
    assert main(["explain", "asft", "--model", model, "--data", sums, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["extra_compute"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "--model needs --data"),
        (["--data", "d"], "--data needs --model"),
        (["--epochs", "3"], "--epochs needs --model and --data"),
        (["--chat"], "--chat needs --model and --data"),
    ],
)
def test_flags_of_explain_that_would_be_ignored_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", "dft", *words]) == 2
    assert message in capsys.readouterr().err


def test_strict_stops_train_and_score(
    model: str, sums: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shared = ["--model", model, "--data", sums, "--rule", "-1 if p_on > 0.5", "--quiet"]
    for command in (["train", "--output", str(tmp_path / "a")], ["score", "--out", str(tmp_path / "b")]):
        assert main([command[0], *shared, *command[1:], "--strict"]) == 2
        assert "error[PD401]" in capsys.readouterr().err
    assert main(["test", "-1 if p_on > 0.5", "--strict"]) == 2
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
