"""What `python -m bench gpu` does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench import report, tables
from bench.gpu import levels
from bench.gpu.engines import ENGINES, GpuEngine
from bench.gpu.measure import COLUMNS, GpuPlan, GpuRow, cell
from bench.gpu.tasks import DTYPES as DTYPES
from bench.gpu.tasks import GpuTask
from bench.gpu.timing import MODES as MODES
from bench.gpu.timing import CudaDevice, Device, why_no_device
from bench.machine import Machine, describe
from bench.measure import Row
from bench.workloads import Workload, select

SUITES = ("net", "ops", "train", "levels")
SUBJECT = report.Subject(
    ENGINES,
    {"net": "Whole network", "ops": "Single layers", "train": "Training step (forward and backward)"},
    (("dtype", "dtype", lambda row: row.dtype), ("mode", "mode", lambda row: row.mode)),
    COLUMNS,
    "on a GPU",
    lambda row: (
        f"{row.suite}-{row.mode}" if row.suite == "net" else f"{row.suite}-{row.variant}-{row.mode}",
        f"batch {row.batch}, {row.dtype}, {row.mode}",
    ),
    limits=False,
)


@dataclass
class GpuMachine(Machine):
    """A machine, and its device."""

    gpu: str = ""

    @property
    def place(self) -> str:
        return self.gpu

    def line(self) -> str:
        return f"{self.gpu}; {super().line()}"

    def ceilings_line(self) -> str:
        return "Times by CUDA events (see bench/gpu/__init__.py); every result was compared with float64 first"


def describe_gpu() -> GpuMachine:
    """This machine with its current device, and the driver's view of it."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = (
        f"{p.name} (sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.L2_cache_size / 2**20:.0f} MB L2, "
        f"{p.total_memory / 2**30:.0f} GB), CUDA {torch.version.cuda}"
    )
    return GpuMachine(**vars(describe()), gpu=gpu)


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    suites: list[str]
    variants: list[str]
    batches: list[int]
    size: int
    dtypes: list[str]
    modes: list[str]
    engines: list[str]
    plan: GpuPlan
    minutes: float
    layers: tuple[str, ...] | None = None  # only these layers


def tasks(request: Request, device: torch.device, folder: Path) -> list[GpuTask]:
    """Networks, single layers, then training steps of both; each in every format."""
    found: list[tuple[Workload, bool]] = []
    for suite in request.suites:
        if suite != "levels":
            suites = ["net", "ops"] if suite == "train" else [suite]
            chosen = select(suites, request.variants, request.batches, request.size)
            found += [(w, suite == "train") for w in chosen]
    if request.layers is not None:
        found = [(w, training) for w, training in found if w.layer is None or w.layer in request.layers]
    return [GpuTask(w, dtype, device, folder, training) for w, training in found for dtype in request.dtypes]


def rows_of(
    request: Request, device: Device, folder: Path, console: Console, engines: dict[str, GpuEngine]
) -> Iterator[GpuRow]:
    """Measures task by task; stops at the request's minutes, and says so."""
    every = tasks(request, device.torch_device, folder)
    start = time.monotonic()
    with tables.progress() as bar:
        shown = bar.add_task("starting", total=len(every), left="")
        for done, task in enumerate(every):
            if time.monotonic() - start > 60 * request.minutes:
                console.print(
                    f"{request.minutes:g} minutes are over: {len(every) - done} cells left out", style="yellow"
                )
                return
            where = f"{task.suite} {task.workload.title}, batch {task.workload.batch}, {task.dtype}"

            def say(what: str, where: str = where) -> None:
                bar.update(shown, description=f"{where}: {what}")

            yield from cell(task, engines, request.modes, request.plan, device, say)
            bar.update(shown, advance=1)


def _levels(request: Request, device: Device, name: str, console: Console, folder: Path) -> bool:
    """Each variant's launches; False where the kernels could not run, which is said."""
    found = []
    for variant in request.variants:
        try:
            rows = levels.measure(variant, device, name)
        except RuntimeError as error:
            console.print(f"launches of ParNet-{variant.upper()}: {error}", style="yellow")
            continue
        levels.show(console, rows, name)
        found += rows
    if found:
        console.print(f"wrote {levels.write(found, folder)}", highlight=False, markup=False)
    return bool(found)


def run(
    request: Request,
    folder: Path,
    console: Console,
    device: Device | None = None,
    machine: Machine | None = None,
    engines: dict[str, GpuEngine] = ENGINES,
) -> int:
    """Measures, shows and writes what is asked for; returns the exit code. Tests give a device and a machine.

    1 without a CUDA device, or if nothing was measured; an engine that fails or is missing is reported in its row.
    """
    if device is None:
        if reason := why_no_device():
            console.print(f"bench gpu {reason}", style="red", highlight=False, soft_wrap=True)
            return 1
        device = CudaDevice()
    machine = machine or describe_gpu()
    for name in request.engines:
        with suppress(ImportError):  # reported in its rows
            machine.versions[engines[name].package] = engines[name].version()
    rows: list[Row] = []
    chosen = {name: engine for name, engine in engines.items() if name in request.engines}
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as scratch:
        try:
            for row in rows_of(request, device, Path(scratch), console, chosen):
                rows.append(row)
        except KeyboardInterrupt:
            console.print("interrupted: what is measured is kept", style="yellow")
    if rows:
        report.show(console, rows, machine, SUBJECT)
        for path in report.write(rows, machine, folder, SUBJECT):
            console.print(f"wrote {path}", highlight=False)
    measured = any(row.status == "ok" for row in rows)
    if "levels" in request.suites:
        measured |= _levels(request, device, machine.place, console, folder)
    return 0 if measured else 1
