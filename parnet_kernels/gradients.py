"""Gradients of the operators, for every backend without its own; differentiable, so that a second backward works.

Only the operators' inputs are saved; backward recomputes the convolution, since φ′ needs the value before φ and SiLU
has no inverse. Notation: t = the value before φ, g = ∂L/∂result, d_ = ∂L/∂_.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels.reference import ACTIVATIONS, deinterleave, gate, interleave, per_channel, shuffle

_MAP = (0, 2, 3)  # the dimensions summed for a per-channel gradient


def _activation(
    t: Tensor, g: Tensor, activation: str, out_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d_t, d_out_scale, d_out_shift) of out_scale · φ(t) + out_shift."""
    if activation == "silu":
        s = t.sigmoid()
        slope = s * (1 + t * (1 - s))
    else:
        slope = (t > 0).to(t.dtype)
    if out_scale is None:
        return g * slope, None, None
    return g * per_channel(out_scale) * slope, (g * ACTIVATIONS[activation](t)).sum(_MAP), g.sum(_MAP)


def _convolution(
    d: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x, d_weight) of conv3x3(x; weight, padding 1), d = gradient of its result."""
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        d, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [need_x, need_weight, False]
    )
    return d_x, d_weight


def _gate(d_logit: Tensor, mean: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(d_mean, d_weight, d_bias) of logit = weight · mean + bias; d_logit [N, K], mean [N, C], weight [K, C/groups]."""
    logits = d_logit.unflatten(1, (groups, -1))  # [N, groups, K/groups]
    d_mean = torch.einsum("ngk,gkc->ngc", logits, weight.unflatten(0, (groups, -1))).flatten(1)
    d_weight = torch.einsum("ngk,ngc->gkc", logits, mean.unflatten(1, (groups, -1))).flatten(0, 1)
    return d_mean, d_weight, d_logit.sum(0)


def repvgg_sse(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip_scale: Tensor,
    skip_shift: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    *,
    activation: str,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the tensor arguments after g; `need[0:2]` spares those of x and weight."""
    z = x * per_channel(skip_scale) + per_channel(skip_shift)
    s = gate(z, gate_weight, gate_bias)  # [N, C, 1, 1]
    t = F.conv2d(x, weight, bias, padding=1) + z * s
    d_t, d_out_scale, d_out_shift = _activation(t, g, activation, out_scale)
    d_conv_x, d_weight = _convolution(d_t, x, weight, 1, 1, need[0], need[1])
    d_logit = (d_t * z).sum((2, 3)) * (s * (1 - s)).flatten(1)
    d_mean, d_gate_weight, d_gate_bias = _gate(d_logit, z.mean((2, 3)), gate_weight, 1)
    d_z = d_t * s + d_mean[:, :, None, None] / (x.shape[2] * x.shape[3])
    d_x = None if d_conv_x is None else d_conv_x + d_z * per_channel(skip_scale)
    return (
        d_x,
        d_weight,
        d_t.sum(_MAP),
        (d_z * x).sum(_MAP),
        d_z.sum(_MAP),
        d_gate_weight,
        None if gate_bias is None else d_gate_bias,
        d_out_scale,
        d_out_shift,
    )


def _gated_convolution(
    d_t: Tensor,
    conv: Tensor,
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    stride: int,
    groups: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """(d_x, d_weight, d_bias, d_gate_weight, d_gate_bias) of t = s·conv, s = 2σ(gate), conv = conv3x3(x) + bias."""
    d_conv = d_t * s
    d_x, d_weight = _convolution(d_conv, x, weight, stride, groups, need_x, need_weight)
    d_logit = (d_t * conv).sum((2, 3)) * (s * (1 - s / 2)).flatten(1)  # (2σ)′ = 2σ(1 − σ)
    d_mean, d_gate_weight, d_gate_bias = _gate(d_logit, x.mean((2, 3)), gate_weight, groups)
    if d_x is not None:
        d_x = d_x + d_mean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return d_x, d_weight, d_conv.sum(_MAP), d_gate_weight, d_gate_bias


def downsample_se(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    *,
    stride: int,
    activation: str,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    s = 2 * gate(x, gate_weight, gate_bias)
    conv = F.conv2d(x, weight, bias, stride, padding=1)
    d_t, d_out_scale, d_out_shift = _activation(conv * s, g, activation, out_scale)
    d_x, d_weight, d_bias, d_gate_weight, d_gate_bias = _gated_convolution(
        d_t, conv, s, x, weight, gate_weight, stride, 1, need[0], need[1]
    )
    return (
        d_x,
        d_weight,
        d_bias,
        d_gate_weight,
        None if gate_bias is None else d_gate_bias,
        d_out_scale,
        d_out_shift,
    )


def fusion_se(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    *,
    stride: int,
    activation: str,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    u = interleave(x, y)
    s = 2 * gate(u, gate_weight, gate_bias, groups=2)
    conv = F.conv2d(u, weight, bias, stride, padding=1, groups=2)
    d_shuffled, d_out_scale, d_out_shift = _activation(shuffle(conv * s), g, activation, out_scale)
    d_t = torch.cat(deinterleave(d_shuffled), 1)  # the inverse of the shuffle
    d_u, d_weight, d_bias, d_gate_weight, d_gate_bias = _gated_convolution(
        d_t, conv, s, u, weight, gate_weight, stride, 2, need[0] or need[1], need[2]
    )
    d_x, d_y = (None, None) if d_u is None else deinterleave(d_u)
    return (
        d_x,
        d_y,
        d_weight,
        d_bias,
        d_gate_weight,
        None if gate_bias is None else d_gate_bias,
        d_out_scale,
        d_out_shift,
    )
