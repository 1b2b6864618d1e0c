"""Packed rows: which rows share a line, that no row sees another, and that all of a row stays with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from priority_dsl import compile_rule
from tests.trainer.families import MODELS, SMALL, VOCABULARY, make
from tests.trainer.test_chance import log, same
from tests.trainer.test_distributed import weights
from trainer.batches import IGNORED, Batch, Spread, collate, layouts, micro_batches, positions
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.faults import ConfigFault
from trainer.packing import Packing, bins_of, check_masks, mask_for, room_of, why_not
from trainer.train import train
from trainer.trained import Call, Trained

STORED = "p(ref)"


def example(index: int, length: int, chosen: bool | None = None) -> Example:
    """A row of made-up tokens, the first two of which are its prompt, with columns of every kind."""
    ids = [3 + (7 * index + 5 * i + (chosen is False)) % (VOCABULARY - 3) for i in range(length)]
    response = [i > 1 for i in range(length)]
    columns: dict[str, Any] = {
        "noise": [float(10 * index + i) for i in range(length)],
        "label": f"row {index}",
        "good": index % 2 == 0,
    }
    roles: list[str | None] = ["assistant" if marked else "user" for marked in response]
    stored = {STORED: np.array([index + i / 100 for i in range(1, length)], dtype=np.float32)}
    return Example(index, f"f:{index}", ids, response, roles, columns, stored, chosen)


ROWS = [example(i, length) for i, length in enumerate([9, 4, 7, 3, 11, 5, 6])]
PAIRS = [example(i, 4 + (3 * i + 2 * side) % 5, side == 0) for i in range(5) for side in range(2)]


# Which rows share a line --------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 100), st.integers(1, 6))
def test_bins_hold_everything_once_and_nothing_too_long(sizes: list[int], room: int, least: int):
    bins = bins_of(sizes, room, least)
    assert sorted(i for of in bins for i in of) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in of) <= room or len(of) == 1 for of in bins)
    assert all(sum(sizes[i] for i in of) <= max(room, *sizes) for of in bins)
    fewest = -(-sum(sizes) // max(room, *sizes))
    assert fewest <= len(bins) <= max(2 * fewest, least, 1) + sum(size > room / 2 for size in sizes)
    assert bins == bins_of(list(sizes), room, least)


def test_bins_are_even_and_as_many_as_processes():
    assert bins_of([3, 3, 2, 2, 2], 7) == [[0, 1], [2, 3, 4]]
    sizes = [90, 80, 20, 10, 10]
    assert [sum(sizes[i] for i in of) for of in bins_of(sizes, 120)] == [110, 100]
    assert [sorted(of) for of in bins_of([4, 4, 4, 4], 16, least=2)] == [[0, 2], [1, 3]]
    assert len(bins_of([4, 4, 4, 4], 16)) == 1
    assert len(bins_of([4], 16, least=3)) == 1
    assert len(bins_of([5] * 12, 20)) == 3


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["rows", "pairs"])
def test_every_row_is_in_one_line_of_one_process(rows: list[Example], processes: int):
    size = 1 if rows is ROWS else 2
    packing = Packing(20, lines=2)
    spreads = [Spread(2, 2, processes, rank, size, packing) for rank in range(processes)]
    shares = [micro_batches(rows, spread, "response", ()) for spread in spreads]
    assert len({len(share) for share in shares}) == 1, "processes take the same number of micro-batches"
    live = [batch for share in shares for batch in share if batch.tokens]
    assert sorted(place for batch in live for place in batch.places) == sorted(row.place for row in rows)
    assert all(len(batch.targets) <= packing.lines for batch in live)
    assert all(batch.targets.shape[1] <= packing.room for batch in live)
    assert any(len(batch.rows) > len(batch.targets) for batch in live)
    for batch in live:  # both responses of a pair are in the same micro-batch
        indices = [row.index for row in batch.rows]
        assert all(indices.count(index) == size for index in indices)
    blank = [batch for share in shares for batch in share if not batch.tokens]
    assert all((batch.targets == IGNORED).all() and not batch.response.any() for batch in blank)


def test_padded_rows_of_a_micro_batch_are_of_similar_length():
    lines = layouts(ROWS, Spread(2, 4))
    lengths = [[len(row.ids) for line in of for row in line] for of in lines]
    assert lengths == [[11, 9], [7, 6], [5, 4], [3]]
    spread = Spread(2, 2, processes=2)
    assert layouts(ROWS, spread) == lines, "process 0 and 1 in turn"


def test_the_room_of_a_line():
    assert room_of(None, [5, 9], 1) == 9
    assert room_of(None, [5, 9], 8) == 16
    assert room_of(20, [5, 9], 8) == 20
    with pytest.raises(ConfigFault, match=r"--packing-length 8: the longest row .* takes 9"):
        room_of(8, [5, 9], 1)


# What belongs to a row stays with it --------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("over", ["response", "all"])
def test_all_of_a_row_is_where_its_targets_are(over: str, multiple: int):
    required = ["noise", "label", "good", "role", "response"]
    spread = Spread(2, packing=Packing(20, 2), multiple=multiple)
    batches = micro_batches(ROWS, spread, over, required)
    assert all(batch.targets.shape[1] % multiple == 0 for batch in batches)
    seen = []
    for batch in batches:
        used = torch.zeros(batch.targets.shape, dtype=torch.bool)
        for row, (line, at) in zip(batch.rows, batch.spans, strict=True):
            alone = collate([row], over, required)
            assert batch.input_ids[line, at].tolist() == row.ids[:-1] == alone.input_ids[0].tolist()
            assert torch.equal(batch.targets[line, at], alone.targets[0])
            assert torch.equal(batch.response[line, at], alone.response[0])
            assert torch.equal(batch.stored[STORED][line, at], alone.stored[STORED][0])
            assert batch.examples[line, at].tolist() == [row.index] * positions([row])
            assert batch.others["position_ids"][line, at].tolist() == list(range(positions([row])))
            for name in ("noise", "role", "response"):
                assert batch.columns[name][line][at] == alone.columns[name][0]
            for name in ("label", "good"):
                assert batch.columns[name][line][at] == alone.columns[name] * positions([row])
            assert not used[line, at].any()
            used[line, at] = True
            seen.append(row.index)
        assert (batch.targets[~used] == IGNORED).all()
        assert (batch.others["position_ids"][~used] == 0).all()
        assert all(len(line) == batch.targets.shape[1] for name in required for line in batch.columns[name])
    assert sorted(seen) == [row.index for row in ROWS]


def test_both_responses_of_a_pair_are_told_apart_in_a_line():
    spread = Spread(2, responses=2, packing=Packing(40, 2))
    (batch,) = micro_batches(PAIRS[:4], spread, "response", ["chosen"])
    for row, (line, at) in zip(batch.rows, batch.spans, strict=True):
        assert batch.columns["chosen"][line][at] == [row.chosen] * positions([row])


# No row sees another ------------------------------------------------------------------------------

WINDOWS: dict[str, dict[str, Any]] = {
    "gemma2, soft cap": {"sliding_window": 3},
    "gemma3, tied": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2},
}
REFUSED = {"falcon-h1, lm_head_multiplier"}  # a state goes on from row to row
MASKED = {"opt, tied", "opt"}  # takes positions, and makes no mask of them


def losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a rule by row and token, and the gradient of its loss."""
    model.zero_grad(set_to_none=True)
    call = Call(batch, {"examples": batch.examples})
    found = Trained(model, compile_rule("p_on ** 0.5"), False, False)(call)
    found.mean.backward()
    by_row = {row.index: found.weights[where] for row, where in zip(batch.rows, batch.spans, strict=True)}
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat([by_row[row.index] for row in ROWS]).detach(), gradient


FAMILIES = [(name, {}) for name in MODELS if name not in REFUSED] + [*WINDOWS.items()]
CASES = [
    pytest.param(name, changes, attention, id=f"{name}{', window' * bool(changes)}, {attention}")
    for name, changes in FAMILIES
    for attention in ("sdpa", "eager")
    if not (name.startswith("gemma2") and attention == "sdpa")  # it has eager attention only
]


@pytest.mark.parametrize(("name", "changes", "attention"), CASES)
def test_a_packed_row_is_read_as_it_is_alone(name: str, changes: dict[str, Any], attention: str):
    model = make(name, **changes)
    model.set_attn_implementation(attention)
    mask = mask_for(model)
    assert (mask == "positions") == (name not in MASKED)
    (batch,) = micro_batches(ROWS, Spread(4, packing=Packing(20, 4, mask)), "response", ())
    assert len(batch.targets) < len(ROWS)
    alone, wanted = losses(model, collate(ROWS, "response", ()))
    packed, gradient = losses(model, batch)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    batch.others.clear()
    crossed, _ = losses(model, batch)
    assert (crossed - alone).abs().max() > 1e-3, "without positions and mask, rows see each other"


def built(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


LEAKY: dict[str, Callable[[], Any]] = {
    "falcon-h1": lambda: make("falcon-h1, lm_head_multiplier"),
    "mamba": lambda: built("Mamba", vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2),
    # Its masks do not know the positions, and one that is given would be without its window.
    "gpt-oss": lambda: built(
        "GptOss", **SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=128
    ),
    "bloom": lambda: built("Bloom", vocab_size=48, hidden_size=16, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("name", LEAKY)
def test_a_model_in_which_rows_would_see_each_other_is_refused(name: str):
    with pytest.raises(ConfigFault, match=r"--packing: \w+ (lets a row see the row before|takes no packed)"):
        mask_for(LEAKY[name]())


def test_a_frozen_model_in_which_rows_would_see_each_other_is_refused():
    with pytest.raises(ConfigFault, match=r"--packing: the model `teacher`: \w+ lets a row see"):
        check_masks({"ref": make("llama"), "teacher": LEAKY["mamba"]()}, "positions")
    assert why_not(make("llama"), "positions") is None
    assert why_not(make("opt, tied" if "opt, tied" in MODELS else "opt"), "positions") is not None


# From the command line ----------------------------------------------------------------------------

RULE = "weight = (1 if mass(ref) >= 0.3 else 0.5) * p_on"
PACKED = {"packing": True, "packing_length": 64}
WITH = [
    {"checkpoint_activations": True},
    {"loss": "dense"},
    {"online_reference": True},
    {"pad_to_multiple": 16},
]


@pytest.fixture
def settings(model: str, sums: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": model, "data": [sums], "eval_data": [sums], "max_steps": 3, "learning_rate": 1e-4,
        "batch_size": 8, "device": "cpu", "quiet": True, "cache": str(tmp_path / "cache"), "rule": RULE,
    }  # fmt: skip


@pytest.mark.parametrize("more", WITH, ids=str)
def test_packing_with(more: dict[str, Any], settings: dict[str, Any], tmp_path: Path):
    padded = train(TrainConfig(**settings, output=str(tmp_path / "padded")))
    packed = train(TrainConfig(**settings, **more, **PACKED, output=str(tmp_path / "packed")))
    same(packed.output, padded.output)


def test_packing_in_bfloat16(settings: dict[str, Any], tmp_path: Path):
    """Rounded otherwise in other shapes, so equal only as far as bfloat16 goes."""
    half = {**settings, "dtype": "bf16"}
    runs = [
        train(TrainConfig(**half, **how, output=str(tmp_path / str(len(how))))).output for how in ({}, PACKED)
    ]
    for one, other in zip(*map(log, runs), strict=True):
        assert one.pop("nll", 0) == pytest.approx(other.pop("nll", 0), rel=2e-3)
        assert one.pop("loss", 0) == pytest.approx(other.pop("loss", 0), rel=0.05)
        assert one.get("supervised_tokens") == other.get("supervised_tokens")
    assert (weights(runs[0]) - weights(runs[1])).abs().max() < 1e-3  # three steps of 1e-4 at the most


def test_a_run_may_go_on_packed(settings: dict[str, Any], tmp_path: Path):
    constant = {**settings, "schedule": "constant"}
    parts = {**constant, "output": str(tmp_path / "parts"), "save_steps": 2}
    train(TrainConfig(**{**parts, "max_steps": 2}))
    packed = train(TrainConfig(**parts, **PACKED, resume=True))
    whole = train(TrainConfig(**constant, output=str(tmp_path / "whole")))
    torch.testing.assert_close(weights(packed.output), weights(whole.output), rtol=0, atol=1e-6)


def test_the_note_of_packing(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(TrainConfig(**{**settings, "quiet": False}, packing=True, output=str(tmp_path / "run")))
    assert "packing: lines of " in capsys.readouterr().err


def test_mistakes_have_a_place_and_a_way_out(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def said(*more: str) -> str:
        words = ["train", "--model", settings["model"], "--data", settings["data"][0], "--rule", "1"]
        assert main([*words, "--output", str(tmp_path / "run"), "--device", "cpu", *more]) == 2
        return capsys.readouterr().err

    assert "--packing-length needs --packing" in said("--packing-length", "64")
    assert "the longest row (of pairs: its two responses) takes" in said("--packing", "--packing-length", "4")
    state = LEAKY["mamba"]()
    state.resize_token_embeddings(320)
    state.save_pretrained(tmp_path / "mamba")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mamba" / name).write_bytes((Path(settings["model"]) / name).read_bytes())
    told = said("--packing", "--model", str(tmp_path / "mamba"))
    assert "--packing: MambaForCausalLM lets a row see the row before it; without the flag rows are" in told
    assert not (tmp_path / "run").exists()


def test_rows_that_make_a_loss_infinite_are_named_when_packed(
    model: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    noise = [1e39 if i == 3 else 1.0 for i in range(6)]
    rows = [{"input_ids": [1, 5 + i, 6, 7], "noise": [0.0, 1.0, 1.0, noise[i]]} for i in range(6)]
    data, rule = write("rows.jsonl", rows), "column noise: number per token; weight = noise"
    words = ["train", "--model", model, "--data", data, "--rule", rule, "--output", str(tmp_path / "run")]
    code = main([*words, "--device", "cpu", "--packing", "--packing-length", "16", "--quiet"])
    assert code != 0
    assert "rows.jsonl:4" in capsys.readouterr().err
