"""Single floating-point and comparison instructions against numpy."""

import numpy as np
import pytest

from .helpers import LANES, RNG, bf16, f16, f32, from_bf16, run_ptx, to_bf16

F32, F64 = np.float32, np.float64


def test_arithmetic():
    a, b, c = f32(), f32(), f32()
    A, B, C = (x.astype(F64) for x in (a, b, c))
    assert np.array_equal(run_ptx("add.f32 %o, %a0, %a1;", [a, b], "f4"), a + b)
    assert np.array_equal(run_ptx("mul.rn.f32 %o, %a0, %a1;", [a, b], "f4"), a * b)
    assert np.array_equal(run_ptx("div.rn.f32 %o, %a0, %a1;", [a, b], "f4"), a / b)
    fma = run_ptx("fma.rn.f32 %o, %a0, %a1, %a2;", [a, b, c], "f4")
    assert np.abs(fma - (A * B + C)).max() <= np.abs(A * B + C).max() * 2**-24
    assert np.array_equal(run_ptx("abs.f32 %o, %a0;", [a], "f4"), abs(a))
    assert np.array_equal(run_ptx("neg.f32 %o, %a0;", [a], "f4"), -a)
    assert np.array_equal(run_ptx("add.sat.f32 %o, %a0, %a1;", [a, b], "f4"), np.clip(a + b, 0, 1))
    assert np.array_equal(run_ptx("copysign.f32 %o, %a0, %a1;", [a, b], "f4"), np.copysign(b, a))


@pytest.mark.parametrize("op", ["add", "mul"])
def test_directed_rounding(op):
    a, b = f32(), f32()
    exact = a.astype(F64) + b if op == "add" else a.astype(F64) * b
    down, up, zero = (run_ptx(f"{op}.{mode}.f32 %o, %a0, %a1;", [a, b], "f4") for mode in ("rm", "rp", "rz"))
    assert (down <= exact).all()
    assert (up >= exact).all()
    assert (np.nextafter(down, F32(np.inf)) >= exact).all()
    assert (abs(zero.astype(F64)) <= abs(exact)).all()
    assert np.array_equal(zero, np.where(exact > 0, down, up))


def test_fma_directed_rounding_and_f64():
    a, b, c = f32(), f32(), f32()
    down, up = (run_ptx(f"fma.{mode}.f32 %o, %a0, %a1, %a2;", [a, b, c], "f4") for mode in ("rm", "rp"))
    exact = a.astype(F64) * b + c
    assert (down <= exact).all()
    assert (up >= exact).all()
    x, y = (v.astype(F64) / 3 for v in (a, b))
    assert np.array_equal(run_ptx("add.f64 %o, %a0, %a1;", [x, y], "f8"), x + y)
    assert np.array_equal(run_ptx("div.rn.f64 %o, %a0, %a1;", [x, y], "f8"), x / y)
    approximate = run_ptx("rcp.approx.ftz.f64 %o, %a0;", [x], "f8")
    assert (approximate.view(np.uint64) & 0xFFFFFFFF == 0).all()  # only the upper half is computed
    np.testing.assert_allclose(approximate, 1 / x, rtol=2**-20)


def test_minimum_maximum():
    a, b, n = f32(), f32(), f32()
    n[::3] = np.nan
    assert np.array_equal(run_ptx("max.f32 %o, %a0, %a1;", [n, b], "f4"), np.fmax(n, b))
    propagated = run_ptx("min.NaN.f32 %o, %a0, %a1;", [n, b], "f4")
    assert np.array_equal(propagated, np.minimum(n, b), equal_nan=True)
    assert np.array_equal(run_ptx("min.f32 %o, %a0, %a1, %a2;", [a, b, n], "f4"), np.fmin(np.fmin(a, b), n))
    sign = np.where(np.signbit(a) != np.signbit(b), F32(-1), F32(1))
    expected = sign * np.minimum(abs(a), abs(b))
    assert np.array_equal(run_ptx("min.xorsign.abs.f32 %o, %a0, %a1;", [a, b], "f4"), expected)
    zeros = np.where(LANES % 2, F32(0), F32(-0.0)).astype(F32)
    assert np.array_equal(np.signbit(run_ptx("max.f32 %o, %a0, %a1;", [zeros, zeros[::-1].copy()], "f4")), [False] * 32)
    assert np.signbit(run_ptx("min.f32 %o, %a0, %a1;", [zeros, zeros[::-1].copy()], "f4")).all()


def test_nan_is_canonical():
    nan = np.full(32, 0xFFC12345, np.uint32).view(F32)
    inf = np.full(32, np.inf, F32)
    for body, inputs in (
        ("add.f32 %o, %a0, %a1;", [nan, inf]),
        ("sub.f32 %o, %a0, %a0;", [inf]),
        ("fma.rn.f32 %o, %a0, %a0, %a0;", [nan]),
        ("max.f32 %o, %a0, %a0;", [nan]),
        ("sqrt.rn.f32 %o, 0fBF800000;", [nan]),
    ):
        assert (run_ptx(body, inputs, "f4").view(np.uint32) == 0x7FFFFFFF).all(), body
    assert (run_ptx("cvt.rn.f16.f32 %o, %a0;", [nan], "u2") == 0x7FFF).all()


def test_flush_to_zero():
    tiny, half_tiny = np.full(32, 1e-40, F32), np.full(32, 6e-8, np.float16)
    assert (run_ptx("add.ftz.f32 %o, %a0, 0f00000000;", [tiny], "f4") == 0).all()
    assert (run_ptx("add.f32 %o, %a0, 0f00000000;", [tiny], "f4") == tiny).all()
    assert (run_ptx("mul.rz.ftz.f32 %o, %a0, 0f7F000000;", [tiny], "f4") == 0).all()
    assert (run_ptx("add.ftz.f16 %o, %a0, %a0;", [half_tiny], "f2") == 0).all()
    assert (run_ptx("add.f16 %o, %a0, %a0;", [half_tiny], "f2") == half_tiny + half_tiny).all()
    assert (run_ptx("fma.rn.ftz.f16 %o, %a0, %a0, %a0;", [half_tiny], "f2") == 0).all()


FUNCTIONS = {
    "ex2.approx.ftz.f32": np.exp2,
    "rcp.approx.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "sqrt.rn.f32": np.sqrt,
    "sqrt.approx.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "lg2.approx.f32": np.log2,
    "tanh.approx.f32": np.tanh,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions(op):
    x = np.abs(f32()) % 20 + F32(0.01)
    np.testing.assert_allclose(run_ptx(f"{op} %o, %a0;", [x], "f4"), FUNCTIONS[op](x.astype(F64)), rtol=2e-7, atol=1e-7)


BOUNDS = {
    "ex2.approx.f32": (np.exp2, 2**-22),
    "rcp.approx.f32": (lambda x: 1 / x, 2**-23),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2**-22.9),
    "tanh.approx.f32": (np.tanh, 2**-11),
}


@pytest.mark.parametrize("op", BOUNDS)
def test_approximation_error_on_request(op):
    x = np.abs(f32()) % 4 + F32(0.01)
    exact, (f, bound) = run_ptx(f"{op} %o, %a0;", [x], "f4"), BOUNDS[op]
    off = run_ptx(f"{op} %o, %a0;", [x], "f4", approx_error=1.0)
    again = run_ptx(f"{op} %o, %a0;", [x], "f4", approx_error=1.0)
    error = abs(off / f(x.astype(F64)) - 1)
    assert np.array_equal(off, again)
    assert not np.array_equal(off, exact)
    assert bound / 4 < error.max() <= bound + 2**-24
    assert np.array_equal(run_ptx("sqrt.rn.f32 %o, %a0;", [x], "f4", approx_error=1.0), np.sqrt(x))


def test_half_arithmetic():
    a, b, c = f16(), f16(), f16()
    x, y, z = bf16(), bf16(), bf16()
    A, B, C = (v.astype(F64) for v in (a, b, c))
    X, Y, Z = (from_bf16(v).astype(F64) for v in (x, y, z))
    assert np.array_equal(run_ptx("fma.rn.f16 %o, %a0, %a1, %a2;", [a, b, c], "f2"), (A * B + C).astype(np.float16))
    relu = np.maximum((A * B + C).astype(np.float16), 0)
    assert np.array_equal(run_ptx("fma.rn.relu.f16 %o, %a0, %a1, %a2;", [a, b, c], "f2"), relu)
    assert np.array_equal(run_ptx("add.f16 %o, %a0, %a1;", [a, b], "f2"), a + b)
    assert np.array_equal(run_ptx("fma.rn.bf16 %o, %a0, %a1, %a2;", [x, y, z], "u2"), to_bf16(X * Y + Z))
    assert np.array_equal(run_ptx("max.bf16 %o, %a0, %a1;", [x, y], "u2"), to_bf16(np.maximum(X, Y)))
    p, q = np.repeat(a, 2).view(np.uint32), np.repeat(b, 2).view(np.uint32)
    assert np.array_equal(run_ptx("mul.f16x2 %o, %a0, %a1;", [p, q], "u4").view(np.float16), np.repeat(a * b, 2))
    assert np.array_equal(run_ptx("neg.f16x2 %o, %a0;", [p], "u4").view(np.float16), np.repeat(-a, 2))
    tanh = run_ptx("tanh.approx.f16x2 %o, %a0;", [p], "u4").view(np.float16)
    assert np.array_equal(tanh, np.tanh(np.repeat(a, 2).astype(F32)).astype(np.float16))


def test_bfloat_fma_rounds_once():
    """28 * 37 = 1036 is half way between 1032 and 1040; what is added decides, though too small for a double."""
    a, b, above, below = (to_bf16(np.full(32, v, F32)) for v in (28, 37, 2.0**-60, -(2.0**-60)))
    for addend, expected in ((above, 1040), (below, 1032)):
        assert (from_bf16(run_ptx("fma.rn.bf16 %o, %a0, %a1, %a2;", [a, b, addend], "u2")) == expected).all()


def test_f32x2():
    a, b, c, d = f32(), f32(), f32(), f32()
    join = "mov.b64 %y0, {%a0, %a1}; mov.b64 %y1, {%a2, %a3};"
    body = f"{join} fma.rn.f32x2 %y2, %y0, %y1, %y0; mov.b64 {{%x0, %x1}}, %y2; mov.b32 %o, %x1;"
    assert np.array_equal(run_ptx(body, [a, b, c, d], "f4"), (b.astype(F64) * d + b).astype(F32))
    for op, f in (("add", np.add), ("mul", np.multiply), ("sub", np.subtract)):
        body = f"{join} {op}.rn.f32x2 %y2, %y0, %y1; mov.b64 {{%x0, %x1}}, %y2; mov.b32 %o, %x0;"
        assert np.array_equal(run_ptx(body, [a, b, c, d], "f4", target="sm_100"), f(a, c))


COMPARISONS = {
    "lt": np.less,
    "geu": lambda a, b: ~(a < b),
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "neu": lambda a, b: ~(a == b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name):
    a, b = f32(), f32()
    a[::4] = np.nan
    a[1::4] = b[1::4]
    expected, even = COMPARISONS[name](a, b), LANES % 2 == 0
    even_lane = "and.b32 %x1, %t, 1; setp.eq.u32 %q2, %x1, 0;"
    result = "selp.b32 %o, 1, 0, %q1;"
    got = run_ptx(f"setp.{name}.f32 %q1, %a0, %a1; {result}", [a, b], "u4")
    assert np.array_equal(got, expected)
    got = run_ptx(f"{even_lane} setp.{name}.and.f32 %q3|%q1, %a0, %a1, %q2; {result}", [a, b], "u4")
    assert np.array_equal(got, ~expected & even)
    got = run_ptx(f"{even_lane} setp.{name}.or.f32 %q1, %a0, %a1, !%q2; {result}", [a, b], "u4")
    assert np.array_equal(got, expected | ~even)
    got = run_ptx(f"set.{name}.f32.f32 %o, %a0, %a1;", [a, b], "f4")
    assert np.array_equal(got, expected.astype(F32))


def test_packed_comparisons():
    a, b = (RNG.integers(-3, 3, 64).astype(np.float16) for _ in range(2))
    p, q = a.view(np.uint32), b.view(np.uint32)
    less = a < b
    got = run_ptx("setp.lt.f16x2 %q1|%q2, %a0, %a1; selp.b32 %o, 1, 0, %q2;", [p, q], "u4")
    assert np.array_equal(got, less[1::2])
    got = run_ptx("set.lt.f16x2.f16x2 %o, %a0, %a1;", [p, q], "u4").view(np.float16)
    assert np.array_equal(got, less)


def test_selection():
    a, b, c = f32(), f32(), f32()
    c[::5], c[1::5] = -0.0, np.nan
    c[2::5] = -1e-40
    assert np.array_equal(run_ptx("slct.f32.f32 %o, %a0, %a1, %a2;", [a, b, c], "f4"), np.where(c >= 0, a, b))
    flushed = np.where((c >= 0) | (c == F32(-1e-40)), a, b)
    assert np.array_equal(run_ptx("slct.ftz.f32.f32 %o, %a0, %a1, %a2;", [a, b, c], "f4"), flushed)
    kinds = {"finite": np.isfinite, "notanumber": np.isnan, "subnormal": lambda x: x == F32(-1e-40)}
    for name, f in kinds.items():
        got = run_ptx(f"testp.{name}.f32 %q1, %a0; selp.b32 %o, 1, 0, %q1;", [c], "u4")
        assert np.array_equal(got, f(c)), name
