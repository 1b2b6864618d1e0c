"""The subcommand `sweep`. Imports stand where used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.faults import ConfigFault

if TYPE_CHECKING:
    from trainer.sweep.config import SweepConfig
    from trainer.sweep.plan import Planned

SEVERAL = ("--rules", "--seeds", "--grid", "--k")  # flags that take several words


def sweep(words: list[str]) -> int:
    """`priority sweep`: train under several rules, parameters and seeds, and compare; 1 if a run failed."""
    from trainer.flags import read_config
    from trainer.sweep.config import SweepConfig

    config = read_config(
        SweepConfig,
        spread(words),
        "priority sweep",
        "Train under several rules, parameters or settings with several seeds, from one base config, and\n"
        "compare them in one table. What frozen models say is computed once for all. A sweep that stopped\n"
        "goes on; what is finished is not repeated.",
        "priority sweep --config base.yaml --rule prift_mass --grid tau=0,0.5,1 --seeds 0,1,2 --output SWEEP",
    )
    _refuse_both(words)
    from trainer.sweep.plan import plan

    planned = plan(config)
    if config.list:
        return _list(planned)
    return _run(config, planned)


def spread(words: list[str]) -> list[str]:
    """The words with a flag of several values repeated before each of them: `--rules sft dft`."""
    found: list[str] = []
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word if word in SEVERAL else ""
            found += [] if flag else [word]
        else:
            found.append(f"{flag}={word}" if flag else word)
    return found


def _refuse_both(words: list[str]) -> None:
    flags = {word.partition("=")[0] for word in words}
    for one, several in (("--rule", "--rules"), ("--seed", "--seeds")):
        if {one, several} <= flags:
            raise ConfigFault(f"{one} and {several}: give one")


def _list(planned: list[Planned]) -> int:
    from trainer.sweep.run import finished

    for run in planned:
        print(f"{'finished' if finished(run) else 'to do':9} {run.config.output}  {run.name}")
    left = sum(finished(run) is None for run in planned)
    print(f"{len(planned)} runs, {left} to do")
    return 0


def _run(config: SweepConfig, planned: list[Planned]) -> int:
    from trainer.models import quieten
    from trainer.sweep import table
    from trainer.sweep.run import run_all

    quieten()
    results = run_all(config, planned, lambda text: print(text, file=sys.stderr))
    of = table.summary(results, config.baseline)
    table.printed(of)
    print(table.frozen(results))
    title = f"Sweep of {len(of.rows)} x {len(config.each_seed)} runs"
    paths = table.written(of, results, Path(config.output), title)
    print(f"written: {', '.join(map(str, paths))}")
    return 1 if any(result.error for result in results) else 0
