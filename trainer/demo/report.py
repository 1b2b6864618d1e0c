"""How the demonstration tells what it found: a table, two sentences, a JSON file and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.demo.scores import SAMPLES, Scores

Found = Mapping[str, Scores]
"""The scores of each method, the base model's under `base`."""
TITLES = {"base": "base", "sft": "SFT", "dft": "DFT", "prift_prob": "PriFT-prob", "prift_mass": "PriFT-mass"}
PRIFT = ("prift_prob", "prift_mass")
NOISE = 5.0
"""Percentage points that a difference must exceed to be called one; two seeds differ by about 3.5."""


def title(method: str) -> str:
    """What a method is called in a table: the papers' name, or the user's rule on one line."""
    return TITLES.get(method, " ".join(method.split()))


def table(found: Found) -> Table:
    """The scores as a table, one method a row; Avg and Pass@k in percent, entropy and KL in nats a token."""
    shown = Table(header_style="bold")
    shown.add_column("method", overflow="fold")
    for heading in (f"Avg@{SAMPLES}", "Pass@4", "Pass@16", "Pass@32", "entropy", "KL to base"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for method, scores in found.items():
        passes = [scores.avg, *map(scores.pass_at, (4, 16, 32))]
        cells = [f"{value:.1f}" for value in passes] + [f"{scores.entropy:.2f}", f"{scores.kl:.2f}"]
        shown.add_row(Text(title(method)), *cells)
    return shown


def what_to_see(found: Found) -> list[str]:
    """Two sentences on the effect, from the numbers of this run: what shows, and what does not.

    None where the base, SFT, DFT or both forms of PriFT were not measured.
    """
    if not {"base", "sft", "dft", *PRIFT} <= found.keys():
        return []
    return [_against_dft(found), _against_sft(found)]


def _against_dft(found: Found) -> str:
    dft = found["dft"]
    gains = [found[method].pass_at(16) - dft.pass_at(16) for method in PRIFT]
    shared = (
        f"With 16 samples DFT solves {dft.pass_at(16):.0f} % of the problems "
        f"(base {found['base'].pass_at(16):.0f} %) at an entropy of {dft.entropy:.2f} nats a token, "
        + " and ".join(
            f"{title(method)} {found[method].pass_at(16):.0f} % at {found[method].entropy:.2f}"
            for method in PRIFT
        )
    )
    if min(gains) > NOISE:
        return (
            f"{shared}: the model's own probability as a weight feeds on itself until one answer is left, "
            "the frozen model's keeps the alternatives."
        )
    return f"{shared}: in this run PriFT does not keep clearly more solutions than DFT."


def _against_sft(found: Found) -> str:
    sft, base = found["sft"], found["base"]
    gains = [found[method].avg - sft.avg for method in PRIFT]
    shared = (
        f"Of single samples SFT gets {sft.avg:.0f} % right (base {base.avg:.0f} %) at a KL of {sft.kl:.2f} "
        "nats a token to the base, "
        + " and ".join(
            f"{title(method)} {found[method].avg:.0f} % at {found[method].kl:.2f}" for method in PRIFT
        )
    )
    if min(gains) > NOISE:
        return (
            f"{shared}: plain fine-tuning copies the wrong sums of the demonstrations, "
            "which a model that can add finds improbable and PriFT therefore hardly trains on."
        )
    return f"{shared}: in this run PriFT is not clearly more often right than SFT."


def write_results(found: Found, path: Path) -> None:
    """Write method -> figures as JSON: percent for `avg` and `pass_at_k`, nats a token for entropy and KL."""
    figures = {method: scores.as_json() for method, scores in found.items()}
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_picture(found: Found, path: Path) -> None:
    """Draw Pass@k over k, one line a method, as a PNG file. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method, scores in found.items():
        line, colour = ("--", "grey") if method == "base" else ("-", None)
        label = title(method).replace("$", r"\$")  # matplotlib would read a formula between two of them
        axes.plot(range(1, SAMPLES + 1), scores.passes, label=label, linestyle=line, color=colour)
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, labels=[str(k) for k in ticks])
    axes.set_xlabel("k samples a problem")
    axes.set_ylabel("Pass@k, %")
    axes.set_title("Countdown after fine-tuning on noisy demonstrations")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
