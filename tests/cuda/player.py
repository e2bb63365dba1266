"""Plays programs of the CUDA backend through the `device` fixture: the package's host code (host_player.cpp, compiled
with g++) decodes them; a GPU, or the PTX simulator, runs the kernels that nvcc compiled.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parnet_kernels.cuda.plan import A100, Gpu
from parnet_kernels.cuda.program import COOPERATIVE, DEPENDENT, PAIRS
from parnet_kernels.cuda.record import COUNTER_BYTES
from tests.ptxsim.device import Device

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
THREADS = 128


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("bytes", ctypes.c_int64)]


@dataclass
class Launch:
    kernel: str
    grid: int
    shared: int
    flags: int
    arguments: bytes
    label: str


_Report = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_char_p,
)


@functools.cache
def host() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "player.so"
        source = Path(__file__).with_name("host_player.cpp")
        subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    for function in (loaded.parnet_play, loaded.parnet_kernel_name, loaded.parnet_layout):
        function.restype = ctypes.c_char_p
    loaded.parnet_play.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, _Report]
    return loaded


def decode(program: Tensor, buffers: Sequence[tuple[int, int]], error_at: int | None = None) -> list[Launch]:
    """What the host code launches for buffers (address, bytes); launch `error_at` reports a failure.

    Raises RuntimeError with the host code's message.
    """
    found: list[Launch] = []

    def report(kernel: int, grid: int, shared: int, flags: int, arguments: int, size: int, label: bytes) -> int:
        name = host().parnet_kernel_name(kernel).decode()
        found.append(Launch(name, grid, shared, flags, ctypes.string_at(arguments, size), label.decode()))
        return len(found) - 1 == error_at

    spans = (Buffer * len(buffers))(*buffers)
    error = host().parnet_play(program.data_ptr(), program.numel(), spans, len(buffers), _Report(report))
    if error:
        raise RuntimeError(error.decode())
    return found


# Keys held weakly: a simulated device is one test's, and holds all the memory that its kernels have seen.
_modules: weakref.WeakKeyDictionary[Device, dict[tuple[str, int], Any]] = weakref.WeakKeyDictionary()


def module(device: Device, kernel: str, architecture: int) -> Any:
    """Compiled once a device."""
    compiled = _modules.setdefault(device, {})
    if (kernel, architecture) not in compiled:
        kind, math = kernel.split("_")[1:]
        source, suffix = ("hopper", "a") if kind == "hopper" else ("level", "")
        compiled[kernel, architecture] = device.cuda(
            CUDA / f"{source}_{math}.cu", f"compute_{architecture}{suffix}", ["-std=c++20"]
        )
    return compiled[kernel, architecture]


def workspace(device: Device, size: int) -> Tensor:
    """As the package allocates it: zero counters, then memory that must be written before it is read."""
    memory = torch.zeros(size, dtype=torch.uint8)
    memory[COUNTER_BYTES:] = 0xFF
    if device.simulated:
        device.session.memory.mark_uninitialised(memory[COUNTER_BYTES:])
    return device.tensor(memory)


def play(
    device: Device,
    program: Tensor,
    buffers: Sequence[Tensor],
    gpu: Gpu = A100,
    only: int | None = None,
    **options: Any,
) -> list[Any]:
    """Plays `program` (or its launch `only`); buffers change in place. Returns counters, or None on a GPU.

    On `gpu` with kernels compiled for `gpu.image`. Options are the simulator's. Its sanitiser raises on any report.
    """
    addresses = [(device.pointer(b) if b.numel() else 0, b.numel() * b.element_size()) for b in buffers]
    results = []
    for i, launch in enumerate(decode(program, addresses)):
        if only not in (None, i):
            continue
        compiled = module(device, launch.kernel, gpu.image)
        # As the launcher decides (csrc/cuda/launch.cu).
        extra: dict[str, Any] = {"dependent": bool(launch.flags & DEPENDENT) and gpu.image >= 90 and only is None}
        extra["architecture"] = gpu.architecture
        if launch.flags & COOPERATIVE:
            extra["resident"] = launch.grid
        if launch.flags & PAIRS:
            extra["cluster"] = 2
        extra = {**options, **extra}
        arguments = [launch.arguments]
        results.append(device.launch(compiled, launch.kernel, launch.grid, THREADS, arguments, launch.shared, **extra))
    return results
