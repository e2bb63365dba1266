"""The CPU backend of the public operators: the native kernels of csrc/cpu on packed weights (`pack.py`, `cache.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from parnet_kernels import _native
from parnet_kernels.call import Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu.cache import again as again
from parnet_kernels.cpu.cache import clear_cache as clear_cache
from parnet_kernels.cpu.cache import packed_weights
from parnet_kernels.cpu.cache import remember as remember

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(op: str, x: Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on x, or None. The arguments are known to agree with each other."""
    if _native.cpu_error:
        return _native.cpu_error
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of {DTYPES}"
    if 0 in x.shape[1:]:
        return f"x has shape {list(x.shape)}"
    return None


def run(call: Call) -> Tensor | None:
    """One call of a public operator.

    None if x, y or a parameter holds NaN or infinity, which the kernels' tiles would spread.
    """
    packed = packed_weights(call)
    if packed is None:
        return None
    x, *others = call.maps
    result: Tensor = torch.ops.parnet._cpu_layer(x, others[0] if others else None, packed, is_channels_last(x))
    return result if result.numel() or not x.numel() else None
