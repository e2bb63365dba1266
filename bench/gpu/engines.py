"""The engines on a device, each a function that turns a task into a call; `ENGINES` is the order of the tables.

In mode "graph" the call is captured by the measurement, unless the engine has a graph of its own (`Built.graph`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import parnet_kernels
from bench.engines.torch_compile import _own_forward
from bench.engines.torch_eager import TorchProgram
from bench.gpu.tasks import GpuTask, run_layers
from bench.gpu.timing import Call
from parnet_kernels import ops, reference, selection
from parnet_kernels.cuda.backend import tensor_missing


@dataclass(frozen=True)
class Built:
    """run: the call that is timed. results: what it returned, as the task expects it. graph: a call that replays a
    graph of the engine's own, and the tensor it fills.
    """

    run: Call
    results: Callable[[Any], list[Tensor]] = lambda y: list(y) if isinstance(y, (list, tuple)) else [y]
    graph: Callable[[], tuple[Call, Any]] | None = None


@dataclass(frozen=True)
class GpuEngine:
    """An engine as the command line and the tables know it. version raises ImportError where it is not installed."""

    title: str
    build: Callable[[GpuTask, str], Built]  # of a task and a mode
    package: str
    suites: tuple[str, ...] = ("net", "ops", "train")

    @property
    def ours(self) -> bool:
        return self.package == "parnet-kernels"

    def version(self) -> str:
        if self.ours:
            return parnet_kernels.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"the package {self.package} is not installed") from None


# ------------------------------------------------------------------ ours


def _cuda(task: GpuTask, mode: str) -> Built:
    """The CUDA kernels; in mode "graph" `DeployedParNet.capture()`, on its own input as the others' graphs."""
    if task.workload.layer is not None:
        return _operator(task, "cuda")
    network = task.workload.network(task.folder).to(task.device, task.torch_dtype)
    (x,) = task.inputs
    if reason := tensor_missing(x) or network.why_layer_by_layer(x):
        raise RuntimeError(reason)

    @torch.inference_mode()
    def run() -> Tensor:
        return network(x)

    def graph() -> tuple[Call, Tensor]:
        captured = network.capture(x)
        return (lambda: captured(captured.input)), captured.result

    return Built(run, graph=graph if mode == "graph" else None)


def _triton(task: GpuTask, mode: str) -> Built:
    if task.training:
        return _step(task, _on_backend("triton"))
    return _operator(task, "triton")


def _operator(task: GpuTask, backend: str) -> Built:
    """The public operators, layer by layer."""
    if reason := selection.BACKENDS[backend].why_not(task.graph.nodes[0].kind, task.inputs[0]):
        raise RuntimeError(reason)
    layers = _on_backend(backend)

    @torch.inference_mode()
    def run() -> Tensor:
        return layers(task, task.inputs, task.parameters)

    return Built(run)


Layers = Callable[[GpuTask, list[Tensor], dict[str, Tensor]], Tensor]


def _on_backend(backend: str) -> Layers:
    def layers(task: GpuTask, inputs: list[Tensor], parameters: dict[str, Tensor]) -> Tensor:
        with ops.use_backend(backend):
            return run_layers(task.graph, ops, inputs, parameters)

    return layers


def _step(task: GpuTask, layers: Layers) -> Built:
    """Forward and backward; parameters and inputs get their gradients at each call anew."""
    inputs, parameters = task.leaves()
    leaves = [t for t in (*inputs, *parameters.values()) if t.requires_grad]
    g = task.gradient(layers(task, inputs, parameters))

    def run() -> list[Tensor]:
        y = layers(task, inputs, parameters)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    return Built(run)


# ------------------------------------------------------------------ PyTorch


def _stock(task: GpuTask, inputs: list[Tensor], parameters: dict[str, Tensor]) -> Tensor:
    return run_layers(task.graph, reference, inputs, parameters)


def program_module(task: GpuTask) -> TorchProgram:
    """The cheapest primitive steps, as the CPU's benchmark runs them, in channels_last."""
    return TorchProgram(task.program, torch.channels_last).to(task.device, task.torch_dtype).eval()


def _restored(task: GpuTask) -> Callable[[Any], list[Tensor]]:
    return lambda y: [task.program.restore(y)]


def _eager(task: GpuTask, mode: str) -> Built:
    if task.training:
        return _step(task, _stock)
    module = program_module(task)

    @torch.inference_mode()
    def run() -> Tensor:
        return module(*task.inputs)

    return Built(run, _restored(task))


def _compiled(task: GpuTask, mode: str, best: str, without_graphs: str) -> Built:
    """torch.compile in its mode `best`; the measurement captures it where that has no graphs of its own."""
    how = without_graphs if mode == "graph" or task.device.type != "cuda" else best
    if task.training:
        graph = task.graph
        compiled = torch.compile(
            lambda inputs, parameters: run_layers(graph, reference, inputs, parameters),
            mode=how,
            fullgraph=True,
            dynamic=False,
        )

        def layers(_: GpuTask, inputs: list[Tensor], parameters: dict[str, Tensor]) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's gradients may be overwritten
            return compiled(inputs, parameters)

        return _step(task, layers)
    call = torch.compile(_own_forward(program_module(task)), mode=how, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run() -> Tensor:
        return call(*task.inputs)

    return Built(run, _restored(task))


def _compile(task: GpuTask, mode: str) -> Built:
    return _compiled(task, mode, "reduce-overhead", "default")


def _compile_max(task: GpuTask, mode: str) -> Built:
    return _compiled(task, mode, "max-autotune", "max-autotune-no-cudagraphs")


def _tensorrt(task: GpuTask, mode: str) -> Built:
    from bench.gpu.tensorrt import build

    return build(task)


ENGINES: dict[str, GpuEngine] = {
    "eager-cl": GpuEngine("eager channels_last", _eager, "torch"),
    "compile": GpuEngine("compile reduce-overhead", _compile, "torch"),
    "compile-max": GpuEngine("compile max-autotune", _compile_max, "torch"),
    "tensorrt": GpuEngine("TensorRT", _tensorrt, "tensorrt", ("net", "ops")),
    "ours-triton": GpuEngine("ours, Triton", _triton, "parnet-kernels"),
    "ours": GpuEngine("ours, CUDA", _cuda, "parnet-kernels", ("net", "ops")),
}
