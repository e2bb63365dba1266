"""The public operators, documented. `torch.ops.parnet.*` are the same; `dispatch.py` registers them."""

from __future__ import annotations

import torch
from torch import Tensor

from parnet_kernels import dispatch, flops  # noqa: F401  register the operators
from parnet_kernels.checks import check_types
from parnet_kernels.selection import clear_cache as clear_cache
from parnet_kernels.selection import explain as explain
from parnet_kernels.selection import use_backend as use_backend


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
    """RepVGG block with skip-squeeze-excitation, folded (paper section 3.1).

    z = skip_scale·x + skip_shift
    y = φ(conv3x3(x; padding 1) + bias + z·σ(gate_weight·mean_hw(z) + gate_bias)), then out_scale·y + out_shift

    Args:
        x: [N, C, H, W], any strides; float64, float32, float16 or bfloat16 (16-bit is computed in float32).
        weight: [C, C, 3, 3]. bias, skip_scale, skip_shift: [C]. gate_weight: [C, C]. gate_bias: [C] or None.
        activation: φ, "silu" or "relu".
        out_scale, out_shift: [C], both or neither: an affine map after φ (a consumer's BatchNorm).

    Returns:
        [N, C, H, W], channels_last if x is, else contiguous.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        TypeError: naming the argument that is no tensor (or number, or string).
    """
    try:
        return torch.ops.parnet.repvgg_sse.default(
            x,
            weight,
            bias,
            skip_scale,
            skip_shift,
            gate_weight,
            gate_bias,
            activation=activation,
            out_scale=out_scale,
            out_shift=out_shift,
        )
    except RuntimeError:
        check_types("repvgg_sse", dict(locals()))
        raise


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
    """Downsampling block, folded (paper section 3.2): no skip, the gate multiplies the convolution.

    y = φ(2σ(gate_weight·mean_hw(x) + gate_bias)·(conv3x3(x; padding 1, stride) + bias)), then out_scale·y + out_shift

    Args:
        x: [N, C, H, W]. weight: [K, C, 3, 3]. bias: [K]. gate_weight: [K, C]. gate_bias: [K] or None.
        stride: 1 or 2. activation, out_scale, out_shift ([K]): as in `repvgg_sse`.

    Returns:
        [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last if x is, else contiguous.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    try:
        return torch.ops.parnet.downsample_se.default(
            x,
            weight,
            bias,
            gate_weight,
            gate_bias,
            stride=stride,
            activation=activation,
            out_scale=out_scale,
            out_shift=out_shift,
        )
    except RuntimeError:
        check_types("downsample_se", dict(locals()))
        raise


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
    """Fusion block, folded (paper section 3.2): two inputs, two groups, channels shuffled; without concat or shuffle.

    u = interleave(x, y), channel 2c + j from x (j = 0) or y (j = 1); everything below in two groups of channels
    v = φ(2σ(gate_weight·mean_hw(u) + gate_bias)·(conv3x3(u; padding 1, stride) + bias))
    result channel 2i + k = out_scale·v[channel k·K/2 + i] + out_shift

    Args:
        x, y: [N, C, H, W], of one shape. weight: [K, C, 3, 3], K even. bias: [K]. gate_weight: [K, C].
        gate_bias: [K] or None. stride: 1 or 2. activation: as in `repvgg_sse`.
        out_scale, out_shift: [K], in the order of the result's channels.

    Returns:
        [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last if x is, else contiguous.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    try:
        return torch.ops.parnet.fusion_se.default(
            x,
            y,
            weight,
            bias,
            gate_weight,
            gate_bias,
            stride=stride,
            activation=activation,
            out_scale=out_scale,
            out_shift=out_shift,
        )
    except RuntimeError:
        check_types("fusion_se", dict(locals()))
        raise
