"""The one place that launches kernels; it sets the device and the width of offsets. Tests replace `run`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

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


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    """Launches on the current stream of the tensors' device, compiled with Triton's `options`."""
    tensor = next(v for v in arguments.values() if isinstance(v, Tensor))
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with guard:
        kernel[grid](**arguments, **options)


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
