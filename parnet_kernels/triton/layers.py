"""Every layer of the deployed network, on maps that carry their sums: the gate, then one convolution with all the rest.

`forward` takes and returns `Map`s, so a network passes sums from layer to layer and pools nothing. The public operators
(`backend.py`) wrap it: they pack x, which is the pass that computes its sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parnet_kernels.triton import conv_bwd, conv_fwd, policy
from parnet_kernels.triton.gate import Gate, gate
from parnet_kernels.triton.gate_bwd import Channels, channel_gradients
from parnet_kernels.triton.launch import INTERPRETED
from parnet_kernels.triton.pack import Map, Slices, pack_map, pack_weight, padded


@dataclass(frozen=True)
class Layer:
    """A layer's parameters in the order of the operators' arguments; skip_scale and skip_shift make it a
    RepVGG-SSE block.
    """

    weight: Tensor  # [K, C, 3, 3]
    bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor | None
    skip_scale: Tensor | None = None
    skip_shift: Tensor | None = None
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    stride: int = 1
    activation: str = "silu"

    @property
    def skips(self) -> bool:
        return self.skip_scale is not None

    def gate_of(self, maps: tuple[Map, ...], *, with_means: bool = False) -> Gate:
        return gate(
            maps,
            self.gate_weight,
            self.gate_bias,
            1.0 if self.skips else 2.0,
            self.skip_scale,
            self.skip_shift,
            with_means=with_means,
        )

    def convolution(self, maps: tuple[Map, ...]) -> conv_fwd.Convolution:
        height, width = (-(-n // self.stride) for n in maps[0].data.shape[1:3])
        slices = Slices.of(maps[0].channels, len(maps), maps[0].data.shape[3])
        weight = pack_weight(self.weight, len(maps), slices)
        return conv_fwd.Convolution(maps, weight, slices, (height, width), self.weight.shape[0], self.stride)

    def epilogue(self, maps: tuple[Map, ...], gates: Gate) -> conv_fwd.Epilogue:
        return conv_fwd.Epilogue(
            bias=self.bias,
            conv_gate=None if self.skips else gates.gate,
            skip=maps[0].data if self.skips else None,
            skip_gate=gates.skip_gate,
            skip_bias=gates.skip_bias,
            activation=self.activation,
            out_scale=self.out_scale,
            out_shift=self.out_shift,
        )


def dot_precision(device: torch.device, dtype: torch.dtype, precision: str) -> str:
    """What tl.dot is given: for 16-bit operands, which have one precision, what every compiler takes; for float32 what
    was asked for, or exact products where the compiler has no others.

    "widen" is for the interpreter, whose matmul reads bfloat16 as integers: the kernel converts to float32 first.
    """
    if dtype != torch.float32:
        return "widen" if INTERPRETED else "ieee"
    return precision if precision in policy.precisions(device) else "ieee"


def plan_of(c: conv_fwd.Convolution, precision: str) -> policy.Plan:
    data = c.maps[0].data
    gh, gw = c.grid
    taps = 9 * len(c.maps) // c.classes
    return policy.plan(
        data.device,
        data.dtype,
        dot_precision(data.device, data.dtype, precision),
        c.images * gh * gw,
        c.k,
        c.reduction,
        taps,
        c.classes,
    )


def forward(layer: Layer, maps: tuple[Map, ...], precision: str, *, dense: bool = False, with_sums: bool = True) -> Map:
    """Runs one layer. maps: one, or two of a fusion block, with sums.

    dense: the result has exactly K channels; else padded(K), so that the next layer reads it where it lies.
    precision: of float32 products: "ieee", "tf32" or "tf32x3".
    """
    gates = layer.gate_of(maps)
    c = layer.convolution(maps)
    pitch = c.k if dense else padded(c.k)
    out = torch.empty(c.images, *c.size, pitch, dtype=maps[0].data.dtype, device=maps[0].data.device)
    sums = conv_fwd.convolution(c, layer.epilogue(maps, gates), plan_of(c, precision), out, with_sums=with_sums)
    return Map(out, c.k, sums)


def maps_of(*tensors: Tensor) -> tuple[Map, ...]:
    """Maps of one or two tensors [N, C, H, W] with sums; two get one set of strides, which the kernels share."""
    if len({t.stride() for t in tensors}) > 1:
        tensors = tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)
    return tuple(pack_map(t) for t in tensors)


def weight_plan_of(c: conv_fwd.Convolution, dtype: torch.dtype, precision: str) -> policy.Plan:
    groups, rows, taps, inputs, span = c.weight.shape
    pixels = c.images * c.size[0] * c.size[1]
    return policy.weight_plan(
        c.weight.device,
        dtype,
        dot_precision(c.weight.device, dtype, precision),
        rows,
        span,
        groups * taps * inputs,
        pixels,
    )


def _input_gradient(
    layer: Layer, maps: tuple[Map, ...], d: Tensor, small: Channels, source: int, precision: str
) -> Tensor:
    """Gradient of input `source` as [N, H, W, C]: the convolution of d with the flipped weight."""
    x = maps[source]
    inputs = len(maps)
    slices = Slices.whole(inputs, x.data.shape[3])
    weight = pack_weight(layer.weight, inputs, slices)[:, :, :, source : source + 1]
    # Of two groups, the first owns the channels c of this input with 2c + source < C.
    edge = (x.channels - source + 1) // 2 if inputs == 2 else None
    size = (x.data.shape[1], x.data.shape[2])
    c = conv_fwd.Convolution(
        (Map(d, layer.weight.shape[0]),), weight, slices, size, x.channels, layer.stride, backward=True, edge=edge
    )
    epilogue = conv_fwd.Epilogue(
        skip=d if layer.skips else None, skip_gate=small.input_gate, skip_bias=small.input_bias[source]
    )
    out = torch.empty(*x.data.shape[:3], x.channels, dtype=d.dtype, device=d.device)
    conv_fwd.convolution(c, epilogue, plan_of(c, precision), out)
    return out


def backward(
    layer: Layer, maps: tuple[Map, ...], g: Tensor, precision: str, need_maps: tuple[bool, ...], need_weight: bool
) -> tuple[tuple[Tensor | None, ...], Tensor | None, Channels]:
    """(gradients of the maps [N, H, W, C], of the weight, of everything per channel) from g [N, OH, OW, K], channels
    adjacent.

    need_maps and need_weight spare the expensive ones. Recomputes the convolution (see `conv_bwd`); changes nothing
    it is given.
    """
    gates = layer.gate_of(maps, with_means=True)
    c = layer.convolution(maps)
    gradient = conv_bwd.before_epilogue(c, layer.epilogue(maps, gates), plan_of(c, precision), g)
    small = channel_gradients(gradient, gates, layer.gate_weight, maps[0].area, layer.skip_scale, layer.skip_shift)
    d_maps = tuple(
        _input_gradient(layer, maps, gradient.conv, small, source, precision) if needed else None
        for source, needed in enumerate(need_maps)
    )
    d_weight = None
    if need_weight:
        d_weight = conv_bwd.weight_gradient(c, gradient.conv, weight_plan_of(c, g.dtype, precision), layer.weight)
    return d_maps, d_weight, small
