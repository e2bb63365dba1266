"""Compiles what the backend would launch, without a GPU: records launches, then builds them for any target.

`record` runs host code with `launch.run` replaced, so signatures, specialisation and constants are those of the real
launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parnet_kernels.triton import launch

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TARGETS = tuple(SHARED_LIMIT)


class Launch(launch.Launch):
    def source(self, target: str = "sm_80") -> tuple[ASTSource, list[str]]:
        """The source as the JIT would specialise it, and the names of the arguments the compiled kernel takes."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for position, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            fixed = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (fixed and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name], aligned = "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            else:
                signature[name], aligned = "i32" if value < 2**31 else "i64", fixed and value % 16 == 0
            if aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
            if isinstance(value, Tensor) and target.startswith("gfx") and value.untyped_storage().nbytes() < 2**31:
                attributes.setdefault((position,), []).append(["tt.pointer_range", 32])  # buffer loads and stores
        return ASTSource(self.kernel, signature, constants, attributes), [n for n in signature if n not in constants]

    def compile(self, target: str) -> Any:
        wave = 32 if target.startswith("gfx1") else 64
        gpu = GPUTarget("hip", target, wave) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
        return triton.compile(self.source(target)[0], target=gpu, options=self.options)


def record(host: Callable[[], Any]) -> list[Launch]:
    """What `host` launches, in order; nothing runs."""
    with launch.recorded() as launches:
        host()
    return [Launch(*one) for one in launches]


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int  # bytes of spill loads and stores, and of stack
    shared: int  # bytes
    threads: int


def tool(name: str) -> Path:
    """A program of the CUDA toolchain that the triton wheel carries."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(compiled: Any, target: str) -> Resources:
    """Registers, spills and shared memory: from `ptxas -v` (the version Triton uses), or the code object's
    metadata on AMD.
    """
    meta = compiled.metadata
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found, f"no {name} in the code object"
            return int(found[1])

        spilled = field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
        return Resources(field("vgpr_count"), spilled, meta.shared, meta.num_warps * 64)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        ptxas = tool("ptxas-blackwell" if int(target[3:]) >= 100 and tool("ptxas-blackwell").exists() else "ptxas")
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
        assert arch
        told = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch[1]}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", told)
    assert registers, told
    assert spills, told
    return Resources(int(registers[1]), sum(map(int, spills)), meta.shared, meta.num_warps * 32)
