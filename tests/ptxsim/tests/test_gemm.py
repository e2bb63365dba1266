"""Matrix products by Triton and by hand, and what happens when their synchronisation is taken out."""

import re
import time

import pytest
import torch
import triton
import triton.language as tl
from ptxsim import PtxFault, PtxModule, PtxSanitizerError, Uninit

from .helpers import aligned_pointers, cuda, triton_kernel
from .hopper import WGMMA

SIZES = [(128, 128, 32), (128, 128, 128), (256, 256, 512), (200, 136, 80), (72, 264, 16), (129, 8, 40)]
TOLERANCE = {"fp16": 6e-4, "bf16": 5e-3, "fp32": 2e-3}
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TILE, TILE_K = 128, 32


@triton.jit
def matmul(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pid = tl.program_id(0)
    rows = tl.cdiv(M, BM)
    m = (pid % rows) * BM + tl.arange(0, BM)
    n = (pid // rows) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    pa = a + m[:, None] * stride_a + k[None, :]
    pb = b + k[:, None] * stride_b + n[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(tl.cdiv(K, BK)):
        A = tl.load(pa, mask=(m[:, None] < M) & (k[None, :] < K - i * BK), other=0.0)
        B = tl.load(pb, mask=(n[None, :] < N) & (k[:, None] < K - i * BK), other=0.0)
        acc = tl.dot(A, B, acc)
        pa += BK
        pb += BK * stride_b
    tl.store(
        c + m[:, None] * stride_c + n[None, :], acc.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N)
    )


def compile_matmul(dtype, arch, aligned, **options):
    signature = dict.fromkeys("abc", "*" + dtype)
    signature |= dict.fromkeys(["M", "N", "K", "stride_a", "stride_b", "stride_c"], "i32")
    attributes = aligned_pointers(signature)
    if aligned:
        attributes |= {(i,): [["tt.divisibility", 16]] for i in range(4, 9)}
    constants = {"BM": TILE, "BN": TILE, "BK": TILE_K}
    signature |= dict.fromkeys(constants, "constexpr")
    return triton_kernel(matmul, signature, constants, attributes, arch, num_stages=3, **options)


def run_matmul(kernel, M, N, K, dtype, ptx=None, **options):
    module = PtxModule(ptx or kernel.ptx)
    torch.manual_seed(1)
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N, dtype=dtype)
    args = [a, b, Uninit(c), M, N, K, K, N, N]
    args += [None] * (len(module.module.functions["matmul"].params) - len(args))
    grid = -(-M // TILE) * -(-N // TILE)
    r = module.launch("matmul", grid, kernel.threads, args, kernel.shared_bytes, **options)
    exact = a.double() @ b.double()
    return r, float((c.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, WGMMA])
def test_triton(dtype, arch, warps):
    kernels = {aligned: compile_matmul(dtype, arch, aligned, num_warps=warps) for aligned in (True, False)}
    assert "cp.async" in kernels[True].ptx
    assert ("mma.sync" if arch == 80 else "wgmma") in kernels[True].ptx
    size = DTYPE[dtype].itemsize
    for M, N, K in SIZES:
        r, error = run_matmul(kernels[N % 16 == 0 and K % 16 == 0], M, N, K, DTYPE[dtype])
        assert error < TOLERANCE[dtype], (M, N, K)
        steps = -(-M // TILE) * -(-N // TILE) * -(-K // TILE_K)
        assert r.mma_flops == steps * 2 * TILE * TILE * TILE_K
        assert (r.unique_read, r.unique_written) == ((M * K + K * N) * size, M * N * size)


@pytest.mark.parametrize("seed", [1, 2])
def test_triton_interleaved(seed):
    kernel = compile_matmul("fp16", 80, True, num_warps=4)
    _, error = run_matmul(kernel, 256, 128, 128, torch.float16, seed=seed, resident=2)
    assert error < TOLERANCE["fp16"]


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_triton_on_other_architectures(arch):
    _, error = run_matmul(compile_matmul("bf16", arch, True, num_warps=4), 200, 144, 96, torch.bfloat16)
    assert error < TOLERANCE["bf16"]


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 7;"], ids=["dropped", "loosened"])
def test_triton_without_its_wait(wait):
    kernel = compile_matmul("fp16", 80, True, num_warps=4)
    mutant = re.sub(r"cp\.async\.wait_group\s+\d+;", wait, kernel.ptx)
    assert mutant != kernel.ptx
    with pytest.raises(PtxSanitizerError, match="async copy"):
        run_matmul(kernel, 128, 128, 128, torch.float16, mutant)
    _, error = run_matmul(kernel, 128, 128, 128, torch.float16, mutant, check="collect")
    assert not error < 0.01  # stale data or NaN, not a report only


def test_triton_without_its_barriers():
    kernel = compile_matmul("fp16", 80, True, num_warps=4)
    with pytest.raises(PtxSanitizerError, match="race on shared byte"):
        run_matmul(kernel, 128, 128, 128, torch.float16, kernel.ptx.replace("bar.sync", "// bar.sync"))


def hand_written(bug, M, N, K, bfloat=False, **options):
    module = cuda("gemm", "compute_80", f"-DBUG={bug}", *(["-DBF16"] if bfloat else []))
    torch.manual_seed(2)
    dtype = torch.bfloat16 if bfloat else torch.float16
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N)
    grid = (-(-N // 64), -(-M // 64))
    r = module.launch("gemm", grid, 128, [a, b, Uninit(c), M, N, K], **options)
    exact = a.double() @ b.double()
    return r, float((c.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("bfloat", [False, True], ids=["f16", "bf16"])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 64, 32), (128, 128, 256), (256, 256, 512), (100, 72, 40), (1, 8, 8)])
def test_hand_written(M, N, K, bfloat):
    r, error = hand_written(0, M, N, K, bfloat)
    assert error < 2e-6
    assert r.ldmatrix["bank_conflict"] == 1.0


def test_hand_written_without_its_wait():
    with pytest.raises(PtxSanitizerError, match="async copy"):
        hand_written(1, 64, 64, 128)
    r, error = hand_written(1, 64, 64, 128, check="collect")
    assert r.by_kind("async-hazard")
    assert not error < 0.01


@pytest.mark.parametrize("bug", [2, 3])
def test_hand_written_without_a_barrier(bug):
    with pytest.raises(PtxSanitizerError, match=r"race on shared|async copy"):
        hand_written(bug, 64, 64, 128)


def test_hand_written_out_of_bounds():
    with pytest.raises(PtxFault, match="out-of-bounds global write"):
        hand_written(4, 60, 64, 64)


@pytest.mark.slow
def test_speed():
    """1024^3 with every check on takes about a second of a free core."""
    start = time.process_time()
    r, error = hand_written(0, 1024, 1024, 1024)
    assert error < 2e-6
    assert r.mma_flops == 2 * 1024**3
    assert time.process_time() - start < 10
