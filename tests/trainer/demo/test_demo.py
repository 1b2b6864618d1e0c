from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

from priority_dsl import PriorityError
from trainer.demo import BASE, make_base
from trainer.demo.countdown import RESPONSE_TOKENS, held_out_problems, make_tokenizer
from trainer.demo.report import NOISE, draw_picture, what_to_see, write_results
from trainer.demo.run import METHODS, Size, demo
from trainer.demo.scores import SAMPLES, Scores, measure
from trainer.faults import ConfigFault
from trainer.models import load_model, load_tokenizer

TINY = Size(demonstrations=128, epochs=1, problems=4)
FIGURES = {"avg", "pass_at_4", "pass_at_16", "pass_at_32", "entropy", "kl"}


def scores(avg: float, at_16: float, entropy: float = 0.2, kl: float = 0.1) -> Scores:
    return Scores((avg, *[at_16] * (SAMPLES - 1)), entropy, kl)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Scores]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, seed=1, rules=["0 if quality == wrong"], methods=("sft",), size=TINY)


def test_the_base_model_is_where_the_demonstration_needs_it() -> None:
    model, tokenizer = load_model(str(BASE)).eval(), load_tokenizer(str(BASE))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert 550_000 < model.num_parameters() < 650_000
    found = measure(model, model, tokenizer, held_out_problems(32, seed=0), seed=0)
    assert 20 <= found.avg <= 40
    assert found.pass_at(32) >= 90
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert 0.15 < found.entropy < 0.5


def test_the_demonstration_writes_what_it_found(finished: tuple[Path, dict[str, Scores]]) -> None:
    folder, found = finished
    written = json.loads((folder / "demo_results.json").read_text())
    assert list(written) == list(found) == ["base", "sft", "0 if quality == wrong"]
    for figures in written.values():
        assert set(figures) == FIGURES
        assert 0 <= figures["avg"] <= figures["pass_at_4"] <= figures["pass_at_16"] <= 100
    assert written["base"]["kl"] == pytest.approx(0, abs=1e-6)
    assert written["sft"]["kl"] > 0, "it was trained"
    assert (folder / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "demonstrations.jsonl").read_text().splitlines()) == TINY.demonstrations


def test_training_is_that_of_priority_train(finished: tuple[Path, dict[str, Scores]]) -> None:
    folder, _ = finished
    log = [json.loads(line) for line in (folder / "rule_1" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2  # 128 rows, 64 a step
    assert all(0.5 < line["weight_nonzero"] < 0.7 for line in log), "the wrong rows have no weight"
    assert all(line["supervised_tokens"] == 64 * RESPONSE_TOKENS for line in log)
    assert all(line["nll"] < 1.5 for line in log), "words run together would be unknown and cost far more"
    assert "quality" in (folder / "rule_1" / "rule.rule").read_text()


def test_a_second_demonstration_replaces_the_first(finished: tuple[Path, dict[str, Scores]]) -> None:
    folder, found = finished
    again = demo(folder, seed=1, methods=("sft",), size=TINY)
    assert again["sft"] == found["sft"], "the same seed gives the same scores"
    assert set(json.loads((folder / "demo_results.json").read_text())) == {"base", "sft"}


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        ("max(p_onn, 0.1)", PriorityError, "p_onn"),
        ('model other "one more"; p_other', ConfigFault, "`other`"),
    ],
)
def test_a_mistake_in_a_rule_is_said_before_anything_is_written(
    tmp_path: Path, rule: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        demo(tmp_path / "run", rules=["sft", rule], size=TINY)
    assert not (tmp_path / "run").exists()


def test_bad_seeds_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigFault, match="--seed -1"):
        demo(tmp_path / "run", seed=-1, size=TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigFault, match="--output"):
        demo(tmp_path / "file", size=TINY)


def test_without_matplotlib_the_results_are_written_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = builtins.__import__

    def without(name: str, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    demo(tmp_path, methods=(), size=TINY)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "demo_results.json").exists()
    assert not (tmp_path / "pass_at_k.png").exists()


def test_the_two_sentences_follow_the_numbers() -> None:
    base = scores(27, 94, kl=0)
    shows = {
        "base": base,
        "sft": scores(23, 85, kl=0.9),
        "dft": scores(40, 56, entropy=0.05),
        "prift_prob": scores(41, 90),
        "prift_mass": scores(44, 82),
    }
    against_dft, against_sft = what_to_see(shows)
    assert "56 %" in against_dft
    assert "82 %" in against_dft
    assert "keeps the alternatives" in against_dft
    assert "23 %" in against_sft
    assert "copies the wrong sums" in against_sft

    level = scores(23 + NOISE, 56 + NOISE)
    against_dft, against_sft = what_to_see({**shows, "prift_mass": level})
    assert "does not keep clearly more" in against_dft
    assert "not clearly more often right" in against_sft
    assert what_to_see({"base": base, "sft": scores(23, 85)}) == []


def test_names_of_rules_reach_the_picture_and_the_file_as_they_are(tmp_path: Path) -> None:
    found = {"base": scores(27, 94), 'p_on # $x_1$ [bold] "Φ"': scores(20, 80)}
    draw_picture(found, tmp_path / "picture.png")
    write_results(found, tmp_path / "results.json")
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(found)


def test_the_script_makes_a_base_model_that_its_seed_decides(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            make_base.make_base(tmp_path / name, seed=seed, steps=4)
    finally:
        torch.set_num_threads(threads)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_prift_beats_dft_on_pass_at_16_and_sft_on_avg(tmp_path: Path) -> None:
    found = demo(tmp_path, seed=0)
    assert set(METHODS) < set(found)
    for method in ("prift_prob", "prift_mass"):
        assert found[method].pass_at(16) - found["dft"].pass_at(16) >= 15
        assert found[method].avg - found["sft"].avg >= 10
