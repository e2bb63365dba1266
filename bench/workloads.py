"""What is timed: one layer of a ParNet, or the whole network, with random, well-conditioned parameters.

A workload is a small picklable description; every process makes the same tensors from it. Its graphs hold the deployed
parameters under the names of `parnet_kernels.ops`, and its float64 reference runs on `parnet_kernels.reference`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels.config import VARIANTS, Layer, ParNetConfig, layers
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export.graph import Graph, Node, graph_of
from parnet_kernels.model import ParNet

MAX_COPIES = 256
FEW_COPIES = 8  # what every engine builds at least, where it builds more than one


@dataclass(frozen=True)
class Workload:
    """`layer` None: the whole network on images of `size`²; else that layer alone, at its size in the network."""

    variant: str
    config: ParNetConfig
    layer: str | None
    batch: int
    size: int = 224

    @property
    def suite(self) -> str:
        return "net" if self.layer is None else "ops"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(channels, height = width) of the image and of every layer's output."""
        found = {"image": (self.config.in_chans, self.size)}
        for layer in layers(self.config):
            found[layer.name] = (layer.out_channels, (found[layer.inputs[0]][1] - 1) // layer.stride + 1)
        return found

    @cached_property
    def spec(self) -> Layer:
        return next(layer for layer in layers(self.config) if layer.name == self.layer)

    @property
    def kind(self) -> str:
        if self.layer is None:
            return "network"
        return "stem" if self.spec.inputs == ("image",) else self.spec.kind

    @property
    def title(self) -> str:
        """Such as "M block 128@56" or "M fusion 2x256->512@28/2"."""
        if self.layer is None:
            return f"ParNet-{self.variant.upper()}"
        spec, (c, size) = self.spec, self.shapes[self.spec.inputs[0]]
        if spec.kind == "repvgg_sse":
            return f"{self.variant.upper()} block {c}@{size}"
        stride = f"/{spec.stride}"
        if self.kind == "stem":
            return f"stem {c}->{spec.out_channels}@{size}{stride}"
        what = {"fusion_se": "fusion 2x", "downsample_se": "down ", "pointwise": "pointwise "}[spec.kind]
        return f"{self.variant.upper()} {what}{c}->{spec.out_channels}@{size}{stride}"

    @property
    def key(self) -> str:
        """A file name for what belongs to this workload."""
        return f"{self.variant}-{self.layer or 'net'}-{self.batch}-{self.size}"

    @cached_property
    def graph_layers(self) -> list[Layer]:
        return layers(self.config) if self.layer is None else [self.spec]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.key.encode()))

    def inputs(self) -> list[Tensor]:
        """Images, or maps distributed like a layer's output."""
        g = self._generator()
        if self.layer is None or self.kind == "stem":
            return [torch.randn(self.batch, self.config.in_chans, self.size, self.size, generator=g)]
        c, size = self.shapes[self.spec.inputs[0]]
        return [F.silu(torch.randn(self.batch, c, size, size, generator=g)) for _ in self.spec.inputs]

    @property
    def weight_bytes(self) -> int:
        """Of the float32 convolution and gate weights (and the classifier's)."""
        head = self.config.planes[-1] * self.config.num_classes if self.layer is None else 0
        taps = {"pointwise": 1}
        return 4 * head + sum(
            4 * spec.in_channels * spec.out_channels * (taps.get(spec.kind, 9) + (spec.kind != "pointwise"))
            for spec in self.graph_layers
        )

    def copies(self, cold_bytes: int) -> int:
        """How many distinct sets of weights make `cold_bytes`, so that none is in cache when its turn comes.

        A few will do where weights are less than a tenth of what a layer reads and writes: there they hardly matter,
        and many copies would only make the activations cold in engines that keep some for each.
        """
        if self.layer is None:
            return 1
        c, size = self.shapes[self.spec.inputs[0]]
        k, out_size = self.shapes[self.layer]
        maps = 4 * self.batch * (len(self.spec.inputs) * c * size**2 + k * out_size**2)
        wanted = -(-cold_bytes // self.weight_bytes)
        return min(wanted, MAX_COPIES if 10 * self.weight_bytes > maps else FEW_COPIES)

    @staticmethod
    def checked_copies(copies: int) -> list[int]:
        """Those whose results are compared: a second one tells whether an engine mixes its copies up."""
        return [0] if copies == 1 else [0, min(copies, FEW_COPIES) - 1]

    def expected(self, copy: int, folder: Path) -> np.ndarray:
        """The float64 result of one copy, computed on first use and kept in `folder`."""
        path = folder / f"{self.key}-{copy}.npy"
        if not path.exists():
            graph = self.graphs(copy + 1, folder)[copy]
            np.save(path, reference_result(graph, self.inputs()).numpy())
        return np.load(path)

    def graphs(self, copies: int, folder: Path) -> list[Graph]:
        """`copies` graphs with distinct weights (engines merge identical ones); `folder` holds the networks."""
        if self.layer is None:
            return [graph_of(self.network(folder))]
        node = self._random_node(self.spec)
        inputs = ("x", "y")[: len(self.spec.inputs)]
        graphs = []
        for i in range(copies):
            weight = node.parameters["weight"].roll(i, 0) * (1 + i / 1024)  # rolled alone, they would repeat
            parameters = {**node.parameters, "weight": weight}
            graphs.append(
                Graph(inputs, (Node(node.name, node.kind, inputs, node.stride, node.activation, parameters),))
            )
        return graphs

    def _random_node(self, spec: Layer) -> Node:
        g = self._generator()
        k, c = spec.out_channels, spec.in_channels
        taps = 1 if spec.kind == "pointwise" else 3

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=g) * scale

        parameters = {
            "weight": normal(k, c, taps, taps, scale=(2 / (c * taps * taps)) ** 0.5),
            "bias": normal(k, scale=0.1),
        }
        if spec.kind != "pointwise":
            parameters["gate_weight"] = normal(k, c, scale=c**-0.5)
        if spec.kind == "repvgg_sse":
            parameters |= {
                "skip_scale": 1 + normal(c, scale=0.2),
                "skip_shift": normal(c, scale=0.1),
                "gate_bias": normal(k, scale=0.1),
            }
        return Node(spec.name, spec.kind, spec.inputs, spec.stride, self.config.activation, parameters)

    def network(self, folder: Path) -> DeployedParNet:
        """The deployed network, made on first use and kept in `folder`: every engine gets the same parameters."""
        path = folder / f"{self.variant}.pt"
        if not path.exists():
            torch.save(random_network(self.config).state_dict(), path)
        network = DeployedParNet(self.config)
        network.load_state_dict(torch.load(path, weights_only=True, mmap=True))
        return network


@torch.no_grad()
def random_network(config: ParNetConfig) -> DeployedParNet:
    """Random weights; BatchNorms have the statistics of their inputs, so that activations keep their size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ParNet(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
                module.momentum = 1.0
        model.train()(torch.randn(4, config.in_chans, 96, 96))
    return model.eval().deploy()


@torch.no_grad()
def reference_result(graph: Graph, inputs: list[Tensor]) -> Tensor:
    """In float64, straight from the definitions."""
    return graph.run(*(t.double() for t in inputs))


BLOCKS = ("streams.0.0", "streams.1.0", "streams.2.0")


def select(suites: list[str], variants: list[str], batches: list[int], size: int = 224) -> list[Workload]:
    """suites: "net", the whole networks; then "blocks", one of each stream, or "ops", each distinct shape once."""
    configs = {name: VARIANTS[name] for name in variants}
    found = []
    if "net" in suites:
        found += [Workload(v, c, None, b, size) for v, c in configs.items() for b in batches]
    if "blocks" in suites:
        found += [Workload(v, c, block, b, size) for v, c in configs.items() for block in BLOCKS for b in batches]
    if "ops" in suites:
        seen: dict[tuple[object, ...], str] = {}
        for v, config in configs.items():
            for layer in sorted(layers(config), key=lambda layer: layer.kind != "repvgg_sse"):
                workload = Workload(v, config, layer.name, batches[0], size)
                c, extent = workload.shapes[layer.inputs[0]]
                shape = (layer.kind, c, layer.out_channels, extent, layer.stride, len(layer.inputs))
                if shape not in seen:
                    seen[shape] = layer.name
                    found += [Workload(v, config, layer.name, b, size) for b in batches]
    return found
