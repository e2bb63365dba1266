"""mma.sync fragments, laid out by the PTX ISA's formulas and independently of the simulator; ldmatrix and its kin."""

import numpy as np
import pytest
import torch
from ptxsim import PtxModule, PtxSanitizerError

from .helpers import LANES, RNG, run_ptx, u32

GROUP, WITHIN = LANES // 4, LANES % 4


def encode(kind: str, value: float) -> int:
    if kind in ("s8", "u8"):
        return int(value) & 255
    if kind == "f16":
        return int(np.float16(value).view(np.uint16))
    if kind == "bf16":
        return int(np.float32(value).view(np.uint32)) >> 16
    if kind == "tf32":
        return int(np.float32(value).view(np.uint32))
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    return int(torch.tensor(float(value)).to(dtype).view(torch.uint8))


PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}


def fragments(A, B, kind_a, kind_b):
    """Registers of A (M x K) and B (K x 8)."""
    m, k = A.shape
    per = PER_REGISTER[kind_a]
    bits = 32 // per
    a, b = np.zeros((m * k // 32 // per, 32), np.uint32), np.zeros((k // 4 // per, 32), np.uint32)
    for lane in range(32):
        for register in range(len(a)):
            for e in range(per):
                row = GROUP[lane] + 8 * (register % (m // 8))
                column = WITHIN[lane] * per + e + (register // (m // 8)) * 4 * per
                a[register, lane] |= np.uint32(encode(kind_a, A[row, column]) << bits * e)
        for register in range(len(b)):
            for e in range(per):
                row = WITHIN[lane] * per + e + register * 4 * per
                b[register, lane] |= np.uint32(encode(kind_b, B[row, GROUP[lane]]) << bits * e)
    return a, b


def accumulators(C):
    """M x 8 values as M / 4 registers"""
    return np.array([C[GROUP + 8 * (i // 2), 2 * WITHIN + i % 2] for i in range(C.shape[0] // 4)])


def names(first: int, count: int) -> str:
    return "{" + ",".join(f"%a{i}" for i in range(first, first + count)) + "}"


def mma(instruction: str, a, b, c) -> list[np.ndarray]:
    inputs = [*a, *b, *c]
    out = "{" + ",".join(f"%x{i}" for i in range(len(c))) + "}"
    operands = f"{names(0, len(a))}, {names(len(a), len(b))}, {names(len(a) + len(b), len(c))}"
    kind = c[0].dtype
    return [run_ptx(f"{instruction} {out}, {operands}; mov.b32 %o, %x{i};", inputs, kind) for i in range(len(c))]


SHAPES = [
    ("m16n8k16", "f16", "f16", "f32"),
    ("m16n8k8", "f16", "f16", "f32"),
    ("m16n8k16", "bf16", "bf16", "f32"),
    ("m16n8k8", "bf16", "bf16", "f32"),
    ("m16n8k8", "tf32", "tf32", "f32"),
    ("m16n8k4", "tf32", "tf32", "f32"),
    ("m16n8k32", "e4m3", "e4m3", "f32"),
    ("m16n8k32", "e5m2", "e4m3", "f32"),
    ("m16n8k16", "e4m3", "e5m2", "f32"),
    ("m16n8k32", "s8", "s8", "s32"),
    ("m16n8k32", "u8", "s8", "s32"),
    ("m16n8k16", "u8", "u8", "s32"),
    ("m8n8k16", "s8", "u8", "s32"),
]


@pytest.mark.parametrize(("shape", "a", "b", "d"), SHAPES, ids=[".".join(s[:3]) for s in SHAPES])
def test_mma(shape, a, b, d):
    m, k = int(shape[1 : shape.index("n")]), int(shape.split("k")[1])
    A = RNG.integers(0 if a == "u8" else -8, 8, (m, k))
    B = RNG.integers(0 if b == "u8" else -8, 8, (k, 8))
    C = RNG.integers(-50, 50, (m, 8))
    dtype = np.int32 if d == "s32" else np.float32
    c = accumulators(C.astype(dtype))
    got = mma(f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d}", *fragments(A, B, a, b), c)
    assert np.array_equal(got, accumulators((C + A @ B).astype(dtype)))


@pytest.mark.parametrize("k", [8, 16])
def test_mma_with_half_accumulators(k):
    A, B, C = (RNG.standard_normal(s).astype(np.float16) for s in ((16, k), (k, 8), (16, 8)))
    pairs = accumulators(C).view(np.uint16).astype(np.uint32)
    c = np.array([pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16])
    got = mma(f"mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16", *fragments(A, B, "f16", "f16"), c)
    exact = accumulators(C.astype(np.float64) + A.astype(np.float64) @ B.astype(np.float64))
    for register, (low, high) in zip(got, (exact[:2], exact[2:]), strict=True):
        np.testing.assert_allclose((register & 0xFFFF).astype(np.uint16).view(np.float16), low, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose((register >> 16).astype(np.uint16).view(np.float16), high, rtol=1e-3, atol=1e-3)


def test_mma_saturates_only_if_told_to():
    A, B = np.full((16, 32), 127), np.full((32, 8), 127)
    c = accumulators(np.full((16, 8), 2**31 - 10, np.int32))
    a, b = fragments(A, B, "s8", "s8")
    wrapped = mma("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", a, b, c)
    assert all((register < 0).all() for register in wrapped)
    clamped = mma("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", a, b, c)
    assert all((register == 2**31 - 1).all() for register in clamped)


@pytest.mark.parametrize(("m", "k"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_mma_f64(m, k):
    A, B, C = RNG.standard_normal((m, k)), RNG.standard_normal((k, 8)), RNG.standard_normal((m, 8))
    halves = m // 8
    a = [A[GROUP + 8 * (i % halves), WITHIN + 4 * (i // halves)] for i in range(m * k // 32)]
    b = [B[WITHIN + 4 * i, GROUP] for i in range(k // 4)]
    c = [C[GROUP + 8 * (i // 2), 2 * WITHIN + i % 2] for i in range(m // 4)]
    out = "{" + ",".join(f"%y{i}" for i in range(len(c))) + "}"
    n_a, n_b = len(a), len(b)
    operands = f"{names(0, n_a)}, {names(n_a, n_b)}, {names(n_a + n_b, len(c))}"
    D = C + A @ B
    for i in range(len(c)):
        body = f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64 {out}, {operands}; mov.b64 %o, %y{i};"
        expected = D[GROUP + 8 * (i // 2), 2 * WITHIN + i % 2]
        np.testing.assert_allclose(run_ptx(body, [*a, *b, *c], "f8"), expected, rtol=1e-12)


def write_matrices(count: int) -> str:
    """Lane l stores its 16 bytes, the words 4l to 4l + 3, as row l of the matrices."""
    words = " ".join(f"shl.b32 %x{i}, %t, 2; add.u32 %x{i}, %x{i}, {i};" for i in range(4))
    address = "mov.u32 %x9, smem; mad.lo.u32 %x8, %t, 16, %x9;"
    return f"{words} {address} st.shared.v4.b32 [%x8], {{%x0, %x1, %x2, %x3}}; bar.warp.sync -1;"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    memory = np.arange(32 * 4, dtype=np.uint32).view(np.uint16).reshape(4, 8, 8)
    registers = "{" + ",".join(f"%x{10 + i}" for i in range(count)) + "}"
    for i in range(count):
        name = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
        body = f"{write_matrices(count)} {name} {registers}, [%x8]; mov.b32 %o, %x{10 + i};"
        matrix = memory[i].T if transposed else memory[i]
        low, high = (matrix[GROUP, 2 * WITHIN + h].astype(np.uint32) for h in range(2))
        assert np.array_equal(run_ptx(body, [], "u4", shared=512), low | high << 16)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_undoes_ldmatrix(count, transposed):
    form = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    registers = "{" + ",".join(f"%x{10 + i}" for i in range(count)) + "}"
    body = f"""{write_matrices(count)} ldmatrix.{form} {registers}, [%x8]; add.u32 %x20, %x8, 512;
    stmatrix.{form} [%x20], {registers}; bar.warp.sync -1;
    setp.lt.u32 %q1, %t, {8 * count}; mov.u32 %o, 0; @%q1 ld.shared.u32 %o, [%x20+8];"""
    expected = np.where(8 * count > LANES, 4 * LANES + 2, 0)
    assert np.array_equal(run_ptx(body, [], "u4", shared=1024), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_warps_store_the_same_matrices(count, transposed):
    """Triton lets warps that hold the same values all store them."""
    registers = ",".join(f"%x{i}" for i in range(count))
    form = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    module = PtxModule(f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u32 other) {{
.reg .b32 %x<9>; .reg .b32 %t; .reg .b32 %w; .reg .b32 %o;
.shared .align 16 .b8 smem[512];
mov.u32 %t, %tid.x; shr.u32 %w, %t, 5; and.b32 %t, %t, 31;
ld.param.u32 %o, [other]; mul.lo.u32 %w, %w, %o;
mad.lo.u32 %x0, %t, 0x01010203, %w; add.u32 %x1, %x0, 7; add.u32 %x2, %x0, 77; add.u32 %x3, %x0, 777;
mov.u32 %x8, smem; mad.lo.u32 %x8, %t, 16, %x8;
stmatrix.sync.aligned.{form} [%x8], {{{registers}}};
ret; }}""")
    module.launch("k", 1, 64, [0])
    text = "race on shared byte .*: write by warp 1, written by warp 0"
    with pytest.raises(PtxSanitizerError, match=text):
        module.launch("k", 1, 64, [0], races="strict")
    for other in (1, 1 << 24):  # the lowest byte of each word differs, or the highest
        with pytest.raises(PtxSanitizerError, match=text):
            module.launch("k", 1, 64, [other])


def test_movmatrix_transposes():
    x = u32()
    matrix = np.stack([x & 0xFFFF, x >> 16], 1).reshape(8, 8).T
    expected = matrix[GROUP, 2 * WITHIN] | matrix[GROUP, 2 * WITHIN + 1] << 16
    assert np.array_equal(run_ptx("movmatrix.sync.aligned.m8n8.trans.b16 %o, %a0;", [x], "u4"), expected)


@pytest.mark.parametrize(("kind", "shape"), [("s8", (16, 16)), ("u8", (32, 8)), ("s8", (8, 32))])
def test_wmma_integers_are_exact(kind, shape):
    """Accumulators beyond 2^24, which a float would round"""
    m, n = shape
    row_a, row_b = m * 16 // 32 // 4, n * 16 // 32 // 4
    A, B = "{" + ",".join(["%x0"] * row_a) + "}", "{" + ",".join(["%x1"] * row_b) + "}"
    C = "{" + ",".join(["%x2"] * 8) + "}"
    D = "{" + ",".join(f"%x{10 + i}" for i in range(8)) + "}"
    setup = "mov.b32 %x0, 0x01010101; mov.b32 %x1, 0x01010101; mov.b32 %x2, 33554433;"
    body = (
        f"{setup} wmma.mma.sync.aligned.row.col.m{m}n{n}k16.s32.{kind}.{kind}.s32 {D}, {A}, {B}, {C}; mov.b32 %o, %x12;"
    )
    assert (run_ptx(body, [], "i4") == 33554433 + 16).all()
