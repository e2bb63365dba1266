"""Synchronisation is taken out of correct kernels, one place at a time.

Each mutant must be reported, or give right results under several interleavings (the place was redundant).
"""

import re

import numpy as np
import pytest
import torch
from ptxsim import PtxError, PtxModule, Uninit

from .helpers import aligned_pointers, cuda_text, triton_kernel
from .test_triton import attn_k

MUTATIONS = [
    (r"bar\.sync\s+0;", lambda m: ""),
    (r"cp\.async\.wait_group\s+(\d+);", lambda m: f"cp.async.wait_group {int(m[1]) + 1};"),
    (
        r"wgmma\.wait_group\.sync\.aligned (\d+);",
        lambda m: f"wgmma.wait_group.sync.aligned {int(m[1]) + 2};",
    ),
]
SEEDS = range(4)
LOG2E_OVER_8 = 1.4426950408889634 / 8


def mutants(ptx):
    for pattern, replacement in MUTATIONS:
        for match in re.finditer(pattern, ptx):
            line = ptx.count("\n", 0, match.start()) + 1
            yield line, ptx[: match.start()] + replacement(match) + ptx[match.end() :]


@pytest.mark.parametrize("arch", [80, 90])
def test_attention(arch):
    constants = {"D": 64, "BM": 64, "BN": 64, "CAUSAL": True}
    signature = dict.fromkeys("qkvo", "*fp16") | {"n": "i32", "scale": "fp32"}
    attributes = aligned_pointers(signature)
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = triton_kernel(attn_k, signature, constants, attributes, arch, num_stages=3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, 64).half() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    caught = redundant = 0
    for line, ptx in mutants(kernel.ptx):
        module = PtxModule(ptx)
        reported = False
        for seed in SEEDS:
            o = torch.zeros_like(q)
            args = [q, k, v, Uninit(o), 200, LOG2E_OVER_8]
            args += [None] * (len(module.module.functions["attn_k"].params) - len(args))
            try:
                r = module.launch(
                    "attn_k", (4, 2), kernel.threads, args, kernel.shared_bytes, check="collect", seed=seed
                )
                reported |= bool(r.reports)
            except PtxError:
                reported = True
            if reported:
                break
            assert (o.float() - expected).abs().max() < 2e-3, f"the mutant of line {line} is wrong and unreported"
        caught, redundant = caught + reported, redundant + (not reported)
    assert caught >= 4
    assert redundant <= 3


def kernel_text(ptx, name):
    start = ptx.index(f".entry {name}(")
    return start, ptx.index("\n}\n", start)


@pytest.mark.parametrize("kernel", ["last_ok", "last_fence_first", "chain_ok"])
def test_synchronisation_between_blocks(kernel):
    """Barriers and fences around an arrival counter and a flag: none of them is redundant."""
    ptx = cuda_text("ordering", "compute_80", "-std=c++17")
    start, end = kernel_text(ptx, kernel)
    places = list(re.finditer(r"\t(bar\.sync|barrier\.sync|membar|fence\.)[^;]*;", ptx[start:end]))
    assert len(places) >= 2
    x = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    caught = 0
    for match in places:
        module = PtxModule(ptx[: start + match.start()] + ptx[start + match.end() :])
        reported = False
        for seed in SEEDS:
            sums, out = np.zeros_like(x), np.zeros(64, np.float32)
            args = [np.zeros(1, np.int32), out, x] if kernel == "chain_ok" else [x, Uninit(sums), Uninit(out), 64]
            try:
                reported |= bool(module.launch(kernel, 6, 64, args, check="collect", seed=seed).reports)
            except PtxError:
                reported = True
        caught += reported
        if not reported:
            assert np.array_equal(out, (1 if kernel == "chain_ok" else 2) * x.sum(0)), match[0]
    assert caught >= len(places) - 1
