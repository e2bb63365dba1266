"""ncnn: its own graph, written directly; inputs and outputs of single layers stay in its packed layout.

It has no batches: the images of a batch run one after the other, each on all threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.engines import Task
from bench.workloads import MAX_COPIES
from parnet_kernels.export.lowering import Act, Add, Affine, Concat, Conv, Gate, Head, Program, Scale, Skip, Step

SIGMOID = 4  # as a convolution's activation


class _Writer:
    """Collects the lines of a .param file and the bytes of its .bin file. Every blob has one consumer."""

    def __init__(self, program: Program, skip: str) -> None:
        self.skip = skip
        self.lines: list[str] = []
        self.weights: list[bytes] = []
        self.blobs = 0
        self.channels = {name: shape[1] for name, shape in program.inputs.items()}
        uses = [name for step in program.steps for name in self._reads(step)]
        self.free: dict[str, list[str]] = {}  # for each value, the blobs not yet taken by a consumer
        self.uses = {name: uses.count(name) for name in uses}
        self.uses[program.output] = 1
        for name in program.inputs:
            self.add("Input", [], name, {})
        for step in program.steps:
            self.step(step)

    def _reads(self, step: Step) -> list[str]:
        twice = isinstance(step, Skip) and self.skip == "scale"  # scale·gate and shift·gate
        return [*step.inputs, step.inputs[1]] if twice else list(step.inputs)

    def add(self, kind: str, inputs: list[str], out: str, options: dict[int, object]) -> str:
        """`inputs`: names of values; `out`: a value, or a blob for the one consumer that follows."""
        blobs = [self.free[name].pop() if name in self.free else name for name in inputs]
        self._line(kind, blobs, [out], options)
        count = self.uses.get(out, 0)
        if count > 1:
            self.free[out] = [f"{out}_{i}" for i in range(count)]
            self._line("Split", [out], self.free[out], {})
            self.free[out] = list(self.free[out])
        return out

    def _line(self, kind: str, inputs: list[str], outputs: list[str], options: dict[int, object]) -> None:
        self.blobs += len(outputs)
        settings = " ".join(f"{k}={v}" for k, v in options.items())
        name = f"{kind}{len(self.lines)}"
        self.lines.append(f"{kind} {name} {len(inputs)} {len(outputs)} {' '.join([*inputs, *outputs])} {settings}")

    def temporary(self) -> str:
        return f"blob{self.blobs}"

    def constants(self, *values: Tensor, tagged: bool) -> None:
        """`tagged`: the first is preceded by a flag word that says float32, as convolutions want it."""
        self.weights += [b"\0\0\0\0"] if tagged else []
        self.weights += [v.contiguous().numpy().tobytes() for v in values]

    def conv(
        self, source: str, out: str, weight: Tensor, bias: Tensor, stride: int, groups: int, activation: int
    ) -> None:
        k, size = weight.shape[0], weight.shape[2]
        options: dict[int, object] = {0: k, 1: size, 3: stride, 4: size // 2, 5: 1, 6: weight.numel()}
        options |= {7: groups} if groups > 1 else {}
        options |= {9: activation} if activation else {}
        self.add("ConvolutionDepthWise" if groups > 1 else "Convolution", [source], out, options)
        self.constants(weight, bias, tagged=True)

    def scale(self, source: str, out: str, scale: Tensor, shift: Tensor) -> str:
        self.add("Scale", [source], out, {0: len(scale), 1: 1})
        self.constants(scale, shift, tagged=False)
        return out

    def binary(self, kind: str, a: str, b: str, out: str) -> str:
        return self.add("BinaryOp", [a, b], out, {0: {"add": 0, "mul": 2}[kind]})

    def pool(self, source: str) -> str:
        return self.add("Pooling", [source], self.temporary(), {0: 1, 4: 1})

    def step(self, step: Step) -> None:
        i, out = step.inputs, step.out
        if isinstance(step, Conv):
            self.conv(i[0], out, step.weight, step.bias, step.stride, step.groups, 0)
        elif isinstance(step, Gate) and step.groups == 1:
            k = len(step.bias)
            options: dict[int, object] = {0: k, 1: 1, 2: step.weight.numel(), 9: SIGMOID}
            self.add("InnerProduct", [self.pool(i[0])], out, options)
            self.constants(step.weight, step.bias, tagged=True)
        elif isinstance(step, Gate):
            pooled = self.add("Reshape", [self.pool(i[0])], self.temporary(), {0: 1, 1: 1, 2: -1})
            weight = step.weight[:, :, None, None]
            self.conv(pooled, out, weight, step.bias, 1, step.groups, SIGMOID)
        elif isinstance(step, Skip) and self.skip == "affine":
            z = self.scale(i[0], self.temporary(), step.scale, step.shift)
            self.binary("mul", z, i[1], out)
        elif isinstance(step, Skip):
            zero = torch.zeros_like(step.scale)
            scale = self.scale(i[1], self.temporary(), step.scale, zero)
            scaled = self.binary("mul", i[0], scale, self.temporary())
            shift = self.scale(i[1], self.temporary(), step.shift, zero)
            self.binary("add", scaled, shift, out)
        elif isinstance(step, Affine):
            self.scale(i[0], out, step.scale, step.shift)
        elif isinstance(step, Add):
            self.binary("add", i[0], i[1], out)
        elif isinstance(step, Scale):
            self.binary("mul", i[0], i[1], out)
        elif isinstance(step, Act):
            self.add("Swish" if step.kind == "silu" else "ReLU", [i[0]], out, {})
        elif isinstance(step, Concat):
            self.concat(step)
        else:
            assert isinstance(step, Head)
            options = {0: len(step.bias), 1: 1, 2: step.weight.numel()}
            self.add("InnerProduct", [self.pool(i[0])], out, options)
            self.constants(step.weight, step.bias, tagged=True)

    def concat(self, step: Concat) -> None:
        """One Slice a input, in the order of its channels, then one Concat."""
        parts: dict[tuple[str, int, int], str] = {}
        for name in step.inputs:
            own = sorted(part for part in step.slices if part[0] == name)
            for part in own:
                parts[part] = f"{step.out}_{name}_{part[1]}"
            source = self.free[name].pop() if name in self.free else name
            sizes = ",".join(str(stop - start) for _, start, stop in own)
            self._line("Slice", [source], [parts[p] for p in own], {-23300: f"{len(own)},{sizes}", 1: 0})
        self.add("Concat", [parts[p] for p in step.slices], step.out, {0: 0})

    def save(self, stem: Path) -> tuple[Path, Path]:
        param, weights = stem.with_suffix(".param"), stem.with_suffix(".bin")
        param.write_text("\n".join(["7767517", f"{len(self.lines)} {self.blobs}", *self.lines, ""]))
        weights.write_bytes(b"".join(self.weights))
        return param, weights


class _Runner:
    def __init__(self, task: Task, form: str) -> None:
        import ncnn

        self.program = task.programs[0]
        self.shape = task.result_shape
        self.nets: list[Any] = []
        self.packed = task.workload.layer is not None and task.workload.kind != "stem"
        for program in task.programs:
            net = ncnn.Net()
            net.opt.num_threads = task.threads
            for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
                setattr(net.opt, f"use_{option}", False)
            param, weights = _Writer(program, form).save(task.folder / "ncnn")
            if net.load_param(str(param)) or net.load_model(str(weights)):
                raise RuntimeError("ncnn did not load the graph")
            param.unlink()
            weights.unlink()
            self.nets.append(net)
        self.images = [
            [(name, self._mat(x[n])) for name, x in zip(self.program.inputs, task.inputs, strict=True)]
            for n in range(task.workload.batch)
        ]

    def _mat(self, image: Tensor) -> Any:
        import ncnn

        mat = ncnn.Mat(image.contiguous().numpy()).clone()
        return ncnn.convert_packing(mat, 8) if self.packed and image.shape[0] % 8 == 0 else mat

    def run(self, copy: int) -> list[Any]:
        results = []
        for image in self.images:
            extractor = self.nets[copy].create_extractor()
            for name, mat in image:
                extractor.input(name, mat)
            results.append(extractor.extract(self.program.output, int(self.packed))[1])
        return results

    def output(self, result: Any) -> np.ndarray:
        import ncnn

        maps = [np.array(ncnn.convert_packing(mat, 1)) for mat in result]
        stored = np.stack(maps).reshape(self.shape)
        return self.program.restore(torch.from_numpy(stored)).numpy()


class Ncnn:
    max_copies = MAX_COPIES

    def version(self) -> str:
        import ncnn

        return ncnn.__version__

    def forms(self, task: Task) -> list[str]:
        return ["scale", "affine"] if task.has_skip else ["scale"]

    def build(self, task: Task, form: str) -> _Runner:
        return _Runner(task, form)

    def note(self, task: Task) -> str:
        return "image by image" if task.workload.batch > 1 else ""
