"""What a worker process does for one engine: build, check, time. `bench.process` drives it."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.engines import ALL, Engine, Runner, Task
from bench.workloads import Workload

TRIAL_RUNS = 4
SLOW_S = 0.3  # one trial of such a run will do


@dataclass
class Built:
    """What an engine makes of a task: its fastest right form, or why there is none."""

    form: str = ""
    error: float = float("nan")  # norm-wise, against float64
    first_call_s: float = float("nan")  # building and the first result, of the first copy where there are several
    trial_s: float = float("nan")  # one warm run
    copies: int = 0
    note: str = ""
    wrong: str = ""  # not empty: no form is right, and none may be timed


def norm_error(result: np.ndarray, expected: np.ndarray) -> float:
    """‖result − expected‖ / ‖expected‖; infinite for another shape or a value that is not finite."""
    if result.shape != expected.shape or not np.isfinite(result).all():
        return float("inf")
    return float(np.linalg.norm(result.astype(np.float64) - expected) / np.linalg.norm(expected))


class Worker:
    """The methods the parent may call. `engine` is given instead of made by tests."""

    def __init__(self, name: str, threads: int, folder: Path, engine: Engine | None = None) -> None:
        torch.set_num_threads(threads)
        self.kind = ALL[name]
        self.engine = engine or self.kind.make()
        self.threads = threads
        self.folder = folder
        self.runner: Runner | None = None
        self.copies = self.next = 0

    def version(self) -> str:
        return self.engine.version()

    def build(self, workload: Workload, cold_bytes: int) -> Built:
        """Builds every form, compares its results with the float64 reference and keeps the fastest right one."""
        if self.runner is not None:
            self.drop()
        copies = min(workload.copies(cold_bytes), self.engine.max_copies)
        graphs = workload.graphs(copies, self.folder)
        task = Task(workload, graphs, workload.inputs(), self.threads, self.folder)
        tolerance = self.kind.tolerance if workload.layer else self.kind.net_tolerance
        best, failures, raised = Built(), [], None
        for form in self.engine.forms(task):
            start = time.perf_counter()
            try:
                runner = self.engine.build(task, form)
                result = runner.output(runner.run(0))
                first = time.perf_counter() - start
                error = norm_error(result, workload.expected(0, self.folder))
                for copy in workload.checked_copies(copies)[1:]:
                    result = runner.output(runner.run(copy))
                    error = max(error, norm_error(result, workload.expected(copy, self.folder)))
            except Exception as failure:  # of this form; another one may be right
                raised = failure
                told = (str(failure).strip() or "no reason").splitlines()[0]
                failures.append(f"{form}: {type(failure).__name__}: {told[:200]}")
                continue
            if not error <= tolerance:
                failures.append(f"{form}: error {error:.1e} > {tolerance:.0e}")
                continue
            trial = self._timed(runner, 0)
            if trial < SLOW_S:
                trial = min(trial, *(self._timed(runner, 0) for _ in range(TRIAL_RUNS)))
            if not self.runner or trial < best.trial_s:
                self.runner = runner
                best = Built(form, error, first, trial, copies, self.engine.note(task))
        if self.runner is None and raised is not None:
            raise raised
        if self.runner is None:
            best.wrong = "; ".join(failures)
        else:
            best.note = "; ".join(filter(None, [best.note, *(f"without {reason}" for reason in failures)]))
            for copy in range(copies):
                self.runner.run(copy)  # what an engine puts off to a copy's first run must not be timed
        self.copies, self.next = copies, 0
        return best

    @staticmethod
    def _timed(runner: Runner, copy: int) -> float:
        start = time.perf_counter()
        runner.run(copy)
        return time.perf_counter() - start

    def time(self, warm: int, runs: int) -> list[tuple[float, float]]:
        """Seconds, and seconds of processor time, of each of `runs` runs, after `warm` untimed ones; copies take turns,
        also across calls.
        """
        assert self.runner is not None, "nothing right was built"
        gc.disable()
        seconds = []
        for _ in range(warm + runs):
            before = time.process_time()
            wall = self._timed(self.runner, self.next)
            seconds.append((wall, time.process_time() - before))
            self.next = (self.next + 1) % self.copies
        gc.enable()
        return seconds[warm:]

    def drop(self) -> int:
        """Frees what was built; returns the bytes this process still holds (0 where the system does not tell)."""
        self.runner = None
        gc.collect()
        with suppress(OSError, AttributeError):  # elsewhere than with glibc, which keeps freed memory
            ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/statm")
        return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0
