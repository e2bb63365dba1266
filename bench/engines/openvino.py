"""OpenVINO: latency hint, one stream; float32 arithmetic unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from bench.engines import Task
from bench.engines.onnxruntime import models
from bench.workloads import MAX_COPIES
from parnet_kernels.export.onnx_model import SKIP_FORMS


class OpenVinoRunner:
    """models: as `Core.read_model` takes them, or made already, one for each graph of the task; precision: the hint."""

    def __init__(self, task: Task, models: Iterable[Any], precision: str = "f32") -> None:
        import openvino as ov

        core = ov.Core()
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": task.threads,
            "NUM_STREAMS": 1,
        }
        self.program = task.programs[0]
        self.requests: list[Any] = []
        self.inputs = [ov.Tensor(x.contiguous().numpy(), shared_memory=True) for x in task.inputs]
        self.result = np.empty(task.result_shape, np.float32)
        result = ov.Tensor(self.result, shared_memory=True)
        for program, model in zip(task.programs, models, strict=True):
            read = core.read_model(model) if isinstance(model, bytes) else model
            request = core.compile_model(read, "CPU", config).create_infer_request()
            for name, x in zip(program.inputs, self.inputs, strict=True):
                request.set_tensor(name, x)
            request.set_output_tensor(result)
            self.requests.append(request)

    def run(self, copy: int) -> np.ndarray:
        self.requests[copy].infer(share_outputs=True)
        return self.result

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, np.ndarray)
        return self.program.restore(torch.from_numpy(result)).numpy()


class OpenVino:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import onnx  # noqa: F401  (builds the model)
        import openvino

        return openvino.__version__.split("-")[0]

    def forms(self, task: Task) -> list[str]:
        return list(SKIP_FORMS) if task.has_skip else [SKIP_FORMS[0]]

    def build(self, task: Task, form: str) -> OpenVinoRunner:
        return OpenVinoRunner(task, models(task, form))

    def note(self, task: Task) -> str:
        return ""
