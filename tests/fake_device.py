"""Devices for the GPU benchmark's tests: one whose clock a test drives, and the CPU in a GPU's place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.engines import Built, GpuEngine, _eager
from bench.gpu.tasks import GpuTask
from bench.gpu.timing import Call
from bench.workloads import Workload
from parnet_kernels.config import ParNetConfig

TINY = ParNetConfig((8, 12, 16, 24), (3, 3, 3), num_classes=10)
CPU = torch.device("cpu")


class _Event:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


class FakeDevice:
    """Its clock moves only where a test moves it, in ms; `log` is what happened, in order."""

    torch_device = CPU
    now = 0.0
    cold = False

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self) -> _Event:
        return _Event(self)

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        self.now += 1000
        self.cold = True
        self.log.append("flush")

    def capture(self, call: Call) -> tuple[Call, Any]:
        result = call()
        self.log.append("capture")
        return lambda: self.work("replay", 0.125), result

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds + (4.0 if self.cold else 0.0)
        self.cold = False


class HostDevice(FakeDevice):
    """The CPU itself, by the host's clock; a graph is the call."""

    def event(self) -> Any:
        class Event:
            def record(self) -> None:
                self.at = time.perf_counter()

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def flush(self) -> None:
        pass

    def capture(self, call: Call) -> tuple[Call, Any]:
        return call, call()


def task_of(
    layer: str | None, folder: Path, dtype: str = "fp32", device: torch.device = CPU, **options: Any
) -> GpuTask:
    return GpuTask(Workload("tiny", TINY, layer, 2, 32), dtype, device, folder, **options)


def engine_of(
    name: str, cost: float, device: FakeDevice, change: Callable[[int, torch.Tensor], Any] | None = None
) -> GpuEngine:
    """Eager, with a cost on the fake clock; `change` gets the number of the call and its result."""

    def build(task: GpuTask, mode: str) -> Built:
        eager = _eager(task, mode)
        count = 0

        def run() -> Any:
            nonlocal count
            count += 1
            device.work(name, cost)
            y = eager.run()
            return y if change is None else change(count, y)

        return Built(run, eager.results)

    return GpuEngine(name, build, "torch")
