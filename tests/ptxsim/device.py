"""The `device` fixture: one test body for a GPU and for the simulator.

    def test_scale(device):
        x, y = device.tensor(torch.randn(1000)), device.empty(1000)
        run = device.launch(device.cuda("scale.cu"), "scale", 8, 128, [x, y, 2.0, 1000])
        assert torch.equal(y, 2 * x)
        if device.simulated:
            assert run.global_load["efficiency"] == 1.0

A test that uses it has the marker `gpu` or `ptxsim`, and is skipped with the reason where it can run on neither.
`pytest --device=simulator` uses the simulator where there is a GPU, `--device=gpu` never does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .cuda_driver import CudaDriver, GpuModule
from .errors import PtxError, Unavailable
from .memory import Uninit
from .module import Dim, PtxModule, three_dimensions
from .native import core
from .report import Result
from .session import Session
from .toolchain import compile_cuda, compile_triton

TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Device:
    """Where kernels run. Tensors are on `torch_device`; `simulated` tells whether launches return counters."""

    simulated: bool
    torch_device: torch.device

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor on this device, with the strides it has."""
        return x if x.device.type == self.torch_device.type else x.to(self.torch_device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor that must not be read before it is written: NaN or all bits set, and checked by the simulator."""
        out = torch.empty(shape, dtype=dtype, device=self.torch_device)
        if out.numel():
            out.view(torch.uint8).fill_(0xFF)
        return out

    def pointer(self, x: torch.Tensor) -> int:
        """The address that kernels see, for structs and arrays of pointers; the tensor must outlive the launches."""
        raise NotImplementedError

    def cuda(self, source: str | Path, arch: str = "compute_80", flags: Sequence[str] = ()) -> Any:
        """Compiles a .cu file with nvcc; the result goes to `launch`."""
        raise NotImplementedError

    def launch(
        self,
        module: Any,
        kernel: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        shared_bytes: int = 0,
        **simulator_options: Any,
    ) -> Result | None:
        """Runs a kernel; tensors are pointers, numbers take the parameters' types, bytes are structs.

        Options: those of PtxModule.launch, of which a GPU heeds `cluster`.
        """
        raise NotImplementedError

    def triton(
        self,
        function: Any,
        grid: Dim,
        args: dict[str, Any],
        constants: dict[str, Any],
        *,
        arch: int = 80,
        simulator_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Result | None:
        """Runs a @triton.jit function. args: tensors and numbers by name; options: num_warps, num_stages, ...

        arch: what the simulator compiles for; a GPU runs its own.
        """
        raise NotImplementedError


class Simulator(Device):
    """CPU tensors, PTX, a Session: what one launch writes, the next may read."""

    simulated = True
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        core()  # raises Unavailable
        self.session = Session()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = super().empty(*shape, dtype=dtype)
        if out.numel():
            self.session.memory.mark_uninitialised(out)
        return out

    def pointer(self, x: torch.Tensor) -> int:
        return self.session.register(x)

    def cuda(self, source: str | Path, arch: str = "compute_80", flags: Sequence[str] = ()) -> PtxModule:
        return PtxModule(_cuda_text(str(source), arch, tuple(flags)))

    def launch(self, module, kernel, grid, block, args, shared_bytes=0, **simulator_options):
        return self.session.launch(module, kernel, grid, block, args, shared_bytes, **simulator_options)

    def triton(self, function, grid, args, constants, *, arch=80, simulator_options=None, **options):
        signature, attributes = triton_signature(function, args, constants)
        compiled = _or_skip(compile_triton, function, signature, constants, attributes, arch, **options)
        module = PtxModule(compiled.ptx)
        ordered = [args[name] for name in signature if name not in constants]
        scratch = len(module.module.functions[compiled.name].params) - len(ordered)  # pointers that Triton appends
        values = [*ordered, *[None] * scratch]
        return self.session.launch(
            module, compiled.name, grid, compiled.threads, values, compiled.shared_bytes, **(simulator_options or {})
        )


class Gpu(Device):
    """CUDA tensors; PTX goes to the driver, which compiles it for the device."""

    simulated = False

    def __init__(self, driver: CudaDriver | None = None, capability: tuple[int, int] | None = None):
        self.driver = driver or CudaDriver()
        self.torch_device = torch.device("cuda", torch.cuda.current_device()) if driver is None else torch.device("cpu")
        self.capability = capability or torch.cuda.get_device_capability()

    def pointer(self, x: torch.Tensor) -> int:
        return x.data_ptr()

    def cuda(self, source: str | Path, arch: str = "compute_80", flags: Sequence[str] = ()) -> GpuModule:
        wanted = arch.removeprefix("compute_").removeprefix("sm_")
        have = 10 * self.capability[0] + self.capability[1]
        exact = not wanted.isdigit()
        number = int(wanted.rstrip("af"))
        if number > have or (exact and number != have):
            pytest.skip(f"needs {arch}, this GPU is sm_{have}")
        return GpuModule(self.driver, _cuda_text(str(source), arch, tuple(flags)))

    def launch(self, module, kernel, grid, block, args, shared_bytes=0, **simulator_options):
        cluster = simulator_options.get("cluster")
        clusters = None if cluster is None else three_dimensions(cluster)
        plain = [arg.array if isinstance(arg, Uninit) else arg for arg in args]
        stream = torch.cuda.current_stream().cuda_stream if self.torch_device.type == "cuda" else 0
        module.launch(kernel, three_dimensions(grid), three_dimensions(block), plain, shared_bytes, stream, clusters)
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()  # a fault shows at the launch that made it

    def triton(self, function, grid, args, constants, *, arch=80, simulator_options=None, **options):
        function[three_dimensions(grid)](**args, **constants, **options)
        torch.cuda.synchronize()


def triton_signature(function: Any, args: dict[str, Any], constants: dict[str, Any]) -> tuple[dict, dict]:
    """Types and alignments as Triton's launcher would find them, in the order of the function's parameters."""
    names = list(inspect.signature(function.fn).parameters)
    if set(names) != set(args) | set(constants) or set(args) & set(constants):
        raise PtxError(f"{function.__name__} takes {names}, got args {list(args)} and constants {list(constants)}")
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = args[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TRITON_TYPES[value.dtype]
            multiple = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool | int):
            signature[name] = "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"
            multiple = not isinstance(value, bool) and value % 16 == 0
        else:
            signature[name], multiple = "fp32", False
        if multiple:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, attributes


def _or_skip(function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


@functools.cache  # sources do not change while tests run
def _cuda_text(source: str, arch: str, flags: tuple[str, ...]) -> str:
    return _or_skip(compile_cuda, source, arch, flags)


def open_device(choice: str = "auto") -> Device:
    """A GPU if there is one, else the simulator. Raises Unavailable with the reason if there is neither."""
    if choice != "simulator" and torch.cuda.is_available():
        return Gpu()
    if choice == "gpu":
        raise Unavailable("no CUDA device, and --device=gpu")
    return Simulator()


# ---- pytest --------------------------------------------------------------------------------------------------
def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["auto", "gpu", "simulator"], default="auto", help="where kernels run")


def mark_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that use the fixture get the marker of where they will run."""
    on_gpu = config.getoption("--device") != "simulator" and torch.cuda.is_available()
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu" if on_gpu else "ptxsim")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """Runs kernels on a GPU or in the simulator; see the module's text."""
    try:
        opened = open_device(request.config.getoption("--device"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    return opened
