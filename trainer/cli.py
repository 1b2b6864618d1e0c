"""The command `priority`: finds the subcommand, and turns every mistake into a message and an exit code.

0 is success, 1 a run or data that failed, 2 a mistake in usage, rule or config. Nothing heavy is imported
here: `priority check` must answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from priority_dsl import PriorityError, __version__
from trainer import commands, storage
from trainer.faults import ConfigFault, Fault, first_line
from trainer.records.command import push_command
from trainer.sweep.command import sweep

Command = Callable[[list[str]], int]

COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (commands.train, "train a model under a rule"),
    "sweep": (sweep, "train under several rules, parameters and seeds, and compare them"),
    "check": (commands.check, "check rules: regime, kinds, every mistake with its place"),
    "explain": (commands.explain, "what a rule is, what it reads and what it costs"),
    "fmt": (commands.fmt, "print rules in canonical form, or rewrite rule files"),
    "rules": (commands.rules, "the rules of the library"),
    "new": (commands.new, "write a rule file and its test, to start from"),
    "test": (commands.test, "test a rule: its properties, and that it equals your own function"),
    "eval": (commands.evaluate, "measure a model: held-out nll, Avg@k, Pass@k, entropy, KL"),
    "push": (push_command, "upload a trained model to the Hugging Face hub"),
    "score": (storage.score, "tokens, statistics and weights of a data set as a Parquet file"),
    "merge": (commands.merge, "an adapter and its base as one model folder"),
    "cache": (storage.cache, "list or remove the stored statistics of frozen models"),
    "demo": (commands.demo, "train on countdown under several rules and compare them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `priority` and return its exit code; `argv` defaults to the program's arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except PriorityError as error:
        return _fail(str(error), 2)
    except Fault as error:
        if debug:
            raise
        return _fail("\n".join(f"error: {line}" for line in _per_rank(str(error))), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the log and the checkpoints so far are kept", 130)
    except BrokenPipeError:  # the reader of our output left: not our mistake
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        return 0
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        return _fail(f"error: {kind}: {first_line(error)} (unexpected; --debug shows the traceback)", 1)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"priority {__version__}")
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        way = f"did you mean `priority {close[0]}`?" if close else f"known are {', '.join(COMMANDS)}"
        raise ConfigFault(f"unknown command `{name}`; {way}")
    try:
        return COMMANDS[name][0](rest)
    except SystemExit as leaving:  # argparse leaves like this after --help
        return int(leaving.code or 0)


def _help() -> str:
    lines = ["usage: priority COMMAND ...", "", "Say how much each training token counts, and train.", ""]
    lines += [f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "  priority COMMAND --help shows a command's flags, priority --version the version,"]
    lines += ["  --debug after any command the traceback of an error", "", "example:"]
    lines += ["  priority check 'mass(ref) >= 0.5'"]
    return "\n".join(lines)


def _per_rank(text: str) -> list[str]:
    """The lines of a message; a process of a group other than the first says which it is."""
    rank = os.environ.get("RANK", "0")
    return [line if rank == "0" else f"[process {rank}] {line}" for line in text.splitlines()]


def _fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
