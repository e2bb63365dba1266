"""What a public operator costs besides its kernel: dispatch, the look-up of its packed weights, and the check that they
are still those of the weights it is given.

Against calls with packed weights, in alternating passes over copies of a layer: at each call weights, and with them the
interpreter, have left the caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bench import tables
from bench.engines import ENGINES, Task
from bench.engines.ours import Ours
from bench.worker import norm_error
from bench.workloads import Workload
from parnet_kernels import _native
from parnet_kernels.cpu import pack as cpu


class CallTime(NamedTuple):
    """Median seconds of a call."""

    public: float
    packed: float
    copies: int  # distinct weights


def measure(workload: Workload, threads: int, cold_bytes: int, folder: Path, rounds: int) -> CallTime:
    """Of a single layer, on channels_last maps.

    Raises:
        RuntimeError: there are no native kernels, the two ways to call them do not return the same, or not what the
            float64 reference does.
    """
    if _native.cpu_error:
        raise RuntimeError(f"parnet_kernels: no packed calls without the native CPU kernels: {_native.cpu_error}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        copies = workload.copies(cold_bytes)
        graphs = workload.graphs(copies, folder)
        runner = Ours().build(Task(workload, graphs, workload.inputs(), threads, folder), "NHWC")
        x, *others = runner.inputs
        nodes = [graph.nodes[0] for graph in graphs]
        storage = cpu.storage_of(x.shape[2] * x.shape[3] // nodes[0].stride ** 2, nodes[0].parameters["weight"])
        weights = [cpu.pack(n.kind, n.stride, n.activation, {**n.parameters}, storage) for n in nodes]

        @torch.inference_mode()
        def packed(copy: int) -> Tensor:
            y = others[0] if others else None
            result: Tensor = torch.ops.parnet._cpu_layer.default(x, y, weights[copy], True)
            return result

        for copy in range(copies):
            if not torch.equal(runner.run(copy), packed(copy)):
                raise RuntimeError(f"{workload.title}: the public operator and the packed call disagree")
        for copy in workload.checked_copies(copies):
            error = norm_error(runner.output(packed(copy)), workload.expected(copy, folder))
            if not error <= (limit := ENGINES["ours"].tolerance):
                raise RuntimeError(f"{workload.title}: error {error:.1e} > {limit:.0e}")
        gc.disable()
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for call, times in zip((runner.run, packed), seconds, strict=True):
                for copy in range(copies):
                    start = time.perf_counter()
                    call(copy)
                    times.append(time.perf_counter() - start)
    finally:
        gc.enable()
        torch.set_num_threads(before)
    return CallTime(statistics.median(seconds[0]), statistics.median(seconds[1]), copies)


HEADER = ("layer", "batch", "thr.", "copies", "packed ms", "public ms", "more by µs", "of packed")


def show(console: Console, rows: list[tuple[Workload, int, CallTime]]) -> None:
    """A line for each (workload, threads)."""
    lines = []
    for workload, threads, t in rows:
        more = t.public - t.packed
        times = f"{1e3 * t.packed:.3f}", f"{1e3 * t.public:.3f}", f"{1e6 * more:.0f}", f"{100 * more / t.packed:.1f} %"
        lines.append((workload.title, str(workload.batch), str(threads), str(t.copies), *times))
    tables.show(console, "Public operators against calls with packed weights: medians", HEADER, lines)
