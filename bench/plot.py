"""The rows as bar charts: ours in colour, the others in greys and blues of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import Machine
from bench.measure import Row

if TYPE_CHECKING:
    from bench.report import Subject

COLOURS = {
    "eager": "#c9ced6",
    "eager-cl": "#aeb6c2",
    "compile": "#8f9bad",
    "compile-max": "#738197",
    "onnxruntime": "#9ecae1",
    "openvino": "#6baed6",
    "ncnn": "#4292c6",
    "mnn": "#2171b5",
    "tensorrt": "#4292c6",
    "ours-triton": "#fdae6b",
    "ours": "#e6550d",
    "onnxruntime-int8": "#9ecae1",
    "openvino-int8": "#6baed6",
    "ours-int8": "#e6550d",
    "autocast-bf16": "#c9ced6",
    "compile-bf16": "#8f9bad",
    "openvino-bf16": "#6baed6",
    "ours-bf16": "#e6550d",
}


def plot(rows: list[Row], machine: Machine, folder: Path, subject: Subject) -> list[Path]:
    """net.png and ops-<variant>.png, a panel for every batch and condition; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    figures: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            figures.setdefault(subject.plotted(row)[0], []).append(row)
    return [_figure(right, machine, folder / f"{name}.png", subject) for name, right in figures.items()]


def _figure(rows: list[Row], machine: Machine, path: Path, subject: Subject) -> Path:
    import matplotlib.pyplot as plt

    titles = {(row.batch, row.threads, subject.plotted(row)[1]): subject.plotted(row)[1] for row in rows}
    panels = [titles[key] for key in sorted(titles)]
    engines = [name for name in subject.engines if any(row.engine == name for row in rows)]
    workloads = list(dict.fromkeys(row.workload for row in rows))
    width = max(7.0, 1.6 + 0.13 * len(engines) * len(workloads))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, 1.2 + 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[:, 0], panels, strict=True):
        own = [row for row in rows if subject.plotted(row)[1] == title]
        _panel(axis, own, {name: subject.engines[name].title for name in engines}, workloads)
        axis.set_title(title, loc="left", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    what = subject.suites[rows[0].suite]
    caption = f"{what[0].lower()}{what[1:]}, {subject.about}, our time below each name; {machine.place}; {machine.date}"
    figure.supxlabel(caption, fontsize=8, color="#666666")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def _panel(axis: Any, rows: list[Row], engines: dict[str, str], workloads: list[str]) -> None:
    """Latency relative to ours where ours ran, in milliseconds otherwise; whiskers from p10 to p90."""
    times = [(row.workload, row.median_ms) for row in rows if row.engine.startswith("ours")]
    ours = {name: min(t for w, t in times if w == name) for name, _ in times}
    relative = set(ours) == {row.workload for row in rows}
    bar = 0.84 / len(engines)
    for i, (engine, label) in enumerate(engines.items()):
        places, heights, whiskers = [], [], []
        for row in rows:
            if row.engine == engine:
                unit = ours[row.workload] if relative else 1.0
                places.append(workloads.index(row.workload) + (i - (len(engines) - 1) / 2) * bar)
                heights.append(row.median_ms / unit)
                whiskers.append(((row.median_ms - row.p10_ms) / unit, (row.p90_ms - row.median_ms) / unit))
        axis.bar(places, heights, bar * 0.92, color=COLOURS[engine], label=label, zorder=2)
        if places:
            low_high = list(zip(*whiskers, strict=True))
            axis.errorbar(places, heights, low_high, fmt="none", ecolor="#333333", elinewidth=0.7, zorder=3)
    if relative:
        axis.axhline(1, color=COLOURS["ours"], linewidth=0.8, zorder=1)
    axis.set_ylabel("time / ours" if relative else "ms", fontsize=9)
    labels = [f"{name}\n{ours[name]:.3g} ms" if name in ours else name for name in workloads]
    axis.set_xticks(range(len(workloads)), labels, fontsize=8, rotation=30 if len(workloads) > 6 else 0)
    axis.set_xlim(-0.6, len(workloads) - 0.4)
    axis.set_ylim(0, None)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
