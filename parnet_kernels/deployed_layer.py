"""The layers of a deployed network as modules, and whether one is still as it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import ops
from parnet_kernels.config import Layer
from parnet_kernels.reference import ACTIVATIONS, per_channel
from parnet_kernels.unchanged import AsMade


def parameter(t: Tensor) -> nn.Parameter:
    """A Parameter, so that optimisers, averages, pruning, … find it; it asks for no gradient until someone does."""
    return nn.Parameter(t, requires_grad=False)


class DeployedLayer(nn.Module):
    """One layer as one operator; its Parameters are the operator's arguments. See `ops` for their shapes."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Layer, activation: str, with_affine: bool) -> None:
        super().__init__()
        self.kind = layer.kind
        self.stride = layer.stride
        self.activation = activation
        shapes = shapes_of(layer, with_affine)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(torch.zeros(shape)))

    def extra_repr(self) -> str:
        k, c = self.weight.shape[:2]
        return f"{self.kind}, {c} → {k} channels, stride {self.stride}, {self.activation}"

    def arguments(self) -> dict[str, Tensor]:
        """The operator's tensors by name, whatever they are now: Parameters, parametrized."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, *inputs: Tensor) -> Tensor:
        return run_layer(self.kind, self.stride, self.activation, inputs, self.arguments())


def run_layer(
    kind: str, stride: int, activation: str, inputs: Sequence[Tensor], arguments: Mapping[str, Tensor]
) -> Tensor:
    """One layer as one operator, see `ops`; a "pointwise" one, act(conv1x1(x)), by PyTorch's."""
    if kind == "pointwise":
        return ACTIVATIONS[activation](F.conv2d(inputs[0], arguments["weight"], arguments["bias"]))
    options: dict[str, Any] = {} if kind == "repvgg_sse" else {"stride": stride}
    return getattr(ops, kind)(*inputs, **arguments, activation=activation, **options)


class AffineLayer(nn.Module):
    """scale·x + shift: a fusion's BatchNorm where no producer can take it over (a stream without blocks)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale, self.shift = parameter(torch.ones(c)), parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel(self.scale) + per_channel(self.shift)


def shapes_of(layer: Layer, with_affine: bool) -> dict[str, tuple[int, ...]]:
    """Of a layer's tensors."""
    c, k = layer.in_channels, layer.out_channels
    shapes: dict[str, tuple[int, ...]] = {"weight": (k, c, 3, 3), "bias": (k,), "gate_weight": (k, c)}
    if layer.kind == "pointwise":
        shapes = {"weight": (k, c, 1, 1), "bias": (k,)}
    if layer.kind == "repvgg_sse":
        shapes |= {"skip_scale": (c,), "skip_shift": (c,)}
    if with_affine:
        shapes |= {"out_scale": (k,), "out_shift": (k,)}
    return shapes


def module_name(name: str) -> str:
    """A layer's name as a module name."""
    return name.replace(".", "_")


AS_MADE = AsMade(DeployedLayer, "arguments")


def why_not_layer(m: nn.Module, expected: tuple[Any, ...]) -> str | None:
    """What was done to a layer that the native kernels would ignore, or None. expected: kind, stride, activation,
    names of the tensors.
    """
    if reason := AS_MADE.why_not(m):
        return reason
    if (m.kind, m.stride, m.activation, m.names) != expected:
        return "has other settings than the configuration says"
    return None
