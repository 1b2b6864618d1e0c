"""The oldest versions that pyproject.toml allows give the same numbers, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Also in the ranges, but TRL 1.16 asks for more.
RAISED = {"accelerate": "1.10.1", "datasets": "4.7.0"}
OLDEST = ("accelerate", "datasets", "peft", "transformers", "trl")


def oldest() -> list[str]:
    """The lowest version of each library whose insides the integrations touch, and the other requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["trl"], *extras["peft"], *extras["testing"]]
    low = {line.split(">=")[0]: line.split(">=")[1].split(",")[0] for line in lines}
    low = {name: RAISED.get(name, version) for name, version in low.items()}
    pinned = [f"{name}=={low[name]}" for name in OLDEST]
    others = [line for line in lines if line.split(">=")[0] not in (*OLDEST, "tokenizers", "torch")]
    return [*pinned, *others, "pytest", "pytest-timeout"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_oldest_versions(tmp_path: Path) -> None:
    """Needs a package index or a folder of packages, as pip is set up here."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    done = subprocess.run([*install, torch, *oldest()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tests = [str(Path(__file__).parent), "--ignore", __file__, "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [str(python), "-m", "pytest", *tests],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    asked = [str(python), "-c", "import transformers; print(transformers.__version__)"]
    shown = subprocess.run(asked, capture_output=True, text=True).stdout
    assert shown.strip() == "5.0.0", "the tests ran on another version than the oldest"
