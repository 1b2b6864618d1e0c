"""`--compile`: the body through torch.compile, head and rule outside; the numbers stay what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.train
from trainer.config import TrainConfig
from trainer.faults import ConfigFault
from trainer.models import compile_body
from trainer.train import Outcome, train

Run = Callable[..., Outcome]
CASES: dict[str, dict[str, Any]] = {
    "stored": {"rule": "weight = mass(ref)"},
    "online reference": {"rule": "loss = nll_on + kl(ref, on)"},
    "adapter, whose base is the compiled model too": {"rule": "loss = nll_on + kl(ref, on)", "lora": 4},
    "average": {"rule": "model slow = ema(0.5); weight = p(slow) ** 0.1"},
    "dense": {"rule": "weight = p_on ** 0.1", "loss": "dense"},
    "checkpointed activations": {"rule": "weight = H_on", "checkpoint_activations": True},
    "views": {"rule": "(p_on * p(unprompted(on))) ** 0.1 * attention(on, prompt)"},
}


@pytest.fixture
def run(model: str, sums: str, tmp_path: Path) -> Run:
    def go(name: str, **options: Any) -> Outcome:
        torch.compiler.reset()
        settings = {"max_steps": 4, "learning_rate": 1e-3, "quiet": True, "device": "cpu", "batch_size": 5}
        paths = {"model": model, "data": sums, "output": str(tmp_path / name), "cache": str(tmp_path / "c")}
        return train(TrainConfig(**{**paths, **settings, "save_steps": 2, **options}))

    return go


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (outcome.output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    (file,) = outcome.output.glob("*.safetensors")
    return load_file(file)


def assert_same(run: Run, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The compiled run gives the numbers of the plain one; how many graphs it was compiled into."""
    made: list[Any] = []
    prepare = trainer.train.prepare
    monkeypatch.setattr(
        trainer.train, "prepare", lambda *of, **more: made.append(prepare(*of, **more)) or made[-1]
    )
    plain = run("plain", **options)
    torch._dynamo.reset()  # what other tests compiled
    torch._dynamo.utils.counters.clear()
    compiled = run("compiled", compile=True, compile_backend=backend, **options)
    assert [m.policy.base_model._compiled_call_impl is not None for m in made] == [False, True]
    for one, other in zip(lines(compiled), lines(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    expected = weights(plain)
    assert weights(compiled).keys() == expected.keys(), "no name of the compiler's"
    for name, value in weights(compiled).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_numbers_are_those_of_the_plain_run(
    run: Run, make_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = make_folder(tmp_path / "small", seed=0, num_hidden_layers=1)
    options = {"model": small, "rule": "weight = p_on ** 0.1", "save_steps": None}
    graphs = assert_same(run, options, "aot_eager", monkeypatch)
    assert 1 <= graphs <= 6, "sizes are left open: rows of other lengths need no new graph"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_plain_run_for_all(
    case: str, backend: str, run: Run, monkeypatch: pytest.MonkeyPatch
):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    assert_same(run, CASES[case], backend, monkeypatch)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_without_compiling(run: Run):
    first = run("run", rule="weight = mass(ref)", compile=True, compile_backend="aot_eager", max_steps=2)
    again = run("run", rule="weight = mass(ref)", resume=True)
    assert (first.step, again.step) == (2, 4)


def test_a_machine_that_cannot_compile_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigFault, match=r"the backend no_such_one does not run here .*leave --compile out"):
        run("run", rule="1", compile=True, compile_backend="no_such_one")

    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    with pytest.raises(ConfigFault, match=r"No working C\+\+ compiler found\).*--compile-backend aot_eager"):
        compile_body(torch.nn.Linear(1, 1), no_compiler, torch.device("cpu"))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_backend_alone_is_refused():
    with pytest.raises(ValueError, match="--compile-backend needs --compile"):
        TrainConfig(model="M", data="d", rule="1", compile_backend="aot_eager")
