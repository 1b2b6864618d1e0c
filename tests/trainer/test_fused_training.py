"""A run under the fused loss gives the numbers of the dense one, and never holds full logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from priority_dsl import compile_rule
from tests.test_compile import has_compiler
from tests.trainer.families import MODELS, make
from tests.trainer.test_families import a_batch
from trainer.config import EvalConfig, TrainConfig
from trainer.evaluate import evaluate
from trainer.faults import ConfigFault, ModelFault
from trainer.models import checkpoint_activations
from trainer.train import Outcome, train
from trainer.trained import Call, Trained

Run = Callable[..., Outcome]
RULES = {
    "pointwise": "dft",
    "selection": "p_on <= 0.01",
    "signed": "-0.5 if p_on > 0.01 else 1",
    "kl": "asft",
    "stored bit": "prift_mass",
    "stored number": "0.5 * p_ref",
    "stored and online": "sigmoid(p_on - p_ref)",
    "gradient through statistics": "weight = p_on; loss = weight * nll_on - 0.1 * H_on",
    "kept": "weight = p_on > 0.004; normalize = kept",
    "kept, stored": "weight = mass(ref) >= 0.5; normalize = kept",
    "weights": "weight = p_on; normalize = weights",
    "examples": "weight = p_on; normalize = examples",
    "none": "weight = 0.01 * p_on; normalize = none",
    "all tokens": "over = all; weight = 1 if response else 0.5 * p_on",
    "of the whole step": "top(H_on, 0.5, batch)",
}


ACCUMULATED = ("kl", "stored bit", "kept", "weights", "examples", "of the whole step")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(model: str, sums: str, tmp_path: Any) -> Run:
    """Trains on the sums at a rate at which Adam does not turn rounding into steps; `name` is the folder."""

    def go(name: str, rule: str, **options: Any) -> Outcome:
        settings = {"max_steps": 10, "learning_rate": 1e-3, "quiet": True, "device": "cpu", **options}
        given = {"model": model, "data": sums, "output": str(tmp_path / name), "rule": rule, **settings}
        return train(TrainConfig(**given))

    return go


def log(outcome: Outcome) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(outcome: Outcome) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(outcome.output)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(one: Outcome, other: Outcome, tolerance: float = 1e-5) -> None:
    assert len(log(one)) == len(log(other)) > 0
    for mine, its in zip(log(one), log(other), strict=True):
        assert mine == pytest.approx(its, abs=tolerance, rel=tolerance)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_ten_fused_steps_are_the_dense_ones(rule: str, run: Run, sums: str):
    measured = {"eval_data": sums}
    assert_same(run("fused", RULES[rule], **measured), run("dense", RULES[rule], loss="dense", **measured))


@pytest.mark.parametrize("rule", ACCUMULATED)
def test_ten_fused_steps_of_four_micro_batches_are_the_dense_ones(rule: str, run: Run, sums: str):
    spread = {"batch_size": 2, "accumulation": 4, "eval_data": sums}
    assert_same(run("fused", RULES[rule], **spread), run("dense", RULES[rule], loss="dense", **spread))


@pytest.mark.parametrize("rule", ["dft", "asft", "prift_mass"])
def test_frozen_models_at_every_step(rule: str, run: Run):
    online = {"online_reference": True, "batch_size": 2, "accumulation": 4, "max_steps": 4}
    assert_same(run("fused", rule, **online), run("dense", rule, loss="dense", **online))


@pytest.mark.parametrize("loss", ["fused", "dense"])
def test_activation_checkpointing_changes_no_number(loss: str, run: Run):
    options = {"loss": loss, "max_steps": 4}
    assert_same(run("plain", "dft", **options), run("again", "dft", checkpoint_activations=True, **options))


def test_activation_checkpointing_computes_the_layers_again():
    model = make("llama").train()
    calls: list[int] = []
    # Not the last part of a layer: what follows the last saved tensor is not computed again.
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for again, expected in ((False, 1), (True, 2)):
        if again:
            checkpoint_activations(model)
        calls.clear()
        batch = a_batch()
        Trained(model, compile_rule("dft"), True, False)(Call(batch, {})).mean.backward()
        assert len(calls) == expected


def test_a_model_that_cannot_checkpoint_activations_says_so(monkeypatch: pytest.MonkeyPatch):
    model = make("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelFault, match="--checkpoint-activations: LlamaForCausalLM does not support"):
        checkpoint_activations(model)


@pytest.mark.parametrize("rule", ["dft", "asft", "prift_mass"])
def test_in_bf16_both_losses_differ_by_its_rounding(rule: str, run: Run):
    # bf16 has 8 bits: 4e-3 of a value. The products are the same; the fused loss rounds the head's gradient
    # once, the dense one each micro-batch. Ten steps apart, nll and loss agree to 1e-2 of themselves.
    fused, dense = (log(run(loss, rule, dtype="bf16", loss=loss)) for loss in ("fused", "dense"))
    exact = log(run("fp32", rule))
    for ours, its in zip(fused, dense, strict=True):
        assert ours["nll"] == pytest.approx(its["nll"], rel=1e-2)
        assert ours["loss"] == pytest.approx(its["loss"], rel=1e-2, abs=1e-3)
    assert fused[0]["nll"] != exact[0]["nll"]
    assert fused[0]["nll"] == pytest.approx(exact[0]["nll"], rel=2e-2)


def gradients(step: Any, model: Any, scale: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    found = step(Call(a_batch(), {"progress": 0.0}))
    (found.mean * scale).backward()
    return found.mean.detach(), [p.grad for p in model.parameters()]


COMPILERS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")],
    ),
]


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap"])
def test_a_compiled_step_is_the_eager_step(backend: str, name: str):
    torch.compiler.reset()
    model = make(name).train()
    step = Trained(model, compile_rule("p_on ** 0.5"), True, False)
    eager = gradients(step, model)
    compiled = gradients(torch.compile(step, backend=backend), model)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiling_takes_the_body():
    torch.compiler.reset()
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        traced.append(len(graph.graph.nodes))
        return graph

    model = make("llama")
    gradients(torch.compile(Trained(model, compile_rule("dft"), True, False), backend=backend), model)
    assert sum(traced) > 100, "the layers are in the graph"


def test_a_gradient_scaler_scales_both_gradients():
    model = make("llama tied")
    step = Trained(model, compile_rule("dft"), True, False)
    loss, plain = gradients(step, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model.zero_grad(set_to_none=True)
    scaler.scale(step(Call(a_batch(), {})).mean).backward()
    assert model.lm_head.weight.grad.abs().max() > 1000 * max(g.abs().max() for g in plain[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.unscale_(optimizer)
    torch.testing.assert_close([p.grad for p in model.parameters()], plain, rtol=1e-6, atol=1e-8)
    assert loss > 0


# Full logits ------------------------------------------------------------------------------------

VOCABULARY = 20_011  # no other size of these runs
LENGTH = 60


class Watch(TorchDispatchMode):
    """The most rows that a tensor with a dimension of the vocabulary's size had."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and VOCABULARY in tensor.shape:
                self.most = max(self.most, tensor.numel() // VOCABULARY)
        return out


@pytest.fixture(scope="module")
def wide(make_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a vocabulary that shows in shapes."""
    return make_folder(tmp_path_factory.mktemp("wide") / "model", seed=0, vocab_size=VOCABULARY)


@pytest.fixture
def long_rows(write: Callable[..., str]) -> str:
    """16 rows that are cut to the same length: 16 * 59 targets, several chunks of them."""
    return write("long.jsonl", [{"prompt": "", "completion": " 1 + 2 = 3" * 30} for _ in range(16)])


ROWS = 16 * (LENGTH - 1)
ONLY_HERE = {"batch_size": 16, "max_steps": 1, "max_length": LENGTH}
PATHS = {
    "online": ("dft", {}),
    "selection, held-out rows": ("p_on <= 0.5", {"evaluated": True}),
    "stored": ("prift_mass", {"evaluated": True}),
    "a frozen model at every step": ("prift_mass", {"online_reference": True}),
    "a frozen model that stays loaded": ("asft", {}),
    "counts of a step": ("weight = p_on; normalize = weights", {"batch_size": 16, "accumulation": 2}),
    "values of a step": ("top(H_on, 0.5, batch)", {}),
    "values of a step in parts": ("top(H_on, 0.5, batch)", {"batch_size": 16, "accumulation": 2}),
    "checkpointed activations": ("dft", {"checkpoint_activations": True}),
    "bf16": ("dft", {"dtype": "bf16"}),
}


def watched(run: Run, wide: str, rows: str, rule: str, **options: Any) -> int:
    options = dict(options)
    held_out = {"eval_data": rows} if options.pop("evaluated", False) else {}
    with Watch() as watch:
        run("run", rule, **{**ONLY_HERE, "model": wide, "data": rows, **held_out, **options})
    return watch.most


@pytest.mark.parametrize("path", PATHS)
def test_a_run_never_holds_full_logits(path: str, run: Run, wide: str, long_rows: str):
    rule, options = PATHS[path]
    if options.get("accumulation"):
        long_rows = doubled(long_rows)
    most = watched(run, wide, long_rows, rule, **options)
    assert 0 < most < ROWS, "chunks of rows are seen, all rows never"


def doubled(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
    return path


def test_the_watch_sees_the_full_logits_of_a_dense_run(run: Run, wide: str, long_rows: str):
    assert watched(run, wide, long_rows, "dft", loss="dense") >= ROWS


def test_evaluation_never_holds_full_logits(wide: str, long_rows: str, monkeypatch: pytest.MonkeyPatch):
    config = EvalConfig(
        model=wide, data=long_rows, base=wide, entropy=True, max_length=LENGTH, device="cpu", quiet=True
    )
    with Watch() as watch:
        figures = evaluate(config)
    assert 0 < watch.most < ROWS
    monkeypatch.setattr("priority_dsl.integrations.heads.why_whole", lambda model: "it is to stay whole")
    with Watch() as watch:
        again = evaluate(config)
    assert watch.most >= ROWS, "the watch sees the logits of a model that stays whole"
    assert again == pytest.approx(figures, rel=1e-5, abs=1e-6)


# What is asked for ------------------------------------------------------------------------------


def test_lines_are_the_same_whether_or_not_every_step_is_shown(run: Run):
    every, third = log(run("every", "prift_mass")), log(run("third", "prift_mass", log_steps=3))
    assert [line["step"] for line in third] == [3, 6, 9, 10]
    shown = [line for line in every if line["step"] in (3, 6, 9, 10)]
    for one, other in zip(third, shown, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_only_steps_that_are_shown_compute_the_nll_of_dead_tokens(run: Run, monkeypatch: pytest.MonkeyPatch):
    import trainer.trained as trained

    asked: list[int] = []

    def counts(hidden: Any, head: Any, targets: Any, rows: torch.Tensor) -> Any:
        asked.append(int(rows.sum()))
        return plain_figures(hidden, head, targets, rows)

    plain_figures = trained.plain_figures
    monkeypatch.setattr(trained, "plain_figures", counts)
    run("run", "prift_mass", log_steps=5)
    assert len(asked) == 2
    assert min(asked) > 0


@pytest.fixture
def unknown_scale(tmp_path: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose logits are scaled by a number of its config that this version does not know."""
    changes = {"vocab_size": 320, "max_position_embeddings": 64}
    assert MODELS["cohere, logit_scale"][0] == "Cohere"
    make("cohere, logit_scale", **changes).save_pretrained(tmp_path / "scaled")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "scaled")
    monkeypatch.setattr("priority_dsl.integrations.heads.SCALES", {})
    return str(tmp_path / "scaled")


REASON = "CohereForCausalLM: body and head do not give the model's logits"


def test_a_model_that_stays_whole_trains_on_full_logits_and_says_so(
    run: Run, unknown_scale: str, capsys: pytest.CaptureFixture[str]
):
    fallen = run("run", "asft", model=unknown_scale, quiet=False, max_steps=2)
    said = capsys.readouterr().err
    assert f"{REASON}: training holds full logits" in said
    assert f"{REASON}; whole logits are used" in said, "and the frozen one"
    assert_same(fallen, run("dense", "asft", model=unknown_scale, loss="dense", max_steps=2))


def test_a_model_that_stays_whole_is_refused_where_the_fused_loss_was_asked_for(run: Run, unknown_scale: str):
    with pytest.raises(ConfigFault, match=f"--loss fused: {REASON}; without the flag"):
        run("run", "dft", model=unknown_scale, loss="fused")


def test_a_model_that_can_be_taken_apart_is_trained_fused_without_a_note(
    run: Run, capsys: pytest.CaptureFixture[str]
):
    run("run", "dft", quiet=False, max_steps=1)
    assert "full logits" not in capsys.readouterr().err


def test_a_resumed_run_may_take_the_other_loss(run: Run):
    options = {"schedule": "constant", "warmup": 0, "save_steps": 2}
    straight = run("straight", "dft", max_steps=4, **options)
    run("parts", "dft", max_steps=2, loss="dense", **options)
    assert_same(run("parts", "dft", max_steps=4, resume=True, loss="fused", **options), straight)
