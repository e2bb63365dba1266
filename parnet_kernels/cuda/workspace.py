"""Scratch memory of the CUDA kernels: one block for each device and stream, so that streams never share one.

Launches of a program follow each other on their stream; the lock keeps two threads from interleaving theirs on one.
Blocks grow and are kept, so a warm call allocates nothing. Their counters (record.COUNTER_BYTES) start zero and
every launch leaves them zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parnet_kernels.locks import Lock


class _Block:
    def __init__(self) -> None:
        self.lock = Lock()
        self.memory: Tensor | None = None


_blocks: dict[tuple[int, int], _Block] = {}
_lock = Lock()


def allocate(device: torch.device, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def finish(device: torch.device) -> None:
    """Waits for what was just packed on the current stream: other streams may use it from now on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def workspace(device: torch.device, size: int) -> Iterator[Tensor]:
    """At least `size` bytes for launches on the current stream of `device`, until the block ends.

    While a CUDA graph is captured: a block of the graph's own, since its replays may run beside this stream's launches.
    """
    if capturing(device):
        yield allocate(device, size)
        return
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    block = _blocks.get(key)
    if block is None:
        with _lock:
            block = _blocks.setdefault(key, _Block())
    with block.lock:
        if block.memory is None or block.memory.numel() < size:
            block.memory = allocate(device, size)
        yield block.memory


def release() -> None:
    """Frees the blocks of all streams; they are allocated again when needed."""
    with _lock:
        _blocks.clear()
