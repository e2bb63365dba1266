"""MNN, from the ONNX model through its own converter.

The converter is called below its Python wrapper `MNN.tools`, whose import installs a logging client and contacts a
server. Precision "normal" is float32 on x86 and ARM, bit for bit that of "high"; only "low" is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.engines import Task
from bench.workloads import MAX_COPIES
from parnet_kernels.export.onnx_model import SKIP_FORMS, onnx_model


class _Runner:
    def __init__(self, task: Task, form: str) -> None:
        import _tools
        import MNN

        self.program = task.programs[0]
        self.shape = task.result_shape
        self.expr = MNN.expr
        self.inputs = [MNN.expr.const(x.contiguous().numpy(), list(x.shape), MNN.expr.NCHW) for x in task.inputs]
        runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "normal", "numThread": task.threads},))
        self.modules: list[Any] = []
        source, target = task.folder / "mnn.onnx", task.folder / "model.mnn"
        for program in task.programs:
            source.write_bytes(onnx_model(program, self.shape, form).SerializeToString())
            arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target)]
            _tools.mnnconvert(["mnnconvert", *arguments, "--bizCode", "bench"])
            self.modules.append(
                MNN.nn.load_module_from_file(
                    str(target),
                    list(program.inputs),
                    [program.output],
                    runtime_manager=runtime,
                    shape_mutable=False,
                )
            )
        source.unlink()
        target.unlink()

    def run(self, copy: int) -> Any:
        return self.modules[copy].forward(self.inputs)

    def output(self, result: Any) -> np.ndarray:
        y = self.expr.convert(result[0], self.expr.NCHW)
        stored = np.array(y.read(), np.float32).reshape(self.shape)
        return self.program.restore(torch.from_numpy(stored)).numpy()


class Mnn:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import MNN
        import onnx  # noqa: F401  (builds the model)

        return MNN.version()

    def forms(self, task: Task) -> list[str]:
        return list(SKIP_FORMS) if task.has_skip else [SKIP_FORMS[0]]

    def build(self, task: Task, form: str) -> _Runner:
        return _Runner(task, form)

    def note(self, task: Task) -> str:
        return ""
