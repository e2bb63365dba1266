"""Rows as a terminal table, CSV, JSON, a markdown table and a plot. A time stands only beside a right result.

A `Subject` says of what: the CPU's benchmark, or that of a GPU (`bench.gpu`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from bench import tables
from bench.engines import ENGINES, LOW_PRECISION
from bench.machine import Machine
from bench.measure import COLUMNS, Row

Cell = tuple[str, ...]  # workload, batch, and the conditions


class _Titled(Protocol):
    @property
    def title(self) -> str: ...


@dataclass(frozen=True)
class Subject:
    """What differs between the reports: the engines in their order, and under which conditions a cell was measured.

    conditions: heading of the table, of the markdown table, and the row's value, of each. suites: key and heading.
    plotted: (a file's name, a panel's title) of a row. limits: whether rows have fractions of the machine's limits.
    """

    engines: Mapping[str, _Titled]
    suites: dict[str, str]
    conditions: tuple[tuple[str, str, Callable[[Any], str]], ...]
    columns: list[str]
    about: str
    plotted: Callable[[Any], tuple[str, str]]
    limits: bool = True
    cpu_time: bool = False  # whether tables have it
    errors: bool = False  # whether the markdown has a line, with its error, for each engine

    def where(self, row: Row) -> str:
        return ", ".join(
            [row.workload, f"batch {row.batch}", *(f"{value(row)} {h}" for _, h, value in self.conditions)]
        )


def _plotted(row: Row) -> tuple[str, str]:
    name = row.suite if row.suite == "net" else f"{row.suite}-{row.variant}"
    return name, f"batch {row.batch}, {row.threads} thread{'s' if row.threads > 1 else ''}"


CPU = Subject(
    ENGINES,
    {"net": "Whole network", "ops": "Single layers, cold weights"},
    (("thr.", "threads", lambda row: str(row.threads)),),
    COLUMNS,
    "float32",
    _plotted,
)
LOW = Subject(
    LOW_PRECISION,
    {"net": "Whole network"},
    (("group", "group", lambda row: row.group), *CPU.conditions),
    COLUMNS,
    "each kind of numbers a group of its own",
    lambda row: (f"net-{row.group}", _plotted(row)[1]),
    limits=False,
    cpu_time=True,
    errors=True,
)


def by_cell(rows: Iterable[Row], suite: str, subject: Subject = CPU) -> dict[Cell, dict[str, Row]]:
    """The rows of a suite, those of one cell together."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if row.suite == suite:
            conditions = (value(row) for _, _, value in subject.conditions)
            cells.setdefault((row.workload, str(row.batch), *conditions), {})[row.engine] = row
    return cells


def is_ours(engine: str) -> bool:
    return engine.startswith("ours")


def speedups(cell: dict[str, Row]) -> tuple[float, str, float]:
    """Ours against the fastest peer, which that is, and against the faster torch.compile; NaN where there is none."""
    times = {name: row.median_ms for name, row in cell.items() if row.status == "ok"}
    ours = min((t for name, t in times.items() if is_ours(name)), default=math.nan)
    peers = {name: t for name, t in times.items() if not is_ours(name)}
    best = min(peers, key=lambda name: peers[name], default="")
    compiled = [t for name, t in peers.items() if name.startswith("compile")]
    return peers.get(best, math.nan) / ours, best, min(compiled, default=math.nan) / ours


def number(value: float) -> str:
    """Three significant digits."""
    if math.isnan(value):
        return "–"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def ratio(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}×"


def _engines(rows: list[Row], subject: Subject) -> list[str]:
    present = {row.engine for row in rows}
    return [name for name in subject.engines if name in present]


def _best_of_ours(cell: dict[str, Row]) -> Row | None:
    """The fastest right one of ours, or any of them."""
    ours = [row for name, row in cell.items() if is_ours(name)]
    return min(ours, key=lambda row: (row.status != "ok", row.median_ms), default=None)


def _header(subject: Subject) -> list[str]:
    return ["engine", "median ms", "p10–p90", *["CPU ms"] * subject.cpu_time, "error", "ours is"]


def _lines(cell: dict[str, Row], subject: Subject) -> list[list[str]]:
    """A line for each engine; the last column says how many times as fast ours is."""
    ours = _best_of_ours(cell)
    lines: list[list[str]] = []
    for name in (name for name in subject.engines if name in cell):
        row = cell[name]
        if row.status != "ok":
            lines.append([subject.engines[name].title, row.status, *[""] * (len(_header(subject)) - 2)])
            continue
        range_ = f"{number(row.p10_ms)}–{number(row.p90_ms)}"
        against = "" if ours is None or is_ours(name) else ratio(row.median_ms / ours.median_ms)
        times = [number(row.median_ms), range_, *[number(row.cpu_ms)] * subject.cpu_time]
        lines.append([subject.engines[name].title, *times, f"{row.error:.0e}", against])
    return lines


def _limits(cell: dict[str, Row], subject: Subject) -> str:
    """What ours reaches in a cell, or nothing where it has no time."""
    ours = _best_of_ours(cell)
    if ours is None or ours.status != "ok":
        return ""
    told = f"{subject.engines[ours.engine].title}: {number(ours.gflops)} GFLOP/s"
    if subject.limits:
        direct, winograd = _percent(ours.of_direct_limit), _percent(ours.of_winograd_limit)
        told += f", {direct} of the direct limit, {winograd} of Winograd's"
    return told


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def remarks(rows: list[Row], machine: Machine, subject: Subject = CPU) -> list[str]:
    """Why engines are missing, failed or wrong, and what else a reader should know; each once."""
    found: dict[str, None] = {}
    if machine.busy:
        found[f"The machine was busy (load {machine.load:.1f} at the start): do not rely on these times"] = None
    for row in rows:
        title = subject.engines[row.engine].title
        if row.status == "missing":
            found[f"{title} is missing: {row.reason}"] = None
        elif row.status != "ok":
            found[f"{title}, {subject.where(row)}: {row.status}, {row.reason}"] = None
        if row.note:
            found[f"{title}: {row.note}"] = None
    return list(found)


def markdown(rows: list[Row], machine: Machine, subject: Subject = CPU) -> str:
    lines = [f"Median latency in ms, {subject.about}. {machine.line()}.", "", machine.ceilings_line() + ".", ""]
    for suite, heading in subject.suites.items():
        cells = by_cell(rows, suite, subject)
        if not cells:
            continue
        if subject.errors:
            lines += [*_by_engine(heading, cells, subject), ""]
            continue
        names = _engines(rows, subject)
        titles = [f"**{subject.engines[n].title}**" if is_ours(n) else subject.engines[n].title for n in names]
        headings = [long for _, long, _ in subject.conditions]
        columns = [heading, "batch", *headings, *titles, "vs best peer", "vs torch.compile", "error"]
        lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        for conditions, cell in cells.items():
            against, _, compiled = speedups(cell)
            times = [
                "" if n not in cell else number(cell[n].median_ms) if cell[n].status == "ok" else cell[n].status
                for n in names
            ]
            times = [f"**{t}**" if is_ours(n) and t else t for n, t in zip(names, times, strict=True)]
            ours = _best_of_ours(cell)
            error = f"{ours.error:.0e}" if ours else ""
            values = [*conditions, *times, ratio(against), ratio(compiled), error]
            lines.append("| " + " | ".join(values) + " |")
        lines.append("")
    lines += [f"* {remark}" for remark in remarks(rows, machine, subject)]
    return "\n".join(lines).rstrip() + "\n"


def _by_engine(heading: str, cells: dict[Cell, dict[str, Row]], subject: Subject) -> Iterator[str]:
    """A markdown table with a line for each engine of each cell."""
    columns = [heading, "batch", *(long for _, long, _ in subject.conditions), *_header(subject)]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    for conditions, cell in cells.items():
        for line in _lines(cell, subject):
            yield "| " + " | ".join([*conditions, *line]) + " |"


def write(rows: list[Row], machine: Machine, folder: Path, subject: Subject = CPU) -> list[Path]:
    """results.csv, results.json, results.md, and plots where there is something to plot."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, text = (folder / f"results.{suffix}" for suffix in ("csv", "json", "md"))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, subject.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plain = [
        {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(row).items()
            if k in subject.columns
        }
        for row in rows
    ]
    data.write_text(json.dumps({"machine": machine.as_dict(), "rows": plain}, indent=1))
    text.write_text(markdown(rows, machine, subject))
    from bench.plot import plot

    return [table, data, text, *plot(rows, machine, folder, subject)]


def show(console: Console, rows: list[Row], machine: Machine, subject: Subject = CPU) -> None:
    """On a terminal a table for each cell; in a pipe tab-separated lines, and remarks that begin with #."""
    if console.is_terminal:
        for suite, heading in subject.suites.items():
            for cell in by_cell(rows, suite, subject).values():
                where = subject.where(next(iter(cell.values())))
                tables.show(console, f"{heading}: {where}", _header(subject), _lines(cell, subject))
                console.print(_limits(cell, subject), style="dim", highlight=False, markup=False)
    else:
        named = [long for _, long, _ in subject.conditions]
        numbers = ["median_ms", "p10_ms", "p90_ms", *["cpu_ms"] * subject.cpu_time, "error"]
        columns = ["workload", "suite", "batch", *named, "engine", "status", *numbers]
        found = []
        for row in rows:
            place = (row.workload, row.suite, str(row.batch), *(value(row) for _, _, value in subject.conditions))
            found.append((*place, row.engine, row.status, *(f"{getattr(row, name):.6g}" for name in numbers)))
        tables.show(console, f"median latency in ms, {subject.about}", columns, found)
    mark = "• " if console.is_terminal else "# "
    for remark in remarks(rows, machine, subject):
        console.print(mark + remark, style="yellow", highlight=False, markup=False, soft_wrap=not console.is_terminal)
    conditions(console, machine.line(), machine.ceilings_line())


def conditions(console: Console, *lines: str) -> None:
    """Under which conditions was measured; in a pipe as lines that begin with #."""
    for line in lines:
        told = line if console.is_terminal else f"# {line}"
        console.print(told, style="dim", highlight=False, markup=False, soft_wrap=not console.is_terminal)
