"""Lowered programs as an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parnet_kernels.export.lowering import (
    Act,
    Add,
    Affine,
    Concat,
    Conv,
    Gate,
    Head,
    Pool,
    Program,
    Round,
    Scale,
    Skip,
    Step,
)

SKIP_FORMS = ("scale", "affine")
OPSET = 18
#: Every node below has been the same from here on, but for types that it does not use.
OLDEST_OPSET = 13


class _Builder:
    def __init__(self, skip: str) -> None:
        self.skip = skip
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.unique = 0
        self.dtype = torch.float32

    def constant(self, value: Tensor) -> str:
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name))
        return name

    def add(self, op: str, inputs: list[str], out: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        from onnx import helper

        if out is None:
            self.unique += 1
            out = f"value{self.unique}"
        self.nodes.append(helper.make_node(op, inputs, [out], out, **attributes))
        return out

    def weight(self, value: Tensor, scale: Tensor | None) -> str:
        """Of a convolution; 8-bit integers are kept as such, with a scale for each output channel."""
        if scale is None:
            return self.constant(value)
        zeros = torch.zeros(len(scale), dtype=torch.int8)
        return self.add("DequantizeLinear", [*map(self.constant, (value, scale, zeros))], axis=0)

    def vector(self, value: Tensor) -> str:
        return self.constant(value[None, :, None, None])

    def affine(self, x: str, scale: Tensor, shift: Tensor, out: str | None = None) -> str:
        return self.add("Add", [self.add("Mul", [x, self.vector(scale)]), self.vector(shift)], out)

    def step(self, step: Step) -> None:
        i, out = list(step.inputs), step.out
        if isinstance(step, Conv):
            self.dtype = step.bias.dtype
            pads = [step.weight.shape[2] // 2] * 4
            constants = [self.weight(step.weight, step.scale), self.constant(step.bias)]
            self.add("Conv", i + constants, out, pads=pads, strides=[step.stride] * 2, group=step.groups)
        elif isinstance(step, Gate):
            pooled = self.add("GlobalAveragePool", i)
            constants = [self.weight(step.weight[:, :, None, None], step.scale), self.constant(step.bias)]
            self.add("Sigmoid", [self.add("Conv", [pooled, *constants], group=step.groups)], out)
        elif isinstance(step, Skip) and self.skip == "affine":
            self.add("Mul", [self.affine(i[0], step.scale, step.shift), i[1]], out)
        elif isinstance(
            step, Skip
        ):  # x·(scale·gate) + (shift·gate): only two passes over the map as well, none over a copy of x
            scale = self.add("Mul", [i[1], self.vector(step.scale)])
            shift = self.add("Mul", [i[1], self.vector(step.shift)])
            self.add("Add", [self.add("Mul", [i[0], scale]), shift], out)
        elif isinstance(step, Round):
            scale, zero = self.constant(torch.tensor(step.scale)), self.constant(torch.tensor(step.zero).byte())
            self.add("DequantizeLinear", [self.add("QuantizeLinear", [*i, scale, zero]), scale, zero], out)
        elif isinstance(step, Affine):
            self.affine(i[0], step.scale, step.shift, out)
        elif isinstance(step, Add):
            self.add("Add", i, out)
        elif isinstance(step, Scale):
            self.add("Mul", i, out)
        elif isinstance(step, Act):
            if step.kind == "relu":
                self.add("Relu", i, out)
            else:
                self.add("Mul", [i[0], self.add("Sigmoid", i)], out)
        elif isinstance(step, Concat):
            self.add("Concat", [self.slice(*part) for part in step.slices], out, axis=1)
        elif isinstance(step, Pool):
            self.add("Flatten", [self.add("GlobalAveragePool", i)], out)
        else:
            assert isinstance(step, Head)
            pooled = self.add("Flatten", [self.add("GlobalAveragePool", i)])
            constants = [self.constant(step.weight), self.constant(step.bias)]
            self.add("Gemm", [pooled, *constants], out, transB=1)

    def slice(self, name: str, start: int, stop: int) -> str:
        bounds = [self.constant(torch.tensor([v])) for v in (start, stop, 1)]
        return self.add("Slice", [name, *bounds])


def onnx_model(program: Program, shape: Sequence[int | str], skip: str = SKIP_FORMS[0], opset: int = OPSET) -> Any:
    """A ModelProto with the program's inputs and its output, of `shape`, all of the dtype of the program's weights.

    `skip`: how the gated skip is written, "scale": x·(scale·gate) + shift·gate, or "affine": (scale·x + shift)·gate.
    """
    import onnx
    from onnx import helper

    builder = _Builder(skip)
    for step in program.steps:
        builder.step(step)
    kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=builder.dtype).numpy().dtype)

    def value(name: str, sizes: Sequence[int | str]) -> Any:
        return helper.make_tensor_value_info(name, kind, sizes)

    inputs = [value(n, s) for n, s in program.inputs.items()]
    graph = helper.make_graph(builder.nodes, "parnet", inputs, [value(program.output, shape)], builder.constants)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))
    onnx.checker.check_model(model, full_check=True)
    return model
