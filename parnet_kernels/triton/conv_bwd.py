"""Backward of the convolution: the gradient before the convolution's epilogue, and the weight's.

The forward's value before φ is not saved: `conv_se_bwd_kernel` computes the convolution once more and, in its
epilogue, turns the result's gradient into that of the convolution and sums everything that the small gradients need
(`gate_bwd.py`). The gradient of the input is `conv_fwd.convolution` on that (DESIGN: the same kernel again).
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108 (the JIT drops the branches of a constexpr `if` statement only)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parnet_kernels.triton.conv_fwd import Convolution, Epilogue, Tiling, alignment, split_and_finish
from parnet_kernels.triton.launch import launch
from parnet_kernels.triton.pack import Sums
from parnet_kernels.triton.policy import Plan
from parnet_kernels.triton.tile import (
    OF_BATCH,
    column_part,
    convolve,
    gate_tile,
    load_channel,
    store_sums,
    tile_columns,
    tile_rows,
    wide,
)

#: As in `conv_fwd`; this epilogue has twice the terms.
EPILOGUE = 16


@triton.jit(do_not_specialize=OF_BATCH)
def conv_se_bwd_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    g_ptr,  # gradient of the result, channels adjacent
    d_ptr,  # [N, OH, OW, GROUPS · w_columns]: gradient of the convolution, group after group
    workspace_ptr,
    bias_ptr,
    conv_gate_ptr,
    skip_ptr,
    skip_gate_ptr,
    skip_bias_ptr,
    out_scale_ptr,
    sums_ptr,  # [2 or 4, N, slots, sums_pitch], see `Gradient`
    images,
    H,
    W,
    GH,
    GW,
    K,
    tiles_n,
    tiles_per_image,
    splits,
    steps,
    edge,
    w_columns,
    channel_1,
    group_channels,
    gate_pitch,
    slots,
    sums_pitch,
    rows,
    width,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_wg,
    stride_wk,
    stride_wt,
    stride_wj,
    stride_wc,
    stride_gn,
    stride_gh,
    stride_gw,
    stride_sn,
    stride_sh,
    stride_sw,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    FLIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    BORDER: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    STAGE: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGN: tl.constexpr,  # as in `conv_fwd`
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):
    if ALIGN > 1:  # see `conv_fwd`
        K = K // ALIGN * ALIGN
    tile = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    image, i, j, inside = tile_rows(tile, GH, GW, images, tiles_per_image, BM, PER_IMAGE)
    row = (image * GH + i) * GW + j
    columns = tile_columns(tile_n, edge, K, BN, SPLIT_COLUMNS)
    acc = convolve(
        x_ptr, y_ptr, w_ptr, workspace_ptr, (image, i, j, inside, row), columns, tl.program_id(1), splits,
        (0, 0), (H, W), (stride_xn, stride_xh, stride_xw), (stride_wk, stride_wt, stride_wj, stride_wc),
        (stride_wg, channel_1, w_columns, group_channels), steps, edge, (rows, width),
        BM, BN, BK, STRIDE, GROUPS, INPUTS, FLIP, TRANSPOSED, SPLIT_COLUMNS, BORDER, STAGE, PRECISION,
        INT64,
    )  # fmt: skip
    n = tile_n * BN + tl.arange(0, BN)
    if STAGE == "part":
        part = wide(tl.program_id(1), INT64) * rows * width
        offsets = wide(row, INT64)[:, None] * width + n[None, :]
        tl.store(workspace_ptr + part + offsets, acc, mask=inside[:, None])
    else:
        PART: tl.constexpr = BN // PARTS
        area = GH * GW
        quantity = tl.cast(images, tl.int64) * slots * sums_pitch
        for part in tl.static_range(PARTS):
            n = tile_n * BN + part * PART + tl.arange(0, PART)
            mask = inside[:, None] & (n < K)[None, :]
            conv = column_part(acc, part, PARTS, BM, BN) + load_channel(
                bias_ptr, n % GROUPS * (K // GROUPS) + n // GROUPS, n < K
            )
            conv = tl.where(mask, conv, 0.0)  # a gradient of zero does not make zero of an infinity
            skip = None
            if skip_ptr is not None:
                skips = wide(image, INT64) * stride_sn + wide(i, INT64) * stride_sh + wide(j, INT64) * stride_sw
                if ALIGN > 1:
                    skips = tl.multiple_of(skips, ALIGN)
                skip = tl.load(skip_ptr + skips[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
            t = gate_tile(
                conv, skip, conv_gate_ptr, skip_gate_ptr, skip_bias_ptr, tile, image, n, area, images, gate_pitch, K,
                BM, PER_IMAGE,
            )  # fmt: skip
            t = tl.where(mask, t, 0.0)
            at = wide(image, INT64) * stride_gn + wide(i, INT64) * stride_gh + wide(j, INT64) * stride_gw
            if ALIGN > 1:
                at = tl.multiple_of(at, ALIGN)
            g = tl.load(g_ptr + at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)  # [BM, PART]
            if ACTIVATION == "silu":
                sigmoid = tl.sigmoid(t)
                value = t * sigmoid
            else:
                value = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if out_scale_ptr is not None:
                store_sums(
                    g * value, sums_ptr + 2 * quantity, tile, image, n, area, images, tiles_per_image, slots,
                    sums_pitch, BM, PER_IMAGE,
                )  # fmt: skip
                store_sums(
                    g, sums_ptr + 3 * quantity, tile, image, n, area, images, tiles_per_image, slots, sums_pitch,
                    BM, PER_IMAGE,
                )  # fmt: skip
                g *= load_channel(out_scale_ptr, n, n < K)
            if ACTIVATION == "silu":
                d = g * (sigmoid * (1 + t * (1 - sigmoid)))
            else:
                d = tl.where(t <= 0, 0.0, g)
            store_sums(d, sums_ptr, tile, image, n, area, images, tiles_per_image, slots, sums_pitch, BM, PER_IMAGE)
            if skip_ptr is not None:  # read again: held since then, it would spill
                factor = tl.load(skip_ptr + skips[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                factor = conv  # ∂t/∂gate
            store_sums(
                d * factor, sums_ptr + quantity, tile, image, n, area, images, tiles_per_image, slots, sums_pitch,
                BM, PER_IMAGE,
            )  # fmt: skip
            d = gate_tile(
                d, None, conv_gate_ptr, None, None, tile, image, n, area, images, gate_pitch, K, BM, PER_IMAGE
            )
            d = d.to(d_ptr.dtype.element_ty)
            at = (wide(row, INT64) * (w_columns * GROUPS))[:, None]
            if GROUPS == 2:
                even, odd = tl.split(tl.reshape(d, (BM, PART // 2, 2)))
                half = (tile_n * BN + part * PART) // 2 + tl.arange(0, PART // 2)
                mask = inside[:, None] & (half < w_columns)[None, :]
                tl.store(d_ptr + at + half[None, :], even, mask=mask)
                tl.store(d_ptr + at + w_columns + half[None, :], odd, mask=mask)
            else:
                tl.store(d_ptr + at + n[None, :], d, mask=inside[:, None] & (n < w_columns)[None, :])


@dataclass(frozen=True)
class Gradient:
    """What one pass over the result's gradient leaves behind.

    conv: [N, OH, OW, groups · padded(K / groups)], the gradient of the convolution, group after group, x's dtype.
    sums: [2 or 4, N, slots, columns] per-tile sums of d_t and d_t·∂t/∂gate; with an output affine also of g·φ(t) and
    g; laid out as `cut` says, channels in the result's order.
    """

    conv: Tensor
    sums: Tensor
    cut: Sums


def before_epilogue(c: Convolution, epilogue: Epilogue, plan: Plan, g: Tensor) -> Gradient:
    """g: gradient of the result, NHWC, channels adjacent. c and epilogue: the forward's."""
    groups, rows = c.weight.shape[:2]
    columns = groups * rows
    conv = torch.empty(c.images, *c.size, columns, dtype=g.dtype, device=g.device)
    quantities = 2 if epilogue.out_scale is None else 4
    cut: Sums | None = None

    def of_tiles(t: Tiling) -> dict[str, Any]:
        nonlocal cut
        shape = (quantities, c.images, t.arguments["slots"], columns)
        cut = Sums(
            torch.empty(shape, dtype=torch.float32, device=g.device), t.arguments["BM"], t.arguments["PER_IMAGE"]
        )
        return {"sums_ptr": cut.partial}

    skip = epilogue.skip
    gate = epilogue.skip_gate if epilogue.conv_gate is None else epilogue.conv_gate
    assert gate is not None
    arguments = {
        "g_ptr": g,
        "d_ptr": conv,
        "bias_ptr": epilogue.bias,
        "conv_gate_ptr": epilogue.conv_gate,
        "skip_ptr": skip,
        "skip_gate_ptr": epilogue.skip_gate,
        "skip_bias_ptr": epilogue.skip_bias,
        "out_scale_ptr": epilogue.out_scale,
        "gate_pitch": gate.stride(0),
        "sums_pitch": columns,
        "stride_gn": g.stride(0),
        "stride_gh": g.stride(1),
        "stride_gw": g.stride(2),
        "stride_sn": skip.stride(0) if skip is not None else 0,
        "stride_sh": skip.stride(1) if skip is not None else 0,
        "stride_sw": skip.stride(2) if skip is not None else 0,
        "ALIGN": alignment(c.k, g, skip),
        "ACTIVATION": epilogue.activation,
    }
    split_and_finish(conv_se_bwd_kernel, c, plan, columns, EPILOGUE, arguments, of_tiles)
    assert cut is not None
    return Gradient(conv, cut.partial, cut)


@triton.jit(do_not_specialize=OF_BATCH)
def weight_se_bwd_kernel(
    d_ptr,  # [pixels, GROUPS · ROWS]
    x_ptr,
    y_ptr,
    part_ptr,  # [splits, GROUPS, ROWS, 9, INPUTS, SPAN] float32
    pixels,
    H,
    W,
    OH,
    OW,
    tiles_c,
    splits,
    channel_1,
    ROWS,
    SPAN,
    stride_xn,
    stride_xh,
    stride_xw,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):
    """Products [K, pixels] × [pixels, C] for one tap, input and group, over one part of the pixels."""
    tap = tl.program_id(1) // (INPUTS * GROUPS)
    source = tl.program_id(1) // GROUPS % INPUTS
    group = tl.program_id(1) % GROUPS
    k = tl.program_id(0) // tiles_c * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles_c * BN + tl.arange(0, BN)
    a_base = d_ptr + group * ROWS + k % ROWS  # past the end: any channel, never stored
    if INPUTS == 2:
        b_base = tl.where(source == 0, x_ptr, y_ptr) + group * channel_1 + c % SPAN
    else:
        b_base = x_ptr + c % SPAN
    split = tl.program_id(2)
    steps = (pixels + BK - 1) // BK
    d_pixel = wide(GROUPS * ROWS, INT64)
    x_image = wide(stride_xn, INT64)
    x_row = wide(stride_xh, INT64)
    x_column = wide(stride_xw, INT64)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(steps * split // splits, steps * (split + 1) // splits):
        p = step * BK + tl.arange(0, BK)
        h = p // OW % OH * STRIDE + tap // 3 - 1
        w = p % OW * STRIDE + tap % 3 - 1
        inside = (p < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a_offsets = p * d_pixel
        b_offsets = p // (OW * OH) * x_image + h * x_row + w * x_column
        a = tl.load(a_base[:, None] + a_offsets[None, :], mask=inside[None, :], other=0.0)  # [BM, BK]
        b = tl.load(b_base[None, :] + b_offsets[:, None], mask=inside[:, None], other=0.0)  # [BK, BN]
        if PRECISION == "widen":  # see `layers.dot_precision`
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = wide(((split * GROUPS + group) * ROWS + k) * 9 + tap, INT64) * INPUTS + source
    mask = (k < ROWS)[:, None] & (c < SPAN)[None, :]
    tl.store(part_ptr + at[:, None] * SPAN + c[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=OF_BATCH)
def weight_sum_bwd_kernel(
    part_ptr,
    out_ptr,  # [GROUPS·K, C, 3, 3]
    K,  # of one group
    C,
    splits,
    total,  # elements of out
    size,  # elements of one part
    channel_1,
    ROWS,
    SPAN,
    stride_k,
    stride_c,
    stride_h,
    stride_w,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Adds the parts in order and undoes `pack.pack_weight_kernel`."""
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = flat % C
    tap = flat // C % 9
    k = flat // (C * 9) % K
    group = flat // (C * 9 * K)
    u = c + group * C
    source = u % INPUTS
    at = (((group * ROWS + k) * 9 + tap) * INPUTS + source) * SPAN + u // INPUTS - group * channel_1
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(splits):
        acc += tl.load(part_ptr + wide(part, INT64) * size + at, mask=flat < total, other=0.0)
    target = (group * K + k) * stride_k + c * stride_c + tap // 3 * stride_h + tap % 3 * stride_w
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=flat < total)


def weight_gradient(c: Convolution, d: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """Gradient of the weight `like` from d (`Gradient.conv`) and c's maps; pixels split in a fixed way, parts
    added in order.
    """
    first, second = c.maps[0].data, c.maps[-1].data
    groups, rows, _, inputs, span = c.weight.shape
    out = torch.empty_like(like)
    parts = torch.empty(plan.splits, *c.weight.shape, dtype=torch.float32, device=d.device)
    tile = plan.tile
    tiles_c = -(-span // tile.bn)
    pixels = c.images * c.size[0] * c.size[1]
    arguments = {
        "d_ptr": d,
        "x_ptr": first,
        "y_ptr": second if inputs == 2 else None,
        "part_ptr": parts,
        "pixels": pixels,
        "H": first.shape[1],
        "W": first.shape[2],
        "OH": c.size[0],
        "OW": c.size[1],
        "tiles_c": tiles_c,
        "splits": plan.splits,
        "channel_1": c.slices.first[1],
        "ROWS": rows,
        "SPAN": span,
        "stride_xn": first.stride(0),
        "stride_xh": first.stride(1),
        "stride_xw": first.stride(2),
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "STRIDE": c.stride,
        "GROUPS": groups,
        "INPUTS": inputs,
        "PRECISION": plan.precision,
    }
    grid = (-(-rows // tile.bm) * tiles_c, 9 * inputs * groups, plan.splits)
    launch(weight_se_bwd_kernel, grid, arguments, tile.options)
    add = {
        "part_ptr": parts,
        "out_ptr": out,
        "K": like.shape[0] // groups,
        "C": like.shape[1],
        "splits": plan.splits,
        "total": out.numel(),
        "size": c.weight.numel(),
        "channel_1": c.slices.first[1],
        "ROWS": rows,
        "SPAN": span,
        "stride_k": out.stride(0),
        "stride_c": out.stride(1),
        "stride_h": out.stride(2),
        "stride_w": out.stride(3),
        "INPUTS": inputs,
        "BLOCK": 2048,
    }
    launch(weight_sum_bwd_kernel, (-(-out.numel() // 2048),), add)
    return out
