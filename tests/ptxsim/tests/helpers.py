"""What the tests share: compiled modules, single-instruction kernels, launches of Triton kernels."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from ptxsim import PtxModule, Unavailable, compile_cuda, compile_triton

KERNELS = Path(__file__).parent / "kernels"
RNG = np.random.default_rng(3)
LANES = np.arange(32)


@functools.cache
def cuda_text(name: str, arch: str = "compute_80", *flags: str) -> str:
    try:
        return compile_cuda(KERNELS / f"{name}.cu", arch, flags)
    except Unavailable as reason:
        pytest.skip(str(reason))


def cuda(name: str, arch: str = "compute_80", *flags: str) -> PtxModule:
    """A module of its own each time, so that module variables start afresh."""
    return PtxModule(cuda_text(name, arch, *flags))


def triton_kernel(function, signature, constants, attributes=None, arch=80, **options):
    try:
        return compile_triton(function, signature, constants, attributes, arch, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


def aligned_pointers(signature: dict[str, str]) -> dict:
    """Tells Triton that all pointers are multiples of 16."""
    return {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}


def launch_triton(function, signature, constants, args, grid, arch=80, align=True, seed=0, **options):
    attributes = aligned_pointers(signature) if align else {}
    signature = signature | dict.fromkeys(constants, "constexpr")
    kernel = triton_kernel(function, signature, constants, attributes, arch, **options)
    module = PtxModule(kernel.ptx)
    scratch = len(module.module.functions[kernel.name].params) - len(args)  # pointers that Triton adds
    args = [*args, *[None] * scratch]
    return module.launch(kernel.name, grid, kernel.threads, args, kernel.shared_bytes, seed=seed)


REGISTER = {2: "b16", 4: "b32", 8: "b64"}


def run_ptx(body: str, inputs, out: str, *, target: str = "sm_90", shared: int = 0, **options) -> np.ndarray:
    """Runs PTX on one warp. The body finds the inputs (32 elements each) in %a0, %a1, ... and sets %o.

    Also declared: %t (lane), predicates %q0.., %x0.. (32 bits), %y0.. (64 bits), %h0.. (16 bits), shared memory `smem`.
    """
    loads, declarations = "", ""
    for i, x in enumerate(inputs):
        kind = REGISTER[x.itemsize]
        declarations += f".reg .{kind} %a{i};\n"
        loads += f"ld.param.u64 %p, [k_{i}]; mad.wide.u32 %p, %t, {x.itemsize}, %p; ld.global.{kind} %a{i}, [%p];\n"
    result = np.zeros(32, out)
    kind, n = REGISTER[result.itemsize], len(inputs)
    memory = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    ptx = f""".version 8.7
.target {target}
.address_size 64
.visible .entry k({", ".join(f".param .u64 k_{i}" for i in range(n + 1))})
{{
.reg .b64 %p; .reg .b32 %t; .reg .{kind} %o;
.reg .pred %q<8>; .reg .b32 %x<64>; .reg .b64 %y<32>; .reg .b16 %h<8>; .reg .b128 %w<4>;
{memory}
{declarations}
mov.u32 %t, %tid.x;
{loads}{body}
ld.param.u64 %p, [k_{n}]; mad.wide.u32 %p, %t, {result.itemsize}, %p; st.global.{kind} [%p], %o;
ret;
}}
"""
    PtxModule(ptx).launch("k", block=32, args=[*inputs, result], **options)
    return result


def u32() -> np.ndarray:
    return RNG.integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32)


def u64() -> np.ndarray:
    return RNG.integers(0, 1 << 63, 32, dtype=np.uint64) * 2 + RNG.integers(0, 2, 32).astype(np.uint64)


def f32() -> np.ndarray:
    return (RNG.standard_normal(32) * 10 ** RNG.uniform(-3, 3, 32)).astype(np.float32)


def f16() -> np.ndarray:
    return (RNG.standard_normal(32) * 4).astype(np.float16)


def bf16() -> np.ndarray:
    return (f32().view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest even"""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def signed(value, bits: int = 32) -> int:
    return int(value) - (1 << bits) if int(value) >> (bits - 1) else int(value)
