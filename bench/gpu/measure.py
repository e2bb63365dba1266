"""One cell on a device: build, check, then samples of all right engines in turns, check again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch

from bench.gpu.engines import Built, GpuEngine
from bench.gpu.tasks import GpuTask, error_of, products_in
from bench.gpu.timing import Call, Device, calls_in_a_sample, sample
from bench.limits import gflop
from bench.measure import Row


@dataclass
class GpuRow(Row):
    """As on the CPU; `threads` and the limits do not apply."""

    dtype: str = ""
    mode: str = ""


LEFT_OUT = {"threads", "group", "cpu_ms", "form", "copies", "first_call_ms", "of_direct_limit", "of_winograd_limit"}
COLUMNS = [f.name for f in fields(GpuRow) if f.name not in LEFT_OUT]


@dataclass(frozen=True)
class GpuPlan:
    """`rounds` over all engines, `samples` of each in a round."""

    rounds: int = 7
    samples: int = 20


@dataclass
class _Ready:
    """An engine whose result is right, in one mode."""

    built: Built
    call: Call
    last: object  # what the call returned, or the tensor that a graph fills
    calls: int
    seconds: list[float]


def reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def cell(
    task: GpuTask,
    engines: dict[str, GpuEngine],
    modes: list[str],
    plan: GpuPlan,
    device: Device,
    say: Callable[[str], None],
) -> Iterator[GpuRow]:
    """The rows of one task, mode by mode, in the order of the engines that have its suite."""
    chosen = {name: engine for name, engine in engines.items() if task.suite in engine.suites}
    with products_in(task.dtype):
        say("float64 reference")
        no_reference = ""
        try:
            _ = task.expected
        except RuntimeError as error:  # such as too little memory: without it nothing can be called right
            no_reference = f"no float64 reference: {reason_of(error)}"
        for mode in modes:
            torch._dynamo.reset()
            rows = {name: _row(task, name, mode) for name in chosen}
            if no_reference:
                for row in rows.values():
                    row.status, row.reason = "failed", no_reference
                    yield row
                continue
            ready: dict[str, _Ready] = {}
            for name, engine in chosen.items():
                say(f"{mode}: building {engine.title}")
                found = _prepare(task, engine, mode, rows[name], device)
                if found is not None:
                    ready[name] = found
            _rounds(task, chosen, mode, rows, ready, plan, device, say)
            yield from rows.values()
            ready.clear()
            gc.collect()
            torch.cuda.empty_cache()


def _row(task: GpuTask, engine: str, mode: str) -> GpuRow:
    w = task.workload
    return GpuRow(
        suite=task.suite,
        workload=w.title,
        variant=w.variant,
        kind=w.kind,
        layer=w.layer or "",
        batch=w.batch,
        size=w.size,
        threads=0,
        engine=engine,
        status="ok",
        dtype=task.dtype,
        mode=mode,
    )


def _wrong(task: GpuTask, engine: GpuEngine, built: Built, result: object, row: GpuRow) -> bool:
    """Whether a result is wrong; notes its error, and the reason."""
    row.error = error_of(built.results(result), task.expected)
    tolerance = task.tolerance(engine.ours)
    if row.error <= tolerance:
        return False
    row.status, row.reason = "wrong", f"error {row.error:.1e} > {tolerance:.0e}"
    return True


def _prepare(task: GpuTask, engine: GpuEngine, mode: str, row: GpuRow, device: Device) -> _Ready | None:
    """Builds, captures in mode "graph", and compares; None, with the row's status, where there is nothing to time."""
    try:
        row.version = engine.version()
        built = engine.build(task, mode)
        call = built.run
        last = call()
        device.synchronize()
        if _wrong(task, engine, built, last, row):
            return None
        if mode == "graph":
            call, last = built.graph() if built.graph else device.capture(call)
            call()
            device.synchronize()
            if _wrong(task, engine, built, last, row):
                return None
        return _Ready(built, call, last, calls_in_a_sample(device, call), [])
    except ImportError as error:
        row.status, row.reason = "missing", reason_of(error)
    except Exception as error:  # of any engine: the others go on
        row.status, row.reason = "failed", reason_of(error)
    return None


def _rounds(
    task: GpuTask,
    engines: dict[str, GpuEngine],
    mode: str,
    rows: dict[str, GpuRow],
    ready: dict[str, _Ready],
    plan: GpuPlan,
    device: Device,
    say: Callable[[str], None],
) -> None:
    order = list(ready)
    for round_ in range(plan.rounds):
        for name in order:
            say(f"{mode}: {engines[name].title}, round {round_ + 1}/{plan.rounds}")
            one = ready[name]
            try:
                one.call()  # warms up
                for _ in range(plan.samples):
                    one.seconds.append(1e-3 * sample(device, one.call, one.calls, cold=mode == "cold"))
            except Exception as error:
                rows[name].status, rows[name].reason = "failed", reason_of(error)
        order = [name for name in order[1:] + order[:1] if rows[name].status == "ok"]
    for name in order:
        one, row = ready[name], rows[name]
        if mode != "graph":
            one.last = one.call()
        device.synchronize()
        if _wrong(task, engines[name], one.built, one.last, row):
            row.reason += " after the last sample"
            continue
        _fill(row, task, one.seconds)


def _fill(row: GpuRow, task: GpuTask, seconds: list[float]) -> None:
    median = row.set_times(seconds)
    # A backward pass is two convolutions of the forward's size, and what an engine recomputes is not counted.
    row.gflops = (3 if task.training else 1) * gflop(task.workload) / median
