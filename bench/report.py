"""Rows as a terminal table, CSV, JSON, a markdown table and a plot. A time stands only beside a right result."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.engines import ENGINES
from bench.machine import Machine
from bench.measure import COLUMNS, Row

Cell = tuple[str, int, int]  # workload, batch, threads
PEERS = [name for name in ENGINES if name != "ours"]


def by_cell(rows: Iterable[Row], suite: str) -> dict[Cell, dict[str, Row]]:
    """The rows of a suite, those of one cell together."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if row.suite == suite:
            cells.setdefault((row.workload, row.batch, row.threads), {})[row.engine] = row
    return cells


def speedups(cell: dict[str, Row]) -> tuple[float, str, float]:
    """Ours against the fastest peer, which that is, and against the faster torch.compile; NaN where there is none."""
    times = {name: row.median_ms for name, row in cell.items() if row.status == "ok"}
    ours = times.get("ours", math.nan)
    peers = {name: t for name, t in times.items() if name != "ours"}
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


def _engines(rows: list[Row]) -> list[str]:
    present = {row.engine for row in rows}
    return [name for name in ENGINES if name in present]


def _text(row: Row | None, best: bool) -> Text:
    if row is None:
        return Text("")
    if row.status != "ok":
        return Text(row.status, "dim" if row.status == "missing" else "bold red")
    text = Text(number(row.median_ms), "bold green" if row.engine == "ours" else "bold" if best else "")
    return text.append(f"\n{number(row.p10_ms)}–{number(row.p90_ms)}\n{row.error:.0e}", "dim not bold")


def tables(rows: list[Row]) -> list[Table]:
    """One for each suite: a line for each cell, a column for each engine."""
    found = []
    for suite, title in (("net", "Whole network"), ("ops", "Single layers, cold weights")):
        cells = by_cell(rows, suite)
        if not cells:
            continue
        table = Table(
            title=f"{title}: median ms, p10–p90, error against float64", title_justify="left", show_lines=True
        )
        table.add_column("workload", no_wrap=True)
        for heading in ("batch", "thr."):
            table.add_column(heading, justify="right")
        names = _engines(rows)
        for name in names:
            table.add_column(ENGINES[name].title, justify="right")
        for heading in ("vs best peer", "vs compile", "GFLOP/s", "of direct / Winograd limit"):
            table.add_column(heading, justify="right")
        for (workload, batch, threads), cell in cells.items():
            against, best, compiled = speedups(cell)
            ours = cell.get("ours")
            rate = number(ours.gflops) if ours else ""
            limits = f"{_percent(ours.of_direct_limit)} / {_percent(ours.of_winograd_limit)}" if ours else ""
            table.add_row(
                workload,
                str(batch),
                str(threads),
                *(_text(cell.get(name), name == best) for name in names),
                ratio(against),
                ratio(compiled),
                rate,
                limits,
            )
        found.append(table)
    return found


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def remarks(rows: list[Row], machine: Machine) -> list[str]:
    """Why engines are missing, failed or wrong, and what else a reader should know; each once."""
    found: dict[str, None] = {}
    if machine.busy:
        found[f"The machine was busy (load {machine.load:.1f} at the start): do not rely on these times"] = None
    for row in rows:
        title = ENGINES[row.engine].title
        if row.status == "missing":
            found[f"{title} is missing: {row.reason}"] = None
        elif row.status != "ok":
            found[f"{title}, {row.workload}, batch {row.batch}, {row.threads} threads: {row.status}, {row.reason}"] = (
                None
            )
        if row.note:
            found[f"{title}: {row.note}"] = None
    return list(found)


def markdown(rows: list[Row], machine: Machine) -> str:
    lines = [f"Median latency in ms, float32. {machine.line()}.", "", machine.ceilings_line() + ".", ""]
    for suite, heading in (("net", "Whole network"), ("ops", "Single layers, cold weights")):
        cells = by_cell(rows, suite)
        if not cells:
            continue
        names = _engines(rows)
        titles = [f"**{ENGINES[n].title}**" if n == "ours" else ENGINES[n].title for n in names]
        columns = [heading, "batch", "threads", *titles, "vs best peer", "vs torch.compile", "error"]
        lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        for (workload, batch, threads), cell in cells.items():
            against, _, compiled = speedups(cell)
            times = [
                "" if n not in cell else number(cell[n].median_ms) if cell[n].status == "ok" else cell[n].status
                for n in names
            ]
            if "ours" in names and cell.get("ours"):
                times[names.index("ours")] = f"**{times[names.index('ours')]}**"
            error = f"{cell['ours'].error:.0e}" if "ours" in cell else ""
            values = [workload, str(batch), str(threads), *times, ratio(against), ratio(compiled), error]
            lines.append("| " + " | ".join(values) + " |")
        lines.append("")
    lines += [f"* {remark}" for remark in remarks(rows, machine)]
    return "\n".join(lines).rstrip() + "\n"


def write(rows: list[Row], machine: Machine, folder: Path) -> list[Path]:
    """results.csv, results.json, results.md, and plots where there is something to plot."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, text = (folder / f"results.{suffix}" for suffix in ("csv", "json", "md"))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
        for row in rows
    ]
    data.write_text(json.dumps({"machine": machine.as_dict(), "rows": plain}, indent=1))
    text.write_text(markdown(rows, machine))
    from bench.plot import plot

    return [table, data, text, *plot(rows, machine, folder)]


def show(console: Console, rows: list[Row], machine: Machine) -> None:
    for table in tables(rows):
        console.print(table)
    for remark in remarks(rows, machine):
        console.print(f"• {remark}", style="yellow", highlight=False)
    console.print(machine.line(), style="dim", highlight=False)
    console.print(machine.ceilings_line(), style="dim", highlight=False)
