"""Python that nobody has read, run in a subprocess that can do no harm: what a model wrote, and its tests.

Layers, each tried on its own and named in the result: `limits` (CPU time, memory, file size, open files),
`namespaces` (user, processes, network, IPC: other processes are out of sight, there is no network, and all
ends with the first process), `read-only mounts` (and a small tmpfs as the only place to write), `landlock`
(reads only Python and system libraries, writes only there), `seccomp` (no new process or program, socket,
signal to others, change of modes or owners, mount, or other way out). Always: a session of its own, a wall
clock, an empty environment, no privileges, a temporary folder as home. Where `ESSENTIAL` is not covered,
nothing is run unless `unsafe` says so.

It protects files, processes and network of the user from code that is careless, broken or written to do
damage. It does not protect from a hole in the kernel, nor hide the folders that Python and the system are
installed in. Only a secret that comes after the solution was defined proves that tests ended: no output, exit
or early end fakes that. But tests run in the interpreter of the solution, as in every such harness: one
written against them (whose results equal everything, or that speaks this module's protocol) can cheat them.
As root, where the limit of processes does not hold, threads are refused too.
Linux on x86_64 or aarch64; elsewhere only `limits` and the wall clock are there.

The subprocess imports this module and `confinement` too, so they import the standard library alone. There, L
launches, P1 is the first process in the namespaces that L makes (both are trusted), and P2 runs the solution:
P1 gives it the solution, then tests and secret, and all ends with P1.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkers.confinement import (
    attempt,
    confinements,
    end_with_parent,
    make_namespaces,
    make_read_only,
)

ESSENTIAL: dict[str, tuple[str, ...]] = {
    "time and memory": ("limits",),
    "other processes": ("seccomp",),
    "network": ("seccomp", "namespaces"),
    "files": ("landlock", "read-only mounts"),
}
"""What untrusted code is kept from, and the layers any of which does."""
ANSWER = 1 << 16  # bytes of the longest message from the solution
GRACE = 20.0  # seconds for the subprocess to start and end, on a busy machine
START = (
    "import sys; sys.path.insert(0, sys.argv[2]); from trainer.checkers.sandbox import launch; "
    "del sys.path[0]; launch(sys.argv[1])"
)


class Limits(NamedTuple):
    """What a solution may use: seconds of wall clock (and of CPU), bytes of memory."""

    seconds: float = 10.0
    memory: int = 1 << 30


class Outcome(NamedTuple):
    """Whether tests passed; if not, why, in a few words (they may quote the solution); the active layers."""

    passed: bool
    reason: str
    layers: tuple[str, ...]
    refused: bool = False


def run_python(solution: str, tests: str, limits: Limits | None = None, unsafe: bool = False) -> Outcome:
    """Run a solution, then its tests in the same module, and say whether the tests ran to their end.

    `refused` where essential layers are missing and `unsafe` is not given: then nothing was run.
    """
    import subprocess
    import tempfile

    limits = limits or Limits()
    site = [path for path in sys.path if path.endswith("-packages")]
    with tempfile.TemporaryDirectory(prefix="priority-", ignore_cleanup_errors=True) as folder:
        folder = os.path.realpath(folder)
        plan = {"folder": folder, "limits": limits, "unsafe": unsafe, "packages": site}
        plan["root"] = os.geteuid() == 0
        plan["read"] = [sys.prefix, sys.base_prefix, *site]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START, json.dumps(plan), str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
            | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            start_new_session=True,
        )
        job = {"solution": solution, "tests": tests, "secret": os.urandom(16).hex()}
        try:
            said, mistakes = child.communicate(json.dumps(job).encode(), timeout=limits.seconds + GRACE)
        except BaseException as stopped:  # Ctrl-C too: L and P1 are in the group, P2 ends with P1
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            said, mistakes = b"", b"it did not answer"
    if not said:
        return Outcome(False, f"the sandbox failed: {mistakes.decode(errors='replace')[-300:]}", (), True)
    passed, reason, layers, refused = json.loads(said)
    return Outcome(passed, reason, tuple(layers), refused)


def active_layers() -> tuple[str, ...]:
    """The layers that this machine offers."""
    return run_python("", "").layers


def missing(layers: Sequence[str], root: bool) -> list[str]:
    """What of `ESSENTIAL` none of the layers covers; mounts do not keep `root` from writing to devices."""
    there = {name for name in layers if not (root and name == "read-only mounts")}
    return [what for what, any_of in ESSENTIAL.items() if not there & set(any_of)]


# L and P1, which are trusted ----------------------------------------------------------------------


def launch(words: str) -> None:
    """What L does: namespaces, P1 in them, and the end together with it."""
    plan = json.loads(words)
    layers = attempt([("namespaces", make_namespaces)])
    if layers:
        layers += attempt([("read-only mounts", lambda: make_read_only(plan["folder"]))])
    first = os.fork()
    if not first:
        end_with_parent()
        _supervise(plan, layers)
    os.waitpid(first, 0)


def _supervise(plan: dict[str, Any], layers: list[str]) -> None:
    """What P1 does: P2, its layers, the solution, the tests; the verdict goes to standard output."""
    orders, answers = os.pipe(), os.pipe()
    solver = os.fork()  # before anything of the job is read, so that P2's memory has nothing of it
    if not solver:
        end_with_parent()
        os.close(orders[1])
        os.close(answers[0])
        _solve(plan, orders[0], answers[1])
    os.close(orders[0])
    os.close(answers[1])
    job = json.loads(sys.stdin.buffer.read())
    try:
        verdict = _judge(plan, layers, job, orders[1], answers[0])
    except TimeoutError:
        verdict = (False, f"not done after {plan['limits'][0]:g} s")
    except EOFError:
        _, status = os.waitpid(solver, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        verdict = (False, f"the process ended {how} before the tests had")
    except (ValueError, KeyError, TypeError, BrokenPipeError):
        verdict = (False, "the solution wrote to the channel of the tests")
    with contextlib.suppress(ProcessLookupError):
        os.kill(solver, signal.SIGKILL)
    os.write(1, json.dumps((*verdict[:2], layers, len(verdict) > 2)).encode())
    os._exit(0)


def _judge(
    plan: dict[str, Any], layers: list[str], job: dict[str, str], orders: int, answers: int
) -> tuple[Any, ...]:
    """Pass or not, and why; a third value where nothing was run. `layers` are added to."""
    until = time.monotonic() + GRACE
    layers += receive(answers, until)["layers"]
    if (lacking := missing(layers, root=plan["root"])) and not plan["unsafe"]:
        return False, "not kept from: " + ", ".join(lacking), True
    until = time.monotonic() + plan["limits"][0]
    send(orders, {"solution": job["solution"]})
    answer = receive(answers, until)
    if answer.get("error") is None:
        send(orders, {"tests": job["tests"], "secret": job["secret"]})
        answer = receive(answers, until)
    if answer.get("error") is not None:
        return False, str(answer["error"])[:200]
    if answer["secret"] != job["secret"]:
        return False, "the tests did not run to their end"
    return True, ""


def send(to: int, message: dict[str, Any]) -> None:
    """Write a message, a line of JSON, to a pipe."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(to, data) :]


def receive(source: int, until: float = float("inf"), most: float = ANSWER) -> dict[str, Any]:
    """The next message; `EOFError` where the other end closed, `TimeoutError`, `ValueError`."""
    data = b""
    while not data.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([source], [], [], None if left == float("inf") else left)[0]:
            raise TimeoutError
        if not (part := os.read(source, 1 << 16)):
            raise EOFError
        data += part
        if len(data) > most:
            raise ValueError("too long")
    return json.loads(data)


# P2, which runs what nobody has read ---------------------------------------------------------------


def _solve(plan: dict[str, Any], orders: int, answers: int) -> None:
    """What P2 does: confine itself, then the solution, then its tests.

    What is needed after the solution ran is held in locals: a solution may put other things into modules.
    """
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.path += plan["packages"]
    tried = confinements(plan["folder"], plan["read"], *plan["limits"], threads=not plan["root"])
    send(answers, {"layers": attempt(tried)})
    give, take, run, read, end = send, receive, exec, compile, os._exit
    untrace, unprofile, words = sys.settrace, sys.setprofile, builtins.__dict__
    own = dict(words)
    module = types.ModuleType("solution")
    for name in [n for n in sys.modules if n == "__main__" or n.partition(".")[0] == "trainer"]:
        del sys.modules[name]
    sys.modules[module.__name__] = module  # where dataclasses and pickle look it up
    answer: dict[str, Any] = {"error": None}
    for part in ("solution", "tests"):
        message = take(orders, most=float("inf"))
        try:
            run(read(message[part], f"<{part}>", "exec"), module.__dict__)
        except BaseException as raised:  # SystemExit and KeyboardInterrupt are no way out
            answer["error"] = f"{type(raised).__name__}: {raised}"[:200]
        untrace(None)
        unprofile(None)
        words.update(own)
        if part == "tests" and answer["error"] is None:
            answer["secret"] = message["secret"]
        give(answers, answer)
        if answer["error"] is not None:
            break
    end(0)
