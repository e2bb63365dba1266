"""Interleaved measurement: a process for each engine and number of threads, one of them running at a time.

For each workload, batch and number of threads ("cell"): every engine builds and is checked against the float64
reference; then rounds A B C …, B C … A, … of short bursts, so that a change of the machine's speed hits all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from bench.engines import ALL
from bench.limits import gflop, limit_seconds
from bench.machine import Machine
from bench.process import Handle, WorkerError
from bench.worker import SLOW_S, Built
from bench.workloads import Workload

BUILD_TIMEOUT_S = 900
CALL_TIMEOUT_S = 300
MIN_ROUNDS = 3
MAX_BURST = 50


@dataclass
class Row:
    """One engine's result on one cell. Times in milliseconds; NaN where there is none."""

    suite: str
    workload: str
    variant: str
    kind: str
    layer: str
    batch: int
    size: int
    threads: int
    engine: str
    status: str  # "ok", "wrong" (no time), "missing" or "failed"
    reason: str = ""
    group: str = "float32"  # see `Kind`
    form: str = ""
    note: str = ""
    version: str = ""
    error: float = float("nan")
    median_ms: float = float("nan")
    p10_ms: float = float("nan")
    p90_ms: float = float("nan")
    cpu_ms: float = float("nan")  # processor time of all threads, median
    runs: int = 0
    copies: int = 0
    first_call_ms: float = float("nan")
    gflops: float = float("nan")  # effective: direct arithmetic over time
    of_direct_limit: float = float("nan")
    of_winograd_limit: float = float("nan")

    def set_times(self, seconds: list[float]) -> float:
        """Median, 10th and 90th percentile of samples in seconds; returns the median, in seconds."""
        median = statistics.median(seconds)
        tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
        self.median_ms, self.p10_ms, self.p90_ms = 1e3 * median, 1e3 * tenths[0], 1e3 * tenths[8]
        self.runs = len(seconds)
        return median


COLUMNS = [f.name for f in fields(Row)]


@dataclass(frozen=True)
class Plan:
    """How long to measure: `rounds`, fewer (at least MIN_ROUNDS) where they would take more than `cell_s` seconds."""

    rounds: int = 7
    cell_s: float = 60
    burst_s: float = 0.12  # a round's share of one engine
    cold_bytes: int = 56 << 20

    def runs(self, trial_s: float) -> int:
        """In one burst."""
        return max(1, min(MAX_BURST, round(self.burst_s / trial_s)))

    def rounds_for(self, trials: list[float]) -> int:
        """When one run of each engine takes that long."""
        round_s = sum((self.runs(t) + 1) * t for t in trials)
        return max(min(MIN_ROUNDS, self.rounds), min(self.rounds, int(self.cell_s / max(round_s, 1e-9))))


class Bench:
    """Keeps the workers alive from cell to cell."""

    def __init__(
        self,
        engines: list[str],
        machine: Machine,
        plan: Plan,
        folder: Path,
        start: Callable[[str, int, Path], Handle] = Handle,
    ) -> None:
        self.engines = engines
        self.start = start
        self.machine = machine
        self.plan = plan
        self.folder = folder
        self.handles: dict[tuple[str, int], Handle] = {}
        self.missing: dict[str, str] = {}

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()
        self.handles.clear()

    def _handle(self, name: str, threads: int) -> Handle | None:
        """The worker, started anew if its process ended; None if the engine is missing."""
        if name in self.missing:
            return None
        handle = self.handles.get((name, threads))
        if handle is None or not handle.alive:
            try:
                handle = self.handles[name, threads] = self.start(name, threads, self.folder)
                package = ALL[name].package or "parnet-kernels"
                self.machine.versions[package] = handle.version
            except WorkerError as error:
                self.missing[name] = str(error)
                return None
        return handle

    def cell(self, workload: Workload, threads: int, say: Callable[[str], None]) -> Iterator[Row]:
        """The rows of one cell, in the order of the engines."""
        for copy in workload.checked_copies(workload.copies(self.plan.cold_bytes)):
            say("float64 reference")
            workload.expected(copy, self.folder)
        rows = {name: self._row(workload, threads, name) for name in self.engines}
        ready: dict[str, Built] = {}
        for name, row in rows.items():
            say(f"building {ALL[name].title}")
            handle = self._handle(name, threads)
            if handle is None:
                row.status, row.reason = "missing", self.missing[name]
                continue
            row.version = handle.version
            try:
                built = handle.call("build", workload, self.plan.cold_bytes, timeout=BUILD_TIMEOUT_S)
            except WorkerError as error:
                row.status, row.reason = "failed", str(error)
                continue
            row.form, row.note, row.error, row.copies = built.form, built.note, built.error, built.copies
            row.first_call_ms = 1e3 * built.first_call_s
            if built.wrong:
                row.status, row.reason = "wrong", built.wrong
            else:
                ready[name] = built
        self._rounds(workload, threads, rows, ready, say)
        for name in ready:
            with suppress(WorkerError):
                kept = self.handles[name, threads].call("drop", timeout=CALL_TIMEOUT_S)
                # Started anew if it holds a large part of memory between cells: torch.compile keeps old weights.
                if kept > self.machine.memory_gb * 2**30 / 24:
                    self.handles.pop((name, threads)).close()
        yield from rows.values()

    def _rounds(
        self,
        workload: Workload,
        threads: int,
        rows: dict[str, Row],
        ready: dict[str, Built],
        say: Callable[[str], None],
    ) -> None:
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        order = list(ready)
        rounds = self.plan.rounds_for([built.trial_s for built in ready.values()])
        for round_ in range(rounds):
            for name in order:
                say(f"{ALL[name].title}, round {round_ + 1}/{rounds}")
                trial = ready[name].trial_s
                warm = 1 if trial < SLOW_S else 0  # a slow run warms up by itself
                handle = self.handles[name, threads]
                try:
                    samples[name] += handle.call("time", warm, self.plan.runs(trial), timeout=CALL_TIMEOUT_S)
                except WorkerError as error:
                    rows[name].status, rows[name].reason = "failed", str(error)
            order = [name for name in order[1:] + order[:1] if rows[name].status == "ok"]
        for name in order:
            self._fill(rows[name], workload, threads, samples[name])

    def _row(self, workload: Workload, threads: int, engine: str) -> Row:
        return Row(
            suite=workload.suite,
            workload=workload.title,
            variant=workload.variant,
            kind=workload.kind,
            layer=workload.layer or "",
            batch=workload.batch,
            size=workload.size,
            threads=threads,
            engine=engine,
            status="ok",
            group=ALL[engine].group,
        )

    def _fill(self, row: Row, workload: Workload, threads: int, seconds: list[tuple[float, float]]) -> None:
        median = row.set_times([wall for wall, _ in seconds])
        row.cpu_ms = 1e3 * statistics.median(cpu for _, cpu in seconds)
        row.gflops = gflop(workload) / median
        ceilings = self.machine.ceilings.get(threads)
        if ceilings is not None and row.group == "float32":
            row.of_direct_limit = limit_seconds(workload, ceilings, winograd=False) / median
            row.of_winograd_limit = limit_seconds(workload, ceilings, winograd=True) / median
