"""Queues: what `DeviceParallel` needs of a device. On CUDA devices a queue is a stream.

Work of one queue runs in order, that of several in any order, but for events: one that a queue records comes after the
work issued to it so far, and what is issued after `wait` comes after the event. On the CPU work is done when it is
issued, so that there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch

from parnet_kernels.cuda.workspace import capturing

Work = Callable[[], object]


class Event(Protocol):
    def synchronize(self) -> None:
        """Waits, in this thread."""


class Queue(Protocol):
    """`new`: a queue of its own; `current`: where the caller's work on a device goes."""

    @classmethod
    def new(cls, device: torch.device) -> Self: ...
    @classmethod
    def current(cls, device: torch.device) -> Self: ...

    def issue(self, work: Work, receiver: Any = None) -> None:
        """receiver: the queue of another device that the work writes to."""

    def record(self) -> Event: ...
    def wait(self, event: Any) -> None: ...
    def captured(self, work: Work) -> Work:
        """The same work for less time of the host; it runs once, or twice, meanwhile."""


class _Done:
    def synchronize(self) -> None:
        pass


class HostQueue:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def new(cls, device: torch.device) -> Self:
        return cls(device)

    @classmethod
    def current(cls, device: torch.device) -> Self:
        return cls(device)

    def issue(self, work: Work, receiver: Any = None) -> None:
        work()

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Any) -> None:
        pass

    def captured(self, work: Work) -> Work:
        return work


class CudaQueue:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    @classmethod
    def new(cls, device: torch.device) -> Self:
        return cls(torch.cuda.Stream(device))

    @classmethod
    def current(cls, device: torch.device) -> Self:
        if capturing(device):
            raise RuntimeError("parnet_kernels: a DeviceParallel has graphs of its own: it cannot be captured into one")
        return cls(torch.cuda.current_stream(device))

    def issue(self, work: Work, receiver: Any = None) -> None:
        # PyTorch copies between devices on the source's current stream, and orders the target's current stream.
        with torch.cuda.stream(None if receiver is None else receiver._stream), torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        self._stream.wait_event(event)

    def captured(self, work: Work) -> Work:
        # Not on the queue itself: the default stream cannot be captured. Once before: a capture loads no kernels.
        side = torch.cuda.Stream(self._stream.device)
        side.wait_stream(self._stream)
        with torch.cuda.stream(side):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device), torch.cuda.graph(graph, stream=side):
            work()
        return graph.replay


QUEUES: dict[str, type[Queue]] = {"cpu": HostQueue, "cuda": CudaQueue}  # by type of device
