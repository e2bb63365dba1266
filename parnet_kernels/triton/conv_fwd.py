"""The 3×3 convolution with the whole epilogue of a ParNet layer (paper section 3), also used for the input gradient.

    out = out_scale·φ(conv_gate·(conv + bias) + skip_gate·skip + skip_bias) + out_shift        every term optional

conv_gate, skip_gate, skip_bias are per image and channel, the rest per channel. The input gradient is the same kernel
on the gradient, with flipped weights (stride 1) or the transposed taps (stride 2), the gated gradient as skip and the
mean's as skip_bias.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parnet_kernels.triton.launch import launch
from parnet_kernels.triton.pack import Map, Slices, Sums, padded
from parnet_kernels.triton.policy import Plan
from parnet_kernels.triton.tile import (
    OF_BATCH,
    activation_of,
    column_part,
    convolve,
    gate_tile,
    load_channel,
    store_sums,
    tile_columns,
    tile_rows,
    wide,
    workspace_mask,
)

#: Results a thread handles at a time in the epilogue, at most; with more, its terms spill.
EPILOGUE = 32


@triton.jit(do_not_specialize=OF_BATCH)
def conv_se_fwd_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    out_ptr,
    workspace_ptr,
    bias_ptr,  # [K], group after group
    conv_gate_ptr,  # [N, gate_pitch] float32, as skip_gate and skip_bias
    skip_ptr,
    skip_gate_ptr,
    skip_bias_ptr,
    out_scale_ptr,  # [K], in the order of the result
    out_shift_ptr,
    sums_ptr,  # [N, slots, sums_pitch] float32
    images,
    H,
    W,
    GH,  # the grid of pixels: the result's, or one parity class of it
    GW,
    OH,
    OW,
    K,
    stored,  # channels of the result that exist: K, or more where it is padded
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
    stride_on,
    stride_oh,
    stride_ow,
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
    ALIGN: tl.constexpr,  # what divides channels and strides of the maps of the epilogue: so wide are its accesses
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):
    if ALIGN > 1:  # which the compiler learns from this
        K = K // ALIGN * ALIGN
        stored = stored // ALIGN * ALIGN
        if SPLIT_COLUMNS:
            edge = edge // ALIGN * ALIGN
    tile = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n  # fastest: programs that run together read the same pixels
    parity = (tl.program_id(2) // 2, tl.program_id(2) % 2)
    image, i, j, inside = tile_rows(tile, GH, GW, images, tiles_per_image, BM, PER_IMAGE)
    row = ((tl.program_id(2) * images + image) * GH + i) * GW + j
    columns = tile_columns(tile_n, edge, K, BN, SPLIT_COLUMNS)
    first, past = columns
    acc = convolve(
        x_ptr, y_ptr, w_ptr, workspace_ptr, (image, i, j, inside, row), columns, tl.program_id(1), splits,
        parity, (H, W), (stride_xn, stride_xh, stride_xw), (stride_wk, stride_wt, stride_wj, stride_wc),
        (stride_wg, channel_1, w_columns, group_channels), steps, edge, (rows, width),
        BM, BN, BK, STRIDE, GROUPS, INPUTS, FLIP, TRANSPOSED, SPLIT_COLUMNS, BORDER, STAGE, PRECISION,
        INT64,
    )  # fmt: skip
    if STAGE == "part":
        part = wide(tl.program_id(1), INT64) * rows * width
        n = first + tl.arange(0, BN)
        offsets = wide(row, INT64)[:, None] * width + n[None, :]
        tl.store(workspace_ptr + part + offsets, acc, mask=workspace_mask(inside, n, past, SPLIT_COLUMNS))
    else:
        if TRANSPOSED:
            i = 2 * i + parity[0]
            j = 2 * j + parity[1]
            inside &= (i < OH) & (j < OW)
        if SPLIT_COLUMNS:
            stored = past
        PART: tl.constexpr = BN // PARTS
        for part in tl.static_range(PARTS):
            t = column_part(acc, part, PARTS, BM, BN)  # [BM, PART]
            n = first + part * PART + tl.arange(0, PART)
            if bias_ptr is not None:
                t += load_channel(bias_ptr, n % GROUPS * (K // GROUPS) + n // GROUPS, n < K)
            mask = inside[:, None] & (n < past)[None, :]
            skip = None
            if skip_ptr is not None:
                at = wide(image, INT64) * stride_sn + wide(i, INT64) * stride_sh + wide(j, INT64) * stride_sw
                if ALIGN > 1:
                    at = tl.multiple_of(at, ALIGN)
                skip = tl.load(skip_ptr + at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
            t = gate_tile(
                t, skip, conv_gate_ptr, skip_gate_ptr, skip_bias_ptr, tile, image, n, GH * GW, images, gate_pitch, K,
                BM, PER_IMAGE,
            )  # fmt: skip
            v = activation_of(t, ACTIVATION)
            if out_scale_ptr is not None:
                v = v * load_channel(out_scale_ptr, n, n < K) + load_channel(out_shift_ptr, n, n < K)
            # A channel of the padding is zero, also where 0 · ∞ has made it NaN.
            v = tl.where(mask, v, 0.0).to(out_ptr.dtype.element_ty)  # [BM, PART]
            at = wide(image, INT64) * stride_on + wide(i, INT64) * stride_oh + wide(j, INT64) * stride_ow
            if ALIGN > 1:
                at = tl.multiple_of(at, ALIGN)
            tl.store(out_ptr + at[:, None] + n[None, :], v, mask=inside[:, None] & (n < stored)[None, :])
            if sums_ptr is not None:
                store_sums(
                    v.to(tl.float32), sums_ptr, tile, image, n, GH * GW, images, tiles_per_image, slots, sums_pitch,
                    BM, PER_IMAGE,
                )  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """The optional terms of the module's formula; gates [N, pitch] float32, vectors [K] of any floating dtype."""

    bias: Tensor | None = None
    conv_gate: Tensor | None = None
    skip: Tensor | None = None  # NHWC, channels adjacent
    skip_gate: Tensor | None = None
    skip_bias: Tensor | None = None
    activation: str = "none"
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None


@dataclass(frozen=True)
class Convolution:
    """One implicit GEMM: maps, packed weight and how it is read.

    maps: one or two of one shape and one set of strides. weight: `pack_weight`'s. size: (H, W) of the result. k: its
    channels. backward: the weight's rows are the reduction (input gradient). edge: turns SPLIT_COLUMNS of
    `tile.convolve` on.
    """

    maps: tuple[Map, ...]
    weight: Tensor
    slices: Slices
    size: tuple[int, int]
    k: int
    stride: int = 1
    backward: bool = False
    edge: int | None = None

    @property
    def transposed(self) -> bool:
        return self.backward and self.stride == 2

    @property
    def classes(self) -> int:
        """Parity classes of result pixels, each with its own taps."""
        return 4 if self.transposed else 1

    @property
    def grid(self) -> tuple[int, int]:
        """The pixels (of one class) that tiles enumerate."""
        step = 2 if self.transposed else 1
        return -(-self.size[0] // step), -(-self.size[1] // step)

    @property
    def images(self) -> int:
        return self.maps[0].data.shape[0]

    @property
    def reduction(self) -> int:
        """Channels summed over in one group, of one input."""
        groups, rows = self.weight.shape[:2]
        return groups * rows if self.backward else self.slices.span


def geometry(c: Convolution, plan: Plan) -> dict[str, Any]:
    """The kernels' arguments that describe the convolution and its tiles."""
    first_map = c.maps[0]
    first, second = first_map.data, c.maps[-1].data
    groups, rows = c.weight.shape[:2]
    stride_wg, stride_row, stride_wt, stride_wj, stride_column = c.weight.stride()
    stride_wk, stride_wc = (stride_column, stride_row) if c.backward else (stride_row, stride_column)
    gh, gw = c.grid
    bk = plan.chunk(rows if c.backward else c.slices.span)
    merged = c.backward or groups == 1  # in one GEMM
    return {
        "x_ptr": first,
        "y_ptr": second if len(c.maps) == 2 else None,
        "w_ptr": c.weight,
        "images": c.images,
        "H": first.shape[1],
        "W": first.shape[2],
        "GH": gh,
        "GW": gw,
        "K": c.k,
        "steps": c.reduction // bk * len(c.maps),
        "edge": c.edge or 0,
        "w_columns": c.weight.shape[4] if c.backward else rows,
        "channel_1": 0 if merged else c.slices.first[1],
        "group_channels": first_map.channels,
        "stride_xn": first.stride(0),
        "stride_xh": first.stride(1),
        "stride_xw": first.stride(2),
        "stride_wg": stride_wg,
        "stride_wk": stride_wk,
        "stride_wt": stride_wt,
        "stride_wj": stride_wj,
        "stride_wc": stride_wc,
        "BK": bk,
        "STRIDE": 1 if c.backward else c.stride,
        "GROUPS": 1 if merged else groups,
        "INPUTS": len(c.maps),
        "FLIP": c.backward and c.stride == 1,
        "TRANSPOSED": c.transposed,
        "SPLIT_COLUMNS": c.edge is not None,
        "BORDER": 0 if merged else c.slices.border(first_map.channels),
        "PRECISION": plan.precision,
    }


def alignment(channels: int, *maps: Tensor | None) -> int:
    """The largest power of two up to 16 that divides the channels and the strides of maps [N, H, W, C]. Triton knows of
    16 by itself, and would make single accesses of everything else.
    """
    found = [channels, 16]
    for t in maps:
        if t is not None:
            found += [t.shape[3], *t.stride()[:3]]
    return math.gcd(*found)


@dataclass(frozen=True)
class Tiling:
    """How the result is cut: the kernels' arguments about tiles, and the grid."""

    arguments: dict[str, Any]
    grid: tuple[int, int, int]


def tiling(c: Convolution, columns: int, bm: int, bn: int, splits: int) -> Tiling:
    """Tiles of bm pixels × bn of `columns`. A tile stays within one image if that wastes little (or nothing, batch
    1).
    """
    area = c.grid[0] * c.grid[1]
    per_image_tiles = -(-area // bm)
    per_image = c.images == 1 or per_image_tiles * bm <= 1.07 * area
    tiles = c.images * per_image_tiles if per_image else -(-c.images * area // bm)
    tiles_n = -(-columns // bn) if c.edge is None else -(-c.edge // bn) - (c.edge - c.k) // bn
    return Tiling(
        {
            "tiles_n": tiles_n,
            "tiles_per_image": per_image_tiles,
            "BM": bm,
            "BN": bn,
            "PER_IMAGE": per_image,
            "slots": per_image_tiles if per_image else per_image_tiles + 1,
        },
        (tiles * tiles_n, splits, c.classes),
    )


def split_and_finish(
    kernel: Any,
    c: Convolution,
    plan: Plan,
    columns: int,
    epilogue: int,
    arguments: dict[str, Any],
    of_tiles: Callable[[Tiling], dict[str, Any]],
) -> None:
    """Runs `kernel` on every tile: at once, or in `plan.splits` parts of the reduction, which a second launch adds.

    columns: of the result to compute. epilogue: results a thread handles at a time in it.
    of_tiles: allocates what depends on the tiles of the launch that runs the epilogue; returns its arguments.
    """
    tile = plan.tile
    whole = tiling(c, columns, tile.bm, tile.bn, plan.splits)
    width = whole.arguments["tiles_n"] * tile.bn
    rows = c.classes * c.images * c.grid[0] * c.grid[1]
    arguments = {**geometry(c, plan), **arguments, "rows": rows, "width": width, "splits": plan.splits}
    if plan.splits == 1:
        arguments["workspace_ptr"] = None
        parts = max(1, tile.bm * tile.bn // (epilogue * 32 * tile.warps))
        launch(
            kernel,
            whole.grid,
            {**arguments, **whole.arguments, **of_tiles(whole), "STAGE": "whole", "PARTS": parts},
            tile.options,
        )
        return
    arguments["workspace_ptr"] = torch.empty(plan.splits, rows, width, dtype=torch.float32, device=c.weight.device)
    finish = tiling(c, columns, plan.finish_bm, min(tile.bn, 64), 1)
    arguments |= of_tiles(finish)
    launch(kernel, whole.grid, {**arguments, **whole.arguments, "STAGE": "part", "PARTS": 1}, tile.options)
    launch(kernel, finish.grid, {**arguments, **finish.arguments, "STAGE": "finish", "PARTS": 1})


def convolution(c: Convolution, epilogue: Epilogue, plan: Plan, out: Tensor, *, with_sums: bool = False) -> Sums | None:
    """Runs the convolution into out [N, OH, OW, ≥ k], channels adjacent; channels past k are written as zeros.

    Returns the per-tile channel sums of what was stored, if asked for.
    """
    gates = [t for t in (epilogue.conv_gate, epilogue.skip_gate, epilogue.skip_bias) if t is not None]
    pitch = padded(c.k)
    sums: Sums | None = None

    def of_tiles(t: Tiling) -> dict[str, Any]:
        nonlocal sums
        if not with_sums:
            return {"sums_ptr": None}
        partial = torch.empty(c.images, t.arguments["slots"], pitch, dtype=torch.float32, device=out.device)
        sums = Sums(partial, t.arguments["BM"], t.arguments["PER_IMAGE"])
        return {"sums_ptr": partial}

    skip = epilogue.skip
    arguments = {
        "out_ptr": out,
        "bias_ptr": epilogue.bias,
        "conv_gate_ptr": epilogue.conv_gate,
        "skip_ptr": skip,
        "skip_gate_ptr": epilogue.skip_gate,
        "skip_bias_ptr": epilogue.skip_bias,
        "out_scale_ptr": epilogue.out_scale,
        "out_shift_ptr": epilogue.out_shift,
        "OH": c.size[0],
        "OW": c.size[1],
        "stored": out.shape[3],
        "gate_pitch": gates[0].stride(0) if gates else 0,
        "sums_pitch": pitch,
        "stride_on": out.stride(0),
        "stride_oh": out.stride(1),
        "stride_ow": out.stride(2),
        "stride_sn": skip.stride(0) if skip is not None else 0,
        "stride_sh": skip.stride(1) if skip is not None else 0,
        "stride_sw": skip.stride(2) if skip is not None else 0,
        "ACTIVATION": epilogue.activation,
    }
    arguments["ALIGN"] = math.gcd(alignment(c.k, out, skip), c.edge or 0)
    split_and_finish(conv_se_fwd_kernel, c, plan, pitch, EPILOGUE, arguments, of_tiles)
    return sums
