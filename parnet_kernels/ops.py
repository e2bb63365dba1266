"""The public operators, documented. `torch.ops.parnet.*` are the same; `dispatch.py` registers them."""

from __future__ import annotations

from collections.abc import Sequence

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


def repvgg_sse_train(
    x: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    gamma0: Tensor,
    beta0: Tensor,
    gate_weight: Tensor,
    *,
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5),
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """RepVGG block with skip-squeeze-excitation in training form, with the statistics of the batch.

    z = BN0(x), y = φ(BN3(conv3x3(x; padding 1)) + BN1(conv1x1(x)) + z·σ(gate_weight·mean_hw(z)))

    Args:
        x: [N, C, H, W], N·H·W ≥ 2, any strides; all but float64 have kernels on the CPU and through Triton on GPUs,
            float64 goes through plain PyTorch. Parameters are of its dtype, or float32 beside 16-bit maps.
        weight3: [C, C, 3, 3]. weight1: [C, C, 1, 1]. gate_weight: [C, C].
        gamma3, beta3, gamma1, beta1, gamma0, beta0: [C], weight and bias of each BatchNorm.
        eps: of BN3, BN1 and BN0. activation: φ, "silu" or "relu".

    Returns:
        y [N, C, H, W], channels_last, and statistics [6, C]: mean and biased variance of conv3x3(x), conv1x1(x) and x,
        for running statistics; not differentiable. For backward x, both convolutions and vectors are kept.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    parameters = weight3, weight1, gamma3, beta3, gamma1, beta1, gamma0, beta0, gate_weight
    y, statistics, *_ = torch.ops.parnet.repvgg_sse_train(x, *parameters, eps=eps, activation=activation)
    return y, statistics


def downsample_se_train(
    x: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    gate_weight: Tensor,
    *,
    eps: Sequence[float] = (1e-5, 1e-5),
    stride: int = 2,
    groups: int = 1,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Downsampling block in training form; with two groups the block within `fusion_se_train`.

    y = φ((BN3(conv3x3(x; padding 1, stride)) + BN1(conv1x1(p)))·2σ(gate_weight·mean_hw(x))), where p is x, or its 2×2
    averages at stride 2 (of x padded with zeros to even sizes)

    Args:
        x: [N, C, H, W], N·⌈H/stride⌉·⌈W/stride⌉ ≥ 2. weight3: [K, C/groups, 3, 3]. weight1: [K, C/groups, 1, 1].
        gate_weight: [K, C/groups]. gamma3, beta3, gamma1, beta1: [K]. eps: of BN3 and BN1. stride: 1 or 2.
        groups: 1 or 2. activation: as in `repvgg_sse_train`.

    Returns:
        y [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last, and statistics [4, K], as in `repvgg_sse_train`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    parameters = weight3, weight1, gamma3, beta3, gamma1, beta1, gate_weight
    y, statistics, *_ = torch.ops.parnet.downsample_se_train(
        x, *parameters, eps=eps, stride=stride, groups=groups, activation=activation
    )
    return y, statistics


def fusion_se_train(
    x: Tensor,
    y: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    gamma_x: Tensor,
    beta_x: Tensor,
    gamma_y: Tensor,
    beta_y: Tensor,
    gate_weight: Tensor,
    *,
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5, 1e-5),
    stride: int = 2,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Fusion block in training form, with the BatchNorms of its inputs and the shuffle of its result.

    u = interleave(BNx(x), BNy(y)), v = `downsample_se_train`(u) in two groups
    result channel 2i + k = v[channel k·K/2 + i]

    Args:
        x, y: [N, C, H, W], of one shape. weight3: [K, C, 3, 3], K even. weight1: [K, C, 1, 1]. gate_weight: [K, C].
        gamma3, beta3, gamma1, beta1: [K]. gamma_x, beta_x, gamma_y, beta_y: [C], weight and bias of BNx and BNy.
        eps: of BN3, BN1, BNx and BNy. stride: 1 or 2. activation: as in `repvgg_sse_train`.

    Returns:
        [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last; statistics [4, K], as in `repvgg_sse_train`; and [4, C], of x
        and y. For backward x, y, both convolutions and vectors are kept, not u.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    norms = gamma3, beta3, gamma1, beta1, gamma_x, beta_x, gamma_y, beta_y
    result, statistics, of_inputs, *_ = torch.ops.parnet.fusion_se_train(
        x, y, weight3, weight1, *norms, gate_weight, eps=eps, stride=stride, activation=activation
    )
    return result, statistics, of_inputs
