"""Times of calls on a device by events, in three modes. Tests give `samples` a device whose clock they drive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

MODES = ("warm", "cold", "graph")
SAMPLE_MS = 1.0  # what a warm sample's calls last together, about
MAX_CALLS = 100
WARM_UP = 3
Call = Callable[[], Any]


class Event(Protocol):
    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`."""


class Device(Protocol):
    """What a measurement needs of a device."""

    torch_device: torch.device

    def event(self) -> Event: ...

    def synchronize(self) -> None: ...

    def flush(self) -> None:
        """Drives what the device's caches hold out of them."""

    def capture(self, call: Call) -> tuple[Call, Any]:
        """(a call that repeats `call` as one graph, what it leaves its result in)."""


class CudaDevice:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._buffer = torch.empty(max(64 << 20, 2 * self.l2_bytes), dtype=torch.uint8, device=self.torch_device)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._buffer.zero_()

    def capture(self, call: Call) -> tuple[Call, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles, tunes or allocates at first must not do so in a capture
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result


def why_no_device() -> str | None:
    """What is missing for a `CudaDevice`, or None."""
    if torch.cuda.is_available():
        return None
    cause = "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no device was found"
    return f"needs a CUDA device, torch.cuda.is_available() is False: {cause} (torch {torch.__version__})"


def sample(device: Device, call: Call, calls: int, *, cold: bool) -> float:
    """Milliseconds of one call: the mean of `calls` in a row; of exactly one after a flush if cold."""
    start, end = device.event(), device.event()
    if cold:
        device.flush()
        calls = 1
    start.record()
    for _ in range(calls):
        call()
    end.record()
    device.synchronize()
    return start.elapsed_time(end) / calls


def calls_in_a_sample(device: Device, call: Call) -> int:
    """After some untimed calls: how many last SAMPLE_MS."""
    for _ in range(WARM_UP):
        call()
    device.synchronize()
    trial = min(sample(device, call, 1, cold=False) for _ in range(WARM_UP))
    return max(1, min(MAX_CALLS, round(SAMPLE_MS / max(trial, 1e-6))))
