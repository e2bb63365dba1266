"""This package: the public operators for single layers, `DeployedParNet` for the network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import parnet_kernels
from bench.engines import Task
from bench.workloads import MAX_COPIES
from parnet_kernels import ops
from parnet_kernels.export.graph import Node


class _Runner:
    def __init__(self, task: Task, form: str) -> None:
        layout = torch.channels_last if form == "NHWC" else torch.contiguous_format
        self.inputs = [x.contiguous(memory_format=layout) for x in task.inputs]
        if task.workload.layer is None:
            self.calls: list[Callable[..., Tensor]] = [task.workload.network(task.folder).prepare()]
        else:
            self.calls = [self._call(graph.nodes[0]) for graph in task.graphs]

    @staticmethod
    def _call(node: Node) -> Callable[..., Tensor]:
        options = {} if node.kind == "repvgg_sse" else {"stride": node.stride}
        op = getattr(ops, node.kind)
        return lambda *inputs: op(*inputs, **node.parameters, activation=node.activation, **options)

    @torch.inference_mode()
    def run(self, copy: int) -> Tensor:
        return self.calls[copy](*self.inputs)

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, Tensor)
        return result.clone().contiguous().numpy()


class Ours:
    max_copies = MAX_COPIES

    def version(self) -> str:
        return parnet_kernels.__version__

    def forms(self, task: Task) -> list[str]:
        return ["NCHW"] if task.workload.layer is None else ["NCHW", "NHWC"]

    def build(self, task: Task, form: str) -> _Runner:
        return _Runner(task, form)

    def note(self, task: Task) -> str:
        """The reason why the native kernels do not run, if they do not."""
        if task.workload.layer is None:
            network = task.workload.network(task.folder)
            reason = network.why_layer_by_layer(task.inputs[0])
        else:
            reason = ops.explain(task.workload.spec.kind, task.inputs[0])["cpu"]
        return f"reference path: {reason}" if reason else ""
