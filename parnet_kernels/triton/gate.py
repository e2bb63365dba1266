"""The squeeze-excitation gate of a layer, from the partial sums of whoever produced its input.

gate = factor·σ(weight · mean + bias), mean over the layer's input, or over z = scale·x + shift of a RepVGG-SSE block.
With two inputs, group g reads channels [g·C, (g + 1)·C) of their interleaving; results are stored in the order of the
layer's output channels (2i + g), rows of the weight stay in theirs (g·K/2 + i).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parnet_kernels.triton.launch import launch
from parnet_kernels.triton.pack import Map, padded
from parnet_kernels.triton.tile import OF_BATCH


@triton.jit
def sum_slots(
    ptr,
    n,
    images,
    c,
    inside,
    pitch,
    slots,
    area,
    TILE: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """[BI, BC] float32: channel c's sum over the tiles of image n, in a fixed order; `Sums` describes the slots."""
    lane = tl.arange(0, BI * BS)
    # Slots are loaded side by side and added by a tree: one after the other, their latencies would add up.
    image = tl.reshape(tl.broadcast_to(n[:, None], (BI, BS)), (BI * BS,))
    count = slots + tl.zeros_like(image)
    if not PER_IMAGE:
        count = ((image + 1) * area - 1) // TILE - image * area // TILE + 1
    total = tl.zeros((BI, BC), tl.float32)
    for first in range(0, slots, BS):
        slot = first + lane % BS
        at = (image.to(tl.int64) * slots + slot) * pitch
        mask = ((slot < count) & (image < images))[:, None] & inside[None, :]
        v = tl.load(ptr + at[:, None] + c[None, :], mask=mask, other=0.0)  # [BI·BS, BC]
        total += tl.sum(tl.reshape(v, (BI, BS, BC)), 1)
    return total


@triton.jit(do_not_specialize=OF_BATCH)
def gate_se_fwd_kernel(
    sums_x_ptr,
    sums_y_ptr,
    weight_ptr,  # [K, C]
    bias_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,  # [N, pitch]: factor·σ
    skip_gate_ptr,  # [N, pitch]: σ·scale and σ·shift
    skip_bias_ptr,
    means_ptr,  # [N, C·inputs]: of the input itself, for backward
    images,
    K,
    C,
    area,
    slots_x,
    slots_y,
    pitch_x,
    pitch_y,
    pitch,
    stride_wk,
    stride_wc,
    FACTOR: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    PER_IMAGE_X: tl.constexpr,
    PER_IMAGE_Y: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0) * BI + tl.arange(0, BI)
    group = tl.program_id(2)
    rows = K // INPUTS  # of one group
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    logit = tl.zeros((BI, BK), tl.float32)
    for first in range(0, C, BC):
        t = first + tl.arange(0, BC)
        u = group * C + t  # channel of the interleaving
        if INPUTS == 2:
            inside_x = (t < C) & (u % 2 == 0)
            c = u // 2
        else:
            inside_x = t < C
            c = t
        total = sum_slots(
            sums_x_ptr, n, images, c, inside_x, pitch_x, slots_x, area, TILE_X, PER_IMAGE_X, BI, BS, BC
        )  # fmt: skip
        if INPUTS == 2:
            inside_y = (t < C) & (u % 2 == 1)
            total += sum_slots(
                sums_y_ptr, n, images, c, inside_y, pitch_y, slots_y, area, TILE_Y, PER_IMAGE_Y, BI, BS, BC
            )  # fmt: skip
        mean = total / area  # [BI, BC]
        if means_ptr is not None:
            mask = (n < images)[:, None] & ((t < C) & (tl.program_id(1) == 0))[None, :]
            tl.store(means_ptr + n[:, None] * (C * INPUTS) + u[None, :], mean, mask=mask)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + t, mask=t < C, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + t, mask=t < C, other=0.0).to(tl.float32)
            mean = mean * scale[None, :] + shift[None, :]
        at = (group * rows + k)[:, None] * stride_wk + t[None, :] * stride_wc
        w = tl.load(weight_ptr + at, mask=(k < rows)[:, None] & (t < C)[None, :], other=0.0).to(tl.float32)  # [BK, BC]
        logit += tl.sum(mean[:, None, :] * w[None, :, :], 2)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + group * rows + k, mask=k < rows, other=0.0).to(tl.float32)[None, :]
    s = tl.sigmoid(logit)
    at = n[:, None] * pitch + (INPUTS * k + group)[None, :]
    mask = (n < images)[:, None] & (k < rows)[None, :]
    tl.store(gate_ptr + at, FACTOR * s, mask=mask)
    if skip_gate_ptr is not None:
        scale = tl.load(scale_ptr + k, mask=k < rows, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + k, mask=k < rows, other=0.0).to(tl.float32)
        tl.store(skip_gate_ptr + at, s * scale[None, :], mask=mask)
        tl.store(skip_bias_ptr + at, s * shift[None, :], mask=mask)


def images_a_program(images: int) -> int:
    """Several where there are several: the gate's weight is then read that much less often."""
    return 1 if images == 1 else 4


@dataclass(frozen=True)
class Gate:
    """gate [N, padded(K)] = factor·σ; of a skip also σ·scale and σ·shift; means [N, inputs·C] if asked for. float32."""

    gate: Tensor
    skip_gate: Tensor | None
    skip_bias: Tensor | None
    means: Tensor | None


def _sums_arguments(maps: tuple[Map, ...]) -> dict[str, Any]:
    block = images_a_program(maps[0].data.shape[0])
    x, y = maps[0].sums, maps[-1].sums
    if x is None or y is None:
        raise ValueError("parnet_kernels: `maps` must carry their channel sums, got a Map without")
    return {
        "sums_x_ptr": x.partial,
        "sums_y_ptr": y.partial if len(maps) == 2 else None,
        "area": maps[0].area,
        "slots_x": x.partial.shape[1],
        "slots_y": y.partial.shape[1],
        "pitch_x": x.partial.shape[2],
        "pitch_y": y.partial.shape[2],
        "TILE_X": x.tile,
        "TILE_Y": y.tile,
        "PER_IMAGE_X": x.per_image,
        "PER_IMAGE_Y": y.per_image,
        "BI": block,
        "BS": min(32 // block, triton.next_power_of_2(max(x.partial.shape[1], y.partial.shape[1]))),
    }


def gate(
    maps: tuple[Map, ...],
    weight: Tensor,
    bias: Tensor | None,
    factor: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    with_means: bool = False,
) -> Gate:
    """The gate of a layer from its maps' sums; scale and shift [C] as in a RepVGG-SSE block.

    Raises:
        ValueError: if a map carries no sums.
    """
    images, k, c = maps[0].data.shape[0], *weight.shape

    def small(columns: int) -> Tensor:
        return torch.empty(images, columns, dtype=torch.float32, device=weight.device)

    skip = scale is not None
    result = Gate(
        small(padded(k)),
        small(padded(k)) if skip else None,
        small(padded(k)) if skip else None,
        small(c * len(maps)) if with_means else None,
    )
    block = images_a_program(images)
    arguments = {
        **_sums_arguments(maps),
        "weight_ptr": weight,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "gate_ptr": result.gate,
        "skip_gate_ptr": result.skip_gate,
        "skip_bias_ptr": result.skip_bias,
        "means_ptr": result.means,
        "images": images,
        "K": k,
        "C": c,
        "pitch": padded(k),
        "stride_wk": weight.stride(0),
        "stride_wc": weight.stride(1),
        "FACTOR": factor,
        "INPUTS": len(maps),
        "BK": 32,
        "BC": 32,
    }
    grid = (-(-images // block), -(-k // len(maps) // 32), len(maps))
    launch(gate_se_fwd_kernel, grid, arguments)
    return result
