"""What the benchmark gives TensorRT and takes from it, with ONNX Runtime in TensorRT's place behind the same calls."""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import HostDevice, task_of

from bench.gpu.engines import ENGINES, GpuEngine
from bench.gpu.measure import GpuPlan, GpuRow, cell

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


class _Context:
    """Of an engine: knows tensors by name and address only."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.address: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> None:
        self.address[name] = address

    def _at(self, value: Any) -> np.ndarray:
        pointer = ctypes.cast(self.address[value.name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, tuple(value.shape))

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {value.name: self._at(value) for value in self.session.get_inputs()}
        (output,) = self.session.get_outputs()
        self._at(output)[:] = self.session.run(None, inputs)[0]
        return stream == 7


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Installs the module; returns the flags that the configuration was given."""
    given: dict[str, bool] = {}

    class Parser:
        num_errors = 1

        def __init__(self, network: Any, logger: Any) -> None:
            self.network = network

        def parse(self, model: bytes) -> bool:
            self.network.model = model
            return True

    def session(plan: bytes) -> Any:
        made = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        return SimpleNamespace(create_execution_context=lambda: _Context(made))

    config = SimpleNamespace(
        set_flag=lambda flag: given.__setitem__(flag, True), clear_flag=lambda flag: given.__setitem__(flag, False)
    )
    builder = SimpleNamespace(
        create_network=lambda flags: SimpleNamespace(model=b""),
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: network.model,
    )
    module = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Builder=lambda logger: builder,
        OnnxParser=Parser,
        BuilderFlag=SimpleNamespace(FP16="FP16", BF16="BF16", TF32="TF32"),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=session),
        __spec__=ModuleSpec("tensorrt", None),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return given


def row_of(layer: str | None, dtype: str, folder: Path) -> GpuRow:
    engine = GpuEngine("TensorRT", ENGINES["tensorrt"].build, "torch")
    device = HostDevice()
    (row,) = cell(task_of(layer, folder, dtype), {"tensorrt": engine}, ["warm"], GpuPlan(1, 1), device, lambda _: None)
    return row


@pytest.mark.parametrize("layer", [None, "downsamples_2.1.2", "streams.0.0"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", {"TF32": False}), ("tf32", {}), ("fp16", {"FP16": True, "TF32": False})],
)
def test_a_model_goes_through(
    layer: str | None, dtype: str, expected: dict[str, bool], flags: dict[str, bool], tmp_path: Path
) -> None:
    row = row_of(layer, dtype, tmp_path)
    assert row.status == "ok", row.reason
    assert row.error < 1e-5
    assert flags == expected


def test_a_refused_model_is_a_reason(flags: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt: Any = sys.modules["tensorrt"]
    monkeypatch.setattr(trt.OnnxParser, "parse", lambda self, model: False)
    monkeypatch.setattr(trt.OnnxParser, "get_error", lambda self, i: f"error {i}", raising=False)
    row = row_of("streams.0.0", "fp32", tmp_path)
    assert (row.status, row.reason) == ("failed", "RuntimeError: error 0")


def test_without_it_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    row = row_of("streams.0.0", "fp32", tmp_path)
    assert row.status == "missing"
    assert "tensorrt" in row.reason
