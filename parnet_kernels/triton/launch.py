"""The one place that launches kernels; it sets the device and the width of offsets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_force_int64 = False  # process-wide: backward runs in the autograd engine's threads


@contextmanager
def int64_offsets() -> Iterator[None]:
    """Within the block every kernel computes offsets in int64, whatever the sizes (to test that path)."""
    global _force_int64
    before, _force_int64 = _force_int64, True
    try:
        yield
    finally:
        _force_int64 = before


def needs_int64(tensors: Iterable[Tensor | None]) -> bool:
    """Whether an element offset into any of the tensors can pass 2³¹ − 1 (a tile may step past the end by its own
    size).
    """
    if _force_int64:
        return True
    spans = (sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None)
    return any(span >= 2**31 - 2**20 for span in spans)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_taker: ContextVar[Callable[[Launch], object] | None] = ContextVar("parnet_triton_taker", default=None)


@contextmanager
def given_to(take: Callable[[Launch], object]) -> Iterator[None]:
    """Within the block `take` gets this thread's launches, and nothing runs."""
    token = _taker.set(take)
    try:
        yield
    finally:
        _taker.reset(token)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block launches are put on the list, and nothing runs."""
    launches: list[Launch] = []
    with given_to(launches.append):
        yield launches


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    """Launches on the current stream of the tensors' device, compiled with Triton's `options`.

    Raises:
        RuntimeError: if it would have to be compiled while the stream is captured into a CUDA graph, which cannot load
            it.
    """
    take = _taker.get()
    if take is not None:
        take(Launch(kernel, grid, arguments, options))
        return
    tensor = next(v for v in arguments.values() if isinstance(v, Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
        with _without_compiling() if capturing else nullcontext():
            kernel[grid](**arguments, **options)


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Within the block this thread's launches raise where they would compile."""
    thread, before = threading.get_ident(), triton.knobs.runtime.jit_cache_hook

    def hook(**told: Any) -> Any:
        if threading.get_ident() == thread:
            raise RuntimeError(
                f"parnet_kernels: {told['fn'].name} is not compiled for these arguments, and a CUDA graph is being "
                "captured: call parnet_kernels.triton.tuning.warmup, or the operator itself, on such arguments before"
            )
        return before(**told) if before else None

    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int] | None = None
) -> None:
    """Launches `kernel` with INT64 chosen from the tensors' sizes; an empty grid launches nothing.

    options: Triton's num_warps, num_stages and so on (`policy.Tile.options`).
    """
    if min(grid) == 0:
        return
    if "INT64" in kernel.arg_names:
        arguments = {**arguments, "INT64": needs_int64(v for v in arguments.values() if isinstance(v, Tensor))}
    run(kernel, grid, arguments, options or {"num_warps": 4, "num_stages": 2})
