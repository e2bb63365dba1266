"""Plays a program of the CUDA backend where there is no GPU: the package's host code decodes it (host_player.cpp,
compiled with g++), the PTX simulator executes the kernels that nvcc compiled.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptxsim import PtxModule, Result, Session, compile_cuda
from torch import Tensor

ROOT = Path(__file__).parents[2]
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
    ctypes.c_char_p,
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
    loaded.parnet_play.restype = loaded.parnet_kernel_name.restype = ctypes.c_char_p
    loaded.parnet_play.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, _Report]
    return loaded


def decode(program: Tensor, buffers: Sequence[tuple[int, int]]) -> list[Launch]:
    """What the host code launches for buffers (address, bytes). Raises RuntimeError with the host code's message."""
    found: list[Launch] = []

    def report(kernel: int, grid: int, shared: int, flags: int, arguments: int, size: int, label: bytes) -> None:
        name = host().parnet_kernel_name(kernel).decode()
        found.append(Launch(name, grid, shared, flags, ctypes.string_at(arguments, size), label.decode()))

    spans = (Buffer * len(buffers))(*buffers)
    error = host().parnet_play(program.data_ptr(), program.numel(), spans, len(buffers), _Report(report))
    if error:
        raise RuntimeError(error.decode())
    return found


@functools.cache
def module(math: str, architecture: int) -> PtxModule:
    source = ROOT / "csrc" / "cuda" / f"level_{math}.cu"
    return PtxModule(compile_cuda(source, f"compute_{architecture}", ["-std=c++20"]))


def module_of(kernel: str, architecture: int) -> PtxModule:
    return module(kernel.rsplit("_", 1)[1], architecture)


def simulate(
    program: Tensor,
    buffers: Sequence[Tensor],
    architecture: int = 80,
    uninitialised: Sequence[Tensor] = (),
    **options: Any,
) -> list[Result]:
    """Plays `program` in the simulator; buffers change in place. Raises on any report of the sanitiser.

    uninitialised: buffers, or parts of them, that must be written before they are read.
    """
    session = Session(**options)
    addresses = [(session.register(b) if b.numel() else 0, b.numel() * b.element_size()) for b in buffers]
    for part in uninitialised:
        session.memory.mark_uninitialised(part)
    for launch in decode(program, addresses):
        compiled = module_of(launch.kernel, architecture)
        resident = launch.grid if launch.flags & 2 else 1  # a cooperative launch
        session.launch(
            compiled, launch.kernel, launch.grid, THREADS, [launch.arguments], launch.shared, resident=resident
        )
    return session.results
