"""Re-parameterisation: a block in training form (branches and BatchNorms) → the parameters of one operator.

Pure functions on tensors; exact in exact arithmetic. The results are the operators' keyword arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class Affine(NamedTuple):
    """x ↦ scale·x + shift, per channel; scale, shift [C]."""

    scale: Tensor
    shift: Tensor


def affine_of(bn: _BatchNorm) -> Affine:
    """The affine map of a BatchNorm in evaluation, in float64: a·x + b with a = γ/√(var + ε), b = β − a·mean."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    one = torch.ones_like(bn.running_var, dtype=torch.float64)
    scale = (one if bn.weight is None else bn.weight.double()) / torch.sqrt(bn.running_var.double() + bn.eps)
    shift = -scale * bn.running_mean.double()
    return Affine(scale, shift if bn.bias is None else bn.bias.double() + shift)


def merge_branches(weight3: Tensor, bn3: Affine, weight1: Tensor, bn1: Affine, stride: int) -> tuple[Tensor, Tensor]:
    """The two convolution branches of a block as one: BN3(conv3x3(x)) + BN1(conv1x1(pooled x)) for maps of any size.

    At stride 1 the 1×1 branch is the centre tap. At stride 2 it follows a 2×2 average pooling, whose windows are the
    taps {1, 2} × {1, 2} of the 3×3 kernel with padding 1.

    Args:
        weight3: [K, C/groups, 3, 3]. weight1: [K, C/groups, 1, 1]. bn3, bn1: [K]. stride: 1 or 2.

    Returns:
        weight [K, C/groups, 3, 3], bias [K].
    """
    point = weight1 * bn1.scale[:, None, None, None]
    taps = F.pad(point, (1, 1, 1, 1)) if stride == 1 else F.pad(point.expand(-1, -1, 2, 2) / 4, (1, 0, 1, 0))
    return weight3 * bn3.scale[:, None, None, None] + taps, bn3.shift + bn1.shift


def fold_identity_block(
    weight3: Tensor, bn3: Affine, weight1: Tensor, bn1: Affine, bn_identity: Affine, gate_weight: Tensor
) -> dict[str, Tensor]:
    """The arguments of `ops.repvgg_sse` for BN3(conv3x3(x)) + BN1(conv1x1(x)) + SSE(BN_identity(x)) (section 3.1).

    Args:
        weight3: [C, C, 3, 3]. weight1, gate_weight: [C, C, 1, 1]. bn3, bn1, bn_identity: [C].
    """
    weight, bias = merge_branches(weight3, bn3, weight1, bn1, stride=1)
    return {
        "weight": weight,
        "bias": bias,
        "skip_scale": bn_identity.scale,
        "skip_shift": bn_identity.shift,
        "gate_weight": gate_weight[:, :, 0, 0],
    }


def fold_gated_block(
    weight3: Tensor, bn3: Affine, weight1: Tensor, bn1: Affine, gate_weight: Tensor, stride: int
) -> dict[str, Tensor]:
    """The arguments of `ops.downsample_se` or, with two groups, `ops.fusion_se`: a block without skip (section 3.2).

    Args:
        weight3: [K, C/groups, 3, 3]. weight1, gate_weight: [K, C/groups, 1, 1]. bn3, bn1: [K]. stride: 1 or 2.
    """
    weight, bias = merge_branches(weight3, bn3, weight1, bn1, stride)
    return {"weight": weight, "bias": bias, "gate_weight": gate_weight[:, :, 0, 0]}
