"""Rules, configs, data, models and checkpoints are data: none runs code, nothing leads out of OUTPUT."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.chat import render_chat
from trainer.cli import main
from trainer.faults import DataFault

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("trainer", "priority_dsl") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture
def data(write: Callable[..., str]) -> str:
    return write("d.jsonl", [{"prompt": "what is 1 ?", "completion": " 1"}])


def words(model: str, data: str, output: Path, *more: str) -> list[str]:
    given = {"--model": model, "--data": data, "--rule": "dft", "--output": str(output), "--max-steps": "1"}
    return ["train", *(word for pair in given.items() for word in pair), "--device", "cpu", *more]


# No pickle, no code -----------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_code_is_called(path: Path):
    modules = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for name, call in calls(path):
        if name == "torch.load":
            assert option(call, "weights_only") == "True", f"line {call.lineno}"
        if name.endswith(".from_pretrained") and name.startswith("Auto"):
            assert option(call, "trust_remote_code") == "trust", f"line {call.lineno}"
        if name == "AutoModelForCausalLM.from_pretrained":
            assert option(call, "use_safetensors") == "True", f"line {call.lineno}"
        if name in ("np.load", "numpy.load"):
            assert option(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), f"line {call.lineno}"
        assert option(call, "trust_remote_code") in (None, "trust", "config.trust_remote_code")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A model folder with code of its own, which writes a file when it runs; the folder and the file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = Path(shutil.copytree(model, tmp_path / f"own{os.getpid()}")), tmp_path / "mark"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    return str(folder), mark


def test_code_of_a_model_runs_only_where_a_flag_allows_it(
    own_code: Any, data: str, tmp_path: Path, capsys: Any
):
    folder, mark = own_code
    for command in (
        words(folder, data, tmp_path / "out"),
        ["score", "--model", folder, "--data", data, "--rule", "dft", "--out", str(tmp_path / "w.parquet")],
        ["eval", "--model", folder, "--data", data, "--device", "cpu"],
        ["explain", "dft", "--model", folder, "--data", data],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "needs Python code that comes with it" in said, command[0]
        assert "--trust-remote-code" in said
        assert not mark.exists(), f"{command[0]} ran code of the model"
        assert not (tmp_path / "out").exists()
    assert main(words(folder, data, tmp_path / "out", "--trust-remote-code")) == 0
    assert mark.read_text() == "ran"


class Malice:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "ran")


def test_pickled_weights_are_refused_with_a_way_out(model: str, data: str, tmp_path: Path, capsys: Any):
    import torch

    folder, mark = Path(shutil.copytree(model, tmp_path / "pickled")), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Malice(mark)}, folder / "pytorch_model.bin")
    assert main(words(str(folder), data, tmp_path / "out")) == 1
    assert "its weights are pickled (pytorch_model.bin)" in capsys.readouterr().err
    assert main(words(model, data, tmp_path / "out", "--rule", "p(good)", "--bind", f"good={folder}")) in (
        1,
        2,
    )
    assert not mark.exists()


# Chat templates ---------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    "{{ self._TemplateReference__context.environment.loader.searchpath }}",
    "{% if %}",
    "{{ 'a'.format.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_runs_in_a_sandbox(template: str, model: str, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    with pytest.raises(DataFault, match=r"^d.jsonl:1: the chat template "):
        render_chat(TALK, tokenizer, "d.jsonl:1")


# What is written --------------------------------------------------------------------------------

WATCHED = """
import os, sys
written = set()
PATHS = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (0, 1),
         "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,), "os.chown": (0,)}
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        mode, flags = args[1], args[2]
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & writing:
            written.add(os.path.realpath(os.fsdecode(args[0])))
    elif event in PATHS:
        paths = [args[i] for i in PATHS[event] if not isinstance(args[i], int)]
        written.update(os.path.realpath(os.fsdecode(path)) for path in paths)
sys.addaudithook(watch)
from trainer.cli import main
code = main(sys.argv[2:])
found = "\\n".join(sorted(written))
with open(sys.argv[1], "w") as file:
    file.write(found)
sys.exit(code)
"""


def test_a_run_writes_only_into_its_output_and_the_cache(model: str, data: str, tmp_path: Path):
    """Seen by Python's audit hook: files that are opened for writing, changes of the tree of files."""
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    shutil.copy(data, tmp_path / "away.jsonl")
    more = ["--rule", "p(ref)", "--save-steps", "1", "--eval-data", "../away.jsonl", "--cache", "../cache"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "temporary" / "inductor"),
    }
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    command = words(model, "sub/../../away.jsonl", Path("../output"), *more)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path / "written.txt"), *command],
        cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in (tmp_path / "written.txt").read_text().splitlines()]
    allowed = [tmp_path / name for name in ("output", "cache", "temporary")]
    devices = [path for path in written if path.parts[1] in ("dev", "proc", "sys")]
    outside = {p for p in written if not any(a == p or a in p.parents for a in allowed)} - {*devices}
    assert outside == set()
    assert any(tmp_path / "output" / "checkpoints" in path.parents for path in written), "it was watched"
    assert any(tmp_path / "cache" in path.parents for path in written)
    assert sorted(p.name for p in here.rglob("*")) == ["sub"]


def test_a_link_in_the_output_leads_nowhere(model: str, data: str, tmp_path: Path, capsys: Any):
    output, away = tmp_path / "out", tmp_path / "away.txt"
    assert main(words(model, data, output, "--save-steps", "1")) == 0
    (output / "finished.json").unlink()
    (output / "log.jsonl").unlink()
    away.write_text("mine")
    (output / "log.jsonl").symlink_to(away)
    assert main(words(model, data, output, "--resume", "--save-steps", "1", "--max-steps", "2")) == 2
    assert "log.jsonl is a link that leads out of the folder" in capsys.readouterr().err
    assert main(words(model, data, output, "--overwrite")) == 0
    assert away.read_text() == "mine"
    assert not (output / "log.jsonl").is_symlink()


def test_a_tokenizer_cannot_name_a_file_outside(model: str, data: str, tmp_path: Path, capsys: Any):
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": "x"} for name in ("default", "../../../escaped")]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(words(str(folder), data, tmp_path / "a" / "b" / "out")) == 1
    assert "chat template named '../../../escaped'" in capsys.readouterr().err
    assert not [*tmp_path.rglob("escaped*")]
