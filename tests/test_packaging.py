"""What the repository promises as a package: one version, its data, light imports, no private places."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import priority_dsl

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("accelerate", "datasets", "torch", "transformers")
TRAINING = {"accelerate", "datasets", "trainer", "transformers"}
PROBE = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"

# Spelled in pieces, so that this file does not name what it forbids.
PRIVATE = re.compile(
    "|".join(
        [
            *(re.escape(f"/{folder}/") for folder in ("work", "farm", "root", "home", "tmp")),
            re.escape("/opt/" + "wheels"),
            re.escape("/opt/" + "pypi"),
            "file" + "://",
            "pypi" + r"\.org",
            "python" + "hosted",
            "download" + r"\.pytorch\.org",
        ]
    )
)


def heavy_imports(code: str) -> list[str]:
    """Which of HEAVY are loaded after `code` ran in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{PROBE}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported_names(source: str) -> Iterator[str]:
    """The top-level package of every absolute import in `source`, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("priority_dsl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("a bare checkout: priority_dsl is not installed")
    assert installed == priority_dsl.__version__, "the metadata is old: `make clean install`"


@pytest.mark.parametrize("package", ["priority_dsl", "trainer"])
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_grammar_and_rules_are_found():
    assert (ROOT / "grammar" / "priority.lark").is_file()
    assert "prift_mass" in priority_dsl.list_rules()
    assert priority_dsl.parse("mass(ref) >= 0.5")


@pytest.mark.parametrize(
    "code",
    [
        "import priority_dsl",
        "import priority_dsl; priority_dsl.check('mass(ref) >= 0.5')",
        "import priority_dsl; priority_dsl.format_rule(priority_dsl.parse('mass(ref)>=.5'))",
    ],
)
def test_language_loads_nothing_heavy(code):
    assert heavy_imports(code) == []


@pytest.mark.parametrize("name", ["torch", "accelerate"])
def test_probe_notices_a_heavy_import(name):
    assert name in heavy_imports(f"import priority_dsl, {name}")


def test_language_never_imports_the_training_side():
    for path in (ROOT / "priority_dsl").rglob("*.py"):
        forbidden = {"trainer"} if "integrations" in path.parts else TRAINING
        found = forbidden.intersection(imported_names(path.read_text(encoding="utf-8")))
        assert not found, f"{path.relative_to(ROOT)} imports {', '.join(sorted(found))}"


def distributions(requirements: list[str]) -> set[str]:
    """The normalised names of requirement lines such as `torch>=2.11,<3` and `torch==2.13.0`."""
    names = (re.match(r"[\w.-]+", line) for line in requirements if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name}


def declared() -> tuple[set[str], set[str]]:
    """What pyproject.toml requires: for what ships (two extras with it), and in all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    always = distributions(project["dependencies"] + extras["testing"] + extras["figures"])
    optional = distributions([line for lines in extras.values() for line in lines])
    return always, (always | optional) - {"priority-dsl"}


OPTIONAL = {  # imported only where asked for, with a message where it is missing
    "kernels.py": {"triton"},  # torch's builds for a GPU bring it
    "adapters.py": {"peft"},
    "maths.py": {"math_verify"},
    "vllm_engine.py": {"vllm"},
}


def test_what_is_imported_is_declared():
    provided_by = importlib.metadata.packages_distributions()
    always, _ = declared()
    for path in [*(ROOT / "priority_dsl").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]:
        if "integrations" in path.parts:  # they adapt to libraries that the user brings
            continue
        outside = set(imported_names(path.read_text(encoding="utf-8"))) - {"priority_dsl", "trainer"}
        outside -= OPTIONAL.get(path.name, set())
        for name in outside - sys.stdlib_module_names:
            owners = distributions(provided_by.get(name, [name]))
            assert owners & always, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml lacks"


def test_what_is_declared_is_pinned():
    pinned = distributions((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    _, all_declared = declared()
    assert not all_declared - pinned, "declared in pyproject.toml, without a version in constraints.txt"


def test_import_walk_sees_nested_imports():
    nested = "def f():\n    if True:\n        from datasets.arrow import x\n    import trainer.cli as c\n"
    assert set(imported_names(nested)) == {"datasets", "trainer"}


def committed_files() -> list[Path]:
    """What git tracks; skips where there is no git checkout (an unpacked sdist)."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_committed_file_names_a_private_place():
    named = []
    for path in committed_files():
        if not path.is_file():  # a link to a folder, or removed but not yet committed
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1
        ):
            if found := PRIVATE.search(line):
                named.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert not named, "\n".join(named)


@pytest.mark.parametrize(
    "line", ["cd /" + "work/main", "--find-links /opt" + "/wheels", "https://py" + "pi.org/simple"]
)
def test_private_places_are_recognised(line):
    assert PRIVATE.search(line)
