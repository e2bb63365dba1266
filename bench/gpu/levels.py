"""Each launch of our CUDA network at batch 1 in fp16: measured beside what bench/cuda_levels.py models.

A launch is replayed alone, many times in a row ("warm": its weights lie in the L2 cache) and after a flush of the cache
("cold", which is nearer to the model's bytes from memory). The sum of launches exceeds the network's graph, in which
they overlap. The model is printed where it knows the device.
"""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bench import cuda_levels, tables
from bench.gpu.tasks import TOLERANCE, GpuTask, error_of
from bench.gpu.timing import Call, Device, calls_in_a_sample, sample
from bench.report import number
from bench.workloads import Workload
from parnet_kernels.config import VARIANTS

SAMPLES = 40


@dataclass
class LevelRow:
    """One launch; times are medians in µs, NaN where the device has no model."""

    variant: str
    launch: str
    modelled_us: float
    roofline_us: float  # modelled
    warm_us: float
    cold_us: float


def model_for(device_name: str) -> str | None:
    """The key in `cuda_levels.GPUS` of a device as CUDA names it."""
    return next((key for key in cuda_levels.GPUS if key.lower() in device_name.lower()), None)


class Launches(NamedTuple):
    """A captured network's launches in order: labels, calls that play one each, the error of the result they leave."""

    labels: list[str]
    calls: list[Call]
    error: float


def launches(variant: str, device: Device) -> Launches:
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder:
        task = GpuTask(Workload(variant, VARIANTS[variant], None, 1), "fp16", device.torch_device, Path(folder))
        network = task.workload.network(task.folder).to(task.device, task.torch_dtype)
        captured = network.capture(task.inputs[0])
        buffers = [captured._memory, captured.result, captured.input, *captured._weights.tensors]

        def play(record: torch.Tensor) -> Call:
            return lambda: torch.ops.parnet._cuda_play(buffers, record)

        low = captured._lowered
        calls = [play(record) for record in cuda_levels.records(low.program)]
        captured.result.fill_(math.nan)
        for call in calls:  # in order, so that each finds what its predecessors leave
            call()
        return Launches(list(low.labels), calls, error_of([captured.result], task.expected))


def measure(
    variant: str, device: Device, device_name: str, launches: Callable[[str, Device], Launches] = launches
) -> list[LevelRow]:
    """Times every launch. Raises RuntimeError where the CUDA kernels cannot run, or are wrong."""
    labels, calls, error = launches(variant, device)
    tolerance = TOLERANCE["fp16"][1]
    if not error <= tolerance:
        raise RuntimeError(f"wrong result, not timed: error {error:.1e} > {tolerance:.0e}")
    key = model_for(device_name)
    model = cuda_levels.levels(variant, cuda_levels.GPUS[key], False) if key else []
    rows = []
    for i, (label, call) in enumerate(zip(labels, calls, strict=True)):
        count = calls_in_a_sample(device, call)
        medians = [
            1e3 * statistics.median(sample(device, call, count, cold=cold) for _ in range(SAMPLES))
            for cold in (False, True)
        ]
        modelled = model[i] if i < len(model) else None
        if modelled is not None and modelled.label != label:
            modelled = None  # another division into launches than the model's
        rows.append(
            LevelRow(
                variant,
                label,
                modelled.modelled if modelled else math.nan,
                modelled.roofline if modelled else math.nan,
                *medians,
            )
        )
    return rows


HEADER = ("launch", "roofline µs modelled", "µs modelled", "µs warm", "µs cold", "cold / modelled")


def show(console: Console, rows: list[LevelRow], device_name: str) -> None:
    """A line for each launch, and one for their sum; warm and cold are measured."""

    def line(label: str, roofline: float, modelled: float, warm: float, cold: float) -> tuple[str, ...]:
        return label, *map(number, (roofline, modelled, warm, cold, cold / modelled))

    columns = [sum(getattr(r, name) for r in rows) for name in ("roofline_us", "modelled_us", "warm_us", "cold_us")]
    lines = [line(r.launch, r.roofline_us, r.modelled_us, r.warm_us, r.cold_us) for r in rows]
    title = f"ParNet-{rows[0].variant.upper()}, fp16, batch 1, launch by launch on {device_name}"
    tables.show(console, title, HEADER, [*lines, line("sum", *columns)], total=1)


def write(rows: list[LevelRow], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "levels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(LevelRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path
