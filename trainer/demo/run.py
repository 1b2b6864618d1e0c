"""The demonstration from start to end: noisy demonstrations, one run a method, what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from priority_dsl import compile_rule
from trainer.config import TrainConfig
from trainer.demo import BASE
from trainer.demo.countdown import demonstrations, held_out_problems
from trainer.demo.files import DEMONSTRATIONS, NOISE, PROBLEMS, write_rows
from trainer.demo.report import draw_picture, table, title, what_to_see, write_results
from trainer.demo.scores import SAMPLES, Scores, measure
from trainer.faults import ConfigFault, first_line
from trainer.models import load_model, load_tokenizer, quieten
from trainer.train import train

METHODS = ("sft", "dft", "prift_prob", "prift_mass")
TRAINING_THREADS = 1
"""Steps this small gain little from a second thread and, on a busy machine, lose most of their time to it."""
MEASURING_THREADS = 2


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained and measured; the default is the demonstration, anything smaller shows nothing."""

    demonstrations: int = DEMONSTRATIONS
    epochs: int = 4
    problems: int = PROBLEMS


def demo(
    output: str | Path = "demo_run",
    seed: int = 0,
    rules: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    size: Size = Size(),
) -> dict[str, Scores]:
    """Train a model under each method and each of the user's rules, and compare them with the base model.

    A rule is rule text, a library name or a path to a .rule file; it may read the column `quality` of the
    demonstrations. Prints the table and what to see in it; writes `demo_results.json`, `pass_at_k.png`, the
    demonstrations and the trained models into `output`, in place of an earlier demonstration's. Returns the
    scores of `base` and of each rule.

    Raises `PriorityError` for a rule with a mistake, before anything is trained, and `Fault` for the rest.
    """
    console = Console(highlight=False)
    quieten()
    if not 0 <= seed < 2**32:
        raise ConfigFault(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    rules = [checked(rule.strip()) for rule in rules]
    folder = work_folder(Path(output))
    data = write_rows(folder / "demonstrations.jsonl", demonstrations(size.demonstrations, NOISE, seed))
    problems = held_out_problems(size.problems, seed)
    tokenizer = load_tokenizer(str(BASE))
    base = load_model(str(BASE)).eval()
    console.print(
        f"Countdown: {size.demonstrations} demonstrations, {NOISE:.0%} of them wrong; "
        f"{size.problems} held-out problems x {SAMPLES} samples"
    )

    with threads(MEASURING_THREADS):
        found = {"base": measure(base, base, tokenizer, problems, seed)}
    # The user's own rules first: if one of them cannot be trained, that is said at once.
    for number, rule in enumerate(dict.fromkeys([*rules, *methods]), 1):
        began = time.perf_counter()
        run = folder / (rule if rule in METHODS else f"rule_{number}")
        with threads(TRAINING_THREADS):
            train(settings(rule, data, run, size.epochs, seed))
        trained = time.perf_counter()
        with threads(MEASURING_THREADS):
            found[rule] = measure(load_model(str(run)).eval(), base, tokenizer, problems, seed)
        measured = time.perf_counter()
        seconds = f"trained in {trained - began:.0f} s, measured in {measured - trained:.0f} s"
        console.print(f"{title(rule)}: {seconds}", markup=False)
    found = {name: found[name] for name in dict.fromkeys(["base", *methods, *rules])}
    tell(found, folder, console)
    return found


@contextmanager
def threads(most: int) -> Iterator[None]:
    """Compute on so many threads at the most, fewer where the machine or OMP_NUM_THREADS gives fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checked(rule: str) -> str:
    """The rule as it was given; an error where it has a mistake or reads a model that is not there."""
    for model in sorted(compile_rule(rule).requires.models - {"on", "ref"}):
        raise ConfigFault(
            f"--rule: it reads the model `{model}`, and the demonstration has only `on` and `ref`; "
            "`priority train --bind` binds others"
        )
    return rule


def settings(rule: str, data: Path, output: Path, epochs: int, seed: int) -> TrainConfig:
    """The run of one rule, as `priority train` would be given it."""
    return TrainConfig(
        model=str(BASE),
        data=(str(data),),
        rule=rule,
        output=str(output),
        epochs=epochs,
        batch_size=64,
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.0,
        separator=" ",
        seed=seed,
        device="cpu",
        overwrite=True,
        quiet=True,
    )


def work_folder(path: Path) -> Path:
    """Make the folder of the demonstration; `ConfigFault` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigFault(f"--output {path}: cannot be made: {first_line(error)}") from error
    return path


def tell(found: dict[str, Scores], folder: Path, console: Console) -> None:
    """Print the table and what to see in it, and write the results and the picture into the folder."""
    console.print(table(found))
    for sentence in what_to_see(found):
        console.print(sentence, markup=False)
    write_results(found, folder / "demo_results.json")
    written = [str(folder / "demo_results.json")]
    try:
        draw_picture(found, folder / "pass_at_k.png")
        written.append(str(folder / "pass_at_k.png"))
    except ImportError:
        console.print(
            "no picture: matplotlib is not installed (pip install 'priority_dsl[figures]')", markup=False
        )
    console.print("written: " + ", ".join(written), markup=False)
