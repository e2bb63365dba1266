"""Lowered programs as an ONNX model, for the engines that read one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.lowering import Act, Add, Affine, Concat, Conv, Gate, Head, Program, Scale, Skip, Step

SKIP_FORMS = ("scale", "affine")


class _Builder:
    def __init__(self, skip: str) -> None:
        self.skip = skip
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.unique = 0

    def constant(self, value: Tensor) -> str:
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def add(self, op: str, inputs: list[str], out: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        from onnx import helper

        if out is None:
            self.unique += 1
            out = f"value{self.unique}"
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out

    def vector(self, value: Tensor) -> str:
        return self.constant(value[None, :, None, None])

    def affine(self, x: str, scale: Tensor, shift: Tensor, out: str | None = None) -> str:
        return self.add("Add", [self.add("Mul", [x, self.vector(scale)]), self.vector(shift)], out)

    def step(self, step: Step) -> None:
        i, out = list(step.inputs), step.out
        if isinstance(step, Conv):
            pads = [step.weight.shape[2] // 2] * 4
            constants = [self.constant(step.weight), self.constant(step.bias)]
            self.add("Conv", i + constants, out, pads=pads, strides=[step.stride] * 2, group=step.groups)
        elif isinstance(step, Gate):
            pooled = self.add("GlobalAveragePool", i)
            constants = [self.constant(step.weight[:, :, None, None]), self.constant(step.bias)]
            self.add("Sigmoid", [self.add("Conv", [pooled, *constants], group=step.groups)], out)
        elif isinstance(step, Skip) and self.skip == "affine":
            self.add("Mul", [self.affine(i[0], step.scale, step.shift), i[1]], out)
        elif isinstance(
            step, Skip
        ):  # x·(scale·gate) + (shift·gate): only two passes over the map as well, none over a copy of x
            scale = self.add("Mul", [i[1], self.vector(step.scale)])
            shift = self.add("Mul", [i[1], self.vector(step.shift)])
            self.add("Add", [self.add("Mul", [i[0], scale]), shift], out)
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
        else:
            assert isinstance(step, Head)
            pooled = self.add("Flatten", [self.add("GlobalAveragePool", i)])
            constants = [self.constant(step.weight), self.constant(step.bias)]
            self.add("Gemm", [pooled, *constants], out, transB=1)

    def slice(self, name: str, start: int, stop: int) -> str:
        bounds = [self.constant(torch.tensor([v])) for v in (start, stop, 1)]
        return self.add("Slice", [name, *bounds])


def onnx_model(program: Program, shape: tuple[int, ...], skip: str = SKIP_FORMS[0]) -> Any:
    """A checked ModelProto with the program's inputs and its output, of `shape`.

    `skip`: how the gated skip is written, "scale": x·(scale·gate) + shift·gate, or "affine": (scale·x + shift)·gate.
    """
    import onnx
    from onnx import TensorProto, helper

    builder = _Builder(skip)
    for step in program.steps:
        builder.step(step)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in program.inputs.items()]
    output = helper.make_tensor_value_info(program.output, TensorProto.FLOAT, shape)
    graph = helper.make_graph(builder.nodes, "parnet", inputs, [output], builder.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
