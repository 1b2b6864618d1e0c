"""`keep` and values over `dataset` in a run: decided before training, over what was kept after truncation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from priority_dsl.vocabulary.chance import drawn
from tests.trainer import test_distributed
from tests.trainer.test_chance import log, same
from tests.trainer.test_precompute import CHECK, watched
from tests.trainer.test_step_values import WORKER, Weights, recorded
from trainer.cli import main
from trainer.columns import ColumnReader
from trainer.config import RowConfig, TrainConfig
from trainer.data import Example, Reader
from trainer.faults import ConfigFault, DataFault
from trainer.models import load_model, load_tokenizer
from trainer.train import Outcome, train

LONGEST = 24  # tokens of a row: some rows are cut
ROWS = [
    {
        "prompt": f"what is {i} ?",
        "completion": " 1 + 2 ; the" * (1 + i % 5) + ". 3" * (i % 3),
        "score": i * 7 % 10,
    }
    for i in range(20)
]
HELD = [{"prompt": f"{i} ?", "completion": " jumps . 3" * (i + 1), "score": 0} for i in range(4)]
SCORED = "column score: number; "
SURE = (  # of a frozen model, over the data set, twice: what is kept decides the numbers of the weight
    "let of_row = mean(nll_ref, example); keep = of_row < quantile(of_row, 0.7, dataset); "
    "normalize = kept; weight = top(nll_ref, 0.4, dataset)"
)
Run = Callable[..., Outcome]


@pytest.fixture
def shared(model: str, write: Callable[..., str], tmp_path: Path) -> dict[str, Any]:
    return {
        "model": model, "data": [write("rows.jsonl", ROWS)], "epochs": 1, "learning_rate": 1e-4, "warmup": 0,
        "batch_size": 4, "schedule": "constant", "device": "cpu", "seed": 5, "max_length": LONGEST,
        "cache": str(tmp_path / "cache"), "quiet": True,
    }  # fmt: skip


@pytest.fixture
def run(shared: dict[str, Any], tmp_path: Path) -> Run:
    def go(name: str, rule: str, **options: Any) -> Outcome:
        return train(TrainConfig(**{**shared, **options, "rule": rule, "output": str(tmp_path / name)}))

    return go


@pytest.fixture
def by_hand(model: str, shared: dict[str, Any]) -> Callable[[str], list[tuple[Example, np.ndarray]]]:
    """The truncated examples and what a model says of their supervised tokens: nll, each row alone."""

    def of(folder: str = model, data: str = shared["data"][0]) -> list[tuple[Example, np.ndarray]]:
        policy, config = load_model(folder).eval(), RowConfig(model=model, data=(data,), max_length=LONGEST)
        found = []
        for row in Reader(config, load_tokenizer(model), 320, LONGEST, ColumnReader({})).read([data]).rows:
            with torch.no_grad():
                said = policy(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            nll = -said[:-1].gather(-1, torch.tensor(row.ids[1:]).unsqueeze(-1)).squeeze(-1)
            found.append((row, nll[torch.tensor(row.response[1:])].double().numpy()))
        return found

    return of


def places(row: Example) -> list[int]:
    """The targets of a row that are supervised."""
    return [t for t, marked in enumerate(row.response[1:]) if marked]


def laid_out(rows: list[Example], values: list[np.ndarray]) -> dict[tuple[int, int], float]:
    """Values of supervised tokens by data-set row and target."""
    pairs = zip(rows, values, strict=True)
    return {(r.index, t): float(x) for r, of in pairs for t, x in zip(places(r), of, strict=True)}


def timeless(weights: Weights) -> dict[tuple[int, int], float]:
    """The weights of one epoch by data-set row and target."""
    return {(row, t): weight for (_, row, _, t), weight in weights.items()}


def largest(values: list[np.ndarray], share: float) -> list[np.ndarray]:
    """Which numbers are among the largest share of all, the earlier ones of ties."""
    flat = np.concatenate(values)
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: int(np.ceil(share * len(flat)))]] = True
    return np.split(chosen, np.cumsum([len(v) for v in values])[:-1])


def test_the_data_set_is_what_was_kept_after_truncation(run: Run, by_hand: Any, capsys: Any):
    rows, nll = map(list, zip(*by_hand(), strict=True))
    means = np.array([of.mean() for of in nll])
    kept = [i for i, mean in enumerate(means) if mean < np.quantile(means, 0.7)]
    wanted = laid_out([rows[i] for i in kept], largest([nll[i] for i in kept], 0.4))
    assert wanted != {k: v for k, v in laid_out(rows, largest(nll, 0.4)).items() if k in wanted}
    with recorded() as weights:
        outcome = run("run", SURE, quiet=False)
    assert timeless(weights) == wanted
    said = capsys.readouterr().err
    tokens = sum(len(rows[i].ids) for i in kept)
    cut = sum(row.ids[-1] != 2 for row in rows)  # without their end token
    assert f"data: {len(kept)} rows, {tokens} tokens" in said
    assert f"{cut} rows over {LONGEST} tokens truncated" in said
    assert f"; {20 - len(kept)} rows left out by `keep`" in said
    assert sum(line["supervised_tokens"] for line in log(outcome.output)) == len(wanted)
    assert len(log(outcome.output)) == -(-len(kept) // 4)


@pytest.mark.parametrize(
    ("rule", "weight"),
    [
        (
            "zscore(nll_ref, dataset, where=position > 0)",
            lambda x, at: (x - x[at > 0].mean()) / x[at > 0].std() * (at > 0),
        ),
        ("nll_ref > quantile(nll_ref, 0.25, dataset)", lambda x, at: x > np.quantile(x, 0.25)),
        ("nll_ref / mean(nll_ref, dataset)", lambda x, at: x / x.mean()),
    ],
    ids=["zscore", "quantile", "mean"],
)
def test_numbers_of_the_data_set_are_numpys(
    rule: str, weight: Callable[..., np.ndarray], run: Run, by_hand: Any
):
    rows, nll = map(list, zip(*by_hand(), strict=True))
    at = np.concatenate([np.arange(len(of)) for of in nll])
    ends = np.cumsum([len(of) for of in nll])[:-1]
    wanted = laid_out(rows, np.split(weight(np.concatenate(nll), at), ends))
    with recorded() as weights:
        run("run", rule)
    assert timeless(weights) == pytest.approx(wanted, abs=5e-6)


def test_columns_alone_need_no_model(run: Run, by_hand: Any):
    rule = SCORED + (
        "keep = top(score, 0.5, dataset, round=floor) and length > 12; weight = score / mean(score, dataset)"
    )
    rows = [row for row, _ in by_hand()]
    scores = [ROWS[row.index]["score"] for row in rows]
    kept = [
        row
        for row, score in zip(rows, scores, strict=True)
        if score >= 5 and len(places(row)) > 12  # each of 0 to 9 twice: the upper ten rows
    ]
    mean = np.mean([ROWS[row.index]["score"] for row in kept])
    wanted = laid_out(kept, [np.full(len(places(r)), ROWS[r.index]["score"] / mean) for r in kept])
    assert 3 < len(kept) < 10
    with watched() as seen, recorded() as weights:
        run("run", rule)
    assert seen.before == 0
    assert timeless(weights) == pytest.approx(wanted, abs=1e-6)


def test_kept_rows_keep_their_number_for_ties_and_chance(run: Run, by_hand: Any):
    rule = SCORED + (
        "keep = score > 3; normalize = kept; weight = top(-position, 0.5, dataset) and bernoulli(0.6) "
        "and bernoulli(0.9, example)"
    )
    rows = [row for row, _ in by_hand() if ROWS[row.index]["score"] > 3]
    early = largest([-np.arange(len(places(row))) for row in rows], 0.5)
    wanted = [
        chosen
        & [drawn(5, 0, row.index, position, (1,)) < 0.6 for position in range(len(chosen))]
        & (drawn(5, 0, row.index, 0, (2,)) < 0.9)
        for row, chosen in zip(rows, early, strict=True)
    ]
    with recorded() as weights:
        run("run", rule)
    assert timeless(weights) == laid_out(rows, wanted)


def test_what_only_keep_reads_is_not_in_memory_in_training(run: Run, by_hand: Any, other_model: str):
    """Chance in `keep` is drawn once; a model of `keep` alone is freed; the weight of 1 reads no model."""
    rule = (
        'param limit = 0; model judge "who says what to keep"; '
        "keep = mean(nll_judge, example) < limit or bernoulli(0.2, example); weight = 1"
    )
    found = by_hand(other_model)
    limit = float(np.median([nll.mean() for _, nll in found])) + 1e-3
    kept = [r for r, nll in found if nll.mean() < limit or drawn(5, 0, r.index, 0, (1,)) < 0.2]
    assert 3 < len(kept) < 17
    with watched() as seen, recorded() as weights:
        run("run", rule, bind={"judge": other_model}, set={"limit": limit}, epochs=2)
    assert {row for _, row, *_ in weights} == {row.index for row in kept}
    assert (seen.before, seen.during, seen.frozen_parameters) == (20 + 2 * CHECK, 0, 0)


def test_the_whole_data_set_is_read_even_where_few_rows_are_visited(run: Run, tmp_path: Path, capsys: Any):
    rule = SURE.replace("top(nll_ref, 0.4, dataset)", "zscore(nll_ref, dataset)")
    with recorded() as all_of_them:
        run("all", rule)
    with watched() as seen, recorded() as weights:
        run("few", rule, max_steps=1, quiet=False)
    assert seen.before == 0, "the statistics are in the cache"
    said = capsys.readouterr().err
    assert said.count("nll(ref): ") == 2, "once for `keep`, once for the weight"
    first = {key: weight for key, weight in all_of_them.items() if key[0] == 0.0}
    assert weights == first
    with watched() as seen:
        run("another share", rule.replace("0.7", "0.6"))
    assert seen.before == 0
    with watched() as seen:
        run("another cache", rule, max_steps=1, cache=str(tmp_path / "empty"))
    assert seen.before == 20 + 2 * CHECK, "`keep` and the weight read the same statistic"


def test_nothing_kept_is_a_fault(run: Run, shared: dict[str, Any], tmp_path: Path, capsys: Any):
    with pytest.raises(DataFault, match=r"`keep` of the rule leaves none of 20 rows"):
        run("run", SCORED + "keep = score > 100; weight = 1")
    words = ["--model", shared["model"], "--data", *shared["data"], "--output", str(tmp_path / "again")]
    assert (
        main(["train", *words, "--rule", SCORED + "keep = score > 100; weight = 1", "--device", "cpu"]) != 0
    )
    said = capsys.readouterr().err
    assert "leaves none of 20 rows" in said
    assert "Traceback" not in said
    assert not (tmp_path / "again").exists()


def test_a_resumed_run_goes_on_with_the_same_numbers(run: Run, monkeypatch: pytest.MonkeyPatch):
    import trainer.train as story

    def stops(run_: Any, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return update(run_, step)

    update = story.update
    options: dict[str, Any] = {"epochs": 2, "save_steps": 2}
    straight = run("straight", SURE, **options)
    monkeypatch.setattr(story, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        run("broken", SURE, **options)
    monkeypatch.setattr(story, "update", update)
    resumed = run("broken", SURE, resume=True, **options)
    assert log(resumed.output) == log(straight.output)
    same(resumed.output, straight.output)
    with pytest.raises(ConfigFault, match=r"other rows or token ids|rule"):
        run("broken", SURE.replace("0.7", "0.5"), resume=True, **options)


def test_two_processes_keep_and_count_as_one(
    shared: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chance = "keep = bernoulli(0.6, example); weight = minmax(p_ref, dataset) * bernoulli(0.5)"
    rules = {"sure": SURE, "chance": chance}
    spread = {"batch_size": 1, "accumulation": 2, "cache": str(tmp_path / "cache of two")}
    two = [{**shared, **spread, "rule": rules[n], "output": str(tmp_path / f"two-{n}")} for n in rules]
    monkeypatch.setattr(test_distributed, "WORKER", WORKER)
    ran = test_distributed.torchrun(two, tmp_path)
    for (name, rule), settings in zip(rules.items(), two, strict=True):
        told = [Path(f"{settings['output']}.rank{rank}.pt") for rank in (0, 1)]
        assert all(path.exists() for path in told), ran.stderr
        seen = [torch.load(path) for path in told]
        assert [of["world"] for of in seen] == [2, 2]
        with recorded() as wanted:
            one = run(name, rule)
        assert {**seen[0]["weights"], **seen[1]["weights"]} == pytest.approx(wanted, abs=1e-6)
        same(Path(settings["output"]), one.output)


def test_the_reference_cannot_stay_online(run: Run):
    for rule in (
        SURE,
        "weight = top(p_ref, 0.5, dataset)",
        "keep = mean(p_ref, example) > 0; weight = p_ref",
    ):
        with pytest.raises(ConfigFault, match=r"--online-reference: .* before training"):
            run("run", rule, online_reference=True)
    run("columns", SCORED + "keep = top(score, 0.5, dataset); weight = p_ref", online_reference=True)


def test_held_out_rows_take_the_numbers_of_the_training_data(
    run: Run, by_hand: Any, write: Callable[..., str], model: str
):
    """All of them are measured, by the threshold of the training data."""
    held = write("held.jsonl", HELD)
    rows, nll = map(list, zip(*by_hand(), strict=True))
    kept = [of for row, of in zip(rows, nll, strict=True) if ROWS[row.index]["score"] > 3]
    flat = np.sort(np.concatenate(kept))[::-1]
    threshold = flat[int(np.ceil(0.4 * len(flat))) - 1]
    rule = SCORED + "keep = score > 3; normalize = kept; weight = top(nll_ref, 0.4, dataset)"
    outcome = run("run", rule, eval_data=[held], max_steps=1)
    line = next(of for of in log(outcome.output) if "eval_loss" in of)
    before = np.concatenate([of for _, of in by_hand(model, held)])
    after = np.concatenate([of for _, of in by_hand(str(outcome.output), held)])
    assert line["eval_supervised_tokens"] == len(before)
    assert 0 < (before >= threshold).mean() < 1
    assert line["eval_nll"] == pytest.approx(after.mean(), abs=1e-5)
    assert line["eval_loss"] == pytest.approx(after[before >= threshold].mean(), abs=1e-5)


def test_score_writes_the_rows_that_are_kept(shared: dict[str, Any], run: Run, tmp_path: Path, capsys: Any):
    words = ["--model", shared["model"], "--data", *shared["data"], "--device", "cpu", "--seed", "5"]
    words += [
        "--max-length",
        str(LONGEST),
        "--cache",
        shared["cache"],
        "--out",
        str(tmp_path / "out.parquet"),
    ]
    assert main(["score", *words, "--rule", SURE]) == 0
    assert "left out by `keep`" in capsys.readouterr().err
    with recorded() as weights:
        run("run", SURE)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    found = {
        (line["row"], t): weight
        for line in table
        for t, (weight, target) in enumerate(zip(line["weight"][1:], line["target"][1:], strict=True))
        if target
    }
    assert found == timeless(weights)
    assert main(["score", *words, "--rule", "weight = top(p_ref, 0.5, batch)"]) != 0
    assert "scoring has no optimizer steps" in capsys.readouterr().err


def test_a_pair_is_kept_whole_and_counted_once(run: Run, write: Callable[..., str], capsys: Any):
    rule = (
        "let d = mean(logratio(on, ref), example); keep = chosen(length) > rejected(length); "
        "loss = -log_sigmoid(chosen(d) - rejected(d))"
    )
    pairs = [
        {"prompt": f"what is {i} ?", "chosen": " the" * (1 + i % 3), "rejected": " the" * (1 + i % 2)}
        for i in range(12)
    ]
    data = write("pairs.jsonl", pairs)
    outcome = run("pairs", rule, data=[data], quiet=False)
    kept = {i for i in range(12) if i % 3 > i % 2}
    tokens = sum(4 + i % 3 + i % 2 for i in kept)  # of both responses, with their end tokens
    assert sum(line["supervised_tokens"] for line in log(outcome.output)) == tokens
    assert f"data: {len(kept)} pairs" in (said := capsys.readouterr().err)
    assert f"{12 - len(kept)} pairs left out by `keep`" in said
    with pytest.raises(DataFault, match="leaves none of 12 pairs"):
        run("none", rule.replace(">", "> 99 +"), data=[data])


def test_explain_shows_what_comes_before(capsys: Any):
    assert main(["explain", SURE]) == 0
    said = capsys.readouterr().out
    for line in (
        "one pass of ref keeps nll(ref) to choose examples",
        "the other examples are left out",
        "data set",
    ):
        assert line in said


def test_the_model_is_trained_on_what_is_kept_alone(run: Run, write: Callable[..., str]):
    """The same as on a file with nothing but those rows, but for the numbers of the rows."""
    kept = write("kept.jsonl", [row for row in ROWS if row["score"] > 3])
    one = run("keep", SCORED + "keep = score > 3; weight = p_on")
    other = run("file", "weight = p_on", data=[kept])
    assert log(one.output) == log(other.output)
    both = [AutoModelForCausalLM.from_pretrained(of.output).state_dict() for of in (one, other)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert json.loads((one.output / "config.json").read_text())
