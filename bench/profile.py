"""Where our network's time goes: its layers one by one, in the network's order, on the activations they get there.

A whole pass lies between two runs of a layer, so its weights are as cold as in the network. Each is a call of the
public operator; the sum exceeds the network's time, which keeps its own layout between layers and makes one call.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from bench.limits import Cost, costs
from bench.machine import Ceilings
from bench.workloads import Workload
from parnet_kernels.deployed import DeployedParNet


class LayerTime(NamedTuple):
    name: str
    seconds: float  # median
    cost: Cost


def profile(workload: Workload, threads: int, folder: Path, rounds: int) -> tuple[list[LayerTime], float]:
    """Each layer's median time, and the whole network's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = workload.network(folder).prepare()
        (image,) = workload.inputs()
        samples: dict[str, list[float]] = {layer.name: [] for layer in workload.graph_layers}
        whole = []
        for round_ in range(rounds + 1):  # the first packs weights
            with torch.inference_mode():
                seconds = _layers(workload, network, image)
                start = time.perf_counter()
                network(image)
                end = time.perf_counter()
            if round_:
                whole.append(end - start)
                for name, value in seconds.items():
                    samples[name].append(value)
    finally:
        torch.set_num_threads(before)
    times = [
        LayerTime(name, statistics.median(values), cost)
        for (name, values), cost in zip(samples.items(), costs(workload), strict=False)
    ]
    return times, statistics.median(whole)


def _layers(workload: Workload, network: DeployedParNet, image: Tensor) -> dict[str, float]:
    made, seconds = {"image": image}, {}
    for layer in workload.graph_layers:
        module = network.layers[layer.name.replace(".", "_")]
        inputs = [made[name] for name in layer.inputs]
        start = time.perf_counter()
        made[layer.name] = module(*inputs)
        seconds[layer.name] = time.perf_counter() - start
    return seconds


def table(workload: Workload, threads: int, times: list[LayerTime], whole: float, ceilings: Ceilings | None) -> Table:
    """A line for each layer, and one for their sum."""
    total = sum(t.seconds for t in times)
    what = f"{workload.title}, batch {workload.batch}, {threads} thr."
    made = Table(title=f"{what}: layers one by one; network {1e3 * whole:.1f} ms", title_justify="left")
    made.add_column("layer")
    for heading in ("ms", "share", "GFLOP/s", "of Winograd limit"):
        made.add_column(heading, justify="right")
    for t in times:
        share = f"{100 * t.seconds / total:.1f} %"
        limit = f"{100 * t.cost.seconds(ceilings, winograd=True) / t.seconds:.0f} %" if ceilings else "–"
        made.add_row(t.name, f"{1e3 * t.seconds:.2f}", share, f"{2e-9 * t.cost.macs / t.seconds:.0f}", limit)
    macs = sum(t.cost.macs for t in times)
    made.add_section()
    made.add_row("sum", f"{1e3 * total:.2f}", "", f"{2e-9 * macs / total:.0f}", "")
    return made
