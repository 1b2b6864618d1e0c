"""Whether two LaTeX expressions are equal, by math-verify, in processes that are killed when they take long.

The library ends what takes long by signals, which only the main thread gets and no C code heeds. So it runs
in processes of their own, which confine themselves as far as the machine lets them: what they read was
written by a model.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
from functools import cache

from trainer.checkers.sandbox import Limits, receive, send

START = "import sys; sys.path[:0] = {paths!r}; from trainer.checkers.maths import serve; serve({memory})"
LOADING = 60.0  # seconds for the library to load
_idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


class _Worker:
    """A process that compares expressions, one pair at a time."""

    def __init__(self, memory: int):
        code = START.format(paths=[p for p in sys.path if p], memory=memory)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._of = self._process.stdin.fileno(), self._process.stdout.fileno()
        receive(self._of, time.monotonic() + LOADING)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, wanted: str, found: str, seconds: float) -> bool:
        send(self._to, {"wanted": wanted, "found": found, "seconds": seconds})
        return receive(self._of, time.monotonic() + seconds)["same"] is True

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def same_expression(wanted: str, found: str, limits: Limits) -> bool:
    """Whether two expressions in LaTeX are mathematically equal; one that cannot be read equals nothing.

    Raises `TimeoutError` after `limits.seconds`. May be called from several threads.
    """
    worker = _free(limits.memory)
    try:
        same = worker.ask(wanted, found, limits.seconds)
    except TimeoutError:
        worker.end()
        raise
    except (EOFError, BrokenPipeError, ValueError):  # out of memory, or a crash of the interpreter
        worker.end()
        return False
    _idle.put(worker)
    return same


def _free(memory: int) -> _Worker:
    while True:
        try:
            worker = _idle.get_nowait()
        except queue.Empty:
            return _Worker(memory)
        if worker.lives:
            return worker


def serve(memory: int) -> None:
    """What such a process does: read pairs, write answers, until the input ends."""
    import resource

    from trainer.checkers.confinement import attempt, confinements

    _compare("1", "1")  # everything is imported before the files are out of reach
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    readable = [path for path in sys.path if os.path.isdir(path)] + [sys.prefix, sys.base_prefix]
    attempt(confinements("", readable, 0, 0, threads=True)[1:])
    send(1, {"ready": True})
    for line in sys.stdin:
        pair = json.loads(line)
        signal.alarm(math.ceil(pair["seconds"]) + 5)  # ends the process where the parent is gone
        try:
            same = _compare(pair["wanted"], pair["found"])
        except Exception:  # the library raises whatever its parser and sympy raise
            same = False
        signal.alarm(0)
        send(1, {"same": same})


@cache
def _reading() -> tuple[object, ...]:
    from math_verify import LatexExtractionConfig  # pyright: ignore[reportMissingImports]

    return (LatexExtractionConfig(boxed_match_priority=0),)


def _compare(wanted: str, found: str) -> bool:
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    # Without the plain expressions that the library also reads: it would evaluate them as Python.
    sides = [
        parse(f"\\boxed{{{text}}}", extraction_config=_reading(), parsing_timeout=None)
        for text in (wanted, found)
    ]
    return bool(verify(*sides, timeout_seconds=None))
