"""The table of a sweep: means over seeds with intervals, and what differs from the baseline, seed by seed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.faults import ConfigFault, first_line
from trainer.sweep.intervals import CONFIDENCE, Mean, difference, mean
from trainer.sweep.run import Result

SHARES = ("accuracy", "avg@", "pass@", "preference_accuracy")  # figures that are shown in percent
INTERVALS = (
    f"Means over seeds; ± is half of a {CONFIDENCE:.0%} interval by Student's t, which one seed has not."
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: figures by name and seed, and the errors of the seeds that failed."""

    label: str
    figures: dict[str, dict[int, float]]
    errors: dict[int, str]

    @property
    def seeds(self) -> int:
        """How many seeds finished."""
        return max((len(values) for values in self.figures.values()), default=0)


@dataclass(frozen=True, slots=True)
class Summary:
    """The rows of a sweep in the order of the plan, and the row that the others are compared with."""

    rows: list[Row]
    baseline: Row

    @property
    def names(self) -> list[str]:
        """The figures that any run has, in the order in which they were measured."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))

    def apart(self, row: Row, name: str) -> Mean | None:
        """How a row differs from the baseline in a figure, over the seeds that both have."""
        return difference(row.figures.get(name, {}), self.baseline.figures.get(name, {}))


def frozen(results: Sequence[Result]) -> str:
    """How often frozen models ran, in words."""
    ran = [result.frozen for result in results if result.frozen]
    if not ran:
        return f"Frozen models: no forward pass in {len(results)} runs."
    return (
        f"Frozen models: {sum(ran):,} rows in {len(ran)} of {len(results)} runs; "
        "the others had them from the cache, or have none."
    )


def summary(results: Sequence[Result], baseline: str | None) -> Summary:
    """Gather results by row; the baseline is the first row unless one is named."""
    rows: dict[str, Row] = {}
    for result in results:
        row = rows.setdefault(result.label, Row(result.label, {}, {}))
        if result.error:
            row.errors[result.seed] = result.error
        for name, value in result.figures.items():
            row.figures.setdefault(name, {})[result.seed] = value
    ordered = list(rows.values())
    return Summary(ordered, rows[baseline] if baseline is not None else ordered[0])


def cells(of: Summary) -> tuple[list[str], list[list[str]]]:
    """The table of means: headings, and a line of cells a row."""
    lines = []
    for row in of.rows:
        seeds = str(row.seeds) + (f" ({len(row.errors)} failed)" if row.errors else "")
        means = [row.figures.get(name) for name in of.names]
        lines.append([row.label, seeds, *(shown(n, mean([*v.values()])) if v else "-"
                                          for n, v in zip(of.names, means, strict=True))])  # fmt: skip
    return ["run", "seeds", *of.names], lines


def differences(of: Summary) -> tuple[list[str], list[list[str]]]:
    """The table of differences to the baseline; no line where there is nothing to compare."""
    lines = []
    for row in of.rows:
        if row is of.baseline:
            continue
        found = [of.apart(row, name) for name in of.names]
        pairs = max((each.n for each in found if each is not None), default=0)
        lines.append([row.label, str(pairs), *(shown(n, d, signed=True) if d else "-"
                                               for n, d in zip(of.names, found, strict=True))])  # fmt: skip
    return ["run", "pairs", *of.names], lines


def shown(name: str, of: Mean, signed: bool = False) -> str:
    """A figure with its interval; shares in percent, `*` behind a difference whose interval leaves out 0."""
    scale, digits = (100, 1) if name.startswith(SHARES) else (1, 4)
    text = f"{scale * of.value:{'+' if signed else ''}.{digits}f}"
    if of.half is not None:
        text += f" ± {scale * of.half:.{digits}f}"
    return text + (" *" if signed and of.apart else "")


def sentences(of: Summary) -> list[str]:
    """What the two tables are, for people."""
    percent = [name for name in of.names if name.startswith(SHARES)]
    first = INTERVALS + (f" In percent: {', '.join(percent)}." if percent else "")
    if len(of.rows) == 1:
        return [first]
    second = (
        f"Differences to {of.baseline.label}, seed by seed; * marks an interval that leaves out 0 "
        "(each by itself, not corrected for how many there are)."
    )
    return [first, second]


def printed(of: Summary) -> None:
    """Print both tables, in parts below each other where the screen is too narrow."""
    tables = [cells(of)] + ([differences(of)] if len(of.rows) > 1 else [])
    console = Console(highlight=False)
    for (headings, lines), sentence in zip(tables, sentences(of), strict=True):
        console.print(Text(sentence))
        for part in parts(headings, lines, console.width):
            console.print(_rich([headings[i] for i in part], [[line[i] for i in part] for line in lines]))


def parts(headings: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each part of a table that fits into so many characters: the first two, and some more."""
    wide = [3 + max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    found, room = [[0, 1]], width - 1 - sum(wide[:2])
    for column in range(2, len(headings)):
        if wide[column] > room and len(found[-1]) > 2:
            found.append([0, 1])
            room = width - 1 - sum(wide[:2])
        found[-1].append(column)
        room -= wide[column]
    return found


def _rich(headings: list[str], lines: list[list[str]]) -> Table:
    table = Table(header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def written(of: Summary, results: Sequence[Result], folder: Path, title: str) -> list[Path]:
    """Write sweep.md, sweep.csv (a line a run) and sweep.json (everything) into the sweep's folder."""
    paths = [folder / f"sweep.{suffix}" for suffix in ("md", "csv", "json")]
    try:
        paths[0].write_text(as_markdown(of, title), encoding="utf-8")
        with paths[1].open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["run", "seed", *of.names, "seconds", "error"])
            for run in results:
                figures = [run.figures.get(name, "") for name in of.names]
                lines.writerow([run.label, run.seed, *figures, run.seconds, run.error])
        text = json.dumps(as_json(of, results), indent=1, ensure_ascii=False)
        paths[2].write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"--output {folder}: cannot be written: {first_line(error)}") from error
    return paths


def as_markdown(of: Summary, title: str) -> str:
    """Both tables as Markdown, and the errors of runs that failed."""
    tables = [cells(of)] + ([differences(of)] if len(of.rows) > 1 else [])
    parts = [f"# {title}"]
    for (headings, lines), sentence in zip(tables, sentences(of), strict=True):
        table = [headings, ["---"] + ["---:"] * (len(headings) - 1), *lines]
        parts += [sentence, "\n".join("| " + " | ".join(_escaped(c) for c in line) + " |" for line in table)]
    failed = [f"- {row.label} seed {seed}: {error}" for row in of.rows for seed, error in row.errors.items()]
    return "\n\n".join([*parts, *(["Failed:", "\n".join(failed)] if failed else [])]) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def as_json(of: Summary, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that is known: the runs one by one, the rows with means and differences."""
    rows = {}
    for row in of.rows:
        apart = {name: of.apart(row, name) for name in of.names if row is not of.baseline}
        rows[row.label] = {
            "figures": {name: asdict(mean([*values.values()])) for name, values in row.figures.items()},
            "differences": {name: asdict(found) for name, found in apart.items() if found is not None},
        }
    return {
        "baseline": of.baseline.label,
        "confidence": CONFIDENCE,
        "rows": rows,
        "runs": [{k: v for k, v in asdict(r).items() if k != "before"} for r in results],
    }
