"""The operators' definitions in plain PyTorch: the oracle of every test and the backend of last resort.

Shapes: x, y [N, C, H, W]; result [N, K, ⌈H/stride⌉, ⌈W/stride⌉]; any floating dtype, any strides, any device.
PARNET.md's algebra after folding; the paper's sections 3.1 (RepVGG-SSE) and 3.2 (downsampling and fusion).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "relu": F.relu}


def gate(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """σ(weight · mean_hw(x) + bias) as [N, K, 1, 1]; weight [K, C / groups], bias [K]."""
    return F.conv2d(x.mean((2, 3), keepdim=True), weight[:, :, None, None], bias, groups=groups).sigmoid()


def interleave(x: Tensor, y: Tensor) -> Tensor:
    """Channel 2c + j is channel c of x (j = 0) or y (j = 1)."""
    return torch.stack((x, y), 2).flatten(1, 2)


def deinterleave(u: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `interleave`."""
    return u[:, 0::2], u[:, 1::2]


def shuffle(v: Tensor) -> Tensor:
    """Channel 2i + k is channel k · K/2 + i of v: the channel shuffle of two groups, an interleaving of its halves."""
    half = v.shape[1] // 2
    return interleave(v[:, :half], v[:, half:])  # not chunk, whose result torch.fx cannot unpack


def per_channel(vector: Tensor) -> Tensor:
    """[C] → [C, 1, 1], to broadcast over a map."""
    return vector[:, None, None]


def _finish(t: Tensor, activation: str, out_scale: Tensor | None, out_shift: Tensor | None) -> Tensor:
    v = ACTIVATIONS[activation](t)
    return v if out_scale is None or out_shift is None else v * per_channel(out_scale) + per_channel(out_shift)


def repvgg_sse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip_scale: Tensor,
    skip_shift: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    z = x * per_channel(skip_scale) + per_channel(skip_shift)
    t = F.conv2d(x, weight, bias, padding=1) + z * gate(z, gate_weight, gate_bias)
    return _finish(t, activation, out_scale, out_shift)


def downsample_se(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    stride: int = 2,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    t = F.conv2d(x, weight, bias, stride, padding=1) * (2 * gate(x, gate_weight, gate_bias))
    return _finish(t, activation, out_scale, out_shift)


def fusion_se(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    stride: int = 2,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    u = interleave(x, y)
    t = F.conv2d(u, weight, bias, stride, padding=1, groups=2) * (2 * gate(u, gate_weight, gate_bias, groups=2))
    return _finish(shuffle(t), activation, out_scale, out_shift)
