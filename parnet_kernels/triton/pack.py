"""Layouts of the kernels: maps as NHWC with padded channels, weights as [group][K][tap][input][C], and the way back.

Channels are padded to a multiple of 16 or 32 with zeros (`padded`), so the main loop masks pixels only. A zero
channel stays zero through every layer: φ(0) = 0. A map that is NHWC already, with a multiple of 16 channels, is used
where it lies.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108 (the JIT drops the branches of a constexpr `if` statement only)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parnet_kernels.triton.launch import launch
from parnet_kernels.triton.tile import wide

PACK_PIXELS = 64


def padded(channels: int) -> int:
    """The number of channels stored: a multiple of 16 as is, else rounded up to one of 32 (16 below 16)."""
    multiple = 16 if channels <= 16 or channels % 16 == 0 else 32
    return -(-channels // multiple) * multiple


@dataclass(frozen=True)
class Sums:
    """Per-channel sums of a map over tiles of `tile` pixels: partial [N, slots, pitch] float32, to be added in order.

    per_image: tiles start afresh with each image; else image n has the tiles that overlap pixels [n·area, (n +
    1)·area).
    """

    partial: Tensor
    tile: int
    per_image: bool


@dataclass(frozen=True)
class Map:
    """A feature map as the kernels read it: data [N, H, W, ≥ padded(channels)], channels adjacent, those past
    `channels` zero.
    """

    data: Tensor
    channels: int
    sums: Sums | None = None

    @property
    def area(self) -> int:
        return self.data.shape[1] * self.data.shape[2]


@triton.jit
def pack_map_kernel(
    x_ptr,
    out_ptr,
    sums_ptr,
    C,
    pitch,
    area,
    W,
    tiles,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    DENSE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """NHWC copy with zero-padded channels (out_ptr may be None) and the channel sums of each tile (sums_ptr may be
    None).
    """
    image = wide(tl.program_id(0) // tiles, INT64)
    tile = tl.program_id(0) % tiles
    p = tile * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if DENSE:  # rows follow each other: pixel offsets stay contiguous for the compiler
        pixel = wide(p, INT64) * stride_xw
    else:
        pixel = wide(p // W, INT64) * stride_xh + wide(p % W, INT64) * stride_xw
    offsets = image * stride_xn + pixel[:, None] + wide(c, INT64)[None, :] * stride_xc
    v = tl.load(x_ptr + offsets, mask=(p < area)[:, None] & (c < C)[None, :], other=0.0)  # [BP, BC]
    if out_ptr is not None:
        target = (image * area + p)[:, None] * pitch + c[None, :]
        tl.store(out_ptr + target, v, mask=(p < area)[:, None] & (c < pitch)[None, :])
    if sums_ptr is not None:
        target = (image * tiles + tile) * pitch + c
        tl.store(sums_ptr + target, tl.sum(v.to(tl.float32), 0), mask=c < pitch)


def is_packed(x: Tensor) -> bool:
    """Whether the kernels can read x [N, C, H, W] where it lies."""
    return x.stride(1) == 1 and x.shape[1] % 16 == 0


def pack_map(x: Tensor, *, with_sums: bool = True) -> Map:
    """x [N, C, H, W], any strides, as a Map; copies unless `is_packed`. With sums: this is the only pass over x
    that pools.
    """
    n, c, h, w = x.shape
    pitch = padded(c)
    tiles = -(-h * w // PACK_PIXELS)
    copy = None if is_packed(x) else torch.empty(n, h, w, pitch, dtype=x.dtype, device=x.device)
    sums = torch.empty(n, tiles, pitch, dtype=torch.float32, device=x.device) if with_sums else None
    if copy is not None or sums is not None:
        arguments = {
            "x_ptr": x,
            "out_ptr": copy,
            "sums_ptr": sums,
            "C": c,
            "pitch": pitch,
            "area": h * w,
            "W": w,
            "tiles": tiles,
            "stride_xn": x.stride(0),
            "stride_xc": x.stride(1),
            "stride_xh": x.stride(2),
            "stride_xw": x.stride(3),
            "DENSE": x.stride(2) == w * x.stride(3) or h == 1,
            "BP": PACK_PIXELS,
            "BC": min(64, triton.next_power_of_2(pitch)),
        }
        launch(pack_map_kernel, (n * tiles, -(-pitch // arguments["BC"])), arguments)
    data = x.permute(0, 2, 3, 1) if copy is None else copy
    return Map(data, c, None if sums is None else Sums(sums, PACK_PIXELS, True))


@dataclass(frozen=True)
class Slices:
    """Which channels of each input a group of a (fused) convolution reads: `span` channels from `first[group]`.

    With two inputs, group g holds channels [g·C, (g + 1)·C) of the interleaving: a contiguous slice of both inputs.
    The slice is widened to whole chunks; the weights of the channels that belong to the other group are zero, and in
    the forward convolution the channels themselves count as zeros (`tile.accumulate`).
    """

    groups: int
    first: tuple[int, int]
    span: int

    @staticmethod
    def of(channels: int, inputs: int, pitch: int) -> Slices:
        if inputs == 1:
            return Slices(1, (0, 0), pitch)
        chunk = 32 if pitch % 32 == 0 else 16
        first = channels // 2 // chunk * chunk
        return Slices(2, (0, first), pitch - first)  # at least the first group's channels, rounded up

    def border(self, channels: int) -> int:
        """The largest power of two up to 16 that divides the channel where group 1 begins, in both inputs; 0 where no
        slice holds channels of the other group.
        """
        if 2 * self.first[1] == channels:
            return 0
        return math.gcd(channels // 2, -(-channels // 2), 16)

    @staticmethod
    def whole(inputs: int, pitch: int) -> Slices:
        """Both groups over all channels, for the input gradient, whose tiles are of channels."""
        return Slices(inputs, (0, 0), pitch)


@triton.jit
def pack_weight_kernel(
    w_ptr,
    out_ptr,
    K,  # of one group
    C,
    first_1,
    total,
    stride_wk,
    stride_wc,
    stride_wh,
    stride_ww,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [groups][ROWS][9][INPUTS][SPAN] of w [groups·K, C, 3, 3], zero outside."""
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = flat % SPAN
    source = flat // SPAN % INPUTS
    tap = flat // (SPAN * INPUTS) % 9
    k = flat // (SPAN * INPUTS * 9) % ROWS
    group = flat // (SPAN * INPUTS * 9 * ROWS)
    column = INPUTS * (c + group * first_1) + source - group * C
    inside = (flat < total) & (k < K) & (column >= 0) & (column < C)
    offset = (group * K + k) * stride_wk + column * stride_wc + tap // 3 * stride_wh + tap % 3 * stride_ww
    tl.store(out_ptr + flat, tl.load(w_ptr + offset, mask=inside, other=0.0), mask=flat < total)


def pack_weight(weight: Tensor, inputs: int, slices: Slices) -> Tensor:
    """weight [K, C, 3, 3] → [groups, padded(K / groups), 9, inputs, span], zeros where a channel is padding or not
    the group's.

    A channels_last weight of aligned channels, one group, is a view.
    """
    k, c = weight.shape[0] // slices.groups, weight.shape[1]
    rows = padded(k)
    if (
        slices.groups == 1
        and rows == k
        and slices.span == c
        and weight.is_contiguous(memory_format=torch.channels_last)
    ):
        return weight.permute(0, 2, 3, 1).view(1, k, 9, 1, c)
    packed = torch.empty(slices.groups, rows, 9, inputs, slices.span, dtype=weight.dtype, device=weight.device)
    arguments = {
        "w_ptr": weight,
        "out_ptr": packed,
        "K": k,
        "C": c,
        "first_1": slices.first[1],
        "total": packed.numel(),
        "stride_wk": weight.stride(0),
        "stride_wc": weight.stride(1),
        "stride_wh": weight.stride(2),
        "stride_ww": weight.stride(3),
        "ROWS": rows,
        "SPAN": slices.span,
        "INPUTS": inputs,
        "BLOCK": 4096,
    }
    launch(pack_weight_kernel, (-(-packed.numel() // 4096),), arguments)
    return packed
