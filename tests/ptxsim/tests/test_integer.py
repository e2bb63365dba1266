"""Single integer instructions against Python's integers."""

import numpy as np
import pytest

from .helpers import LANES, RNG, run_ptx, signed, u32, u64

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def s24(x: int) -> int:
    return signed(x & 0xFFFFFF, 24)


BINARY = {
    "add.u32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul24.lo.u32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.hi.s32": lambda a, b: s24(a) * s24(b) >> 16,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "min.relu.s32": lambda a, b: max(min(signed(a), signed(b)), 0),
    "max.relu.s32": lambda a, b: max(signed(a), signed(b), 0),
    "min.relu.s16x2": lambda a, b: (
        max(min(signed(a & 0xFFFF, 16), signed(b & 0xFFFF, 16)), 0)
        | max(min(signed(a >> 16, 16), signed(b >> 16, 16)), 0) << 16
    ),
    "div.u32": lambda a, b: a // b,
    "rem.u32": lambda a, b: a % b,
    "div.s32": lambda a, b: truncated_quotient(signed(a), signed(b)),
    "rem.s32": lambda a, b: signed(a) - truncated_quotient(signed(a), signed(b)) * signed(b),
    "add.sat.s32": lambda a, b: max(-(2**31), min(2**31 - 1, signed(a) + signed(b))),
    "sub.sat.s32": lambda a, b: max(-(2**31), min(2**31 - 1, signed(a) - signed(b))),
    "add.u16x2": lambda a, b: (a + b) & 0xFFFF | ((a >> 16) + (b >> 16)) << 16,
    "min.s16x2": lambda a, b: (
        min(signed(a & 0xFFFF, 16), signed(b & 0xFFFF, 16)) & 0xFFFF
        | (min(signed(a >> 16, 16), signed(b >> 16, 16)) & 0xFFFF) << 16
    ),
    "max.u16x2": lambda a, b: max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16,
}


@pytest.mark.parametrize("op", BINARY)
def test_binary(op):
    a, b = u32(), np.maximum(u32() >> RNG.integers(0, 31, 32).astype(np.uint32), 1)
    expected = [BINARY[op](int(x), int(y)) & M32 for x, y in zip(a, b, strict=True)]
    assert run_ptx(f"{op} %o, %a0, %a1;", [a, b], "u4").tolist() == expected


def test_division_by_zero_and_overflow():
    a = np.full(32, 0x80000000, np.uint32)
    assert (run_ptx("div.s32 %o, %a0, -1;", [a], "u4") == a).all()
    assert (run_ptx("rem.s32 %o, %a0, -1;", [a], "u4") == 0).all()
    assert (run_ptx("rem.u32 %o, %a0, 0;", [a], "u4") == a).all()


A, S = u32(), RNG.integers(0, 40, 32).astype(np.uint32)
SELECT = 0x55667788


def permute(x: int, selectors) -> int:
    return sum(((SELECT << 32 | x) >> 8 * s & 255) << 8 * i for i, s in enumerate(selectors))


# instruction on %a0 = x, %a1 = y (0..39) -> result
BITS = {
    "shl.b32 %o, %a0, %a1;": lambda x, y: x << y if y < 32 else 0,
    "shr.u32 %o, %a0, %a1;": lambda x, y: x >> y if y < 32 else 0,
    "shr.s32 %o, %a0, %a1;": lambda x, y: signed(x) >> min(y, 31),
    "shf.l.wrap.b32 %o, %a0, 0x12345678, %a1;": lambda x, y: (0x12345678 << 32 | x) << (y & 31) >> 32,
    "shf.l.clamp.b32 %o, %a0, 0x12345678, %a1;": lambda x, y: (0x12345678 << 32 | x) << min(y, 32) >> 32,
    "shf.r.clamp.b32 %o, %a0, 0x12345678, %a1;": lambda x, y: (0x12345678 << 32 | x) >> min(y, 32),
    "shf.r.wrap.b32 %o, %a0, 0x12345678, %a1;": lambda x, y: (0x12345678 << 32 | x) >> (y & 31),
    "bfe.u32 %o, %a0, 5, 9;": lambda x, y: x >> 5 & 511,
    "bfe.s32 %o, %a0, 5, 9;": lambda x, y: signed(x >> 5 & 511, 9),
    "bfe.s32 %o, %a0, 28, 9;": lambda x, y: signed(x) >> 28,
    "bfe.s32 %o, %a0, 40, 3;": lambda x, y: signed(x) >> 31,
    "bfe.u32 %o, %a0, 40, 3;": lambda x, y: 0,
    "bfe.s32 %o, %a0, 3, 0;": lambda x, y: 0,
    "bfi.b32 %o, %a0, 0xdeadbeef, 7, 6;": lambda x, y: 0xDEADBEEF & ~(63 << 7) | (x & 63) << 7,
    "bfi.b32 %o, %a0, 0xdeadbeef, 30, 6;": lambda x, y: 0xDEADBEEF & ~(3 << 30) | (x & 3) << 30,
    "popc.b32 %o, %a0;": lambda x, y: x.bit_count(),
    "brev.b32 %o, %a0;": lambda x, y: int(f"{x:032b}"[::-1], 2),
    "bfind.u32 %o, %a0;": lambda x, y: x.bit_length() - 1,
    "bfind.s32 %o, %a0;": lambda x, y: (x if signed(x) >= 0 else ~x & M32).bit_length() - 1,
    "bfind.shiftamt.u32 %o, %a0;": lambda x, y: 32 - x.bit_length(),
    "cnot.b32 %o, %a0;": lambda x, y: int(x == 0),
    "not.b32 %o, %a0;": lambda x, y: ~x,
    "abs.s32 %o, %a0;": lambda x, y: abs(signed(x)),
    "neg.s32 %o, %a0;": lambda x, y: -signed(x),
    "sad.s32 %o, %a0, 77, %a1;": lambda x, y: abs(signed(x) - 77) + y,
    "lop3.b32 %o, %a0, %a1, 0x0f0f1234, 0x96;": lambda x, y: x ^ y ^ 0x0F0F1234,
    "lop3.b32 %o, %a0, %a1, 0x0f0f1234, 0xca;": lambda x, y: (x & y) | (~x & 0x0F0F1234),
    "bmsk.clamp.b32 %o, 3, %a1;": lambda x, y: ((1 << min(y, 32)) - 1) << 3,
    "bmsk.wrap.b32 %o, 3, %a1;": lambda x, y: ((1 << (y & 31)) - 1) << 3,
    "szext.clamp.s32 %o, %a0, 9;": lambda x, y: signed(x & 511, 9),
    "szext.wrap.u32 %o, %a0, %a1;": lambda x, y: x & ((1 << (y & 31)) - 1),
    "mad.lo.s32 %o, %a0, %a1, 5;": lambda x, y: x * y + 5,
    "mad.hi.u32 %o, %a0, 0x12345678, %a1;": lambda x, y: (x * 0x12345678 >> 32) + y,
    "mad24.lo.u32 %o, %a0, 0x12345678, %a1;": lambda x, y: (x & 0xFFFFFF) * 0x345678 + y,
    "mad.hi.sat.s32 %o, %a0, 0x7fffffff, 0x7fffffff;": lambda x, y: min(
        2**31 - 1, (signed(x) * 0x7FFFFFFF >> 32) + 0x7FFFFFFF
    ),
    f"prmt.b32 %o, %a0, {SELECT}, 0x5140;": lambda x, y: permute(x, [0, 4, 1, 5]),
    f"prmt.b32 %o, %a0, {SELECT}, 0x0008;": lambda x, y: (255 if x & 128 else 0) | permute(x, [0] * 4) & ~255,
    f"prmt.b32.f4e %o, %a0, {SELECT}, 2;": lambda x, y: permute(x, [2, 3, 4, 5]),
    f"prmt.b32.b4e %o, %a0, {SELECT}, 1;": lambda x, y: permute(x, [1, 0, 7, 6]),
    f"prmt.b32.rc8 %o, %a0, {SELECT}, 3;": lambda x, y: permute(x, [3, 3, 3, 3]),
    f"prmt.b32.ecl %o, %a0, {SELECT}, 1;": lambda x, y: permute(x, [1, 1, 2, 3]),
    f"prmt.b32.ecr %o, %a0, {SELECT}, 1;": lambda x, y: permute(x, [0, 1, 1, 1]),
    f"prmt.b32.rc16 %o, %a0, {SELECT}, 1;": lambda x, y: permute(x, [2, 3, 2, 3]),
    "cvt.s32.s8 %o, %a0;": lambda x, y: signed(x & 255, 8),
    "cvt.u16.u32 %h1, %a0; cvt.u32.u16 %o, %h1;": lambda x, y: x & 65535,
    "cvt.sat.u8.s32 %o, %a0;": lambda x, y: max(0, min(255, signed(x))),
    "mov.b32 {%h1, %h2}, %a0; mov.b32 %o, {%h2, %h1};": lambda x, y: x >> 16 | (x & 65535) << 16,
    "mov.b32 {_, %h2}, %a0; cvt.u32.u16 %o, %h2;": lambda x, y: x >> 16,
}


@pytest.mark.parametrize("body", BITS)
def test_bits(body):
    expected = [BITS[body](int(x), int(y)) & M32 for x, y in zip(A, S, strict=True)]
    assert run_ptx(body, [A, S], "u4").tolist() == expected


def test_clz_of_all_lengths():
    x = (A >> S % 33).astype(np.uint32)
    x[S >= 32] = 0
    assert run_ptx("clz.b32 %o, %a0;", [x], "u4").tolist() == [32 - int(v).bit_length() for v in x]


def find_nth_set(mask: int, base: int, offset: int) -> int:
    if offset == 0:
        return base if mask >> base & 1 else M32
    step, left = (1 if offset > 0 else -1), abs(offset)
    for position in range(base, 32 if offset > 0 else -1, step):
        left -= mask >> position & 1
        if left == 0:
            return position
    return M32


@pytest.mark.parametrize("offset", [0, 1, 3, -1, -4])
def test_fns(offset):
    base = LANES.astype(np.uint32)
    expected = [find_nth_set(int(m), int(b), offset) for m, b in zip(A, base, strict=True)]
    assert run_ptx(f"fns.b32 %o, %a0, %a1, {offset};", [A, base], "u4").tolist() == expected


def test_wide_and_carry():
    a, b, c, d = u32(), u32(), u64(), u64()

    def check(body, inputs, f):
        expected = [f(*map(int, row)) & M64 for row in zip(*inputs, strict=True)]
        assert run_ptx(body, inputs, "u8").tolist() == expected, body

    split = "mov.b64 {%x0, %x1}, %a0; mov.b64 {%x2, %x3}, %a1;"
    check("mul.wide.s32 %o, %a0, %a1;", [a, b], lambda x, y: signed(x) * signed(y))
    check("mad.wide.u32 %o, %a0, %a1, %a2;", [a, b, c], lambda x, y, z: x * y + z)
    check("mul.hi.u64 %o, %a0, %a1;", [c, d], lambda x, y: x * y >> 64)
    check("mul.hi.s64 %o, %a0, %a1;", [c, d], lambda x, y: signed(x, 64) * signed(y, 64) >> 64)
    check("mul.lo.s64 %o, %a0, %a1;", [c, d], lambda x, y: x * y)
    add = f"{split} add.cc.u32 %x0, %x0, %x2; addc.u32 %x1, %x1, %x3; mov.b64 %o, {{%x0, %x1}};"
    check(add, [c, d], lambda x, y: x + y)
    check(add.replace("add.cc", "sub.cc").replace("addc", "subc"), [c, d], lambda x, y: x - y)
    # 32x32 -> 64 in two steps: the carry of the low product goes into the high one
    mad = (
        "mov.b64 {%x2, %x3}, %a2; mad.lo.cc.u32 %x0, %a0, %a1, %x2; madc.hi.u32 %x1, %a0, %a1, %x3;"
        "mov.b64 %o, {%x0, %x1};"
    )
    check(mad, [a, b, c], lambda x, y, z: x * y + z)
    check("shl.b64 %o, %a0, 13;", [c], lambda x: x << 13)
    check("bfe.s64 %o, %a0, 50, 9;", [c], lambda x: signed(x >> 50 & 511, 9))
    check("popc.b64 %x0, %a0; cvt.u64.u32 %o, %x0;", [c], int.bit_count)


@pytest.mark.parametrize("kinds", ["u32.u32", "s32.s32", "s32.u32", "u32.s32"])
def test_dot_products(kinds):
    a, b, c = u32(), u32(), u32()
    sign_a, sign_b = (kind[0] == "s" for kind in kinds.split("."))

    def part(x: int, i: int, bits: int, sign: bool) -> int:
        value = x >> bits * i & ((1 << bits) - 1)
        return signed(value, bits) if sign else value

    def dp4a(x, y, z):
        return z + sum(part(x, i, 8, sign_a) * part(y, i, 8, sign_b) for i in range(4))

    def dp2a(x, y, z, first):
        return z + sum(part(x, i, 16, sign_a) * part(y, i + first, 8, sign_b) for i in range(2))

    rows = [tuple(map(int, row)) for row in zip(a, b, c, strict=True)]
    args = [a, b, c]
    assert run_ptx(f"dp4a.{kinds} %o, %a0, %a1, %a2;", args, "u4").tolist() == [dp4a(*row) & M32 for row in rows]
    for half, first in (("lo", 0), ("hi", 2)):
        got = run_ptx(f"dp2a.{half}.{kinds} %o, %a0, %a1, %a2;", args, "u4").tolist()
        assert got == [dp2a(*row, first) & M32 for row in rows]


def test_128_bit_moves():
    a, b = u64(), u64()
    body = "mov.b128 %w0, {%a0, %a1}; mov.b128 %w1, %w0; mov.b128 {%y0, %y1}, %w1; xor.b64 %o, %y0, %y1;"
    assert np.array_equal(run_ptx(body, [a, b], "u8"), a ^ b)


def test_branch_table_and_predication():
    a = (LANES % 5).astype(np.uint32)
    body = """mov.u32 %o, 0; T: .branchtargets A, B, C; setp.gt.u32 %q1, %a0, 2; @%q1 bra E; brx.idx %a0, T;
    A: mov.u32 %o, 10; bra E; B: mov.u32 %o, 11; bra E; C: mov.u32 %o, 12; E: @!%q1 add.u32 %o, %o, 100;"""
    assert np.array_equal(run_ptx(body, [a], "u4"), np.array([110, 111, 112, 0, 0])[a])
