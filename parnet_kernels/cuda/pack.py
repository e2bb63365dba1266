"""Weights in the order in which the CUDA kernels stream them: packed once a layer, by torch operations on any device.

A map lies as NHWC; `Layout` says at which position of a pixel each channel is stored. Kernels read maps in chunks of 64
bytes of a pixel; `_cover` chooses the chunks that hold a group's channels, and every other position in them gets zero
weights. So channel counts, groups, interleaving and shuffles cost the kernels nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 64  # output channels of a tile
CHUNK_BYTES = 64
SOURCE_SHIFT = 30
VECTORS = 6
STEM_REDUCTION = 64

Parameters = dict[str, Tensor | None]


def chunk_channels(dtype: torch.dtype) -> int:
    return CHUNK_BYTES // dtype.itemsize


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Channel c of a map is at positions[c] of each pixel; all other positions of `pitch` hold zero."""

    positions: tuple[int, ...]
    pitch: int

    @classmethod
    def natural(cls, channels: int, dtype: torch.dtype) -> Layout:
        return cls(tuple(range(channels)), _up(channels, chunk_channels(dtype)))

    @classmethod
    def grouped(cls, channels: int, dtype: torch.dtype) -> Layout:
        """As a fusion computes it, its two groups one after the other: the shuffle is left to whoever reads it."""
        group = _up(channels // 2, chunk_channels(dtype))
        return cls(tuple(c % 2 * group + c // 2 for c in range(channels)), 2 * group)


class PackedLayer(NamedTuple):
    """A layer of the level kernel. Tensors as csrc/cuda/layer.h describes them."""

    weight: Tensor
    gate_weight: Tensor
    vectors: Tensor
    chunk_table: Tensor  # int32: the table; if `masked`, then the masks
    masked: bool  # whether a chunk holds channels of another group
    kind: str
    stride: int
    activation: str
    in_channels: int
    out_channels: int
    groups: int
    column_tiles: int
    chunks: int


class PackedStem(NamedTuple):
    """A first layer of few input channels."""

    weight: Tensor
    gate_weight: Tensor
    vectors: Tensor
    stride: int
    activation: str
    in_channels: int
    out_channels: int
    column_tiles: int
    chunks: int


def fits_stem(kind: str, in_channels: int) -> bool:
    return kind == "downsample_se" and 9 * in_channels <= STEM_REDUCTION


def round_to_tf32(x: Tensor) -> Tensor:
    """To 10 bits of mantissa, ties away from zero, as the kernels round activations."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _cover(positions: list[int], layout: Layout, dtype: torch.dtype) -> list[int]:
    """First positions, each a multiple of 16 bytes, of the chunks that together hold `positions`."""
    size, alignment = chunk_channels(dtype), 16 // dtype.itemsize
    starts: list[int] = []
    for position in sorted(positions):
        if not starts or position >= starts[-1] + size:
            starts.append(min(position // alignment * alignment, layout.pitch - size))
    return starts


def _group_inputs(kind: str, group: int, channels: int) -> list[list[tuple[int, int]]]:
    """For each input, (its channel, the weight's input channel) of all that the group multiplies."""
    if kind != "fusion_se":
        return [[(c, c) for c in range(channels)]]
    first = group * channels  # of the interleaved 2·channels
    inputs: list[list[tuple[int, int]]] = [[], []]
    for t in range(first, first + channels):
        inputs[t % 2].append((t // 2, t - first))
    return inputs


def _column_order(device: torch.device) -> Tensor:
    """Row n of a weight tile holds output channel order[n]: a lane's sums of two fragments are 4 adjacent channels."""
    n = torch.arange(COLUMNS, device=device)
    m = n % 16
    return n - m + 4 * (m % 8 // 2) + 2 * (m // 8) + m % 2


def _swizzle(rows: Tensor) -> Tensor:
    """[…, 64 columns, chunk], columns in `_column_order`, the four 16-byte parts of row n at part ^ (n/2 % 4)."""
    rows = rows.index_select(-2, _column_order(rows.device))
    parts = rows.unflatten(-1, (4, -1))
    n = torch.arange(COLUMNS, device=rows.device)[:, None]
    source = (torch.arange(4, device=rows.device)[None] ^ (n // 2 % 4))[..., None].expand(parts.shape[-3:])
    return parts.gather(-2, source.expand(parts.shape)).flatten(-2).contiguous()


def _vectors(kind: str, p: Parameters, groups: int, tiles: int) -> Tensor:
    """[group][column tile][6][64] float32; the group's channels in order, padded with zeros."""
    weight = p["weight"]
    assert weight is not None
    k, device = weight.shape[0], weight.device
    width = k // groups
    rows = torch.zeros(groups, VECTORS, tiles * COLUMNS, dtype=torch.float64, device=device)

    def put(row: int, value: Tensor) -> None:
        rows[:, row, :width] = value.double().reshape(groups, width)

    def of_result(vector: Tensor) -> Tensor:  # channel 2i + k of a fusion's result is row i of group k
        return vector.reshape(-1, groups).T if groups == 2 else vector

    bias, gate_weight, gate_bias = p["bias"], p["gate_weight"], p.get("gate_bias")
    assert bias is not None
    assert gate_weight is not None
    put(0, bias)
    logit = torch.zeros(k, dtype=torch.float64, device=device) if gate_bias is None else gate_bias.double()
    if kind == "repvgg_sse":
        skip_scale, skip_shift = p["skip_scale"], p["skip_shift"]
        assert skip_scale is not None
        assert skip_shift is not None
        logit = logit + gate_weight.double() @ skip_shift.double()
        put(2, skip_scale)
        put(3, skip_shift)
    put(1, logit)
    scale, shift = p.get("out_scale"), p.get("out_shift")
    put(4, torch.ones(k, device=device) if scale is None else of_result(scale))
    if shift is not None:
        put(5, of_result(shift))
    return rows.float().reshape(groups, VECTORS, tiles, COLUMNS).transpose(1, 2).contiguous()


def pack(
    kind: str, stride: int, activation: str, p: Parameters, inputs: tuple[Layout, ...], precision: str
) -> PackedLayer:
    """p: the operator's parameters by name. precision "tf32" rounds float32 weights of the convolution."""
    weight, gate_weight = p["weight"], p["gate_weight"]
    assert weight is not None
    assert gate_weight is not None
    dtype, device = weight.dtype, weight.device
    k, channels = weight.shape[:2]
    groups = 2 if kind == "fusion_se" else 1
    width = k // groups
    tiles = -(-width // COLUMNS)
    size = chunk_channels(dtype)
    if kind == "repvgg_sse":  # the gate sees skip_scale·mean + skip_shift; the shift is in `_vectors`
        skip_scale = p["skip_scale"]
        assert skip_scale is not None
        gate_weight = (gate_weight.double() * skip_scale.double()).to(dtype)
    convolution = round_to_tf32(weight) if dtype == torch.float32 and precision == "tf32" else weight

    tables: list[list[int]] = []
    masks: list[list[int]] = []
    orders: list[list[int]] = []  # weight input channel of each chunk position; `channels` for none
    for group in range(groups):
        table: list[int] = []
        mask: list[int] = []
        order: list[int] = []
        for source, (pairs, layout) in enumerate(zip(_group_inputs(kind, group, channels), inputs, strict=True)):
            left = {layout.positions[c]: t for c, t in pairs}
            others = set(layout.positions) - set(left)
            for start in _cover(list(left), layout, dtype):
                table.append(start | source << SOURCE_SHIFT)
                order += [left.pop(position, channels) for position in range(start, start + size)]
                mask.append(sum(1 << i for i in range(size) if start + i not in others))
        tables.append(table)
        masks.append(mask)
        orders.append(order)
    chunks = max(map(len, tables))
    for table, mask, order in zip(tables, masks, orders, strict=True):  # with an odd number of channels, groups differ
        order += [channels] * (size * (chunks - len(table)))
        mask += [0] * (chunks - len(table))
        table += [0] * (chunks - len(table))
    every = [*itertools.chain(*masks)]
    masked = any(m != (1 << size) - 1 for m in every)
    words = [*itertools.chain(*tables), 0, *(every if masked else [])]

    packed_weight, packed_gate = [], []
    for group in range(groups):
        index = torch.tensor(orders[group], device=device)
        rows = slice(group * width, (group + 1) * width)
        w = torch.zeros(tiles * COLUMNS, channels + 1, 9, dtype=dtype, device=device)
        w[:width, :channels] = convolution[rows].reshape(width, channels, 9)
        w = w.index_select(1, index).reshape(tiles, COLUMNS, chunks, size, 9).permute(0, 2, 4, 1, 3)
        if stride == 2:  # even columns of the input first
            w = w.unflatten(2, (3, 3))[:, :, :, [0, 2, 1]].flatten(2, 3)
        packed_weight.append(_swizzle(w))
        g = torch.zeros(tiles * COLUMNS, channels + 1, dtype=dtype, device=device)
        g[:width, :channels] = gate_weight[rows]
        packed_gate.append(g.index_select(1, index))
    return PackedLayer(
        torch.stack(packed_weight),
        torch.stack(packed_gate).contiguous(),
        _vectors(kind, p, groups, tiles),
        torch.tensor(words, dtype=torch.int64).to(torch.int32).to(device),  # wraps the 32nd bit of a mask
        masked,
        kind,
        stride,
        activation,
        channels,
        k,
        groups,
        tiles,
        chunks,
    )


def pack_stem(stride: int, activation: str, p: Parameters, precision: str) -> PackedStem:
    """A "downsample_se" layer with `fits_stem`."""
    weight, gate_weight = p["weight"], p["gate_weight"]
    assert weight is not None
    assert gate_weight is not None
    dtype, device = weight.dtype, weight.device
    k, channels = weight.shape[:2]
    tiles, size = -(-k // COLUMNS), chunk_channels(dtype)
    chunks = -(-9 * channels // size)
    convolution = round_to_tf32(weight) if dtype == torch.float32 and precision == "tf32" else weight
    w = torch.zeros(tiles * COLUMNS, chunks * size, dtype=dtype, device=device)
    w[:k, : 9 * channels] = convolution.permute(0, 2, 3, 1).reshape(k, 9 * channels)
    g = torch.zeros(tiles * COLUMNS, channels, device=device)
    g[:k] = gate_weight.float()
    return PackedStem(
        _swizzle(w.reshape(tiles, COLUMNS, chunks, size).transpose(1, 2)),
        g.reshape(tiles, COLUMNS, channels).transpose(1, 2).contiguous(),
        _vectors("downsample_se", p, 1, tiles),
        stride,
        activation,
        channels,
        k,
        tiles,
        chunks,
    )
