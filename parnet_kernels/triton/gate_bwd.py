"""Backward of the gate, and every gradient per channel, from the per-tile sums of `conv_bwd.before_epilogue`.

With S1 = Σ_hw d_t and S2 = Σ_hw d_t·∂t/∂gate (d_t: gradient before φ), s the stored gate, a skip_scale, b skip_shift:
    RepVGG-SSE   d_logit = (a·S2 + b·S1)·s(1 − s)      else   d_logit = S2·s(1 − s/2), as s = 2σ
    d_mean = gate_weightᵀ·d_logit, d_gate_weight = Σ_n d_logit·mean, and sums over n (`Channels`).
All float32, no atomics. Rows of K are in the weight's order (g·K/2 + i); the sums and gates in the result's (2i + g).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parnet_kernels.triton.conv_bwd import Gradient
from parnet_kernels.triton.gate import Gate, images_a_program, sum_slots
from parnet_kernels.triton.launch import launch
from parnet_kernels.triton.tile import OF_BATCH


@triton.jit(do_not_specialize=OF_BATCH)
def gate_se_bwd_kernel(
    sums_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    d_logit_ptr,  # [N, K]
    d_bias_ptr,  # [N, K]: of one image
    factor_ptr,  # [N, K]: S2; None without skip
    affine_ptr,  # [2, N, K], in the result's order
    images,
    K,
    area,
    slots,
    sums_pitch,
    gate_pitch,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BI + tl.arange(0, BI)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    result = GROUPS * (k % (K // GROUPS)) + k // (K // GROUPS)  # the result's channel
    quantity = tl.cast(images, tl.int64) * slots * sums_pitch
    mask = (n < images)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    s1 = sum_slots(sums_ptr, n, images, result, k < K, sums_pitch, slots, area, TILE, PER_IMAGE, BI, BS, BK)
    s2 = sum_slots(sums_ptr + quantity, n, images, result, k < K, sums_pitch, slots, area, TILE, PER_IMAGE, BI, BS, BK)
    s = tl.load(gate_ptr + n[:, None] * gate_pitch + result[None, :], mask=mask, other=0.0)  # [BI, BK]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        d_logit = (scale * s2 + shift * s1) * s * (1 - s)
        tl.store(factor_ptr + at, s2, mask=mask)
        tl.store(d_bias_ptr + at, s1, mask=mask)
    else:
        d_logit = s2 * s * (1 - s / 2)
        tl.store(d_bias_ptr + at, s1 * s, mask=mask)
    tl.store(d_logit_ptr + at, d_logit, mask=mask)
    if affine_ptr is not None:
        at = n[:, None] * K + result[None, :]
        base = sums_ptr + 2 * quantity
        v = sum_slots(base, n, images, result, k < K, sums_pitch, slots, area, TILE, PER_IMAGE, BI, BS, BK)
        tl.store(affine_ptr + at, v, mask=mask)
        base += quantity
        v = sum_slots(base, n, images, result, k < K, sums_pitch, slots, area, TILE, PER_IMAGE, BI, BS, BK)
        tl.store(affine_ptr + images * K + at, v, mask=mask)


@triton.jit(do_not_specialize=OF_BATCH)
def mean_se_bwd_kernel(
    d_logit_ptr,
    weight_ptr,  # [K, C]
    gate_ptr,
    scale_ptr,
    means_ptr,
    d_bias_ptr,
    factor_ptr,
    skip_gate_ptr,  # [N, C]: scale·s, what the input gradient adds of d_t
    skip_bias_ptr,  # [INPUTS, N, C]: the mean's part of the input gradient
    skip_ptr,  # [2, N, C]: gradients of skip_scale and skip_shift of one image
    images,
    K,
    C,
    area,
    gate_pitch,
    stride_wk,
    stride_wc,
    INPUTS: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0) * BI + tl.arange(0, BI)
    t = tl.program_id(1) * BC + tl.arange(0, BC)
    group = tl.program_id(2)
    rows = K // INPUTS
    d_mean = tl.zeros((BI, BC), tl.float32)
    for first in range(0, rows, BK):
        r = first + tl.arange(0, BK)
        k = group * rows + r
        mask = (n < images)[:, None] & (r < rows)[None, :]
        d_logit = tl.load(d_logit_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0)  # [BI, BK]
        mask = (r < rows)[:, None] & (t < C)[None, :]
        w = tl.load(weight_ptr + k[:, None] * stride_wk + t[None, :] * stride_wc, mask=mask, other=0.0).to(tl.float32)
        d_mean += tl.sum(d_logit[:, :, None] * w[None, :, :], 1)
    u = group * C + t
    at = n[:, None] * C + (u // INPUTS)[None, :]
    mask = (n < images)[:, None] & (t < C)[None, :]
    if scale_ptr is not None:
        s = tl.load(gate_ptr + n[:, None] * gate_pitch + t[None, :], mask=mask, other=0.0)
        scale = tl.load(scale_ptr + t, mask=t < C, other=0.0).to(tl.float32)[None, :]
        mean = tl.load(means_ptr + at, mask=mask, other=0.0)
        s1 = tl.load(d_bias_ptr + at, mask=mask, other=0.0)
        s2 = tl.load(factor_ptr + at, mask=mask, other=0.0)
        tl.store(skip_ptr + at, s * s2 + d_mean * mean, mask=mask)
        tl.store(skip_ptr + images * C + at, s * s1 + d_mean, mask=mask)
        tl.store(skip_gate_ptr + at, scale * s, mask=mask)
        d_mean *= scale
    source = (u % INPUTS)[None, :] * images * C
    tl.store(skip_bias_ptr + source + at, d_mean / area, mask=mask)


@triton.jit(do_not_specialize=OF_BATCH)
def gate_weight_se_bwd_kernel(
    d_logit_ptr,
    means_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,  # [K, C]
    images,
    K,
    C,
    stride_k,
    stride_c,
    INPUTS: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    rows = K // INPUTS
    r = tl.program_id(0) * BK + tl.arange(0, BK)
    t = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.program_id(2) * rows + r
    u = tl.program_id(2) * C + t
    acc = tl.zeros((BK, BC), tl.float32)
    for first in range(0, images, BI):
        n = first + tl.arange(0, BI)
        mask = (n < images)[None, :] & (r < rows)[:, None]
        d_logit = tl.load(d_logit_ptr + n[None, :] * K + k[:, None], mask=mask, other=0.0)  # [BK, BI]
        mask = (n < images)[:, None] & (t < C)[None, :]
        mean = tl.load(means_ptr + n[:, None] * (C * INPUTS) + u[None, :], mask=mask, other=0.0)  # [BI, BC]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + t, mask=t < C, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + t, mask=t < C, other=0.0).to(tl.float32)[None, :]
            mean = mean * scale + shift
        acc = tl.dot(d_logit, mean, acc, input_precision="ieee")  # images past the end add 0 · shift
    mask = (r < rows)[:, None] & (t < C)[None, :]
    tl.store(out_ptr + k[:, None] * stride_k + t[None, :] * stride_c, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_BATCH)
def channel_se_bwd_kernel(rows_ptr, out_ptr, images, K, BI: tl.constexpr, BK: tl.constexpr, INT64: tl.constexpr):
    """out [rows, K] = Σ_n of rows [rows, N, K], in a fixed order."""
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    base = rows_ptr + tl.program_id(0).to(tl.int64) * images * K
    acc = tl.zeros((BK,), tl.float32)
    for first in range(0, images, BI):
        n = first + tl.arange(0, BI)
        mask = (n < images)[:, None] & (k < K)[None, :]
        acc += tl.sum(tl.load(base + n[:, None] * K + k[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + tl.program_id(0) * K + k, acc, mask=k < K)


@dataclass(frozen=True)
class Channels:
    """Gradients per channel, float32 [K], and what the input gradient's epilogue needs."""

    bias: Tensor
    gate_bias: Tensor
    gate_weight: Tensor  # its parameter's dtype
    skip_scale: Tensor | None
    skip_shift: Tensor | None
    out_scale: Tensor | None
    out_shift: Tensor | None
    input_gate: Tensor | None  # [N, C]
    input_bias: Tensor  # [inputs, N, C]


def channel_gradients(
    gradient: Gradient, gates: Gate, gate_weight: Tensor, area: int, scale: Tensor | None, shift: Tensor | None
) -> Channels:
    """From the sums of `gradient`; gates with means. area: pixels of an input map. scale, shift: of a RepVGG-SSE
    block, or None.
    """
    quantities, images, slots, pitch = gradient.sums.shape
    assert gates.means is not None
    k, c = gate_weight.shape
    inputs = gates.means.shape[1] // c
    skips, affine = scale is not None, quantities == 4
    # One row [N, K] a gradient, summed over the images by one launch. d_logit is the gate bias's.
    names = ["gate_bias", "bias"] + ["skip_scale", "skip_shift"] * skips + ["out_scale", "out_shift"] * affine
    rows = torch.empty(len(names), images, k, dtype=torch.float32, device=gate_weight.device)
    factor = torch.empty_like(rows[0]) if skips else None
    block = images_a_program(images)
    first = {
        "sums_ptr": gradient.sums,
        "gate_ptr": gates.gate,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "d_logit_ptr": rows[0],
        "d_bias_ptr": rows[1],
        "factor_ptr": factor,
        "affine_ptr": rows[len(names) - 2 :] if affine else None,
        "images": images,
        "K": k,
        "area": gradient.conv.shape[1] * gradient.conv.shape[2],
        "slots": slots,
        "sums_pitch": pitch,
        "gate_pitch": gates.gate.stride(0),
        "GROUPS": inputs,
        "TILE": gradient.cut.tile,
        "PER_IMAGE": gradient.cut.per_image,
        "BI": block,
        "BS": min(32 // block, triton.next_power_of_2(slots)),
        "BK": 32,
    }
    launch(gate_se_bwd_kernel, (-(-images // block), -(-k // 32)), first)
    input_gate = torch.empty(images, c, dtype=torch.float32, device=rows.device) if skips else None
    input_bias = torch.empty(inputs, images, c, dtype=torch.float32, device=rows.device)
    second = {
        "d_logit_ptr": rows[0],
        "weight_ptr": gate_weight,
        "gate_ptr": gates.gate,
        "scale_ptr": scale,
        "means_ptr": gates.means,
        "d_bias_ptr": rows[1],
        "factor_ptr": factor,
        "skip_gate_ptr": input_gate,
        "skip_bias_ptr": input_bias,
        "skip_ptr": rows[2:4] if skips else None,
        "images": images,
        "K": k,
        "C": c,
        "area": area,
        "gate_pitch": gates.gate.stride(0),
        "stride_wk": gate_weight.stride(0),
        "stride_wc": gate_weight.stride(1),
        "INPUTS": inputs,
        "BI": block,
        "BK": 32,
        "BC": 32,
    }
    launch(mean_se_bwd_kernel, (-(-images // block), -(-c // 32), inputs), second)
    d_gate_weight = torch.empty_like(gate_weight)
    third = {
        "d_logit_ptr": rows[0],
        "means_ptr": gates.means,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "out_ptr": d_gate_weight,
        "images": images,
        "K": k,
        "C": c,
        "stride_k": d_gate_weight.stride(0),
        "stride_c": d_gate_weight.stride(1),
        "INPUTS": inputs,
        "BI": 16,
        "BK": 32,
        "BC": 32,
    }
    launch(gate_weight_se_bwd_kernel, (-(-k // inputs // 32), -(-c // 32), inputs), third)
    out = torch.empty(len(names), k, dtype=torch.float32, device=rows.device)
    fourth = {"rows_ptr": rows, "out_ptr": out, "images": images, "K": k, "BI": 32, "BK": 32}
    launch(channel_se_bwd_kernel, (len(names), -(-k // 32)), fourth)
    by_name = dict(zip(names, out, strict=True))
    return Channels(
        by_name["bias"],
        by_name["gate_bias"],
        d_gate_weight,
        by_name.get("skip_scale"),
        by_name.get("skip_shift"),
        by_name.get("out_scale"),
        by_name.get("out_shift"),
        input_gate,
        input_bias,
    )
