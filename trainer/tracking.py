"""Trackers of a run beside OUTPUT/log.jsonl: wandb, tensorboard, trackio, or objects of one's own.

They are accelerate's `GeneralTracker`s, and each gets every line of the log once: the same names and values,
with the line's step as the step. OUTPUT/trackers.json says which runs of which trackers these are, so that a
resumed run goes on in them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.atomic import write_file
from trainer.faults import ConfigFault, first_line
from trainer.runlog import LOG_NAME

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.prepare import Run

PROJECT = "priority_dsl"
FILE_NAME = "trackers.json"
FINAL = (
    "nll", "loss", "eval_nll", "eval_loss", "eval_accuracy", "eval_preference_accuracy",
    "eval_preference_margin",
)  # fmt: skip
Line = dict[str, Any]
Key = tuple[Any, ...]
Tracker = Any  # a `GeneralTracker` of accelerate, whose class does not declare the `name` that it must have


def check_installed(names: Sequence[str]) -> None:
    """`ConfigFault` for a tracker whose package is missing, before anything is computed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigFault(
                f"--tracker {name}: the package {name} is not installed: pip install 'priority_dsl[{name}]'"
            )


class Tracking:
    """The trackers of a run; make it before `prepare`, which cuts the log of a run that is resumed."""

    def __init__(self, config: TrainConfig, own: Sequence[Tracker] = ()):
        check_installed(config.tracker)
        self._config = config
        self._folder = Path(config.output)
        self._own = list(own)
        self._known: dict[str, Any] = self._read_known() if config.resume else {}
        self._before = frozenset(self._known)
        self._sent = {_key(line) for line in self._lines()} if self._known else set()
        self._trackers: list[Tracker] = []
        self._skipped: dict[str, set[Key]] = {}  # lines that a tracker has from before
        self._note: Callable[[str], None] = print

    @contextmanager
    def of(self, run: Run) -> Iterator[None]:
        """The trackers follow the log of the run and are finished however it ends; one process has them."""
        if not run.accelerator.is_main_process or not (self._config.tracker or self._own):
            yield
            return
        self._note = run.log.note
        try:
            self._start(run)
            run.log.follow(self.log)
            yield
        except BaseException:
            self._finish(failed=True)
            raise
        self._finish(failed=False)

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand a line of the log to every tracker; one that fails is left out from then on, with a note."""
        values = {name: value for name, value in line.items() if name != "step" and value is not None}
        for tracker in list(self._trackers):
            if _key(line) not in self._skipped.get(tracker.name, ()):
                self._guarded(tracker, lambda t=tracker: t.log(values, step=line["step"]))

    def _start(self, run: Run) -> None:
        facts = hyper_parameters(run)
        for name in self._config.tracker:
            resumed = name in self._known
            told = self._known.setdefault(name, self._named(name))
            self._begin(_made(name, told, self._folder, run, facts, resumed), facts, run.start.step)
        for tracker in self._own:
            self._begin(tracker, facts, run.start.step)
            self._known.setdefault(tracker.name, {"name": tracker.name})
        write_file(self._folder / FILE_NAME, json.dumps(self._known, indent=2) + "\n")
        for line in self._lines():  # what a tracker that joins a resumed run has missed
            self.log(line)

    def _begin(self, tracker: Tracker, facts: Mapping[str, Any], step: int) -> None:
        try:
            tracker.start()
            if tracker.name != "trackio" or tracker in self._own:
                tracker.store_init_configuration(dict(facts))
        except Exception as error:  # every tracker raises its own
            raise ConfigFault(
                f"--tracker {tracker.name}: does not start: {first_line(error)}; mend that, or leave it out"
            ) from error
        self._trackers.append(tracker)
        if tracker.name in self._before:
            # tensorboard forgets what came after the checkpoint; the others keep it, and get it once
            whole = tracker.name != "tensorboard"
            self._skipped[tracker.name] = {key for key in self._sent if whole or key[0] <= step}

    def _named(self, name: str) -> dict[str, str]:
        project, run_name = self._config.project or PROJECT, self._config.run_name
        return {
            "project": project,
            "name": run_name or self._folder.resolve().name,
            **({"id": secrets.token_hex(4)} if name == "wandb" else {}),
        }

    def _finish(self, failed: bool) -> None:
        lines = self._lines()
        found = summary(lines)
        for tracker in list(self._trackers):
            if found and not failed:
                self._guarded(tracker, lambda t=tracker: t.log(found, step=lines[-1]["step"]))
            self._guarded(tracker, lambda t=tracker: _finished(t, failed))
        self._trackers = []

    def _guarded(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # what a tracker cannot do must not stop a run
            self._trackers = [one for one in self._trackers if one is not tracker]
            self._note(
                f"--tracker {tracker.name}: {first_line(error)}; the run goes on without it, "
                f"{LOG_NAME} has all"
            )

    def _read_known(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / FILE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigFault(
                f"{self._folder / FILE_NAME}: cannot be read: {first_line(error)}; remove it, and the "
                "trackers begin new runs"
            ) from error

    def _lines(self) -> list[Line]:
        """The lines of the log as it is now; an unfinished one is passed over."""
        path = self._folder / LOG_NAME
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        found = []
        for text in texts:
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found


def hyper_parameters(run: Run) -> dict[str, Any]:
    """The config as flat values that every tracker takes, with what the rule is and how long the run."""
    flat: dict[str, Any] = {}
    for name, value in run.config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": part for key, part in value.items()}
        elif isinstance(value, list):
            flat[name] = ", ".join(map(str, value))
        elif value is not None:
            flat[name] = value
    return {
        **flat,
        "rule_text": run.rule.text,
        "regime": str(run.rule.regime),
        "planned_steps": run.start.planned,
        "rows_a_step": run.start.rows,
        "processes": run.accelerator.num_processes,
    }


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a log came to: its last step with its figures, and the best held-out nll."""
    steps = [line for line in lines if "nll" in line]
    measured = [line for line in lines if line.get("eval_nll") is not None]
    found: dict[str, Any] = {"final_step": lines[-1]["step"]} if lines else {}
    for line in (*steps[-1:], *measured[-1:]):
        found |= {f"final_{name}": line[name] for name in FINAL if line.get(name) is not None}
    if measured:
        best = min(measured, key=lambda line: line["eval_nll"])
        found |= {"best_eval_nll": best["eval_nll"], "best_eval_step": best["step"]}
    return found


def _made(
    name: str, told: Mapping[str, str], folder: Path, run: Run, facts: Mapping[str, Any], resumed: bool
) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        later = {"purge_step": run.start.step + 1} if resumed else {}
        return tracking.TensorBoardTracker(told["name"], folder / "tensorboard", **later)
    if name == "wandb":
        quiet = {"settings": {"silent": True}} if run.config.quiet else {}
        # Its files are where wandb puts them, ./wandb or WANDB_DIR: they hold links, OUTPUT holds none.
        return tracking.WandBTracker(
            told["project"], name=told["name"], id=told["id"], resume="allow", **quiet
        )
    resume = "allow" if resumed else "never"
    # Here, and not by accelerate's `store_init_configuration`, which adds a setting that is none.
    return tracking.TrackioTracker(told["project"], name=told["name"], config=dict(facts), resume=resume)


def _finished(tracker: Tracker, failed: bool) -> None:
    if failed and tracker.name == "wandb":
        tracker.tracker.finish(exit_code=1)  # accelerate's own says that the run was finished
    else:
        tracker.finish()


def _key(line: Mapping[str, Any]) -> Key:
    """What tells a line from the others of a log: its step, and whether the step or held-out rows."""
    return line["step"], "eval_nll" in line
