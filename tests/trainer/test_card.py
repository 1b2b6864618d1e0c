"""The model card and what is uploaded: complete, the same each time, without the places of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from trainer.cli import main
from trainer.config import TrainConfig
from trainer.records.card import bibtex, card, public
from trainer.records.hub import uploads
from trainer.train import train

RULE = 'param t = 0.5 in [0, 1]\nweight = rule("prift_mass", tau=t) * rule("dft")'


@pytest.fixture
def finished(model: str, sums: str, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a finished run on the sums; everything lies in a folder with a telling name."""
    home = tmp_path / "private-home"
    shutil.copytree(model, home / "MODEL", dirs_exist_ok=True)
    shutil.copy(sums, home / "sums.jsonl")

    def go(name: str = "RUN", **options: Any) -> Path:
        given = {
            "rule": RULE,
            "set": {"t": 0.25},
            "max_steps": 2,
            "save_steps": 1,
            "device": "cpu",
            "quiet": True,
        }
        named = {"model": "MODEL", "data": "sums.jsonl", "eval_data": "sums.jsonl", "cache": "cache"}
        places = {field: str(home / file) for field, file in {**named, "output": name}.items()}
        return train(TrainConfig(**{**given, **places, **options})).output

    return go


def test_the_card_says_what_the_model_is(finished: Callable[..., Path]) -> None:
    folder = finished()
    text = (folder / "README.md").read_text()
    assert text == card(folder), "it is made from the folder, the same each time"
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.library_name == "transformers"
    assert set(loaded.data.tags or []) >= {"priority_dsl", "token-priority", "soft-reweighting"}
    assert loaded.data.base_model is None, "a local folder is no link"
    assert (folder / "rule.rule").read_text().strip() in text
    for inner in ("dft", "prift_mass"):
        assert (folder / "rules" / f"{inner}.rule").read_text().strip() in text
    assert "soft reweighting (intrinsic)" in text
    assert "weights in [0, 1]" in text
    assert "before     one pass of ref keeps mass(ref)" in text, "the plan"
    assert "| `t` | 0.25 | [0, 1] |" in text
    assert "- PriFT, arXiv:2606.09396, Eq. (3)" in text
    assert "eprint = {2606.09396}" in text
    assert "| learning_rate | 2e-05 |" in text
    assert "Training data: 24 rows" in text
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert f"| training nll, first and last step | {lines[0]['nll']:.4f}, {lines[1]['nll']:.4f} |" in text
    assert f"| held-out nll | {lines[-1]['eval_nll']:.4f} |" in text
    assert "priority train --from RUN" in text


def test_two_runs_of_the_same_have_the_same_card(finished: Callable[..., Path]) -> None:
    one, other = finished("a/RUN"), finished("b/RUN")
    assert (one / "README.md").read_bytes() == (other / "README.md").read_bytes()


def test_no_place_of_this_machine_is_in_it(finished: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "private-home" / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    folder = finished(chat_template=str(template), bind={}, push_to_hub=None)
    assert "private-home" in (folder / "config.yaml").read_text(), "the test can see one"
    assert "private-home" not in (folder / "README.md").read_text()
    for name, content in uploads(folder).items():
        data = content.read_bytes() if isinstance(content, Path) else content
        assert b"private-home" not in data, name


def test_what_is_uploaded(finished: Callable[..., Path]) -> None:
    folder = finished()
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "README.md").write_text("none")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(folder.parent / "MODEL")}))
    found = uploads(folder)
    assert set(found) == {
        "README.md", "chat_template.jinja", "config.json", "config.yaml", "generation_config.json",
        "log.jsonl", "manifest.json", "model.safetensors", "rule.rule", "rules/dft.rule",
        "rules/prift_mass.rule", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert isinstance(found["config.json"], bytes)
    assert json.loads(found["config.json"]) == {**config, "_name_or_path": "MODEL"}
    assert isinstance(found["config.yaml"], bytes)
    settings = yaml.safe_load(found["config.yaml"])
    assert settings["model"] == "MODEL"
    assert settings["data"] == ["sums.jsonl"]
    assert not {"output", "cache"} & settings.keys()
    assert isinstance(found["manifest.json"], bytes)
    known = json.loads(found["manifest.json"])
    assert not {"command", "directory", "commit"} & known.keys()
    assert known["models"]["model"]["source"] == "MODEL"


class StandIn:
    """What records, in place of the hub, how it is called."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    failure: Exception | None = None

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", {"repo": repo, **options}))

    def create_commit(self, repo: str, operations: Any, **options: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        self.calls.append(
            ("commit", {"repo": repo, "files": [o.path_in_repo for o in operations], **options})
        )
        return type("Done", (), {"commit_url": f"hub/{repo}/commit/1"})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setattr(StandIn, "failure", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return StandIn


def test_push_at_the_end_of_a_run(hub: type[StandIn], finished: Callable[..., Path]) -> None:
    folder = finished(push_to_hub="me/tuned", hub_private=True)
    (made, first), (committed, second) = hub.calls
    assert (made, committed) == ("create", "commit")
    assert first == {"repo": "me/tuned", "private": True, "repo_type": "model", "exist_ok": True}
    assert second["files"] == sorted(uploads(folder))
    again = finished(push_to_hub="me/tuned", resume=True)
    assert (again, len(hub.calls)) == (folder, 4), "a finished run is pushed, not trained, by --resume"


def test_push_of_a_finished_run(
    hub: type[StandIn], finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    assert main(["push", str(folder), "me/tuned"]) == 0
    assert capsys.readouterr().out == "hub/me/tuned/commit/1\n"
    assert hub.calls[0][1]["private"] is False
    assert main(["push", str(folder), "me/tuned", "--list"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert len(hub.calls) == 2
    assert main(["push", str(folder / "checkpoints"), "me/tuned"]) == 2
    assert "is not the folder of a finished run" in capsys.readouterr().err
    assert main(["push", str(folder), "tuned"]) == 2
    assert "tuned: must be OWNER/NAME" in capsys.readouterr().err


def test_a_push_that_fails_leaves_the_model(
    hub: type[StandIn], finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainer.faults import RunFault

    monkeypatch.setattr(hub, "failure", ConnectionError("no route"))
    with pytest.raises(
        RunFault, match=r"ConnectionError: no route; the model in .* is whole: `priority push "
    ):
        finished(push_to_hub="me/tuned")
    folder = tmp_path / "private-home" / "RUN"
    assert (folder / "finished.json").exists()
    assert (folder / "model.safetensors").exists()


def test_nobody_is_logged_in(
    hub: type[StandIn], finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainer.faults import ConfigFault

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigFault, match="nobody is logged in; `hf auth login`"):
        finished(push_to_hub="me/tuned")
    assert not (tmp_path / "private-home" / "RUN").exists(), "told before the run"


def test_metadata_of_what_is_on_the_hub(finished: Callable[..., Path]) -> None:
    folder = finished(rule="dft", set={})
    known = json.loads((folder / "manifest.json").read_text())
    known["models"]["model"] = {"source": "org/base", "name": "org/base", "local": False, "digest": None}
    known["data"] = [
        {"source": "org/rows:main@train", "name": "org/rows:main@train", "local": False, "digest": None}
    ]
    (folder / "manifest.json").write_text(json.dumps(known))
    (folder / "README.md").write_text(card(folder))
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.base_model == "org/base"
    assert loaded.data.datasets == ["org/rows"]
    assert "rule:dft" in (loaded.data.tags or [])
    assert loaded.data.license is None, "not known"


def test_the_licence_is_that_of_the_bases_card(finished: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "private-home" / "MODEL" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    assert ModelCard.load(finished() / "README.md").data.license == "apache-2.0"


def test_a_rule_with_backticks_and_bars_does_not_break_the_card(finished: Callable[..., Path]) -> None:
    folder = finished(rule='"""Says ``` and | and {{ 1 }}."""\nweight = 1', set={})
    text = (folder / "README.md").read_text()
    assert '````\n"""Says ``` and | and {{ 1 }}."""' in text
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"


def test_citations_as_bibtex() -> None:
    cites = [
        "PriFT, arXiv:2606.09396, Eq. (3)",
        "own idea",
        "PriFT, arXiv:2606.09396, Table 2",
        "arXiv:2401.00001",
    ]
    one, other = bibtex(cites)
    assert one == (
        "@misc{prift260609396,\n  title = {PriFT},\n  eprint = {2606.09396},\n  archivePrefix = {arXiv},\n"
        "  note = {Eq. (3)}\n}"
    )
    assert "title = {2401.00001}" in other


def test_a_public_name_is_the_last_part_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train.jsonl").touch()
    assert public("org/name") == "org/name"
    assert public("data/train.jsonl") == "train.jsonl"
    assert public(str(tmp_path / "gone")) == "gone"
    assert public("./x") == "x"
    assert public("p_on ** (1/tau)") == "p_on ** (1/tau)"
