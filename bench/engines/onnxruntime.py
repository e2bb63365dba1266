"""ONNX Runtime, CPU provider: all graph optimisations, bound inputs and outputs, one thread pool for all copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from bench.engines import Task
from bench.workloads import MAX_COPIES
from parnet_kernels.export.onnx_model import SKIP_FORMS, onnx_model

_pool_threads: int | None = None


def _share(threads: int) -> None:
    """Copies share threads, which spin, and the memory of activations, as the layers of a network do.

    Both belong to the process; the pool keeps its first size.
    """
    import onnxruntime

    global _pool_threads
    if _pool_threads is None:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        onnxruntime.create_and_register_allocator(
            onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            ),
            None,
        )
        _pool_threads = threads
    elif _pool_threads != threads:
        raise RuntimeError(f"the thread pool of this process has {_pool_threads} threads, not {threads}")


class OnnxRuntimeRunner:
    """models: serialised, one for each graph of the task. Those of a process share threads, or each has its own."""

    def __init__(self, task: Task, models: Iterable[bytes], shared: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if shared:
            _share(task.threads)
            options.use_per_session_threads = False
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            options.intra_op_num_threads = task.threads
        options.log_severity_level = 3
        self.program = task.programs[0]
        self.shape = task.result_shape
        self.calls: list[tuple[Any, Any]] = []
        self.result = np.empty(self.shape, np.float32)
        self.inputs = [x.contiguous().numpy() for x in task.inputs]
        for program, model in zip(task.programs, models, strict=True):
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            for name, x in zip(program.inputs, self.inputs, strict=True):
                binding.bind_cpu_input(name, x)
            pointer = self.result.ctypes.data
            binding.bind_output(program.output, "cpu", 0, np.float32, self.shape, pointer)
            self.calls.append((session, binding))

    def run(self, copy: int) -> np.ndarray:
        session, binding = self.calls[copy]
        session.run_with_iobinding(binding)
        return self.result

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, np.ndarray)
        return self.program.restore(torch.from_numpy(result)).numpy()


def models(task: Task, form: str) -> Iterator[bytes]:
    for program in task.programs:
        yield onnx_model(program, task.result_shape, form).SerializeToString()


class OnnxRuntime:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import onnx  # noqa: F401  (builds the model)
        import onnxruntime

        return onnxruntime.__version__

    def forms(self, task: Task) -> list[str]:
        return list(SKIP_FORMS) if task.has_skip else [SKIP_FORMS[0]]

    def build(self, task: Task, form: str) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(task, models(task, form))

    def note(self, task: Task) -> str:
        return ""
