"""Code that libraries generate: CUB, cooperative groups, cuda::barrier, fp8 and wmma headers; calls."""

import numpy as np
import pytest
import torch
from ptxsim import PtxModule, Uninit

from .helpers import RNG, cuda_text

BUILDS = {"80": ("compute_80", ()), "90-lineinfo": ("compute_90", ("-lineinfo",)), "80-debug": ("compute_80", ("-G",))}
FLAGS = ("-std=c++17", "-w")


@pytest.fixture(params=BUILDS)
def library(request) -> PtxModule:
    arch, flags = BUILDS[request.param]
    return PtxModule(cuda_text("library", arch, *FLAGS, *flags))


def test_cub(library):
    x, y = RNG.standard_normal(100).astype(np.float32), np.zeros(1, np.float32)
    library.launch("cubsum", block=128, args=[x, Uninit(y), 100])
    assert abs(y[0] - x.sum()) < 1e-4
    x, y = RNG.integers(0, 100, 128).astype(np.int32), np.zeros(128, np.int32)
    library.launch("cubscan", block=128, args=[x, Uninit(y)])
    assert np.array_equal(y, np.cumsum(x) - x)
    x = RNG.integers(0, 1 << 32, 512).astype(np.uint32)
    expected = np.sort(x)
    library.launch("cubsort", block=128, args=[x])
    assert np.array_equal(x, expected)


def check_tiled_reduction(module):
    x, y = RNG.standard_normal(64).astype(np.float32), np.zeros(4, np.float32)
    module.launch("cgred", block=64, args=[x, y])
    np.testing.assert_allclose(y, x.reshape(4, 16).sum(1) + 120, rtol=1e-5)


def test_cooperative_groups(library):
    check_tiled_reduction(library)
    x, count, rank = RNG.integers(0, 9, 64).astype(np.int32), np.zeros(1, np.int32), np.zeros(64, np.int32)
    library.launch("cgcoal", block=64, args=[x, count, Uninit(rank)])
    odd = x & 1 == 1
    assert count[0] == odd.sum()
    assert np.array_equal(np.sort(rank[odd]), np.arange(count[0]))
    assert (rank[~odd] == -1).all()
    x, y = RNG.standard_normal(256).astype(np.float32), np.zeros(256, np.float32)
    library.launch("cgcopy", block=64, args=[x, Uninit(y)])
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("build", ["80", "90-lineinfo"])  # -G code calls through function pointers
@pytest.mark.parametrize("seed", [0, 1])
def test_cuda_barrier(build, seed):
    arch, flags = BUILDS[build]
    y = np.zeros(384, np.int32)
    PtxModule(cuda_text("library", arch, *FLAGS, *flags)).launch("cudabar", block=128, args=[Uninit(y)], seed=seed)
    assert np.array_equal(y.reshape(3, 128), [(127 - np.arange(128)) * (i + 1) for i in range(3)])


def test_fp8(library):
    x = (RNG.standard_normal(64) * 20).astype(np.float32)
    y, q = np.zeros(64, np.float32), np.zeros(64, np.uint8)
    library.launch("fp8", block=64, args=[x, Uninit(y), Uninit(q)])
    e4m3, e5m2 = (torch.from_numpy(x).to(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2))
    assert np.array_equal(q, e4m3.view(torch.uint8).numpy())
    assert np.array_equal(y, (e4m3.float() + 1000 * e5m2.float()).numpy())


def test_wmma(library):
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), np.zeros((16, 16), np.float32)
    library.launch("wmmabf", block=32, args=[a, b, Uninit(c)])
    assert np.abs(c.T - (1 + a.float() @ b.float()).numpy()).max() < 1e-5


def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def test_calls(library):
    v, t = np.arange(10, dtype=np.float32), np.arange(40)
    y, f = np.zeros(40, np.float32), np.zeros(40, np.int32)
    library.launch("calls", block=40, args=[v.tobytes() + np.int32(7).tobytes(), Uninit(y), Uninit(f)])
    assert np.array_equal(y, np.where((t & 1) & (t % 10 < 7), 3, 1) * v[t % 10])
    assert np.array_equal(f, [fibonacci(i % 20) for i in t])


def test_functions_shared_by_kernels():
    """Functions are decoded anew for each kernel of a module: its register slots must not leak into another."""
    module = PtxModule(cuda_text("library", "compute_80", *FLAGS, "-G"))
    for kernel in ("cubsort", "cubscan", "cubsum", "cgcoal"):
        module.program(kernel)
    program = module.program("cgred")
    assert program.registers is not module.program("cubsort").registers
    assert all(0 <= code < program.register_bytes for code, _ in program.registers.values())
    check_tiled_reduction(module)
