"""A run: the same numbers for any layout, checkpoints that continue exactly, a folder that is safe."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import TrainConfig
from trainer.faults import ConfigFault, RunFault
from trainer.train import Outcome, train

Run = Callable[..., Outcome]
WHEN = {"seconds"}  # of a line of the log, what differs between two equal runs


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    """Trains on the sums; `name` is the output folder."""

    def go(name: str, rule: str = "dft", **options: Any) -> Outcome:
        settings = {"max_steps": 3, "learning_rate": 1e-2, "quiet": True, "device": "cpu", **options}
        return train(
            TrainConfig(
                **{"model": model, "data": sums, "output": str(tmp_path / name), "rule": rule, **settings}
            )
        )

    return go


def log(outcome: Outcome) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WHEN} for line in lines]


def weights(outcome: Outcome) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(outcome.output)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_leaves_model_tokenizer_rule_config_and_log(run: Run, model: str):
    outcome = run("run", "sg(p_on) ** (1/tau)", set={"tau": 2}, max_steps=4)
    assert outcome.step == 4
    trained = AutoModelForCausalLM.from_pretrained(outcome.output)
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    assert AutoTokenizer.from_pretrained(outcome.output).chat_template
    text = (outcome.output / "rule.rule").read_text()
    assert text == "# run with --set tau=2.0\nsg(p_on) ** (1 / tau)\n"
    saved = yaml.safe_load((outcome.output / "config.yaml").read_text())
    assert saved["set"] == {"tau": 2.0}
    lines = log(outcome)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1], "24 rows are three steps of 8"
    figures = "nll loss weight_mean weight_nonzero weight_negative learning_rate grad_norm".split()
    assert set(lines[0]) == {"step", "epoch", *figures, "supervised_tokens", "tokens"}
    assert all(line["learning_rate"] > 0 for line in lines)


def test_the_log_shows_what_a_hand_computes(run: Run, model: str, tokenizer: Any, write: Callable[..., str]):
    row = {"prompt": "what is 1 ?", "completion": " the answer is 7"}
    line = log(run("run", "-1 if p_on > 0.01 else 1", data=write("one.jsonl", [row]), max_steps=1))[0]
    ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
    before = AutoModelForCausalLM.from_pretrained(model)
    logp = before(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    nll = -logp.gather(-1, torch.tensor(ids[1:])[:, None])[prompt - 1 :, 0]
    weight = torch.where((-nll).exp() > 0.01, -1.0, 1.0)
    assert line["supervised_tokens"] == len(nll) == len(ids) - prompt
    assert line["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert line["loss"] == pytest.approx((weight * nll).mean().item(), rel=1e-4, abs=1e-6)
    assert line["weight_mean"] == pytest.approx(weight.mean().item(), abs=1e-6)
    assert line["weight_negative"] == pytest.approx((weight < 0).float().mean().item(), abs=1e-6)
    assert line["weight_nonzero"] == 1.0
    loss = (weight * nll).mean()
    grads = torch.autograd.grad(loss, list(before.parameters()))
    assert line["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-4)


LAYOUT_RULES = {
    "tokens": "mass(ref) >= 0.5",
    "weights": "weight = p_on; normalize = weights",
    "kept": "weight = p_on > 0.004; normalize = kept",
    "examples": "weight = p_on; normalize = examples",
    "all": "over = all; weight = 1 if response else 0.5",
}


@pytest.mark.parametrize("rule", LAYOUT_RULES.values(), ids=LAYOUT_RULES)
def test_accumulation_changes_nothing(rule: str, run: Run):
    # A small rate: Adam turns rounding in a gradient near 0 into a step of the size of the rate.
    whole = run("whole", rule, batch_size=8, accumulation=1, learning_rate=1e-3)
    parts = run("parts", rule, batch_size=2, accumulation=4, learning_rate=1e-3)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-6)
    for one, other in zip(log(whole), log(parts), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_accumulation_of_a_last_step_that_is_short(run: Run):
    rate = 1e-3
    whole = run("whole", "dft", batch_size=10, accumulation=1, learning_rate=rate)  # steps of 10, 10, 4 rows
    parts = run("parts", "dft", batch_size=5, accumulation=2, learning_rate=rate)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-6)


def test_two_runs_are_equal_and_another_seed_is_not(run: Run):
    assert log(run("a")) == log(run("b"))
    assert log(run("c", seed=1)) != log(run("a2"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_rises_and_falls_and_is_never_zero(schedule: str, run: Run):
    outcome = run(schedule, schedule=schedule, warmup=0.5, max_steps=6)
    rates = [line["learning_rate"] for line in log(outcome)]
    assert rates[:3] == pytest.approx([0.0025, 0.005, 0.0075])
    assert rates[3] == pytest.approx(0.01)
    assert all(rate > 0 for rate in rates)
    falls = [a > b for a, b in itertools.pairwise(rates[3:])]
    assert falls == [schedule != "constant"] * 2


def test_epochs_and_steps_whichever_ends_first(run: Run):
    assert run("a", max_steps=None).step == 3
    assert run("b", max_steps=None, epochs=2).step == 6
    assert run("c", max_steps=4, epochs=2).step == 4
    assert run("d", max_steps=9, epochs=2).step == 6


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(run: Run, monkeypatch: pytest.MonkeyPatch):
    straight = run("straight", "p_on * (1 - progress)", max_steps=6)
    import trainer.train as story

    def stops(run_: Any, step: int) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return update(run_, step)

    update = story.update
    monkeypatch.setattr(story, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        run("broken", "p_on * (1 - progress)", max_steps=6, save_steps=3)
    monkeypatch.setattr(story, "update", update)
    resumed = run("broken", "p_on * (1 - progress)", max_steps=6, save_steps=3, resume=True)
    assert log(resumed) == log(straight)
    assert torch.equal(weights(resumed), weights(straight))
    assert sorted(p.name for p in (resumed.output / "checkpoints").iterdir()) == ["step-3", "step-6"]


def test_a_resumed_run_keeps_the_reference_that_it_began_with(run: Run):
    rule = "mass(ref) >= 0.5"
    straight = run("straight", rule, max_steps=4, schedule="constant", warmup=0)
    run("parts", rule, max_steps=2, schedule="constant", warmup=0, save_steps=2)
    resumed = run("parts", rule, max_steps=4, schedule="constant", warmup=0, save_steps=2, resume=True)
    assert log(resumed) == log(straight)


def test_a_resumed_run_may_be_spread_otherwise(run: Run):
    options = {"schedule": "constant", "warmup": 0, "save_steps": 2}
    straight = run("straight", max_steps=4, **options)
    run("parts", max_steps=2, **options)
    resumed = run("parts", max_steps=4, resume=True, batch_size=2, accumulation=4, **options)
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=1e-6)


@pytest.fixture
def forgetful(make_folder: Callable[..., str], tmp_path: Path) -> str:
    """A model with dropout, so that chance decides."""
    return make_folder(tmp_path / "forgetful", seed=0, attention_dropout=0.5)


def test_a_resumed_run_continues_the_dropout(run: Run, forgetful: str):
    options = {"model": forgetful, "schedule": "constant", "warmup": 0, "save_steps": 2}
    straight = run("straight", max_steps=4, **options)
    run("parts", max_steps=2, **options)
    assert log(run("parts", max_steps=4, resume=True, **options)) == log(straight)
    assert log(straight) != log(run("other", max_steps=4, **{**options, "seed": 1}))


def test_measuring_leaves_the_training_as_it_was(run: Run, forgetful: str, sums: str):
    plain = run("plain", model=forgetful)
    measured = run("measured", model=forgetful, eval_data=sums, eval_steps=1)
    assert [line for line in log(measured) if "nll" in line] == log(plain)


def test_counting_sees_the_dropout_of_the_training_pass(run: Run, forgetful: str):
    rule = (
        "weight = p_on; loss = weight + 0 * nll_on; normalize = weights"  # the loss is sum / sum of weights
    )
    lines = log(run("run", rule, model=forgetful, batch_size=2, accumulation=4))
    assert [line["loss"] for line in lines] == pytest.approx([1, 1, 1], abs=1e-6)


def test_progress_and_epoch_are_those_of_completed_steps(run: Run):
    lines = log(run("progress", "weight = progress", max_steps=4))
    assert [line["weight_mean"] for line in lines] == pytest.approx([0, 0.25, 0.5, 0.75])
    lines = log(run("epoch", "weight = epoch", max_steps=None, epochs=2))
    assert [line["weight_mean"] for line in lines] == [0, 0, 0, 1, 1, 1]


RESUME_MISTAKES = {
    "rule": ({"rule": "1"}, "`rule` was 'dft' .* is '1' now"),
    "rate": ({"learning_rate": 1e-3}, "`learning_rate` was"),
    "rows of a step": ({"batch_size": 4}, "a step had 8 rows and has 4 now"),
}


@pytest.mark.parametrize("case", RESUME_MISTAKES)
def test_a_resumed_run_must_be_the_same_run(case: str, run: Run):
    run("run", max_steps=2, save_steps=2)
    changes, message = RESUME_MISTAKES[case]
    with pytest.raises(ConfigFault, match=message):
        run("run", **{"max_steps": 4, "save_steps": 2, "resume": True, **changes})


def test_a_resumed_run_must_have_the_same_data(run: Run, sums: str):
    run("run", max_steps=2, save_steps=2)
    text = Path(sums).read_text()
    Path(sums).write_text(text.replace("answer", "result", 1))
    with pytest.raises(ConfigFault, match="the data are not those that the run began with"):
        run("run", max_steps=4, save_steps=2, resume=True)


def test_a_damaged_checkpoint_is_named(run: Run):
    outcome = run("run", max_steps=2, save_steps=2)
    (outcome.output / "checkpoints/step-2/optimizer.pt").write_bytes(b"no")
    with pytest.raises(RunFault, match=r"step-2: the checkpoint is damaged .* remove it"):
        run("run", max_steps=4, save_steps=2, resume=True)


def test_a_finished_run_that_is_resumed_stays_as_it_is(run: Run):
    first = run("run", max_steps=2, save_steps=2)
    before = weights(first)
    assert torch.equal(weights(run("run", max_steps=2, save_steps=2, resume=True)), before)


def test_a_folder_in_use_is_refused_and_replaced_only_on_request(run: Run):
    first = run("run", max_steps=2, save_steps=1)
    with pytest.raises(ConfigFault, match=r"is not empty; --resume continues .* --overwrite replaces"):
        run("run")
    second = run("run", "1", overwrite=True)
    assert second.output == first.output
    assert not (second.output / "checkpoints").exists()
    assert len(log(second)) == 3


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_a_folder_that_is_no_run_is_never_touched(flag: str, run: Run, tmp_path: Path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "config.yaml").write_text("mine: true\n")
    with pytest.raises(ConfigFault, match="holds no run"):
        run("papers", **{flag: True})
    assert (tmp_path / "papers" / "config.yaml").read_text() == "mine: true\n"


def test_overwrite_never_deletes_what_the_run_reads(run: Run, tmp_path: Path):
    first = run("run")
    for inside in (
        {"model": str(first.output)},
        {"rule": "sg(p_on) * mass(ref)", "bind": {"ref": str(first.output)}},
    ):
        with pytest.raises(ConfigFault, match=r"would delete .* which this run reads"):
            run("run", **{"overwrite": True, **inside})
    assert (first.output / "model.safetensors").exists()


def test_overwrite_keeps_the_old_run_until_nothing_can_fail(run: Run):
    first = run("run")
    with pytest.raises(Exception, match="no such file"):
        run("run", overwrite=True, data="missing.jsonl")
    assert (first.output / "model.safetensors").exists()


def test_held_out_rows_are_measured(run: Run, sums: str, model: str):
    outcome = run("run", "dft", eval_data=sums, eval_steps=2, learning_rate=1e-9)
    measured = [line for line in log(outcome) if "eval_nll" in line]
    assert [line["step"] for line in measured] == [2, 3]
    assert outcome.evaluation is not None
    assert outcome.evaluation.nll == pytest.approx(measured[-1]["eval_nll"])
    assert outcome.evaluation.loss < outcome.evaluation.nll, "weights are probabilities"
    again = run("parts", "dft", eval_data=sums, batch_size=3, learning_rate=1e-9)
    assert again.evaluation is not None
    assert again.evaluation.nll == pytest.approx(outcome.evaluation.nll, rel=1e-5)
    assert again.evaluation.loss == pytest.approx(outcome.evaluation.loss, rel=1e-5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_progress_bar_and_a_file_does_not(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run("bar", quiet=False)
    assert "3/3" in terminal.getvalue()
    assert "nll " in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    run("file", quiet=False)
    assert "3/3" not in file.getvalue()
    assert "data: 24 rows" in file.getvalue()
    monkeypatch.setattr(sys, "stderr", quiet := Terminal())
    run("quiet", quiet=True)
    assert quiet.getvalue() == ""


def test_bf16_trains_float32_weights(run: Run):
    full, half = run("full"), run("half", dtype="bf16")
    assert next(AutoModelForCausalLM.from_pretrained(half.output).parameters()).dtype == torch.float32
    assert log(half)[0]["nll"] == pytest.approx(log(full)[0]["nll"], rel=0.02)
    assert log(half)[0]["nll"] != log(full)[0]["nll"]


def test_columns_reach_the_rule(run: Run, write: Callable[..., str]):
    rows = [
        {"prompt": "a", "completion": f" {i}", "label": "neg" if i % 4 == 0 else "pos"} for i in range(16)
    ]
    outcome = run(
        "run", "-0.5 if label == neg else 1", data=write("l.jsonl", rows), batch_size=16, max_steps=1
    )
    assert log(outcome)[0]["weight_negative"] == pytest.approx(0.25, abs=0.05)


def test_a_bound_model_is_another_reference(run: Run, other_model: str):
    own, other = run("own", "mass(ref)"), run("other", "mass(ref)", bind={"ref": other_model})
    assert log(own)[0]["nll"] == log(other)[0]["nll"]
    assert log(own)[0]["loss"] != log(other)[0]["loss"]
    extra = run("extra", 'model good "a better one"; weight = p(good)', bind={"good": other_model})
    assert extra.step == 3


def poisoned(model: str, folder: Path) -> str:
    """The model with one weight that is not a number: every loss is NaN."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, model: str, tmp_path: Path):
    with pytest.raises(RunFault, match=r"^step 1: .*the loss is not finite.* in the rows .*sums\.jsonl:\d+"):
        run("run", "1", model=poisoned(model, tmp_path / "nan"))
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_a_weight_that_is_not_finite_stops_the_run(run: Run, write: Callable[..., str], tmp_path: Path):
    rows = [{"prompt": "a", "completion": " b", "noise": noise} for noise in (1.0, 1.0, 0.0)]
    with pytest.raises(RunFault, match=r"(?s)^step \d: the rule stopped in the rows .*PD505"):
        run("run", "column noise: number; weight = 1 / noise", data=write("n.jsonl", rows), batch_size=1)


def test_a_run_that_stops_keeps_its_log_and_its_last_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import trainer.train as story

    def bursts(run_: Any, step: int) -> float:
        if step == 2:
            for parameter in run_.policy.parameters():
                parameter.grad.fill_(float("inf"))
        return update(run_, step)

    update = story.update
    monkeypatch.setattr(story, "update", bursts)
    with pytest.raises(RunFault, match="step 3: the gradient is not finite"):
        run("run", save_steps=1)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-1", "step-2"]
