"""A range of Triton kernels compiled for several architectures, against torch."""

import pytest
import torch
import triton
import triton.language as tl
from ptxsim import Uninit

from .helpers import launch_triton
from .hopper import WGMMA


@triton.jit
def softmax_k(x, y, n, st, B: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + r * st + o, mask=o < n, other=-float("inf"))
    v = v - tl.max(v, 0)
    e = tl.exp(v)
    tl.store(y + r * st + o, e / tl.sum(e, 0), mask=o < n)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("n", [7, 500, 1024])
def test_softmax(arch, n):
    x, y = torch.randn(5, n), torch.zeros(5, n)
    launch_triton(
        softmax_k,
        {"x": "*fp32", "y": "*fp32", "n": "i32", "st": "i32"},
        {"B": 1024},
        [x, Uninit(y), n, n],
        5,
        arch,
        align=False,
    )
    assert torch.allclose(y, x.softmax(1), atol=1e-6)


@triton.jit
def layernorm_k(x, w, b, y, n, eps, B: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, B)
    m = o < n
    v = tl.load(x + r * n + o, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(v, 0) / n
    d = tl.where(m, v - mu, 0.0)
    rs = tl.rsqrt(tl.sum(d * d, 0) / n + eps)
    tl.store(y + r * n + o, (d * rs * tl.load(w + o, mask=m) + tl.load(b + o, mask=m)).to(y.dtype.element_ty), mask=m)


@pytest.mark.parametrize("arch", [80, 90])
def test_layernorm(arch):
    n = 300
    x, w, b, y = torch.randn(4, n).bfloat16(), torch.randn(n), torch.randn(n), torch.zeros(4, n).bfloat16()
    launch_triton(
        layernorm_k,
        {"x": "*bf16", "w": "*fp32", "b": "*fp32", "y": "*bf16", "n": "i32", "eps": "fp32"},
        {"B": 512},
        [x, w, b, Uninit(y), n, 1e-5],
        4,
        arch,
        align=False,
    )
    ref = torch.nn.functional.layer_norm(x.float(), (n,), w, b, 1e-5)
    assert (y.float() - ref).abs().max() < 0.04


@triton.jit
def attn_k(q, k, v, o, n, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    pm, h = tl.program_id(0), tl.program_id(1)
    base = h * n * D
    om, on, od = pm * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    Q = tl.load(q + base + om[:, None] * D + od[None, :], mask=om[:, None] < n, other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    hi = tl.minimum((pm + 1) * BM, n) if CAUSAL else n
    for s in range(0, hi, BN):
        K = tl.load(k + base + (s + on)[None, :] * D + od[:, None], mask=(s + on)[None, :] < n, other=0.0)
        V = tl.load(v + base + (s + on)[:, None] * D + od[None, :], mask=(s + on)[:, None] < n, other=0.0)
        S = tl.dot(Q, K) * scale
        ok = (s + on)[None, :] < n
        if CAUSAL:
            ok = ok & ((s + on)[None, :] <= om[:, None])
        S = tl.where(ok, S, -1e30)
        mn = tl.maximum(m, tl.max(S, 1))
        p = tl.exp2(S - mn[:, None])
        a = tl.exp2(m - mn)
        total = total * a + tl.sum(p, 1)
        acc = acc * a[:, None]
        acc = tl.dot(p.to(V.dtype), V, acc)
        m = mn
    tl.store(
        o + base + om[:, None] * D + od[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=om[:, None] < n
    )


@pytest.mark.parametrize("arch", [80, WGMMA])
@pytest.mark.parametrize("dt", ["fp16", "bf16"])
@pytest.mark.parametrize(("n", "causal", "seed"), [(128, False, 0), (200, True, 0), (200, True, 3)])
def test_attention(arch, dt, n, causal, seed):
    D, H = 64, 2
    t = {"fp16": torch.float16, "bf16": torch.bfloat16}[dt]
    torch.manual_seed(0)
    q, k, v = (torch.randn(H, n, D).to(t) for _ in range(3))
    o = torch.zeros_like(q)
    launch_triton(
        attn_k,
        {"q": "*" + dt, "k": "*" + dt, "v": "*" + dt, "o": "*" + dt, "n": "i32", "scale": "fp32"},
        {"D": D, "BM": 64, "BN": 64, "CAUSAL": causal},
        [q, k, v, Uninit(o), n, 1.4426950408889634 / D**0.5],
        (-(-n // 64), H),
        arch,
        num_stages=3,
        seed=seed,
    )
    ref = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    assert (o.float() - ref).abs().max() < (0.002 if dt == "fp16" else 0.02)


@triton.jit
def dot_k(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, PREC: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    A = tl.load(a + i[:, None] * K + k[None, :])
    B = tl.load(b + k[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(A, B, out_dtype=OUT, input_precision=PREC))


@pytest.mark.parametrize("arch", [80, 90])
def test_int8_dot(arch):
    a, b = torch.randint(-128, 128, (64, 64), dtype=torch.int8), torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    c = torch.zeros(64, 64, dtype=torch.int32)
    launch_triton(
        dot_k,
        {"a": "*i8", "b": "*i8", "c": "*i32"},
        {"M": 64, "N": 64, "K": 64, "OUT": tl.int32, "PREC": "tf32"},
        [a, b, Uninit(c)],
        1,
        arch,
    )
    assert torch.equal(c, a.int() @ b.int())


FP8 = [(80, "fp8e5"), (89, "fp8e4nv"), (89, "fp8e5"), (90, "fp8e4nv"), (90, "fp8e5")]  # Triton has no e4m3 on sm_80


@pytest.mark.parametrize(("arch", "fmt"), FP8)
def test_fp8_dot(arch, fmt):
    t = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}[fmt]
    a, b, c = torch.randn(64, 64).to(t), torch.randn(64, 64).to(t), torch.zeros(64, 64)
    launch_triton(
        dot_k,
        {"a": "*" + fmt, "b": "*" + fmt, "c": "*fp32"},
        {"M": 64, "N": 64, "K": 64, "OUT": tl.float32, "PREC": "tf32"},
        [a.view(torch.uint8), b.view(torch.uint8), Uninit(c)],
        1,
        arch,
    )
    assert (c - a.float() @ b.float()).abs().max() < 1e-3


@pytest.mark.parametrize(("prec", "tol"), [("tf32", 0.05), ("tf32x3", 1e-4), ("ieee", 1e-4)])
def test_f32_dot(prec, tol):
    a, b, c = torch.randn(64, 32), torch.randn(32, 64), torch.zeros(64, 64)
    launch_triton(
        dot_k,
        {"a": "*fp32", "b": "*fp32", "c": "*fp32"},
        {"M": 64, "N": 64, "K": 32, "OUT": tl.float32, "PREC": prec},
        [a, b, Uninit(c)],
        1,
    )
    assert (c - a @ b).abs().max() < tol


@triton.jit
def misc_k(x, s, c, r, h, hist, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o)
    tl.store(s + o, tl.sort(v))
    tl.store(c + o, tl.cumsum(v, 0))
    tl.store(r + o, tl.rand(1234, o))
    tl.atomic_add(h + (o % 7), v)
    tl.store(hist + tl.arange(0, 16), tl.histogram((v * 16).to(tl.int32), 16))


@pytest.mark.parametrize("arch", [80, 90])
def test_sort_scan_rand_atomics(arch):
    B = 512
    x = torch.rand(B)
    s, c, r, h, hi = torch.zeros(B), torch.zeros(B), torch.zeros(B), torch.zeros(7), torch.zeros(16, dtype=torch.int32)
    launch_triton(
        misc_k,
        {"x": "*fp32", "s": "*fp32", "c": "*fp32", "r": "*fp32", "h": "*fp32", "hist": "*i32"},
        {"B": B},
        [x, Uninit(s), Uninit(c), Uninit(r), h, Uninit(hi)],
        1,
        arch,
    )
    assert torch.equal(s, x.sort().values)
    assert torch.allclose(c, x.cumsum(0), rtol=1e-5)
    assert torch.allclose(h, torch.zeros(7).index_add(0, torch.arange(B) % 7, x), rtol=1e-5)
    assert torch.equal(hi, torch.histc(x, 16, 0, 1).int())
    assert 0.45 < r.mean() < 0.55
    assert len(r.unique()) > 500


@triton.jit
def elem_k(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, a + b)
    tl.store(o + B + i, a * b - a)
    tl.store(o + 2 * B + i, tl.maximum(a, b))
    tl.store(o + 3 * B + i, tl.exp(a.to(tl.float32)).to(a.dtype))
    tl.store(o + 4 * B + i, tl.where(a < b, a, -b))
    tl.store(o + 5 * B + i, tl.abs(a))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dt", ["fp16", "bf16", "fp32", "fp64"])
def test_elementwise(arch, dt):
    t = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dt]
    B = 256
    x, y, o = torch.randn(B).to(t), torch.randn(B).to(t), torch.zeros(6, B).to(t)
    launch_triton(elem_k, dict.fromkeys("xyo", "*" + dt), {"B": B}, [x, y, Uninit(o)], 1, arch)
    d, e = x.double(), y.double()
    assert torch.equal(o[0], x + y)
    assert torch.equal(o[2], torch.maximum(x, y))
    assert torch.equal(o[4], torch.where(x < y, x, -y))
    assert torch.equal(o[5], x.abs())
    eps = torch.finfo(t).eps
    assert ((o[1].double() - (d * e - d)).abs() <= eps * ((d * e).abs() + d.abs())).all()
    assert ((o[3].double() - d.exp()).abs() <= max(eps, 1e-6) * d.exp()).all()


@triton.jit
def hints_k(x, y, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    a = tl.load(x + o, mask=o < n, eviction_policy="evict_first")
    b = tl.load(x + o, mask=o < n, eviction_policy="evict_last") + tl.load(x + o, mask=o < n, cache_modifier=".cg")
    c = tl.load(x + o, mask=o < n, volatile=True)
    tl.store(y + o, a + b + c, mask=o < n, cache_modifier=".cs")


@pytest.mark.parametrize("arch", [80, 90])
def test_cache_hints(arch):
    x, y = torch.randn(1000), torch.zeros(1000)
    r = launch_triton(hints_k, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 256}, [x, Uninit(y), 1000], 4, arch)
    assert torch.allclose(y, 4 * x)
    assert r.unique_read == 4000


@triton.jit
def splitk_k(a, b, c, lock, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KS: tl.constexpr):
    s = tl.program_id(0)
    i, j, k = tl.arange(0, M), tl.arange(0, N), s * KS + tl.arange(0, KS)
    acc = tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + j[None, :]))
    p = c + i[:, None] * N + j[None, :]
    while tl.atomic_cas(lock, s, s) != s:  # blocks add in order
        pass
    v = tl.load(p) if s > 0 else tl.zeros((M, N), tl.float32)
    tl.store(p, v + acc)
    tl.debug_barrier()
    tl.atomic_xchg(lock, s + 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_split_k_with_lock(arch):
    a, b, c, lock = (
        torch.randn(64, 128).half(),
        torch.randn(128, 64).half(),
        torch.zeros(64, 64),
        torch.zeros(1, dtype=torch.int32),
    )
    launch_triton(
        splitk_k,
        {"a": "*fp16", "b": "*fp16", "c": "*fp32", "lock": "*i32"},
        {"M": 64, "N": 64, "K": 128, "KS": 32},
        [a, b, Uninit(c), lock],
        4,
        arch,
    )
    assert (c - a.float() @ b.float()).abs().max() < 1e-3
    assert lock[0] == 4
