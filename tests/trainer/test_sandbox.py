"""Solutions that would do damage, run for real: nothing of ours is touched and none is scored as right.

Each is run only where the layers that stop it stand, which is asserted first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkers import sandbox
from trainer.checkers.sandbox import ESSENTIAL, Limits, active_layers, missing, run_python
from trainer.checkers.table import CHECKERS, Bounds
from trainer.faults import ConfigFault

LAYERS = active_layers()
QUICK = Limits(1.0, 512 << 20)
TESTS = "assert f(1) == 2\n"

pytestmark = pytest.mark.skipif(
    bool(missing(LAYERS, root=os.geteuid() == 0)),
    reason=f"this machine has not the layers that untrusted code needs, only {LAYERS}",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files of ours; after the solutions it is as it was, and nothing runs."""
    folder = tmp_path / "home"
    (folder / "documents").mkdir(parents=True)
    (folder / "documents" / "thesis.txt").write_text("years of work")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    stat = (folder / "documents" / "thesis.txt").stat()
    yield folder
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*")] == [
        "documents",
        "documents/thesis.txt",
    ]
    now = (folder / "documents" / "thesis.txt").stat()
    assert (folder / "documents" / "thesis.txt").read_text() == "years of work"
    assert (now.st_mode, now.st_mtime, now.st_uid) == (stat.st_mode, stat.st_mtime, stat.st_uid)
    assert list((tmp_path / "scratch").iterdir()) == [], "the folder of a solution is removed"
    assert processes_of(tmp_path) == [], "no process of a solution is left"
    monkeypatch.setattr("tempfile.tempdir", None)


def processes_of(folder: Path) -> list[str]:
    """The command lines of processes that name a folder, as those of the sandbox do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and "trainer.checkers.sandbox" in line:
            found.append(line)
    return found


FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
HARMFUL = {
    "a fork bomb": FORK_BOMB,
    "a fork bomb of programs": (
        "import subprocess, sys\nwhile True:\n    subprocess.Popen([sys.executable, '-V'])"
    ),
    "threads without end": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True:\n    threading.Thread(target=time.sleep, args=(99,)).start()"
    ),
    "an endless loop": "while True: pass",
    "an endless sleep": "import time\ntime.sleep(1e9)",
    "a handler for every signal": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass"
    ),
    "deleting a file": "import os\nos.remove('{home}/documents/thesis.txt')",
    "deleting a home": "import shutil\nshutil.rmtree('{home}')",
    "deleting all, errors ignored": "import shutil\nshutil.rmtree('{home}', ignore_errors=True)",
    "overwriting a file": "open('{home}/documents/thesis.txt', 'w').write('gone')",
    "cutting a file": "import os\nos.truncate('{home}/documents/thesis.txt', 0)",
    "changing a mode": "import os\nos.chmod('{home}/documents/thesis.txt', 0)",
    "changing a time": "import os\nos.utime('{home}/documents/thesis.txt', (0, 0))",
    "leaving a file": "open('{home}/left.txt', 'w').write('here')",
    "renaming": "import os\nos.rename('{home}/documents', '{home}/d')",
    "linking": "import os\nos.symlink('/', '{home}/root')",
    "reading a file": "open('{home}/documents/thesis.txt').read()\ndef f(x): return 2",
    "a memory bomb": "x = [' ' * (1 << 20)]\nwhile True: x = x + x",
    "one large block": "x = bytearray(8 << 30)",
    "one large mapping": "import mmap\nx = mmap.mmap(-1, 8 << 30)",
    "a flood of output": "while True: print('x' * (1 << 20))",
    "a flood below Python": "import os\nwhile True: os.write(1, b'x' * (1 << 20))",
    "a flood of files": (
        "n = 0\nwhile True:\n"
        "    with open(str(n), 'wb') as file:\n        file.write(bytes(1 << 20))\n    n += 1"
    ),
    "a large file": "with open('x', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)",
    "killing the group": "import os\nos.kill(0, 9)",
    "killing everything": "import os\nos.kill(-1, 9)",
    "killing us": "import os\nos.kill({us}, 9)",
    "a child that stays": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(99)"
    ),
    "recursion": "def f(x): return f(x)",
    "recursion without a bound": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "other limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(8 << 30)"
    ),
    "limits of ours": "import resource\nresource.prlimit({us}, resource.RLIMIT_CPU, (1, 1))",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "a source too deep": "x = " + "(" * 100_000 + ")" * 100_000,
    "a zero byte": "x = 1\0",
}
CHEATING = {
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "sys.exit(0) when asked": "import sys\ndef f(x): sys.exit(0)",
    "os._exit(0) when asked": "import os\ndef f(x): os._exit(0)",
    "saying so": "print('passed')\nimport os\nos.write(1, b'[true, \"\", [], false]')\nos._exit(0)",
    "answers to all": (
        "import os\nfor fd in range(3, 64):\n"
        '    try: os.write(fd, b\'{"error": null, "secret": ""}\\n\' * 3)\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "answers one by one": (
        "import os, time\nfor i in range(2):\n    for fd in range(3, 64):\n"
        '        try: os.write(fd, b\'{"error": null, "secret": ""}\\n\')\n'
        "        except OSError: pass\n    time.sleep(0.2)\n"
        "time.sleep(0.2)\nos._exit(0)"
    ),
    "no exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(x): return 3",
    "another AssertionError": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return 3",
    "no exceptions": (
        "import builtins\nbuiltins.BaseException = builtins.Exception = KeyError\ndef f(x): return 3"
    ),
    "a caller that is gone": (
        "import sys\nsys.modules['__main__'] = None\nsys.modules['os'] = None\ndef f(x): return 3"
    ),
    "the sandbox itself": (
        "import sys\nfor name in list(sys.modules):\n    if 'trainer' in name or 'main' in name:\n"
        "        vars(sys.modules[name]).update(run_python=None, send=print, receive=print)\n"
        "def f(x): return 3"
    ),
    "other ends": (
        "import sys, atexit, os\natexit.register(os._exit, 0)\nsys.excepthook = lambda *a: os._exit(0)\n"
        "def f(x): return 3"
    ),
    "a trace that leaves out lines": (
        "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_filename == '<tests>':\n"
        "        frame.f_lineno = 2\n    return trace\nsys.settrace(trace)\ndef f(x): return 3"
    ),
    "an exception that does not print": (
        "class E(Exception):\n    def __str__(self): import os; os._exit(0)\ndef f(x): raise E"
    ),
    "nothing": "",
    "a syntax error": "def f(x) return 2",
}


@pytest.mark.parametrize("what", HARMFUL)
def test_harm_is_not_done_and_not_right(what: str, home: Path):
    assert {"limits", "seccomp"} <= set(LAYERS), "no bomb goes off without the layers that hold it"
    began = time.monotonic()
    solution = HARMFUL[what].replace("{home}", str(home)).replace("{us}", str(os.getpid()))
    if "def f" not in solution and "ignore_errors" not in solution:
        solution += "\ndef f(x): return 2\n"  # it would be right if it got that far
    outcome = run_python(solution, TESTS, QUICK)
    assert not outcome.passed
    assert outcome.reason
    assert not outcome.refused, "it was run"
    assert time.monotonic() - began < QUICK.seconds + 15


@pytest.mark.parametrize("what", CHEATING)
def test_success_is_not_faked(what: str, home: Path):
    assert not run_python(CHEATING[what], TESTS, QUICK).passed


def test_a_network_call_does_not_arrive(home: Path):
    arrived = []

    def listen() -> None:
        while True:
            try:
                arrived.append(server.accept())
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'secrets')\n"
        assert not run_python(call + "def f(x): return 2", TESTS, QUICK).passed
        quiet = (
            "try:\n    import urllib.request\n"
            f"    urllib.request.urlopen('http://127.0.0.1:{port}')\nexcept OSError: pass\n"
        )
        run_python(quiet + "def f(x): return 2", TESTS, QUICK)
        time.sleep(0.2)
        assert arrived == []
        socket.create_connection(("127.0.0.1", port), 1).close()  # it does listen
        deadline = time.monotonic() + 5
        while not arrived and time.monotonic() < deadline:
            time.sleep(0.01)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert len(arrived) == 1


HARMLESS = {
    "a function": "def f(x): return x + 1",
    "files of its own": "open('x', 'w').write('2')\ndef f(x): return int(open('x').read())",
    "the library": (
        "import collections, heapq, itertools, math, random, re, statistics\ndef f(x): return x + 1"
    ),
    "classes": (
        "from dataclasses import dataclass\nfrom typing import NamedTuple\n"
        "@dataclass\nclass A:\n    x: 'int'\n"
        "class B(NamedTuple):\n    x: int\ndef f(x): return A(x).x + B(1).x"
    ),
    "output": "import sys\ndef f(x):\n    print('working', file=sys.stderr)\n    print(x)\n    return x + 1",
    "a temporary folder": (
        "import tempfile, os\ndef f(x):\n    with tempfile.TemporaryDirectory() as d:\n"
        "        open(os.path.join(d, 'y'), 'w').close()\n        return x + len(os.listdir(d))"
    ),
    "a main block": "def f(x): return x + 1\nif __name__ == '__main__':\n    raise SystemExit(1)",
    "asyncio": "import asyncio\nasync def g(x): return x + 1\ndef f(x): return asyncio.run(g(x))",
    "numpy": "import numpy\ndef f(x): return int(numpy.arange(9) @ numpy.ones(9)) - 34",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_does_no_harm_runs(what: str, home: Path):
    assert run_python(HARMLESS[what], TESTS, Limits(20)) == (True, "", LAYERS, False)


def test_nothing_of_the_surroundings_is_seen(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    solution = "import os\ndef f(x): return 2 if 'SECRET_TOKEN' not in os.environ and os.getpid() < 9 else 0"
    assert run_python(solution, TESTS, QUICK).passed == ("namespaces" in LAYERS)
    solution = "import os\nassert not [v for v in os.environ.values() if 'hunter2' in v]\ndef f(x): return 2"
    assert run_python(solution, TESTS, QUICK).passed


ALONE = """
import os, sys
sys.path.insert(0, {root!r})
from trainer.checkers import confinement as c
folder = {folder!r}
layer = {layer!r}
if layer == "namespaces":
    c.make_namespaces()
    if os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    if {mounts!r}:
        c.make_read_only(folder)
else:
    stood = c.attempt([l for l in c.confinements(folder, [], 2, 1 << 30, False) if l[0] == layer])
    assert stood == [layer], stood
try:
    exec({code!r})
except OSError as error:
    print("stopped", error)
"""
EACH = [
    ("landlock", False, "open({file!r}, 'a')"),
    ("landlock", False, "os.remove({file!r})"),
    ("landlock", False, "open({file!r})"),
    ("seccomp", False, "os.fork()"),
    ("seccomp", False, "import socket; socket.socket()"),
    ("seccomp", False, "os.kill(os.getppid(), 0)"),
    ("seccomp", False, "os.chmod({file!r}, 0o777)"),
    ("seccomp", False, "os.execv('/bin/true', ['true'])"),
    ("namespaces", False, "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
    ("namespaces", False, "os.kill({us}, 0)"),
    ("namespaces", True, "open({file!r}, 'a')"),
    ("namespaces", True, "os.remove({file!r})"),
]


@pytest.mark.parametrize(
    ("layer", "mounts", "code"), EACH, ids=[f"{layer}: {code}" for layer, _, code in EACH]
)
def test_each_layer_holds_alone(layer: str, mounts: bool, code: str, tmp_path: Path):
    needed = "read-only mounts" if mounts else layer
    if needed not in LAYERS:
        pytest.skip(f"this machine has no {needed}")
    file = tmp_path / "ours"
    file.write_text("x")
    (tmp_path / "folder").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = code.format(file=str(file), port=server.getsockname()[1], us=os.getpid())
        settings: dict[str, Any] = {"layer": layer, "mounts": mounts, "code": code}
        program = ALONE.format(
            root=str(Path(sandbox.__file__).parents[1]), folder=str(tmp_path / "folder"), **settings
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("stopped"), done.stdout + done.stderr
    assert file.read_text() == "x"


@pytest.mark.parametrize("what", ESSENTIAL)
def test_without_an_essential_layer_nothing_is_run(what: str, monkeypatch: pytest.MonkeyPatch):
    left = tuple(
        name for name in ("limits", "namespaces", "landlock", "seccomp") if name not in ESSENTIAL[what]
    )
    assert what in missing(left, root=False)
    monkeypatch.setattr("trainer.checkers.table.active_layers", lambda: left)
    prepare: Callable[[Bounds], str] | None = CHECKERS["python"].prepare
    assert prepare is not None
    with pytest.raises(ConfigFault, match=f"{what}.*--unsafe-checker"):
        prepare(Bounds())
    assert "NOT KEPT FROM" in prepare(Bounds(unsafe=True))
    # The same again where it runs: the solution is not even sent.
    orders, answers = os.pipe(), os.pipe()
    os.write(answers[1], b'{"layers": []}\n')
    plan = {"limits": [2, 0], "unsafe": False, "root": False}
    job = {"solution": "", "tests": "", "secret": ""}
    passed, reason, refused = sandbox._judge(plan, list(left), job, orders[1], answers[0])
    assert (passed, refused) == (False, True)
    assert what in reason
    os.set_blocking(orders[0], False)
    with pytest.raises(BlockingIOError):
        os.read(orders[0], 1)
    for end in (*orders, *answers):
        os.close(end)


def test_root_may_write_to_devices_behind_read_only_mounts():
    layers = ("limits", "namespaces", "read-only mounts", "seccomp")
    assert missing(layers, root=True) == ["files"]
    assert missing(layers, root=False) == []
