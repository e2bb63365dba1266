"""What a training step launches, compiles and moves, counted: nothing here is a time."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from offline import Launch, resources
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parnet_kernels import training_block, training_ops
from parnet_kernels.model import Block, MultiBatchNorm, ParNet
from parnet_kernels.ops import use_backend
from parnet_kernels.reference import interleave
from parnet_kernels.triton import launch

CONVOLUTIONS = {"aten::conv2d", "aten::convolution", "aten::convolution_backward"}
#: What makes no launch: views, and memory without contents.
FREE = {
    "view", "_unsafe_view", "permute", "expand", "split", "select", "slice", "unsqueeze", "squeeze", "t",
    "transpose", "detach", "alias", "empty", "new_empty", "empty_like", "as_strided", "unbind",
    "split_with_sizes",
}  # fmt: skip


class Library(TorchDispatchMode):
    """Counts what PyTorch is asked for, within our operators too, with the bytes of their tensors from `least` on."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes, self.least = 0, least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("parnet::"):
            operator = training_ops.OPERATORS.get(name.removeprefix("parnet::"))
            with self:
                return (operator.kernel if operator else training_ops._backward)(*args, **kwargs)
        result = func(*args, **kwargs)
        same = name in ("aten::to", "aten::contiguous") and result is args[0]
        if not same and name.split("::")[1].removesuffix("_") not in FREE:
            self.calls[name] += 1
            if name not in CONVOLUTIONS:
                self.bytes += moved(name, [*args, result], self.least)
        return result


def moved(name: str, given: Any, least: int) -> int:
    """Bytes of the maps of a call: each read or written once; of a BatchNorm, whose statistics come before its result,
    inputs are read twice. Expanded maps are read once a value.
    """
    total = 0
    for i, t in enumerate(given):
        if isinstance(t, (list, tuple)):
            total += moved(name, t, least)
        elif isinstance(t, Tensor) and t.numel() >= least:
            size = t.untyped_storage().nbytes() if 0 in t.stride() else t.numel() * t.element_size()
            twice = "batch_norm" in name and i < len(given) - 1
            total += size * (2 if twice else 1)
    return total


class Ours:
    """Counts our launches in place of running them, and the bytes of their maps."""

    def __init__(self) -> None:
        self.names: collections.Counter[str] = collections.Counter()
        self.kernels: dict[str, Launch] = {}  # what Triton would compile
        self.bytes = 0

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
        one = Launch(kernel, grid, arguments, options)
        source, _ = one.source()
        name = kernel.__name__
        self.names[name] += 1
        key = f"{name} {source.signature} {source.constants} {source.attrs} {sorted(options.items())}"
        small = {k: torch.empty((), dtype=v.dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        self.kernels.setdefault(key, one._replace(arguments=small))
        maps = {t.data_ptr(): t for t in arguments.values() if isinstance(t, Tensor) and t.dim() == 4}
        self.bytes += sum(t.numel() * t.element_size() for t in maps.values())
        if name == "train_add_bwd_kernel":  # reads and writes one of them
            self.bytes += arguments["d_3_ptr"].numel() * arguments["d_3_ptr"].element_size()


def step(run: Callable[[], Tensor], backend: str = "triton", least: int = 1) -> tuple[Ours, Library]:
    """Forward and backward of what `run` returns."""
    ours = Ours()
    gpu = mock.patch.dict(training_ops.KERNELS, {"triton": lambda x: None})  # counting needs none
    library = Library(least)
    with gpu, mock.patch.object(launch, "run", ours.run), use_backend(backend):
        with library:
            y = run()
        g = torch.ones_like(y)
        with library:
            y.backward(g)
    return ours, library


@functools.cache
def parnet_s(dtype: torch.dtype) -> ParNet:
    return ParNet("s", num_classes=10).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def step_of_s(size: int, batch: int, dtype: torch.dtype = torch.float32, backend: str = "triton") -> Any:
    model, x = parnet_s(dtype), torch.randn(batch, 3, size, size, dtype=dtype)
    return step(lambda: model(x), backend)


def test_launches_of_a_step_of_parnet_s() -> None:
    """22 blocks; docs/backends.md has the figures."""
    ours, library = step_of_s(64, 2)
    convolutions = sum(library.calls[name] for name in CONVOLUTIONS)
    assert sum(ours.names.values()) == 165
    assert convolutions == 46 + 44  # two of the stem's are made again
    assert sum(library.calls.values()) - convolutions <= 104, library.calls
    _, plain = step_of_s(64, 2, backend="reference")
    assert sum(plain.calls.values()) >= 884, plain.calls


def test_kernels_of_a_step_of_parnet_s() -> None:
    """Another batch or resolution compiles nothing anew."""
    known = {*step_of_s(64, 2)[0].kernels}
    assert len(known) <= 40
    for size, batch in ((64, 3), (32, 16), (96, 1)):
        assert {*step_of_s(size, batch)[0].kernels} <= known


def by_modules(block: Any, norm: Any, x: Tensor, y: Tensor) -> Tensor:
    return block(interleave(*norm(x, y)))


@pytest.mark.parametrize("kind", ["repvgg", "downsample", "fusion"])
def test_bytes_of_a_block(kind: str) -> None:
    """Without the convolutions', about half of what the modules move, at most; in maps of x."""
    stride = 1 if kind == "repvgg" else 2
    maps = (torch.randn(2, 64, 28, 28).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x, y = (map.requires_grad_() for map in maps)
    found = []
    for backend in ("triton", "reference"):
        x.grad = y.grad = None
        block: Any = Block(*((128, 64, 2, 2) if kind == "fusion" else (64, 64, stride, 1)), "silu")
        fused = functools.partial(training_block.run, block, x)
        run: Callable[[], Tensor] = fused if backend == "triton" else functools.partial(block, x)
        if kind == "fusion":
            norm = MultiBatchNorm(64, 64)
            fused = functools.partial(training_block.run_fusion, block, norm, (x, y))
            run = fused if backend == "triton" else functools.partial(by_modules, block, norm, x, y)
        ours, library = step(run, backend, least=2 * 64 * 14 * 14)
        found.append((ours.bytes + library.bytes) / (x.numel() * 4))
    assert found[0] == pytest.approx({"repvgg": 22.8, "downsample": 9.8, "fusion": 35.8}[kind], abs=0.06)
    assert found[0] <= found[1] * (0.52 if kind == "fusion" else 0.5)


@pytest.mark.parametrize("target", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_kernels_compile(target: str) -> None:
    """Those of a step in float16: little is spilled, and that by the products of vectors alone."""
    ours, _ = step_of_s(32, 2, torch.float16)
    for one in ours.kernels.values():
        used = resources(one.compile(target), target)
        assert used.spilled <= (128 if "gate" in one.kernel.__name__ else 0), (one.kernel.__name__, used)
        assert used.shared <= 1024 * 64
