"""Runs pieces of a deployed network on one device: by the native kernels where they can take them, else each layer as
one operator. Either way the pieces together give the bits of the whole network on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from parnet_kernels.checks import is_channels_last
from parnet_kernels.config import Layer
from parnet_kernels.cpu.pack import are_finite
from parnet_kernels.cpu.parts import CpuParts, Summed
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.deployed_layer import module_name, run_layer
from parnet_kernels.distributed.cut import Size
from parnet_kernels.whole import WholeNetwork, classify


class Packet(NamedTuple):
    """A map as it is sent: `flat` holds the map and its channel sums one behind the other."""

    flat: Tensor
    map: Tensor  # [N, C, H, W], a view
    sums: Tensor  # [N, C], a view; empty where layers run one by one


class Wire(NamedTuple):
    """How maps are sent. In float32 with their sums by the native CPU kernels, which keep them so also for 16-bit
    images; else in the images' dtype and layout.
    """

    native: bool
    dtype: torch.dtype  # of the images
    channels_last: bool
    device: torch.device

    def packet(self, size: Size) -> Packet:
        """Uninitialised."""
        n, c, h, w = size
        count, sums = prod(size), n * c if self.native else 0
        dtype = torch.float32 if self.native else self.dtype
        flat = torch.empty(count + sums, dtype=dtype, device=self.device)
        if self.native or self.channels_last:
            shaped = flat[:count].view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            shaped = flat[:count].view(n, c, h, w)
        return Packet(flat, shaped, flat[count:].view(n, c) if self.native else flat[count:])


class Pieces:
    """The pieces of one network that one device runs; packed weights are made for those only.

    Args:
        device: where they run; None: where the network is. Else the weights of its layers are copied there when they
            are first needed, for a network that `whole` gives.
    """

    def __init__(self, network: DeployedParNet, device: torch.device | None = None) -> None:
        self.network, self.device = network, device
        self._of: WholeNetwork | None = None
        self._finite = False
        self._packed: dict[tuple[str, ...], CpuParts] = {}
        self.copies: dict[str, dict[str, Tensor]] = {}  # of layers' arguments, by layer

    def weights(self) -> list[Tensor]:
        """Of the layers that run as operators."""
        if self.device is None:
            return [own["weight"] for own in self._of.arguments] if self._of else []
        return [own["weight"] for own in self.copies.values()]

    def why_not(self) -> str | None:
        """Why the network cannot be cut into pieces as it is now, or None."""
        found = self.network.whole()
        if isinstance(found, WholeNetwork):
            return None
        # A stream without blocks keeps the network from being one call, not from being cut.
        if found != "a stream without blocks feeds a fusion":
            return found
        if reason := self.network.why_not_as_configured():
            return reason
        tensors = (*self.network.buffers(), *self.network.parameters())
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "weights need gradients"
        return None

    def wire(self, x: Tensor) -> Wire:
        """How maps are sent for images like x, which says also what runs the layers."""
        found, native = self.network.whole(), False
        if isinstance(found, WholeNetwork):
            if self._of is not found:
                every = [*found.head, *(t for arguments in found.arguments for t in arguments.values())]
                self._finite, self._of = x.is_cpu and are_finite(every), found
                self._packed.clear()
                self.copies.clear()
            native = self._finite and self.network._native.why_not(found, x) is None
        return Wire(native, x.dtype, is_channels_last(x), x.device)

    def _parts(self, names: tuple[str, ...]) -> CpuParts:
        parts = self._packed.get(names)
        if parts is None:
            assert self._of is not None
            self._packed[names] = parts = CpuParts(self._of, names, self.network._native.storage)
        return parts

    def run(
        self,
        wire: Wire,
        given: Mapping[str, Tensor | Packet],
        layers: Sequence[Layer],
        wanted: Mapping[str, Size],
    ) -> dict[str, Packet]:
        """The maps `wanted`, by name with their sizes, from the image (a tensor) or maps `given`."""
        made: dict[str, Packet] = {name: given[name] for name in wanted if name in given}  # type: ignore[misc]
        results = {name: wire.packet(size) for name, size in wanted.items() if name not in given}
        self.write(wire, given, layers, results)
        return made | results

    def write(
        self,
        wire: Wire,
        given: Mapping[str, Tensor | Packet],
        layers: Sequence[Layer],
        results: Mapping[str, Packet],
    ) -> None:
        """Writes the maps `results`, by name."""
        if results and wire.native:
            inputs, names = self._inputs(given, layers), tuple(layer.name for layer in layers)
            summed = {name: Summed(packet.map, packet.sums) for name, packet in results.items()}
            self._parts(names).run(inputs, names, summed)
        elif results:
            maps = self._layer_by_layer(given, layers)
            for name, packet in results.items():
                packet.map.copy_(maps[name])

    def finish(self, wire: Wire, ends: Mapping[str, Packet], layers: Sequence[Layer], x: Tensor, result: str) -> Tensor:
        """The network's result from the maps where its streams end: see `CpuParts.finish`."""
        if wire.native:
            names = tuple(layer.name for layer in layers if layer.kind != "pointwise")
            return self._parts(names).finish(self._inputs(ends, layers), names, x, result)
        features = self._layer_by_layer(ends, layers)[layers[-1].name]
        if result == "features":
            return features
        head = self.network.head_weight, self.network.head_bias
        return classify(features, head if result == "logits" else None)

    @staticmethod
    def _inputs(given: Mapping[str, Tensor | Packet], layers: Sequence[Layer]) -> dict[str, Summed]:
        read = {name for layer in layers for name in layer.inputs}
        return {
            name: Summed(m.map, m.sums) if isinstance(m, Packet) else Summed(m, torch.empty(0, device="cpu"))
            for name, m in given.items()
            if name in read
        }

    def _layer_by_layer(self, given: Mapping[str, Tensor | Packet], layers: Sequence[Layer]) -> dict[str, Tensor]:
        network = self.network
        made = {name: m.map if isinstance(m, Packet) else m for name, m in given.items()}
        for layer in layers:
            inputs = [made[name] for name in layer.inputs]
            if layer.kind == "fusion_se":
                slots = map(module_name, layer.inputs)
                affines = network.affines
                inputs = [affines[s](t) if s in affines else t for s, t in zip(slots, inputs, strict=True)]
            made[layer.name] = self._layer(layer, inputs)
        return made

    def _layer(self, layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
        if self.device is None:
            y: Tensor = self.network.layers[module_name(layer.name)](*inputs)
            return y
        if layer.name not in self.copies:
            assert self._of is not None
            arguments = next(own for each, own in self._of.operators() if each.name == layer.name)
            self.copies[layer.name] = {name: t.detach().to(self.device, copy=True) for name, t in arguments.items()}
        activation = self.network.config.activation
        return run_layer(layer.kind, layer.stride, activation, inputs, self.copies[layer.name])
