"""The engines, each behind the same small protocol; `ENGINES` is the order of the tables, `LOW_PRECISION` that of
`bench int8`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from bench.workloads import Workload
from parnet_kernels.export.graph import Graph
from parnet_kernels.export.lowering import Program, lower


@dataclass(frozen=True)
class Task:
    """What an engine has to run: one or more graphs that differ in their weights, on the same inputs."""

    workload: Workload
    graphs: list[Graph]
    inputs: list[Tensor]
    threads: int
    folder: Path  # for networks and for files the engine wants

    @cached_property
    def programs(self) -> list[Program]:
        return [lower(graph, [tuple(x.shape) for x in self.inputs]) for graph in self.graphs]

    @property
    def result_shape(self) -> tuple[int, ...]:
        w = self.workload
        if w.layer is None:
            return w.batch, w.config.num_classes
        channels, size = w.shapes[w.layer]
        return w.batch, channels, size, size

    @property
    def has_skip(self) -> bool:
        return any(node.kind == "repvgg_sse" for node in self.graphs[0].nodes)


class Runner(Protocol):
    """A built task."""

    def run(self, copy: int) -> object:
        """Runs graph `copy` once, to its end. This call is what is timed."""

    def output(self, result: object) -> np.ndarray:
        """What `run` returned as an array [N, K, H, W] or [N, K], channels in their true order."""


class Engine(Protocol):
    max_copies: int  # building a copy may be dear

    def version(self) -> str:
        """Raises ImportError where the engine is not installed."""

    def forms(self, task: Task) -> list[str]:
        """The ways this engine can run the task, among which the fastest right one is taken."""

    def build(self, task: Task, form: str) -> Runner: ...

    def note(self, task: Task) -> str:
        """What a reader should know about the result, or an empty string."""


@dataclass(frozen=True)
class Kind:
    """An engine as the command line and the tables know it; `where` is module:class."""

    title: str
    where: str
    tolerance: float  # the largest norm-wise error of a right result, for single operators
    net_tolerance: float
    package: str | None = None
    group: str = "float32"  # of the numbers that it calculates with

    def make(self) -> Engine:
        module, _, cls = self.where.partition(":")
        return getattr(importlib.import_module(f"bench.engines.{module}"), cls)()


#: Of `bench int8`: a network is still the same one, whatever its numbers were rounded to.
ROUNDED = {"int8": 0.2, "bf16": 0.05}
PEER = 2e-3  # some peers trade accuracy for speed; the error printed beside the time tells
ENGINES: dict[str, Kind] = {
    "eager": Kind("eager", "torch_eager:Eager", PEER, PEER, "torch"),
    "eager-cl": Kind("eager channels_last", "torch_eager:EagerChannelsLast", PEER, PEER, "torch"),
    "compile": Kind("torch.compile", "torch_compile:Compile", PEER, PEER, "torch"),
    "compile-max": Kind("compile max-autotune", "torch_compile:CompileMaxAutotune", PEER, PEER, "torch"),
    "onnxruntime": Kind("ONNX Runtime", "onnxruntime:OnnxRuntime", PEER, PEER, "onnxruntime"),
    "openvino": Kind("OpenVINO", "openvino:OpenVino", PEER, PEER, "openvino"),
    "ncnn": Kind("ncnn", "ncnn:Ncnn", PEER, PEER, "ncnn"),
    "mnn": Kind("MNN", "mnn:Mnn", PEER, PEER, "MNN"),
    "ours": Kind("parnet-kernels", "ours:Ours", 3e-6, 5e-6),
}


def _rounded(title: str, where: str, group: str, package: str | None = None) -> Kind:
    return Kind(title, where, 0, ROUNDED[group], package, group)


#: Those of `bench int8`, whole networks only, by what they calculate with; float32 for comparison.
LOW_PRECISION: dict[str, Kind] = {
    "ours": ENGINES["ours"],
    "onnxruntime-int8": _rounded("ONNX Runtime int8", "int8:OnnxRuntime", "int8", "onnxruntime"),
    "openvino-int8": _rounded("OpenVINO int8", "int8:OpenVino", "int8", "openvino"),
    "ours-int8": _rounded("parnet-kernels int8", "int8:Ours", "int8"),
    "autocast-bf16": _rounded("eager bf16", "bf16:Eager", "bf16", "torch"),
    "compile-bf16": _rounded("torch.compile bf16", "bf16:Compile", "bf16", "torch"),
    "openvino-bf16": _rounded("OpenVINO bf16", "bf16:OpenVino", "bf16", "openvino"),
    "ours-bf16": _rounded("parnet-kernels bf16", "bf16:Ours", "bf16"),
}
ALL = ENGINES | LOW_PRECISION
