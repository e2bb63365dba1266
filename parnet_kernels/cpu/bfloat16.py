"""A bfloat16 network whose products are bfloat16, too: the layers behind the first through csrc/cpu/direct.

A layer is one pass: products of bfloat16 with float32 sums, everything around them in float32, its map rounded to
bfloat16. The first layer multiplies in float32, as it reads few channels; the last map stays float32 until the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parnet_kernels.cpu import direct
from parnet_kernels.cpu import pack as cpu
from parnet_kernels.cpu.direct import DirectLayer
from parnet_kernels.whole import WholeNetwork, classify


class Bfloat16(NamedTuple):
    """A network's packed weights."""

    first: Tensor
    steps: Tensor  # of the first layer, as `_cpu_network` takes them
    rest: direct.Packed
    head: tuple[Tensor, Tensor]  # float32


def why_not(network: WholeNetwork) -> str | None:
    """Why these kernels cannot take the network, or None."""
    if reason := direct.why_not(torch.bfloat16):
        return reason
    if (dtype := network.head[0].dtype) != torch.bfloat16:
        return f"the network is {dtype}"
    if (widest := max(layer.in_channels for layer, _ in network.operators())) > direct.MAX_CHANNELS:
        return f"a layer has {widest} channels, more than {direct.MAX_CHANNELS}"
    return None


def pack(network: WholeNetwork, kernels: int) -> Bfloat16:
    """For the kernels of this number. Weights must be finite."""
    (first, arguments), *rest = network.operators()
    activation = network.config.activation
    options = {"kind": first.kind, "stride": first.stride, "activation": activation, "storage": "transformed"}
    packed, _ = cpu.pack_layers([{**cpu.OPTIONAL, **arguments, **options}])
    values, layers = {first.name: 0}, []
    for layer, tensors in rest:
        inputs = [values[name] for name in layer.inputs]
        values[layer.name] = len(values)
        numbers = inputs[0], inputs[1] if len(inputs) == 2 else -1, values[layer.name]
        layers.append((_plain(layer.kind, layer.stride, tensors, layer is rest[-1][0]), numbers))
    steps = torch.tensor([[0, 0, -1, 1]], dtype=torch.int64, device="cpu")
    weight, bias = (t.detach().float() for t in network.head)
    return Bfloat16(packed, steps, direct.pack(layers, activation, kernels), (weight, bias))


def _plain(kind: str, stride: int, tensors: dict[str, Tensor], last: bool) -> DirectLayer:
    t = {name: value.detach() for name, value in tensors.items()}
    k = t["weight"].shape[0]
    one, zero = torch.ones(k, device="cpu"), torch.zeros(k, device="cpu")
    gate_weight, gate_bias = t["gate_weight"].float(), t["gate_bias"].float() if "gate_bias" in t else zero
    scale = shift = None
    if kind == "repvgg_sse":  # its gate reads skip_scale·x + skip_shift
        scale, shift = t["skip_scale"].float(), t["skip_shift"].float()
        gate_weight, gate_bias = gate_weight * scale, gate_bias + gate_weight @ shift
    return DirectLayer(
        kind=kind,
        stride=stride,
        weight=t["weight"],
        weight_scale=one,
        bias=t["bias"].float(),
        gate_weight=gate_weight.bfloat16(),
        gate_scale=one,
        gate_bias=gate_bias,
        skip_scale=scale,
        skip_shift=shift,
        out_scale=t["out_scale"].float() if "out_scale" in t else one,
        out_shift=t["out_shift"].float() if "out_shift" in t else zero,
        scale_in=1.0,
        zero_in=0,
        scale_out=1.0,
        zero_out=0,
        last=last,
    )


def run(packed: Bfloat16, network: WholeNetwork, x: Tensor, result: str) -> Tensor | None:
    """As `CpuNetwork.run`. None: the kernels' products with zeros would spread an infinity or NaN of these maps, or the
    maps are too large for them.
    """
    first = torch.ops.parnet._cpu_network.default(x, packed.first, packed.steps, False, True)
    if first.shape[2] * first.shape[3] > direct.MAX_PIXELS:
        return None
    features = direct.run(packed.rest, first)
    if not bool(features.isfinite().all()):
        return None
    if network.config.pointwise_head:
        return network.end(features.bfloat16(), result)
    if result == "features":
        return features.bfloat16()
    return classify(features, packed.head if result == "logits" else None).bfloat16()
