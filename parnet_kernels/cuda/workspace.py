"""Scratch memory of the CUDA kernels: one block for each device and stream, so that streams never share one.

Launches of a program follow each other on their stream; the lock keeps two threads from interleaving theirs on one.
Blocks grow and are kept, so a warm call allocates nothing. Their counters (record.COUNTER_BYTES) start zero and
every launch leaves them zero. A stream is known by its handle: that of the per-thread default stream means another
stream in each thread, and that of a stream of somebody else's may have been given to a new one, which then waits for
what the old one was given.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parnet_kernels.cuda.record import COUNTER_BYTES
from parnet_kernels.locks import Lock

PER_THREAD = 2  # cudaStreamPerThread


class _Block:
    def __init__(self) -> None:
        self.lock = Lock()
        self.memory: Tensor | None = None
        self.used: torch.cuda.Event | None = None  # after the last launches, where the handle may be given anew


_blocks: dict[tuple[int, int, int], _Block] = {}
_lock = Lock()


def allocate(device: torch.device, size: int) -> Tensor:
    """Scratch memory with counters that are zero; all else is as it comes. A graph clears them at each replay."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    memory[:COUNTER_BYTES].zero_()
    return memory


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Packed:
    """Tensors that were packed on the current stream, which it waits for: every stream may read them from now on."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self.tensors = [*tensors]
        self._known: set[int] = set()  # handles of the streams that the allocator knows of
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            stream.synchronize()
            self._known.add(stream.cuda_stream)

    def read(self, device: torch.device) -> None:
        """To be called after launches on the current stream that read the tensors: whoever forgets them, their memory
        is given away only when these launches, and later ones on this stream, have ended.
        """
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream not in self._known:
            for t in self.tensors:
                t.record_stream(stream)
            self._known.add(stream.cuda_stream)


@contextmanager
def workspace(device: torch.device, size: int) -> Iterator[Tensor]:
    """At least `size` bytes for launches on the current stream of `device`, until the block ends.

    While a CUDA graph is captured: a block of the graph's own, since its replays may run beside this stream's launches.
    """
    if capturing(device):
        yield allocate(device, size)
        return
    stream = torch.cuda.current_stream(device)
    handle = stream.cuda_stream
    key = (stream.device_index, handle, threading.get_ident() if handle == PER_THREAD else 0)
    block = _blocks.get(key)
    if block is None:
        with _lock:
            block = _blocks.setdefault(key, _Block())
    with block.lock:
        if block.used is not None:
            stream.wait_event(block.used)
        if block.memory is None or block.memory.numel() < size:
            block.memory = allocate(device, size)
        yield block.memory
        if handle and stream.stream_id == handle:  # an external stream: PyTorch's own are never destroyed
            block.used = block.used or torch.cuda.Event()
            block.used.record(stream)


def release() -> None:
    """Frees the blocks of all streams; they are allocated again when needed."""
    with _lock:
        _blocks.clear()
