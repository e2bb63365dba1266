"""Gradients of the operators, for every backend without its own; differentiable, so that a second backward works.

Only the operators' inputs are saved; backward recomputes the convolution, since φ′ needs the value before φ and SiLU
has no inverse. Notation: t = the value before φ, g = ∂L/∂result, d_ = ∂L/∂_.
"""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels.call import Call
from parnet_kernels.reference import ACTIVATIONS, deinterleave, gate, interleave, per_channel, shuffle

_MAP = (0, 2, 3)  # the dimensions summed for a per-channel gradient


def through(g: Tensor, t: Tensor, activation: str) -> Tensor:
    """d_t from the gradient g of φ(t). ReLU's is zero where t ≤ 0, whatever g is: 0 · ∞ would be NaN."""
    if activation == "relu":
        return g.masked_fill(t <= 0, 0)
    s = t.sigmoid()
    return g * (s * (1 + t * (1 - s)))


def _activation(
    t: Tensor, g: Tensor, activation: str, out_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d_t, d_out_scale, d_out_shift) of out_scale · φ(t) + out_shift."""
    if out_scale is None:
        return through(g, t, activation), None, None
    d_t = through(g * per_channel(out_scale), t, activation)
    return d_t, (g * ACTIVATIONS[activation](t)).sum(_MAP), g.sum(_MAP)


class Convolutions:
    """3×3 convolutions, padding 1, and their gradients by PyTorch's operators: differentiable."""

    def forward(self, x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        return F.conv2d(x, weight, None, stride, 1, groups=groups)

    def backward(
        self, d: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(d_x, d_weight), d = gradient of the result."""
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            d, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [need_x, need_weight, False]
        )
        return d_x, d_weight


_PYTORCH = Convolutions()


def _gate(d_logit: Tensor, mean: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(d_mean, d_weight, d_bias) of logit = weight · mean + bias; d_logit [N, K], mean [N, C], weight [K, C/groups]."""
    # Not einsum and unflatten, which the vmap behind `is_grads_batched` does not know.
    n, k, c = len(mean), weight.shape[0] // groups, weight.shape[1]
    logits = d_logit.reshape(n, groups, k).transpose(0, 1)  # [groups, N, K/groups]
    d_mean = torch.bmm(logits, weight.reshape(groups, k, c)).transpose(0, 1).reshape(mean.shape)
    means = mean.reshape(n, groups, c).transpose(0, 1)
    d_weight = torch.bmm(logits.transpose(1, 2), means).reshape(weight.shape)
    return d_mean, d_weight, d_logit.sum(0)


def of(call: Call, g: Tensor, need: Set[str], convolutions: Convolutions = _PYTORCH) -> dict[str, Tensor]:
    """The gradients of the tensors named in `need`, each in its tensor's dtype; 16-bit is computed in float32."""
    wide = call.widened()
    d = _FORMULAS[call.op](wide, g.to(wide.x.dtype), need, convolutions)
    tensors = call.tensors
    return {name: value.to(tensors[name].dtype) for name in need if (value := d[name]) is not None}  # type: ignore[union-attr]


def _repvgg_sse(call: Call, g: Tensor, need: Set[str], convolutions: Convolutions) -> dict[str, Tensor | None]:
    x, weight, out_scale = call.x, call["weight"], call.parameters["out_scale"]
    z = x * per_channel(call["skip_scale"]) + per_channel(call["skip_shift"])
    s = gate(z, call["gate_weight"], call.parameters["gate_bias"])  # [N, C, 1, 1]
    t = convolutions.forward(x, weight, 1, 1) + per_channel(call["bias"]) + z * s
    d_t, d_out_scale, d_out_shift = _activation(t, g, call.activation, out_scale)
    d_conv_x, d_weight = convolutions.backward(d_t, x, weight, 1, 1, "x" in need, "weight" in need)
    d_logit = (d_t * z).sum((2, 3)) * (s * (1 - s)).flatten(1)
    d_mean, d_gate_weight, d_gate_bias = _gate(d_logit, z.mean((2, 3)), call["gate_weight"], 1)
    d_z = d_t * s + d_mean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return {
        "x": None if d_conv_x is None else d_conv_x + d_z * per_channel(call["skip_scale"]),
        "weight": d_weight,
        "bias": d_t.sum(_MAP),
        "skip_scale": (d_z * x).sum(_MAP),
        "skip_shift": d_z.sum(_MAP),
        "gate_weight": d_gate_weight,
        "gate_bias": d_gate_bias,
        "out_scale": d_out_scale,
        "out_shift": d_out_shift,
    }


def _gated_convolution(
    call: Call,
    convolutions: Convolutions,
    u: Tensor,
    conv: Tensor,
    s: Tensor,
    d_t: Tensor,
    need_u: bool,
    need_weight: bool,
) -> dict[str, Tensor | None]:
    """Gradients of t = s·conv, s = 2σ(gate(u)), conv = conv3x3(u) + bias; that of u is named "u"."""
    weight, gate_weight, groups = call["weight"], call["gate_weight"], len(call.maps)
    d_conv = d_t * s
    d_u, d_weight = convolutions.backward(d_conv, u, weight, call.stride, groups, need_u, need_weight)
    d_logit = (d_t * conv).sum((2, 3)) * (s * (1 - s / 2)).flatten(1)  # (2σ)′ = 2σ(1 − σ)
    d_mean, d_gate_weight, d_gate_bias = _gate(d_logit, u.mean((2, 3)), gate_weight, groups)
    if d_u is not None:
        d_u = d_u + d_mean[:, :, None, None] / (u.shape[2] * u.shape[3])
    return {
        "u": d_u,
        "weight": d_weight,
        "bias": d_conv.sum(_MAP),
        "gate_weight": d_gate_weight,
        "gate_bias": d_gate_bias,
    }


def _downsample_se(call: Call, g: Tensor, need: Set[str], convolutions: Convolutions) -> dict[str, Tensor | None]:
    x, out_scale = call.x, call.parameters["out_scale"]
    s = 2 * gate(x, call["gate_weight"], call.parameters["gate_bias"])
    conv = convolutions.forward(x, call["weight"], call.stride, 1) + per_channel(call["bias"])
    d_t, d_out_scale, d_out_shift = _activation(conv * s, g, call.activation, out_scale)
    found = _gated_convolution(call, convolutions, x, conv, s, d_t, "x" in need, "weight" in need)
    return {**found, "x": found["u"], "out_scale": d_out_scale, "out_shift": d_out_shift}


def _fusion_se(call: Call, g: Tensor, need: Set[str], convolutions: Convolutions) -> dict[str, Tensor | None]:
    u, out_scale = interleave(*call.maps), call.parameters["out_scale"]
    s = 2 * gate(u, call["gate_weight"], call.parameters["gate_bias"], groups=2)
    conv = convolutions.forward(u, call["weight"], call.stride, 2) + per_channel(call["bias"])
    d_shuffled, d_out_scale, d_out_shift = _activation(shuffle(conv * s), g, call.activation, out_scale)
    d_t = torch.cat(deinterleave(d_shuffled), 1)  # the inverse of the shuffle
    found = _gated_convolution(call, convolutions, u, conv, s, d_t, not need.isdisjoint({"x", "y"}), "weight" in need)
    d_x, d_y = (None, None) if found["u"] is None else deinterleave(found["u"])
    return {**found, "x": d_x, "y": d_y, "out_scale": d_out_scale, "out_shift": d_out_shift}


_FORMULAS = {"repvgg_sse": _repvgg_sse, "downsample_se": _downsample_se, "fusion_se": _fusion_se}
