"""TensorRT: through torch_tensorrt where that is installed, else from the ONNX model of the CPU's benchmark."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from bench.gpu.engines import Built, _restored, program_module
from bench.gpu.tasks import GpuTask


def build(task: GpuTask) -> Built:
    """Raises ImportError without tensorrt (or onnx), RuntimeError where TensorRT refuses the model."""
    return _from_torch(task) if importlib.util.find_spec("torch_tensorrt") else _from_onnx(task)


def _from_torch(task: GpuTask) -> Built:
    import torch_tensorrt

    with torch.no_grad():
        engine = torch_tensorrt.compile(
            program_module(task),
            ir="dynamo",
            inputs=task.inputs,
            enabled_precisions={task.torch_dtype},
            disable_tf32=task.dtype != "tf32",
            require_full_compilation=True,
        )

    @torch.no_grad()
    def run() -> Tensor:
        return engine(*task.inputs)

    return Built(run, _restored(task))


def _from_onnx(task: GpuTask) -> Built:
    """A float32 model that TensorRT may run in the format, with inputs and outputs in float32."""
    import tensorrt as trt

    from parnet_kernels.export.onnx_model import onnx_model

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    shape = tuple(task.expected[0].shape)
    if not parser.parse(onnx_model(task.program, shape).SerializeToString()):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if task.dtype in ("fp16", "bf16"):
        config.set_flag(getattr(trt.BuilderFlag, task.dtype.upper()))
    if task.dtype != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    inputs = [t.float().contiguous() for t in task.inputs]
    output = torch.empty(shape, device=task.device)
    for name, tensor in zip([*task.program.inputs, task.program.output], [*inputs, output], strict=True):
        context.set_tensor_address(name, tensor.data_ptr())

    def run() -> Tensor:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run its engine")
        return output

    def results(y: Tensor) -> list[Tensor]:
        assert inputs  # whose addresses the context holds
        return [task.program.restore(y)]

    return Built(run, results)
