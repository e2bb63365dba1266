"""The CPU backend of the public operators: the native kernels of csrc/cpu on packed weights (`pack.py`, `cache.py`)."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from parnet_kernels import _native, gradients
from parnet_kernels.call import Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu.cache import again as again
from parnet_kernels.cpu.cache import clear_cache as clear_cache
from parnet_kernels.cpu.cache import packed_weights
from parnet_kernels.cpu.cache import remember as remember
from parnet_kernels.cpu.training import CpuKernels
from parnet_kernels.training import as_pixels

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


class _Convolutions(gradients.Convolutions):
    """By the kernels of the training form."""

    kernels = CpuKernels()

    def forward(self, x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        return self.kernels.convolve(x, weight, stride, groups)[0]

    def backward(
        self, d: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        d, d_x = as_pixels(d), None
        if need_x:
            d_x = torch.zeros_like(x, memory_format=torch.channels_last)
            self.kernels.add_input_gradient(d_x, d, weight, stride, groups)
        return d_x, self.kernels.weight_gradient(x, d, weight, stride, groups) if need_weight else None


def backward(call: Call, g: Tensor, need: Set[str]) -> dict[str, Tensor]:
    """The gradients of the tensors named in need: float32 by the kernels, unless something is not finite."""
    given = [g, *call.maps, call["weight"]]
    real = all(type(t) in (Tensor, torch.nn.Parameter) for t in given)  # not traced: values cannot be asked
    same = call.x.dtype == g.dtype == torch.float32 and g.numel() > 0
    native = real and same and all(bool(t.sum().isfinite()) for t in given)
    return gradients.of(call, g, need, _Convolutions()) if native else gradients.of(call, g, need)


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
