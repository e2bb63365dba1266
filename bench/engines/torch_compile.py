"""torch.compile with freezing: constant folding and oneDNN's prepacked weights."""

from __future__ import annotations

import os
import types
from collections.abc import Callable

import torch
from torch import Tensor

from bench.engines import Task
from bench.engines.torch_eager import Eager, TorchProgram, TorchRunner
from bench.workloads import FEW_COPIES


def _own_forward(module: TorchProgram) -> Callable[..., Tensor]:
    """`module.forward` with a code object of its own: what is compiled is cached by code object, up to a limit."""
    shared = TorchProgram.forward
    own = types.FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__)
    return types.MethodType(own, module)


class CompileRunner(TorchRunner):
    @torch.no_grad()  # as it was compiled: inference mode would compile it again
    def run(self, copy: int) -> Tensor:
        return self.calls[copy](*self.inputs)


class Compile(Eager):
    # Each copy is compiled for itself. Where this few do not fill the cache, their weights stay in it: an advantage of
    # at most the time it takes to read them, 1-2 % of a layer.
    max_copies = FEW_COPIES
    mode = "default"
    dtype = torch.float32

    def forms(self, task: Task) -> list[str]:
        return ["frozen NHWC"]  # freezing turns convolutions to channels_last whatever the input; this saves a copy

    def build(self, task: Task, form: str) -> TorchRunner:
        import torch._inductor.config as inductor
        from torch._inductor.codecache import PyCodeCache

        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of idle compilers
        inductor.freezing = True
        inductor.compile_threads = 1
        torch._dynamo.reset()  # the caches would keep the frozen weights of all earlier tasks
        PyCodeCache.cache_clear()
        inputs = [x.contiguous(memory_format=torch.channels_last).to(self.dtype) for x in task.inputs]
        calls: list[Callable[..., Tensor]] = []
        with torch.no_grad():
            for program in task.programs:
                module = TorchProgram(program, torch.channels_last).to(self.dtype).eval()
                compiled = torch.compile(_own_forward(module), mode=self.mode, fullgraph=True, dynamic=False)
                compiled(*inputs)
                calls.append(compiled)
        return CompileRunner(task, calls, inputs)


class CompileMaxAutotune(Compile):
    mode = "max-autotune"
