"""A graph of deployed layers as the few primitive steps that a general inference engine knows, in their cheapest form.

What other engines would do at run time is folded here, exactly, so that they get their best form: the 2 of 2σ(·) goes
into the convolution's weights, the skip's affine into the gate's, a fusion's interleaving and channel shuffle into the
order of weights and of concatenated slices. So a result may be stored in another channel order: `Program.order`.

A node may hold 8-bit weights, and the range of bytes that its result is rounded to: see `graph.int8_graph_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parnet_kernels.export.graph import Graph, Node

Shape = tuple[int | str, ...]  # a string names a size that is known only when the program runs


@dataclass(frozen=True)
class Step:
    """Computes `out` from the tensors named `inputs`."""

    out: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Conv(Step):
    """k×k convolution, padding k // 2."""

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int
    scale: Tensor | None = None  # [K]: of 8-bit weights, what a row is multiplied by


@dataclass(frozen=True)
class Gate(Step):
    """σ(weight · mean_hw(x) + bias): [N, K, 1, 1]."""

    weight: Tensor  # [K, C / groups]
    bias: Tensor
    groups: int
    scale: Tensor | None = None  # as that of `Conv`


@dataclass(frozen=True)
class Skip(Step):
    """(scale·x + shift)·gate of inputs (x, gate)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Scale(Step):
    """x·gate of inputs (x, gate)."""


@dataclass(frozen=True)
class Add(Step):
    pass


@dataclass(frozen=True)
class Act(Step):
    kind: str


@dataclass(frozen=True)
class Affine(Step):
    """scale·x + shift."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Round(Step):
    """The nearest bytes q with x ≈ scale · (q − zero), and the values that these stand for."""

    scale: float
    zero: int


@dataclass(frozen=True)
class Concat(Step):
    """Slices of the inputs' channels, one behind the other."""

    slices: tuple[tuple[str, int, int], ...]  # name, first channel, last channel + 1


@dataclass(frozen=True)
class Head(Step):
    """weight · mean_hw(x) + bias: [N, K]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Pool(Step):
    """mean_hw(x): [N, C]."""


@dataclass(frozen=True)
class Program:
    inputs: dict[str, Shape]
    steps: tuple[Step, ...]
    order: Tensor | None  # channel i of the stored result is channel order[i] of the true one; None: the same

    @property
    def output(self) -> str:
        return self.steps[-1].out

    def restore(self, stored: Tensor) -> Tensor:
        """The result in its true order."""
        if self.order is None:
            return stored
        true = torch.empty_like(stored)
        true[:, self.order] = stored
        return true


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Maximal ranges of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for p in positions:
        if runs and runs[-1][1] == p:
            runs[-1] = (runs[-1][0], p + 1)
        else:
            runs.append((p, p + 1))
    return runs


class Lowering:
    """The program of a graph; `order`: of each map, which true channel each stored one is."""

    def __init__(self, graph: Graph, shapes: Sequence[Shape]) -> None:
        self.steps: list[Step] = []
        self.shapes = dict(zip(graph.inputs, shapes, strict=True))
        self.order = {name: torch.arange(int(shape[1])) for name, shape in self.shapes.items()}
        for node in graph.nodes:
            self.node(node)
        last = graph.nodes[-1].name
        order = self.order[last]
        if graph.head is not None:
            weight, bias = graph.head
            if len(weight):
                self.steps.append(Head("logits", (last,), weight[:, order], bias))
            else:
                assert bool((order == torch.arange(len(order))).all())  # as the last layer of every network has it
                self.steps.append(Pool("pooled", (last,)))
        same = graph.head is not None or bool((order == torch.arange(len(order))).all())
        self.program = Program(self.shapes, tuple(self.steps), None if same else order)

    def node(self, node: Node) -> None:
        p, name = node.parameters, node.name
        order = self.order[node.inputs[0]]
        if node.kind == "affine":
            self.steps.append(Affine(name, node.inputs, p["scale"][order], p["shift"][order]))
            self.order[name] = order
            return None
        if node.kind == "pointwise":
            self.conv(node, node.inputs[0], p["weight"][:, order], p["bias"], 1, 1)
            return self.finish(node, f"{name}/conv", torch.arange(len(p["bias"])))
        scale, gate_scale = p.get("weight_scale"), p.get("gate_scale")
        if node.kind == "repvgg_sse":  # stored in the order of its input: the skip adds them
            a, c = p["skip_scale"][order], p["skip_shift"][order]
            weight, gate_weight = (p[n][order][:, order] for n in ("weight", "gate_weight"))
            gate_bias = p["gate_bias"][order] if "gate_bias" in p else torch.zeros_like(c)
            if gate_scale is None:
                gate_bias = (gate_weight.double() @ c.double() + gate_bias).to(gate_weight.dtype)
                gate_weight = (gate_weight.double() * a.double()).to(gate_weight.dtype)
            scale, gate_scale = (None if s is None else s[order] for s in (scale, gate_scale))
            self.conv(node, node.inputs[0], weight, p["bias"][order], 1, 1, scale)
            self.steps += [
                Gate(f"{name}/gate", node.inputs, gate_weight, gate_bias, 1, gate_scale),
                Skip(f"{name}/skip", (node.inputs[0], f"{name}/gate"), a, c),
                Add(f"{name}/sum", (f"{name}/conv", f"{name}/skip")),
            ]
            return self.finish(node, f"{name}/sum", order)
        k = len(p["bias"])
        weight, gate_weight, groups, source = p["weight"], p["gate_weight"], 1, node.inputs[0]
        if node.kind == "fusion_se":
            groups, source = 2, f"{name}/input"
            columns = self.concat(
                node, source
            )  # [2, C]: for each group, which of its columns of the weights comes where
            halves = [(w.chunk(2, 0)) for w in (weight, gate_weight)]
            weight, gate_weight = (
                torch.cat([half[:, columns[group]] for group, half in enumerate(pair)]) for pair in halves
            )
        else:
            weight, gate_weight = weight[:, order], gate_weight[:, order]
        weight, scale = (2 * weight, None) if scale is None else (weight, 2 * scale)
        self.conv(node, source, weight, 2 * p["bias"], node.stride, groups, scale)
        gate_bias = p.get("gate_bias", torch.zeros_like(p["bias"]))
        self.steps += [
            Gate(f"{name}/gate", (source,), gate_weight, gate_bias, groups, gate_scale),
            Scale(f"{name}/scaled", (f"{name}/conv", f"{name}/gate")),
        ]
        true = torch.arange(k).view(k // groups, groups).t().flatten() if groups == 2 else torch.arange(k)
        return self.finish(node, f"{name}/scaled", true)

    def conv(
        self,
        node: Node,
        source: str,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        groups: int,
        scale: Tensor | None = None,
    ) -> None:
        self.steps.append(Conv(f"{node.name}/conv", (source,), weight.contiguous(), bias, stride, groups, scale))

    def concat(self, node: Node, out: str) -> Tensor:
        """Gathers each group's channels of both inputs as slices; returns their places in the interleaved order."""
        c = len(self.order[node.inputs[0]])
        slices, columns = [], []
        for group in range(2):
            for j, name in enumerate(node.inputs):
                order = self.order[name]
                interleaved = 2 * order + j
                inside = (interleaved >= group * c) & (interleaved < (group + 1) * c)
                positions = inside.nonzero().flatten()
                slices += [(name, start, stop) for start, stop in _runs(positions.tolist())]
                columns.append(interleaved[positions] - group * c)
        self.steps.append(Concat(out, node.inputs, tuple(slices)))
        return torch.cat(columns).view(2, c)

    def finish(self, node: Node, source: str, order: Tensor) -> None:
        exact = node.name if node.range is None else f"{node.name}/exact"
        affine = "out_scale" in node.parameters
        self.steps.append(Act(f"{node.name}/act" if affine else exact, (source,), node.activation))
        if affine:
            scale, shift = (node.parameters[n][order] for n in ("out_scale", "out_shift"))
            self.steps.append(Affine(exact, (f"{node.name}/act",), scale, shift))
        if node.range is not None:
            self.steps.append(Round(node.name, (exact,), *node.range))
        self.order[node.name] = order


def lower(graph: Graph, shapes: Sequence[Shape]) -> Program:
    """The steps of `graph` for inputs of these shapes; their numbers of channels must be known."""
    return Lowering(graph, shapes).program
