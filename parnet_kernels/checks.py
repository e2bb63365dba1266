"""Argument checks of the public operators, once for every backend and for the fake kernels.

Each error names the argument, what is required of it and what was got.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parnet_kernels.reference import ACTIVATIONS


def _require(condition: bool, argument: str, requirement: str, got: object) -> None:
    if not condition:
        raise ValueError(f"parnet_kernels: `{argument}` must {requirement}, got {got}")


def _is_map(name: str, t: Tensor) -> None:
    _require(t.dim() == 4, name, "have 4 dimensions [N, C, H, W]", f"shape {list(t.shape)}")
    _require(t.is_floating_point(), name, "be a floating-point tensor", t.dtype)
    _require(
        t.shape[1] > 0 and t.shape[2] > 0 and t.shape[3] > 0,
        name,
        "have C, H, W ≥ 1",
        f"shape {list(t.shape)}",
    )


def _like(name: str, t: Tensor, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    _require(list(t.shape) == list(shape), name, f"have shape {list(shape)} ({meaning})", list(t.shape))
    _require(t.dtype == x.dtype, name, f"have the dtype of `x`, {x.dtype}", t.dtype)
    _require(t.device == x.device, name, f"be on the device of `x`, {x.device}", t.device)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor | None) -> int:
    """Checks the parameters that every operator has; returns K."""
    _require(weight.dim() == 4, "weight", "have 4 dimensions [K, C, 3, 3]", f"shape {list(weight.shape)}")
    k, c = weight.shape[0], x.shape[1]
    _require(k > 0, "weight", "have K ≥ 1 output channels", f"shape {list(weight.shape)}")
    _like("weight", weight, x, (k, c, 3, 3), "[K, C, 3, 3]")
    _like("bias", bias, x, (k,), "[K]")
    _like("gate_weight", gate_weight, x, (k, c), "[K, C]")
    if gate_bias is not None:
        _like("gate_bias", gate_bias, x, (k,), "[K]")
    return k


def _epilogue(x: Tensor, k: int, activation: str, out_scale: Tensor | None, out_shift: Tensor | None) -> None:
    _require(activation in ACTIVATIONS, "activation", f"be one of {sorted(ACTIVATIONS)}", repr(activation))
    for name, t, other_name, other in (
        ("out_scale", out_scale, "out_shift", out_shift),
        ("out_shift", out_shift, "out_scale", out_scale),
    ):
        if t is not None:
            _require(other is not None, other_name, f"be given together with `{name}`", None)
            _like(name, t, x, (k,), "[K]")


def _stride(stride: int) -> None:
    _require(stride in (1, 2), "stride", "be 1 or 2", stride)


def repvgg_sse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip_scale: Tensor,
    skip_shift: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    *,
    activation: str,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> None:
    _is_map("x", x)
    k = _convolution(x, weight, bias, gate_weight, gate_bias)
    _require(k == x.shape[1], "weight", f"have K = C = {x.shape[1]}, the skip adds x", f"K = {k}")
    _like("skip_scale", skip_scale, x, (k,), "[C]")
    _like("skip_shift", skip_shift, x, (k,), "[C]")
    _epilogue(x, k, activation, out_scale, out_shift)


def downsample_se(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    *,
    stride: int,
    activation: str,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> None:
    _is_map("x", x)
    _stride(stride)
    k = _convolution(x, weight, bias, gate_weight, gate_bias)
    _epilogue(x, k, activation, out_scale, out_shift)


def fusion_se(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    *,
    stride: int,
    activation: str,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> None:
    _is_map("x", x)
    _is_map("y", y)
    _like("y", y, x, x.shape, "that of `x`")
    _stride(stride)
    k = _convolution(x, weight, bias, gate_weight, gate_bias)
    _require(k % 2 == 0, "weight", "have an even K, two groups", f"K = {k}")
    _epilogue(x, k, activation, out_scale, out_shift)


def is_channels_last(x: Tensor) -> bool:
    """Whether the result of an operator on x is channels_last: dense channels_last, and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
