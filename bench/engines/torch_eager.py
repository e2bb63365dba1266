"""PyTorch eager on the lowered steps, in place where that saves a pass; contiguous or channels_last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engines import Task
from bench.workloads import MAX_COPIES
from parnet_kernels.export.lowering import Act, Add, Affine, Concat, Conv, Gate, Head, Program, Scale, Skip, Step
from parnet_kernels.reference import per_channel

ACTIVATIONS = {"silu": lambda x: F.silu(x, inplace=True), "relu": lambda x: F.relu(x, inplace=True)}


class TorchProgram(nn.Module):
    """A program as a module; its tensors are buffers, so that torch.compile can freeze them."""

    def __init__(self, program: Program, layout: torch.memory_format) -> None:
        super().__init__()
        self.inputs = list(program.inputs)
        self.layout = layout
        self.calls = [(step.out, step.inputs, self._call(i, step)) for i, step in enumerate(program.steps)]
        self.result = program.output

    def _keep(self, index: int, name: str, value: Tensor) -> str:
        attribute = f"{name}_{index}"
        if value.dim() == 4:
            value = value.contiguous(memory_format=self.layout)
        self.register_buffer(attribute, value)
        return attribute

    def _call(self, index: int, step: Step) -> Callable[..., object]:
        """What runs `step`; takes the values of its inputs."""
        if isinstance(step, Conv):
            weight, bias = self._keep(index, "weight", step.weight), self._keep(index, "bias", step.bias)
            stride, padding, groups = step.stride, step.weight.shape[2] // 2, step.groups
            return lambda x: F.conv2d(x, getattr(self, weight), getattr(self, bias), stride, padding, groups=groups)
        if isinstance(step, Gate):
            weight = self._keep(index, "weight", step.weight[:, :, None, None])
            bias, groups = self._keep(index, "bias", step.bias), step.groups
            return lambda x: F.conv2d(
                x.mean((2, 3), keepdim=True), getattr(self, weight), getattr(self, bias), groups=groups
            ).sigmoid()
        if isinstance(step, Skip | Affine):
            scale = self._keep(index, "scale", per_channel(step.scale))
            shift = self._keep(index, "shift", per_channel(step.shift))
            if isinstance(step, Affine):
                return lambda x: torch.addcmul(getattr(self, shift), x, getattr(self, scale))
            # Left to the addition that follows, which multiplies and adds in one pass.
            return lambda x, gate: (torch.addcmul(getattr(self, shift), x, getattr(self, scale)), gate)
        if isinstance(step, Add):
            return lambda x, skip: x.addcmul_(*skip)
        if isinstance(step, Scale):
            return lambda x, gate: x.mul_(gate)
        if isinstance(step, Act):
            return ACTIVATIONS[step.kind]
        if isinstance(step, Concat):
            places = [(step.inputs.index(name), start, stop) for name, start, stop in step.slices]
            return lambda *xs: torch.cat([xs[i][:, start:stop] for i, start, stop in places], 1)
        assert isinstance(step, Head)
        weight, bias = self._keep(index, "weight", step.weight), self._keep(index, "bias", step.bias)
        return lambda x: F.linear(x.mean((2, 3)), getattr(self, weight), getattr(self, bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        made: dict[str, object] = dict(zip(self.inputs, inputs, strict=True))
        for out, names, call in self.calls:
            made[out] = call(*(made[name] for name in names))
        result = made[self.result]
        assert isinstance(result, Tensor)
        return result


class TorchRunner:
    """Runs one callable a copy under inference_mode."""

    def __init__(self, task: Task, calls: list[Callable[..., Tensor]], inputs: list[Tensor]) -> None:
        self.program = task.programs[0]
        self.calls = calls
        self.inputs = inputs

    @torch.inference_mode()
    def run(self, copy: int) -> Tensor:
        return self.calls[copy](*self.inputs)

    def output(self, result: object) -> np.ndarray:
        assert isinstance(result, Tensor)
        return self.program.restore(result.clone()).float().contiguous().numpy()


class Eager:
    max_copies = MAX_COPIES
    layout = torch.contiguous_format

    def version(self) -> str:
        return torch.__version__

    def forms(self, task: Task) -> list[str]:
        return ["NCHW" if self.layout is torch.contiguous_format else "NHWC"]

    def build(self, task: Task, form: str) -> TorchRunner:
        modules: list[Callable[..., Tensor]] = [TorchProgram(p, self.layout).eval() for p in task.programs]
        return TorchRunner(task, modules, [x.contiguous(memory_format=self.layout) for x in task.inputs])

    def note(self, task: Task) -> str:
        return ""


class EagerChannelsLast(Eager):
    layout = torch.channels_last
