"""The kernels of the training form (`training.Kernels`) on the CPU: csrc/cpu/schedule/training.h.

Convolutions, their gradients and the elementwise passes are native, but for what a library does faster. All maps are
channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import _native, training
from parnet_kernels.cpu.pack import CODES
from parnet_kernels.training import Moments, as_pixels

_ops = torch.ops.parnet
IMAGE_CHANNELS = 4
#: Channels below which the library's weight gradient is faster, in ms on one thread, batch 16: 8 channels of 32 × 32
#: 0.44 against 0.76; 16 channels 0.70 against 0.56, 32 channels 2.79 against 1.24.
NARROW = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor) -> str | None:
    """The reason why these kernels cannot run on x, or None."""
    if _native.cpu_error:
        return _native.cpu_error
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of {DTYPES}"
    return None


def _groups(weight: Tensor, groups: int) -> list[tuple[slice, slice, Tensor]]:
    """Of each group: its input channels, output channels and weight."""
    k, c = weight.shape[0] // groups, weight.shape[1]
    return [(slice(g * c, (g + 1) * c), slice(g * k, (g + 1) * k), weight[g * k : (g + 1) * k]) for g in range(groups)]


def _dense(vectors: list[Tensor]) -> list[Tensor]:
    return [v.contiguous() for v in vectors]


class CpuKernels(training.Plain):
    """Maps of float32, bfloat16 or float16; everything else, and all sums, are float32."""

    def moments(self, x: Tensor) -> tuple[Tensor, Moments]:
        found = _ops._cpu_train_moments.default(as_pixels(x), True)
        return found[:-2], Moments(found[-2], found[-1])

    def image_means(self, x: Tensor) -> Tensor:
        means: Tensor = _ops._cpu_train_moments.default(as_pixels(x), False)
        return means

    def convolve(self, x: Tensor, weight: Tensor, stride: int, groups: int) -> tuple[Tensor, Moments]:
        size = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        x, found = as_pixels(x), []
        for c, k, w in _groups(weight, groups):
            if _is_image(weight):
                y[:, k] = F.conv2d(x[:, c].float(), w, None, stride, 1)
                found.append(_ops._cpu_train_moments.default(y[:, k], True)[-2:])
            else:
                convolve = _ops._cpu_train_convolve.default
                found.append(convolve(x[:, c], w.contiguous(), stride, False, False, True, y[:, k]))
        return y, Moments(*(found[0] if groups == 1 else torch.cat(found, 1)))

    def pool(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        size = n, c, (h + 1) // 2, (w + 1) // 2
        pooled = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        _ops._cpu_train_pool.default(as_pixels(x), pooled)
        return pooled

    def combine(self, maps: list[Tensor], scales: Tensor, shift: Tensor, activation: str) -> Tensor:
        y = torch.empty_like(maps[0])
        code = CODES["activation"].index(activation)
        _ops._cpu_train_combine.default([*map(as_pixels, maps)], scales.contiguous(), shift.contiguous(), code, y)
        return y

    def reduce(
        self, g: Tensor, maps: list[Tensor], scales: Tensor, shift: Tensor, means: Tensor, activation: str
    ) -> Tensor:
        coefficients = scales.contiguous(), shift.contiguous(), means.contiguous()
        code = CODES["activation"].index(activation)
        sums: Tensor = _ops._cpu_train_reduce.default(as_pixels(g), [*map(as_pixels, maps)], *coefficients, code)
        return sums

    def spread(
        self,
        g: Tensor,
        maps: list[Tensor],
        scales: Tensor,
        shift: Tensor,
        q: Tensor,
        r: Tensor,
        outputs: int,
        activation: str,
    ) -> list[Tensor]:
        found = [torch.empty_like(maps[0]) for _ in range(outputs)]
        coefficients = [t.contiguous() for t in (scales, shift, q, r)]
        code = CODES["activation"].index(activation)
        _ops._cpu_train_spread.default(as_pixels(g), [*map(as_pixels, maps)], *coefficients, code, found)
        return found

    def join(self, maps: Sequence[Tensor], scales: list[Tensor], shifts: list[Tensor]) -> Tensor:
        n, c, h, w = maps[0].shape
        u = torch.empty((n, 2 * c, h, w), dtype=maps[0].dtype, memory_format=torch.channels_last)
        _ops._cpu_train_join.default([*map(as_pixels, maps)], _dense(scales), _dense(shifts), u)
        return u

    def join_sums(self, d: Tensor, maps: Sequence[Tensor], means: list[Tensor]) -> list[Tensor]:
        sums = _ops._cpu_train_join_sums.default(as_pixels(d), [*map(as_pixels, maps)], _dense(means))
        return [*sums.unbind()]

    def separate(self, d: Tensor, maps: Sequence[Tensor], lines: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        found = [torch.empty_like(m, memory_format=torch.channels_last) for m in maps]
        p, q, r = (_dense([line[i] for line in lines]) for i in range(3))
        _ops._cpu_train_separate.default(as_pixels(d), [*map(as_pixels, maps)], p, q, r, found)
        return found

    def unpool(self, d: Tensor, shift: Tensor, size: torch.Size) -> Tensor:
        if size[2] % 2 or size[3] % 2:
            return super().unpool(d, shift, size).contiguous(memory_format=torch.channels_last)
        n, c, h, w = d.shape
        result = torch.empty(tuple(size), dtype=d.dtype, device=d.device, memory_format=torch.channels_last)
        windows = result.as_strided((n, h, 2, w, 2, c), (4 * h * w * c, 4 * w * c, 2 * w * c, 2 * c, c, 1))
        each = d.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(windows.shape)
        torch.add(shift[:, None, None, None, None, :], each, alpha=0.25, out=windows)
        return result

    def point_input_gradient(self, d: Tensor, weight: Tensor, groups: int) -> Tensor:
        size = (d.shape[0], weight.shape[1] * groups, *d.shape[2:])
        d_x = torch.empty(size, dtype=d.dtype, device=d.device, memory_format=torch.channels_last)
        for c, k, w in _groups(weight, groups):
            _ops._cpu_train_convolve.default(d[:, k], w.contiguous(), 1, True, False, False, d_x[:, c])
        return d_x

    def add_input_gradient(self, d_x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> None:
        for c, k, w in _groups(weight, groups):
            _ops._cpu_train_convolve.default(d[:, k], w.contiguous(), stride, True, True, False, d_x[:, c])

    def weight_gradient(self, x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        result, x = torch.empty_like(weight, memory_format=torch.contiguous_format), as_pixels(x)
        for c, k, w in _groups(result, groups):
            if weight.shape[2] == 3 and min(w.shape[:2]) < NARROW:
                w.copy_(super().weight_gradient(x[:, c].float(), d[:, k].float(), w, stride, 1))
            else:
                _ops._cpu_train_weight_gradient.default(x[:, c], d[:, k], stride, w)
        return result


def _is_image(weight: Tensor) -> bool:
    """Vectors of input channels would be almost empty: PyTorch's convolutions."""
    return weight.shape[2] == 3 and weight.shape[1] <= IMAGE_CHANNELS
