"""What an engine has to run on a device, in a number format, and which results are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.workloads import Workload
from parnet_kernels import reference
from parnet_kernels.export.graph import Graph
from parnet_kernels.export.lowering import Program, lower

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
#: The largest norm-wise error of a right result: (a layer, a network). The kernels' own for layers, as their tests
#: have them; a dozen layers with 16-bit or tf32 maps between them add up (tests/cuda/test_networks.py).
TOLERANCE = {"fp16": (1e-3, 5e-3), "bf16": (8e-3, 4e-2), "tf32": (2e-3, 5e-3), "fp32": (3e-6, 5e-6)}
#: Others round more often; a tf32 product (about 3e-4) would still not pass as "fp32". The error is printed.
PEER_TOLERANCE = {"fp16": (5e-3, 2e-2), "bf16": (4e-2, 0.16), "tf32": (5e-3, 2e-2), "fp32": (5e-5, 5e-5)}


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """Within the block, float32 products are tf32 only if `dtype` is "tf32": PyTorch's, and so ours and TensorRT's."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖; infinite for another shape or a value that is not finite."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        difference = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        worst = max(worst, float("inf") if not torch.isfinite(difference) else difference.item())
    return worst


def run_layers(graph: Graph, operators: Any, inputs: list[Tensor], parameters: dict[str, Tensor]) -> Tensor:
    """The graph on `operators` (`parnet_kernels.ops` or `.reference`); parameters by "layer/argument"."""
    made = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        own = {name: parameters[f"{node.name}/{name}"] for name in node.parameters}
        options = {} if node.kind == "repvgg_sse" else {"stride": node.stride}
        maps = [made[name] for name in node.inputs]
        made[node.name] = getattr(operators, node.kind)(*maps, **own, activation=node.activation, **options)
    y = made[graph.nodes[-1].name]
    return y if graph.head is None else F.linear(y.mean((2, 3)), parameters["head/weight"], parameters["head/bias"])


@dataclass(frozen=True)
class GpuTask:
    """A workload in a number format on a device; `training`: its forward and backward."""

    workload: Workload
    dtype: str
    device: torch.device
    folder: Path
    training: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def suite(self) -> str:
        return "train" if self.training else self.workload.suite

    def here(self, t: Tensor) -> Tensor:
        """On the device, in the format; maps and kernels in channels_last."""
        t = t.detach().to(self.device, self.torch_dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()

    @cached_property
    def graph(self) -> Graph:
        """In float32, on the CPU, with values that the format can hold."""
        (graph,) = self.workload.graphs(1, self.folder)

        def rounded(t: Tensor) -> Tensor:
            return t.to(self.torch_dtype).float()

        nodes = [replace(n, parameters={k: rounded(v) for k, v in n.parameters.items()}) for n in graph.nodes]
        head = None if graph.head is None else (rounded(graph.head[0]), rounded(graph.head[1]))
        return Graph(graph.inputs, tuple(nodes), head)

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [self.here(t) for t in self.workload.inputs()]

    @cached_property
    def program(self) -> Program:
        """The primitive steps that general engines are given."""
        return lower(self.graph, [tuple(t.shape) for t in self.inputs])

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """On the device, by "layer/argument", in the order of execution."""
        found = {f"{node.name}/{k}": self.here(v) for node in self.graph.nodes for k, v in node.parameters.items()}
        if self.graph.head is not None:
            found["head/weight"], found["head/bias"] = (self.here(t) for t in self.graph.head)
        return found

    def gradient(self, y: Tensor) -> Tensor:
        """What backward starts from: the same for all engines."""
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return g.to(y.device, self.torch_dtype).to(y.dtype)

    @property
    def by_inputs(self) -> bool:
        """Whether a training step differentiates by its inputs: not by images."""
        return self.training and self.workload.layer is not None and self.workload.kind != "stem"

    def leaves(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Inputs and parameters of a training step: copies that are differentiated by."""
        inputs = [t.clone().requires_grad_(self.by_inputs) for t in self.inputs]
        return inputs, {name: t.clone().requires_grad_() for name, t in self.parameters.items()}

    @cached_property
    def expected(self) -> list[Tensor]:
        """The result, and in training every gradient, in float64 on the device."""
        inputs = [t.double().requires_grad_(self.by_inputs) for t in self.inputs]
        parameters = {name: t.double().requires_grad_(self.training) for name, t in self.parameters.items()}
        with torch.set_grad_enabled(self.training):
            y = run_layers(self.graph, reference, inputs, parameters)
            if not self.training:
                return [y]
            leaves = [t for t in (*inputs, *parameters.values()) if t.requires_grad]
            return [y.detach(), *torch.autograd.grad(y, leaves, self.gradient(y))]

    def tolerance(self, ours: bool) -> float:
        return (TOLERANCE if ours else PEER_TOLERANCE)[self.dtype][self.workload.layer is None]
