"""Where our network's time goes: its layers within one run of the whole, timed by the scheduler of the native kernels.

Seconds of all threads together, divided by their number. "gates" are the SE vectors of a layer, "transform" is the part
of its input transform that threads share; the rest of it, the products and the epilogue are one stage.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bench import tables
from bench.limits import Cost, costs
from bench.machine import Ceilings
from bench.workloads import Workload
from parnet_kernels.config import layers

GATE, TRANSFORM, WAIT = 2, 3, 9  # enum class Task in csrc/cpu/schedule/stages.h


class LayerTime(NamedTuple):
    name: str
    seconds: float  # median, everything but waiting
    gates: float
    transform: float
    waiting: float
    cost: Cost | None  # None: conversion of the input, channel means and classifier


def profile(workload: Workload, threads: int, folder: Path, rounds: int) -> tuple[list[LayerTime], float]:
    """Each layer's median time, and the whole network's, in alternating runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = workload.network(folder).prepare()
        (image,) = workload.inputs()
        samples: dict[int, list[list[float]]] = defaultdict(list)
        whole = []
        with torch.inference_mode():
            for round_ in range(rounds + 1):  # the first one plans
                start = time.perf_counter()
                network(image)
                end = time.perf_counter()
                stages = network.profile(image)
                if round_:
                    whole.append(end - start)
                    for layer, sums in _by_layer(stages, threads).items():
                        samples[layer].append(sums)
    finally:
        torch.set_num_threads(before)
    names = [layer.name for layer in layers(workload.config)]
    by_name = dict(zip([layer.name for layer in workload.graph_layers], costs(workload), strict=False))
    times = []
    for layer, rows in sorted(samples.items()):
        name = names[layer] if layer >= 0 else "input and head"
        work, gates, transform, waiting = (statistics.median(column) for column in zip(*rows, strict=True))
        times.append(LayerTime(name, work, gates, transform, waiting, by_name.get(name)))
    return times, statistics.median(whole)


def _by_layer(stages: list[tuple[int, int, float]], threads: int) -> dict[int, list[float]]:
    """Of each layer: seconds of work, of which gates and transform, and of waiting."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0] * 4)
    for task, layer, seconds in stages:
        row = sums[layer]
        if task == WAIT:
            row[3] += seconds / threads
            continue
        row[0] += seconds / threads
        if task in (GATE, TRANSFORM):
            row[1 if task == GATE else 2] += seconds / threads
    return sums


HEADER = ("layer", "ms", "gates", "transform", "waiting", "share", "GFLOP/s", "of limit")


def show(
    console: Console,
    workload: Workload,
    threads: int,
    times: list[LayerTime],
    whole: float,
    ceilings: Ceilings | None,
) -> None:
    """A line for each layer, and one for their sum; "of limit": of Winograd's, see `bench.limits`."""
    total = sum(t.seconds + t.waiting for t in times)
    rows = []
    for t in times:
        parts = [f"{1e3 * s:.2f}" if s >= 5e-6 else "–" for s in (t.seconds, t.gates, t.transform, t.waiting)]
        rate = limit = "–"
        if t.cost:
            rate = f"{2e-9 * t.cost.macs / t.seconds:.0f}"
            if ceilings:
                limit = f"{100 * t.cost.seconds(ceilings, winograd=True) / t.seconds:.0f} %"
        rows.append((t.name, *parts, f"{100 * (t.seconds + t.waiting) / total:.1f} %", rate, limit))
    macs = sum(t.cost.macs for t in times if t.cost)
    rows.append(("sum", f"{1e3 * total:.2f}", "", "", "", "", f"{2e-9 * macs / total:.0f}", ""))
    what = f"{workload.title}, batch {workload.batch}, {threads} thr."
    tables.show(console, f"{what}: layers within a run; network {1e3 * whole:.2f} ms", HEADER, rows, total=1)
