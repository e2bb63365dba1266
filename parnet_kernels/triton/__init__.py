"""Triton backend: forward and backward of every operator, for training and large batches, on NVIDIA and AMD GPUs.

Nothing here imports triton until a CUDA tensor (or, under TRITON_INTERPRET=1, a CPU tensor) asks for it.

Saved for backward: the operator's inputs only. Backward recomputes the convolution, fused with φ′, because φ′ needs
the value before φ and SiLU has no inverse; that costs one convolution more and no memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from parnet_kernels.precision import current_precision as current_precision
from parnet_kernels.precision import float32_precision as float32_precision
from parnet_kernels.triton.operators import backward as backward
from parnet_kernels.triton.operators import run as run

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation must not break the other backends
        return f"triton cannot be imported: {error}"
    return None


@functools.cache
def _interpreted() -> bool:
    from parnet_kernels.triton import launch

    return launch.INTERPRETED


@functools.cache
def _device_missing(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"needs compute capability 8.0, cuda:{index} has {torch.cuda.get_device_capability(index)}"
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no driver, or one that Triton cannot use
        return f"Triton finds no driver: {error}"
    return None


def why_not(op: str, x: Tensor) -> str | None:
    """Why the backend cannot run `op` on x, or None."""
    if x.dtype not in _DTYPES:
        return f"computes float16, bfloat16 and float32, x is {x.dtype}"
    if x.device.type not in ("cuda", "cpu"):
        return f"needs a CUDA device, x is on {x.device}"
    if reason := _triton_missing():
        return reason
    if x.device.type == "cpu":
        return None if _interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1), x is on cpu"
    if not torch.cuda.is_available():
        return "no CUDA driver"
    return _device_missing(x.device.index or 0)
