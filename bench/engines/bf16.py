"""Whole networks in bfloat16: what is multiplied has 8 bits of mantissa, sums are float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import parnet_kernels
from bench.engines import Task
from bench.engines import openvino as float_openvino
from bench.engines.onnxruntime import models
from bench.engines.openvino import OpenVinoRunner
from bench.engines.torch_compile import Compile as FloatCompile
from bench.engines.torch_eager import EagerChannelsLast, TorchProgram, TorchRunner
from bench.workloads import MAX_COPIES

BF16 = torch.bfloat16
AUTOCAST, ALL = "autocast", "weights and maps"


class _Autocast(TorchRunner):
    @torch.inference_mode()
    def run(self, copy: int) -> Tensor:
        with torch.autocast("cpu", BF16):
            return self.calls[copy](*self.inputs)


class Eager(EagerChannelsLast):
    """oneDNN's convolutions."""

    def forms(self, task: Task) -> list[str]:
        return [AUTOCAST, ALL]

    def build(self, task: Task, form: str) -> TorchRunner:
        dtype = BF16 if form == ALL else torch.float32
        modules = [TorchProgram(p, self.layout).to(dtype).eval() for p in task.programs]
        inputs = [x.contiguous(memory_format=self.layout).to(dtype) for x in task.inputs]
        return (TorchRunner if form == ALL else _Autocast)(task, [*modules], inputs)


class Compile(FloatCompile):
    dtype = BF16


class OpenVino(float_openvino.OpenVino):
    def build(self, task: Task, form: str) -> OpenVinoRunner:
        return OpenVinoRunner(task, models(task, form), precision="bf16")


class _Runner:
    def __init__(self, task: Task) -> None:
        self.x = task.inputs[0].to(BF16)
        self.network = task.workload.network(task.folder).to(BF16).prepare(products="bfloat16")

    @torch.inference_mode()
    def run(self, copy: int) -> Tensor:
        return self.network(self.x)

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, Tensor)
        return result.float().numpy()


class Ours:
    max_copies = MAX_COPIES

    def version(self) -> str:
        return parnet_kernels.__version__

    def forms(self, task: Task) -> list[str]:
        return [ALL]

    def build(self, task: Task, form: str) -> _Runner:
        return _Runner(task)

    def note(self, task: Task) -> str:
        reason = task.workload.network(task.folder).to(BF16).why_layer_by_layer(task.inputs[0].to(BF16))
        return f"reference path: {reason}" if reason else ""
