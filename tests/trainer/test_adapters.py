"""LoRA runs: the reference is the base bit for bit, there is no second copy, adapters load in peft."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trainer.train
from priority_dsl.integrations.heads import hidden_states, read_head, why_whole
from trainer.adapters import Adapter, Base, add_adapter
from trainer.columns import ColumnReader
from trainer.config import EvalConfig, RowConfig, ScoreConfig, TrainConfig
from trainer.data import Reader
from trainer.evaluate import evaluate
from trainer.faults import ConfigFault, ModelFault, RunFault
from trainer.fingerprints import folder_fingerprint
from trainer.merging import merge
from trainer.models import load_model
from trainer.score import score
from trainer.train import Outcome, train

Run = Callable[..., Outcome]
RULES = ("prift_mass", "asft", "weight = p_ref")
HEADS = ("lm_head", "q_proj,v_proj")


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    def go(name: str, rule: str = "prift_mass", **options: Any) -> Outcome:
        paths = {"model": model, "data": sums, "output": str(tmp_path / name), "cache": str(tmp_path / "c")}
        settings = {"max_steps": 4, "learning_rate": 1e-2, "quiet": True, "device": "cpu", "lora": 4}
        return train(TrainConfig(**{**paths, **settings, "batch_size": 8, "rule": rule, **options}))

    return go


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.fixture
def last_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that are made ready, with the models as they are in memory."""
    made: list[Any] = []
    prepare = trainer.train.prepare
    monkeypatch.setattr(
        trainer.train, "prepare", lambda *of, **more: made.append(prepare(*of, **more)) or made[-1]
    )
    return made


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded, by folder."""
    seen: list[str] = []
    for place in ("trainer.opening", "trainer.models"):
        module: Any = __import__(place, fromlist=["load_model"])
        own = module.load_model
        monkeypatch.setattr(
            module,
            "load_model",
            lambda source, *rest, _own=own, **more: seen.append(source) or _own(source, *rest, **more),
        )
    return seen


def ids() -> Tensor:
    return torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(5))


def stirred(folder: str, **options: Any) -> Adapter:
    """An adapter that changes what its base says."""
    adapter = add_adapter(
        load_model(folder), TrainConfig(model=folder, data="d", rule="1", lora=4, **options)
    )
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return adapter


@pytest.mark.parametrize("targets", [(), *HEADS])
def test_switched_off_it_is_the_base_bit_for_bit(model: str, targets: Any):
    adapter, base = stirred(model, lora_targets=targets, lora_dropout=0.0), load_model(model).eval()
    adapter.model.train()
    with torch.no_grad():
        plain = base(ids()).logits
        with adapter.switched_off():
            assert torch.equal(adapter.model(ids()).logits, plain)
            assert torch.equal(read_head(adapter.model).logits(hidden_states(adapter.model, ids())),
                               read_head(base).logits(hidden_states(base, ids())))  # fmt: skip
        assert adapter.model.training
        assert (adapter.model(ids()).logits - plain).abs().max() > 0.1
    trained = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained), "the switch leaves gradients as they are"


def test_dropout_is_off_in_the_base_too(make_folder: Callable[..., str], tmp_path: Path):
    folder = make_folder(tmp_path / "dropping", seed=3, attention_dropout=0.5)
    adapter, base = stirred(folder, lora_dropout=0.5), load_model(folder).eval()
    adapter.model.train()
    with torch.no_grad(), adapter.switched_off():
        assert torch.equal(adapter.model(ids()).logits, base(ids()).logits)
    assert not torch.equal(adapter.model(ids()).logits, adapter.model(ids()).logits), "dropout is on again"


@pytest.mark.parametrize("loss", ["fused", "dense"])
@pytest.mark.parametrize("rule", ["asft", "prift_mass"])
def test_what_the_reference_says_in_a_run_is_what_the_base_says(
    rule: str, loss: str, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
):
    """At each step of a run whose adapter moves, against a base that is loaded apart."""
    base, seen, says = load_model(model).eval(), [], Base.says

    def checked(self: Base, batch: Any, epoch: int) -> Any:
        said, inside = says(self, batch, epoch)
        (hidden, head) = said["ref"]
        with torch.no_grad():
            given = batch.input_ids
            own = (
                base(given).logits if loss == "dense" else read_head(base).logits(hidden_states(base, given))
            )
            moved = (self.adapter.model(given).logits - base(given).logits).abs().max()
        seen.append((torch.equal(head.logits(hidden), own), float(moved)))
        return said, inside

    monkeypatch.setattr(Base, "says", checked)
    run("run", rule, loss=loss, online_reference=rule == "prift_mass", accumulation=2, batch_size=4)
    assert len(seen) == 4 * 2 if rule == "asft" else len(seen) >= 4 * 2
    assert all(equal for equal, _ in seen)
    assert seen[-1][1] > 1e-3, "the adapter has moved the model"


def test_stored_statistics_are_those_of_the_base_and_share_its_cache(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    full = run("full", lora=None)
    own = run("own", cache=str(tmp_path / "c2"))
    stored, ours = (numbers_in(tmp_path / name) for name in ("c", "c2"))
    assert stored.keys() == ours.keys(), "the same keys"
    assert stored == ours, "the same numbers"
    capsys.readouterr()
    shared = run("shared", quiet=False)
    assert "rows from the cache, no forward pass" in capsys.readouterr().err
    assert lines(shared) == lines(own)
    assert lines(full)[0]["weight_mean"] == lines(own)[0]["weight_mean"]


def numbers_in(cache: Path) -> dict[str, list[bytes]]:
    """What each place of a cache holds."""
    places = [path for path in (cache / "statistics").iterdir() if path.is_dir()]
    assert places
    return {place.name: sorted(path.read_bytes() for path in place.glob("*.arrow")) for place in places}


@pytest.mark.parametrize("rule", RULES)
def test_no_second_model_is_in_memory(rule: str, run: Run, model: str, loads: list[str], last_run: list[Any]):
    def held() -> int:
        """The numbers of all parameters that are alive, each storage once."""
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]
        return sum({p.data_ptr(): p.numel() for p in alive}.values())

    before = held()
    run("run", rule)
    assert loads == [model]
    own = held() - before
    base = sum(p.numel() for p in last_run[0].policy.parameters() if not p.requires_grad)
    adapter = sum(p.numel() for p in last_run[0].policy.parameters() if p.requires_grad)
    assert own == base + adapter
    loads.clear()
    last_run.clear()
    gc.collect()
    before = held()
    run("bound", rule, bind={"ref": model}, cache=None if rule == "asft" else str(Path(model).parent / rule))
    assert loads == [model, model], "a model that is bound is loaded, whatever it is"
    assert held() - before == own + (base if rule == "asft" else 0)


@pytest.mark.parametrize("rule", RULES)
def test_the_losses_are_those_of_a_peft_loop_by_hand(
    rule: str, run: Run, model: str, sums: str, tokenizer: Any
):
    """Single rows, full logits, two models, torch's AdamW: nothing of the trainer but its rows."""
    outcome = run("run", rule, batch_size=24, schedule="constant", warmup=0.0, clip=0.0, lora_alpha=6)
    config = RowConfig(model=model, data=(sums,))
    rows = Reader(config, tokenizer, 320, 64, ColumnReader({})).read([sums]).rows
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    on = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    trained = [p for p in on.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(4):
        total, tokens = torch.zeros(()), 0
        for row in rows:
            at = torch.tensor([i for i, mark in enumerate(row.response) if mark])
            given = torch.tensor([row.ids])
            said = on(given).logits[0].log_softmax(-1)[at - 1]
            with torch.no_grad():
                held = base(given).logits[0].log_softmax(-1)[at - 1]
            total = total + by_hand(rule, said, held, given[0, at]).sum()
            tokens += len(at)
        (total / tokens).backward()
        losses.append(float((total / tokens).detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert [line["loss"] for line in lines(outcome)] == pytest.approx(losses, rel=1e-4)
    assert abs(losses[-1] / losses[0] - 1) > 0.1
    saved = AutoModelForCausalLM.from_pretrained(outcome.output)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids()).logits, on(ids()).logits, rtol=0, atol=2e-3)


def by_hand(rule: str, said: Tensor, held: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token from log-probabilities `[T, V]` of the trained model and of its base."""
    own, base = (logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for logp in (said, held))
    if rule == "weight = p_ref":
        return -base.exp() * own
    if rule == "prift_mass":
        p, target = held.exp(), base.exp().unsqueeze(-1)
        mass = torch.where(p <= target, p, 0.0).sum(-1)
        return -torch.where(mass >= 0.5, own, 0.0)
    kl = (held.exp() * (held - said)).sum(-1)
    return -own.detach().exp() * own + 0.05 * kl


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "lm_head")])
def test_the_folder_loads_in_peft_and_says_what_the_model_said(
    targets: Any, run: Run, model: str, last_run: list[Any]
):
    outcome = run("run", lora_targets=targets)
    names = {path.name for path in outcome.output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    ours = last_run[0].policy.eval()
    base = AutoModelForCausalLM.from_pretrained(model)
    plain = base(ids()).logits
    theirs = PeftModel.from_pretrained(base, str(outcome.output)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(ids()).logits, ours(ids()).logits)
        assert torch.equal(load_model(str(outcome.output)).eval()(ids()).logits, ours(ids()).logits)
        assert (ours(ids()).logits - plain).abs().max() > 1e-3


def test_a_killed_run_that_is_resumed_is_the_same_bit_for_bit(run: Run, monkeypatch: pytest.MonkeyPatch):
    rule = "model slow = ema(0.5); weight = p(slow); loss = weight * nll_on + kl(ref, on)"
    settings: dict[str, Any] = {"save_steps": 2, "max_steps": 6, "lora_dropout": 0.1}
    straight = run("straight", rule, **settings)
    update = trainer.train.update

    def killed(of: Any, step: int) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return update(of, step)

    monkeypatch.setattr(trainer.train, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken", rule, **settings)
    monkeypatch.undo()
    resumed = run("broken", rule, **settings, resume=True)
    assert lines(resumed) == lines(straight)
    for name in ("adapter_model.safetensors", "checkpoints/step-6/average-slow.weights"):
        assert (resumed.output / name).read_bytes() == (straight.output / name).read_bytes()
    average = load_file(straight.output / "checkpoints/step-6/average-slow.weights")
    assert average
    assert all("lora_" in name for name in average), "the average is of what is trained"
    assert not (straight.output / "checkpoints/step-6/model.safetensors").exists()


def test_weights_of_another_adapter_are_refused(run: Run, model: str):
    outcome = run("run")
    file = outcome.output / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    with pytest.raises(RunFault, match="1 weights differ, such as base_model"):
        stirred(model).restore(outcome.output)


def test_an_average_of_an_adapter_follows_its_weights_alone(run: Run, last_run: list[Any]):
    run("run", "model slow = ema(0.9); weight = p(slow)")
    slow = last_run[0].moving.models["slow"].model
    shared = dict(slow.named_parameters())
    for name, parameter in last_run[0].policy.named_parameters():
        assert (shared[name] is parameter) == ("lora_" not in name)


def test_an_adapter_on_the_head_is_part_of_the_fused_loss(run: Run, model: str):
    assert why_whole(stirred(model, lora_targets="lm_head").model) is None
    with pytest.raises(ConfigFault, match="the adapter on its output layer has dropout"):
        run("refused", lora_targets="lm_head", lora_dropout=0.1, loss="fused")
    for rule in ("asft", "prift_mass"):
        fused, dense = (run(f"{rule} {loss}", rule, lora_targets="lm_head,q_proj", loss=loss)
                        for loss in ("fused", "dense"))  # fmt: skip
        for one, other in zip(lines(fused), lines(dense), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert abs(lines(fused)[-1]["loss"] - lines(fused)[0]["loss"]) > 1e-3


def test_tied_embeddings_stay_what_they_are(run: Run, make_folder: Callable[..., str], tmp_path: Path):
    tied = make_folder(tmp_path / "tied", seed=2, tie_word_embeddings=True)
    fused, dense = (run(loss, "asft", model=tied, lora_targets="lm_head,v_proj", loss=loss)
                    for loss in ("fused", "dense"))  # fmt: skip
    for one, other in zip(lines(fused), lines(dense), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tied)
    PeftModel.from_pretrained(base, str(fused.output))
    names = load_file(fused.output / "adapter_model.safetensors")
    assert all("lora_" in name for name in names), "no weight of the base is in the adapter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_targets": "q_prj"},
            "--lora-targets q_prj: no layer has this name; .* q_proj, up_proj, v_proj",
        ),
        ({"lora_targets": "embed_tokens"}, "--lora-targets embed_tokens: is no linear layer"),
        ({"lora_targets": "self_attn"}, "--lora-targets self_attn: is no linear layer"),
    ],
)
def test_what_has_no_adapter(options: dict[str, Any], message: str, run: Run, tmp_path: Path):
    with pytest.raises(ConfigFault, match=message):
        run("run", **options)
    assert not (tmp_path / "run").exists()


def test_flags_that_would_be_ignored(model: str):
    for name, value in {
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "lora_targets": "q_proj",
        "quantize": "4bit",
    }.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} needs --lora"):
            TrainConfig(model=model, data="d", rule="1", **{name: value})
    assert TrainConfig(model=model, data="d", rule="1", lora=2, lora_targets="a, b").lora_targets == (
        "a",
        "b",
    )


def test_an_adapter_is_no_model_to_begin_from(run: Run, model: str, tmp_path: Path):
    first = run("first")
    with pytest.raises(
        ConfigFault, match=r"is an adapter, .* `priority merge --model .*first --output FOLDER`"
    ):
        run("second", model=str(first.output))
    merge(str(first.output), str(tmp_path / "merged"))
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids()).logits
        torch.testing.assert_close(whole, load_model(str(first.output))(ids()).logits, rtol=0, atol=1e-4)
    second = run("second", model=str(tmp_path / "merged"))
    assert second.step == 4
    for wrong in (str(tmp_path / "merged"), model):
        with pytest.raises(ConfigFault, match="is no adapter folder"):
            merge(wrong, str(tmp_path / "again"))
    with pytest.raises(ConfigFault, match="is not empty"):
        merge(str(first.output), str(tmp_path / "merged"))


def test_an_adapter_folder_is_measured_scored_and_bound(run: Run, model: str, sums: str, tmp_path: Path):
    outcome = run("run", eval_data=(sums,))
    assert outcome.evaluation is not None
    folder = str(outcome.output)
    settings: dict[str, Any] = {"data": sums, "device": "cpu", "quiet": True}
    figures = evaluate(
        EvalConfig(model=folder, base=model, samples=2, checker="exact", max_new_tokens=4, **settings)
    )
    assert figures["nll"] == pytest.approx(outcome.evaluation.nll, rel=1e-5)
    assert figures["kl"] > 0
    assert evaluate(EvalConfig(model=model, **settings))["nll"] != figures["nll"]
    for rule in ("p_on", "p_ref"):
        score(ScoreConfig(model=folder, rule=f"weight = {rule}", out=str(tmp_path / "s.parquet"), **settings,
                          cache=str(tmp_path / "c")))  # fmt: skip
    bound = run("bound", 'model teacher "another"; weight = p_teacher', lora=None, bind={"teacher": folder})
    assert lines(bound)[0]["weight_mean"] > 0
    prints = {folder_fingerprint(Path(f)) for f in (folder, model, str(run("other", seed=1).output))}
    assert len(prints) == 3


def test_an_adapter_whose_base_is_away(run: Run, sums: str, tmp_path: Path):
    outcome = run("run")
    settings = outcome.output / "adapter_config.json"
    said = json.loads(settings.read_text())
    for change, message in (
        (
            {"base_model_name_or_path": str(tmp_path / "gone")},
            "is an adapter of the model .*gone, which is not here",
        ),
        ({"base_model_name_or_path": None}, "a model that it does not name"),
        ({"peft_type": "PREFIX_TUNING"}, "is a PREFIX_TUNING adapter"),
    ):
        settings.write_text(json.dumps({**said, **change}))
        with pytest.raises(ModelFault, match=message):
            evaluate(EvalConfig(model=str(outcome.output), data=sums, quiet=True))
    settings.write_text(json.dumps(said))
    (outcome.output / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelFault, match="the adapter does not load"):
        load_model(str(outcome.output))


MEASURED = """
import json, resource, sys
from trainer.config import TrainConfig
from trainer.train import train
train(TrainConfig(**json.loads(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["asft", "prift_mass"])
def test_the_peak_of_memory_has_no_second_copy(
    rule: str, make_folder: Callable[..., str], sums: str, tmp_path: Path
):
    """A process each on a model of 0.4 GB: `ref` as the adapter switched off, and bound to its own folder."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = make_folder(tmp_path / "big", seed=0, initializer_range=0.02, **shape)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size

    def peak(name: str, **options: Any) -> float:
        settings = {
            "model": model, "data": [sums], "rule": rule, "output": str(tmp_path / name), "batch_size": 2,
            "max_steps": 2, "quiet": True, "device": "cpu", "lora": 4, "cache": f"{tmp_path}/{name} cache",
        }  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", MEASURED, json.dumps({**settings, **options})],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return float(ran.stdout.split()[-1])

    none, own, second = peak("none", rule="1"), peak("own"), peak("second", bind={"ref": model})
    print(
        f"{rule}: model {size:,} bytes; peak {none:,.0f} without ref, {own:,.0f} switched off, "
        f"{second:,.0f} bound"
    )
    assert own - none < 0.25 * size, "activations of the pass at the most"
    if rule == "asft":  # before training, the weights of the trained model are mapped and not yet read
        assert second - own > 0.8 * size
