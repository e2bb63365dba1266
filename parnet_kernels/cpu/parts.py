"""Parts of a deployed network on the native CPU kernels: maps in and out, with the channel sums that go with them.

The parts of a network, run one after the other, give the bits of the whole: what a layer's gate reads are the channel
sums as the layer before added them up, and they travel with the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parnet_kernels.checks import is_channels_last
from parnet_kernels.config import layers
from parnet_kernels.cpu import pack as cpu
from parnet_kernels.cpu.network import storages
from parnet_kernels.whole import WholeNetwork


class Summed(NamedTuple):
    """A map between layers."""

    map: Tensor  # [N, C, H, W]
    sums: Tensor  # [N, C] over its pixels, float32; empty for an image


class CpuParts:
    """The packed weights of some layers of a network whose weights are finite.

    Args:
        names: of the layers that are operators of `ops`.
    """

    def __init__(self, network: WholeNetwork, names: Sequence[str], storage: str = "auto") -> None:
        self.network = network
        chosen = dict(zip((layer.name for layer, _ in network.operators()), storages(network, storage), strict=True))
        own = [(layer, arguments) for layer, arguments in network.operators() if layer.name in names]
        options = {"activation": network.config.activation}
        packed, starts = cpu.pack_layers(
            [
                {**cpu.OPTIONAL, **arguments, **options, "kind": layer.kind, "stride": layer.stride}
                | {"storage": chosen[layer.name]}
                for layer, arguments in own
            ]
        )
        self._packed = packed
        self._start = {layer.name: start for start, (layer, _) in zip(starts, own, strict=True)}
        self._steps_of: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Tensor, dict[str, int]]] = {}
        self._classifier: Tensor | None = None

    def _steps(self, inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[Tensor, dict[str, int]]:
        """See schemas.inc; and the variables."""
        known = self._steps_of.get((inputs, names))
        if known is None:
            variables = {name: i for i, name in enumerate(inputs)}
            rows = []
            for layer in layers(self.network.config):
                if layer.name in names:
                    read = [variables[name] for name in layer.inputs]
                    variables[layer.name] = len(variables)
                    rows.append(
                        [self._start[layer.name], read[0], read[1] if len(read) == 2 else -1, len(variables) - 1]
                    )
            steps = torch.tensor(rows, dtype=torch.int64, device="cpu")
            self._steps_of[inputs, names] = known = steps, variables
        return known

    def run(self, inputs: Mapping[str, Summed], names: Sequence[str], results: Mapping[str, Summed]) -> None:
        """Runs the layers `names` and writes the maps of `results`, dense or channels_last, with their sums."""
        steps, variables = self._steps(tuple(inputs), tuple(names))
        torch.ops.parnet._cpu_part.default(
            [m.map for m in inputs.values()],
            [m.sums for m in inputs.values()],
            self._packed,
            steps,
            [variables[name] for name in results],
            [m.map for m in results.values()],
            [m.sums for m in results.values()],
            [],
        )

    def finish(self, inputs: Mapping[str, Summed], names: Sequence[str], like: Tensor, result: str) -> Tensor:
        """Runs the layers `names`, the last ones of the network, to its result, in the dtype and layout of the images
        `like`: "logits" [N, classes], "pooled" [N, P] or "features", the last map.
        """
        network, config = self.network, self.network.config
        steps, variables = self._steps(tuple(inputs), tuple(names))
        given = [m.map for m in inputs.values()], [m.sums for m in inputs.values()], self._packed, steps
        n, size = given[0][0].shape[0], {name: m.map.shape[2:] for name, m in inputs.items()}
        for last in (layer for layer in layers(config) if layer.name in names):
            size[last.name] = torch.Size(-(-extent // last.stride) for extent in size[last.inputs[0]])
        if result == "features" or config.pointwise_head:
            layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
            shape = n, last.out_channels, *size[last.name]
            y = torch.empty(shape, dtype=like.dtype, device="cpu", memory_format=layout)
            sums = torch.empty(n, last.out_channels, dtype=torch.float32, device="cpu")
            torch.ops.parnet._cpu_part.default(*given, [variables[last.name]], [y], [sums], [])
            return network.end(y, result) if config.pointwise_head else y
        if result == "logits" and self._classifier is None:
            self._classifier = torch.ops.parnet._cpu_pack_classifier(*network.head)
        width = config.num_classes if result == "logits" else last.out_channels
        end = torch.empty(n, width, dtype=like.dtype, device="cpu")
        classifier = self._classifier if result == "logits" else None
        torch.ops.parnet._cpu_part.default(*given, [], [], [], [end], classifier)
        return end
