"""A deployed network, or a part of it, as a graph of layers with their parameters: what every export starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import reference
from parnet_kernels.config import layers
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.deployed_layer import DeployedLayer
from parnet_kernels.quantized import QuantizedParNet


@dataclass(frozen=True)
class Node:
    """One deployed layer: an operator and its arguments; or an affine map per channel, of kind "affine"."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    stride: int
    activation: str
    parameters: dict[str, Tensor]
    #: Scale and zero of the bytes that the result is rounded to; None: it stays as it is.
    range: tuple[float, int] | None = None

    def run(self, *inputs: Tensor) -> Tensor:
        """The operator's definition, in the dtype of `inputs`."""
        p = {name: t.to(inputs[0].dtype) for name, t in self.parameters.items()}
        if self.kind == "affine":
            return inputs[0] * reference.per_channel(p["scale"]) + reference.per_channel(p["shift"])
        if self.kind == "pointwise":
            return reference.ACTIVATIONS[self.activation](F.conv2d(inputs[0], p["weight"], p["bias"]))
        options = {} if self.kind == "repvgg_sse" else {"stride": self.stride}
        return getattr(reference, self.kind)(*inputs, **p, activation=self.activation, **options)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order of execution; the last one's output, or the classifier's, is the result.

    head: weight [classes, P] and bias [classes] of the classifier; without classes the result is the channel means.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    head: tuple[Tensor, Tensor] | None = None

    def run(self, *inputs: Tensor) -> Tensor:
        made = dict(zip(self.inputs, inputs, strict=True))
        for node in self.nodes:
            made[node.name] = node.run(*(made[name] for name in node.inputs))
        y = made[self.nodes[-1].name]
        if self.head is None:
            return y
        weight, bias = (t.to(y.dtype) for t in self.head)
        return F.linear(y.mean((2, 3)), weight, bias) if len(weight) else y.mean((2, 3))


def graph_of(network: DeployedParNet) -> Graph:
    """A deployed network as a graph, with its own tensors."""
    nodes = []
    for layer in layers(network.config):
        inputs = list(layer.inputs)
        for i, name in enumerate(inputs if layer.kind == "fusion_se" else ()):
            slot = name.replace(".", "_")
            if slot in network.affines:
                inputs[i] = f"{layer.name}/{name}"
                parameters: dict[str, Tensor] = {**dict(network.affines[slot].named_parameters())}
                nodes.append(Node(inputs[i], "affine", (name,), 1, network.config.activation, parameters))
        module = network.layers[layer.name.replace(".", "_")]
        assert isinstance(module, DeployedLayer)
        nodes.append(Node(layer.name, layer.kind, tuple(inputs), layer.stride, module.activation, module.arguments()))
    return Graph(("image",), tuple(nodes), (network.head_weight, network.head_bias))


def int8_graph_of(network: QuantizedParNet) -> Graph:
    """An int8 network as a graph, with its own tensors. Its nodes cannot be run: `QuantizedLayer` is what defines them.
    Weights [K, C, …] are 8-bit integers, to be multiplied by `weight_scale` and `gate_scale` [K]; the gate reads the
    means of the layer's input as it is, also where there is a skip.
    """
    graph = layers(network.config)
    quantized = network.plain_layers()
    entry = next(iter(quantized.values()))
    nodes = []
    for layer in graph:
        if (a := quantized.get(layer.name)) is None:  # the first or the last
            m = network.first if layer is graph[0] else network.pointwise
            assert m is not None
            parameters, range_ = m.arguments(), (entry.scale_in, entry.zero_in) if layer is graph[0] else None
        else:
            parameters = {name: t for name, t in vars(a).items() if isinstance(t, Tensor)}
            range_ = None if a.last else (a.scale_out, a.zero_out)
        activation = network.config.activation
        nodes.append(Node(layer.name, layer.kind, layer.inputs, layer.stride, activation, parameters, range_))
    return Graph(("image",), tuple(nodes), (network.head_weight, network.head_bias))
