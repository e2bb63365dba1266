"""Whole networks in int8, each engine from the best of what it can be given: our numbers as a QDQ file, or its own
quantisation of the float32 network. All are calibrated on the same pictures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import parnet_kernels
from bench.engines import Task
from bench.engines.onnxruntime import OnnxRuntimeRunner, models
from bench.engines.openvino import OpenVinoRunner
from bench.workloads import MAX_COPIES
from parnet_kernels.checkpoint import load_quantized, save
from parnet_kernels.export.graph import int8_graph_of
from parnet_kernels.export.lowering import lower
from parnet_kernels.export.onnx_model import SKIP_FORMS, onnx_model
from parnet_kernels.quantized import QuantizedParNet

PICTURES = 8  # random, as the images that are timed: their ranges are the same
OUR_NUMBERS, OWN = "our QDQ file", "its own quantisation"


def pictures(task: Task) -> list[Tensor]:
    """For calibration, in batches of the size that the network is made for."""
    w, g = task.workload, torch.Generator().manual_seed(1)
    count = -(-PICTURES // w.batch)
    return [torch.randn(w.batch, w.config.in_chans, w.size, w.size, generator=g) for _ in range(count)]


def quantized(task: Task) -> QuantizedParNet:
    """Our int8 network, made on first use and kept in the folder."""
    w = task.workload
    path = task.folder / f"{w.key}-int8.safetensors"
    if not path.exists():
        save(w.network(task.folder).quantize(torch.cat(pictures(task))), path)
    return load_quantized(path)


def qdq_model(task: Task) -> bytes:
    program = lower(int8_graph_of(quantized(task)), [tuple(x.shape) for x in task.inputs])
    content: bytes = onnx_model(program, task.result_shape).SerializeToString()
    return content


class _Runner:
    def __init__(self, task: Task) -> None:
        (self.x,) = task.inputs
        self.network = quantized(task).prepare()

    @torch.inference_mode()
    def run(self, copy: int) -> Tensor:
        result: Tensor = self.network(self.x)
        return result

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, Tensor)
        return result.numpy()


class Ours:
    max_copies = MAX_COPIES

    def version(self) -> str:
        return parnet_kernels.__version__

    def forms(self, task: Task) -> list[str]:
        return ["int8"]

    def build(self, task: Task, form: str) -> _Runner:
        return _Runner(task)

    def note(self, task: Task) -> str:
        return quantized(task).why_layer_by_layer() or QuantizedParNet.why_not() or ""


class OnnxRuntime:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import onnx  # noqa: F401  (builds the model)
        import onnxruntime

        return onnxruntime.__version__

    def forms(self, task: Task) -> list[str]:
        return [OUR_NUMBERS, OWN]

    def build(self, task: Task, form: str) -> OnnxRuntimeRunner:
        # Calibration runs sessions of its own, which a pool of the process would not let it.
        return OnnxRuntimeRunner(task, [qdq_model(task) if form == OUR_NUMBERS else self._own(task)], shared=False)

    @staticmethod
    def _own(task: Task) -> bytes:
        """Static, per channel, on its own calibration."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.left: Iterator[Tensor] = iter(pictures(task))

            def get_next(self) -> Any:
                x = next(self.left, None)
                return None if x is None else {"image": x.numpy()}

        source, target = (task.folder / f"{task.workload.key}-{name}.onnx" for name in ("float", "own"))
        if not target.exists():
            source.write_bytes(next(models(task, SKIP_FORMS[0])))
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return Path(target).read_bytes()

    def note(self, task: Task) -> str:
        return ""


class OpenVino:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import onnx  # noqa: F401  (builds the model)
        import openvino

        return openvino.__version__.split("-")[0]

    def forms(self, task: Task) -> list[str]:
        return [OUR_NUMBERS, OWN] if _nncf() else [OUR_NUMBERS]

    def build(self, task: Task, form: str) -> OpenVinoRunner:
        if form == OUR_NUMBERS:
            return OpenVinoRunner(task, [qdq_model(task)])
        import nncf
        import openvino as ov

        model = ov.Core().read_model(next(models(task, SKIP_FORMS[0])))
        return OpenVinoRunner(task, [nncf.quantize(model, nncf.Dataset(pictures(task), lambda x: x.numpy()))])

    def note(self, task: Task) -> str:
        return "" if _nncf() else "without its own quantisation: NNCF is not installed"


def _nncf() -> bool:
    return importlib.util.find_spec("nncf") is not None
