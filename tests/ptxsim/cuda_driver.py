"""Launches PTX on a GPU through the CUDA driver API, on torch's context and current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

from .arguments import value_bytes
from .errors import PtxError
from .memory import is_torch
from .parser import parse_module

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute with the value of CLUSTER_DIMENSION."""

    _fields_: ClassVar = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


class CudaDriver:
    """`library` is libcuda, or what stands in for it in a test."""

    def __init__(self, library: Any = None):
        self.library = library or ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            raise PtxError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


class GpuModule:
    """PTX that the driver has compiled for the current device."""

    def __init__(self, driver: CudaDriver, ptx: str):
        self.driver = driver
        self.functions = parse_module(ptx).functions
        self.handle = ctypes.c_void_p()
        self.driver.call("cuModuleLoadData", ctypes.byref(self.handle), ctypes.c_char_p(ptx.encode()))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Any],
        shared_bytes: int,
        stream: int,
        cluster: tuple[int, int, int] | None = None,
    ) -> None:
        function = self.functions.get(kernel)
        if function is None or not function.is_entry:
            raise PtxError(f"no kernel named {kernel}; have {[n for n, f in self.functions.items() if f.is_entry]}")
        if len(args) != len(function.params):
            raise PtxError(f"{kernel} takes {len(function.params)} arguments, got {len(args)}")
        values = []
        for i, (param, arg) in enumerate(zip(function.params, args, strict=True)):
            pointer = is_torch(arg) and param.size == 8
            values.append(arg.data_ptr().to_bytes(8, "little") if pointer else value_bytes(i, param, arg))
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
        pointers = (ctypes.c_void_p * max(len(buffers), 1))(*map(ctypes.addressof, buffers))
        handle = ctypes.c_void_p()
        self.driver.call("cuModuleGetFunction", ctypes.byref(handle), self.handle, ctypes.c_char_p(kernel.encode()))
        if shared_bytes:
            self.driver.call("cuFuncSetAttribute", handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        attributes = (LaunchAttribute * 1)(LaunchAttribute(CLUSTER_DIMENSION, 0, cluster or ()))
        config = LaunchConfig(grid, block, shared_bytes, stream, attributes, 0 if cluster is None else 1)
        self.driver.call("cuLaunchKernelEx", ctypes.byref(config), handle, pointers, None)
