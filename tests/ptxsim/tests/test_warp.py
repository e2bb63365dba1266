"""Shuffles, votes, matches, reductions, barriers with reductions, atomics."""

import numpy as np
import pytest

from .helpers import LANES, RNG, from_bf16, run_ptx, to_bf16, u32


def shuffled(mode, lane, b, clamp, segment):
    highest, lowest = (lane & segment) | (clamp & ~segment & 31), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return (source, 1) if inside else (lane, 0)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("b", [0, 1, 5, 9])
def test_shfl(mode, width, b):
    x = u32()
    segment, clamp = 32 - width, 0 if mode == "up" else 31
    body = f"shfl.sync.{mode}.b32 %x0|%q1, %a0, {b}, {segment << 8 | clamp}, -1; selp.b32 %x1, 1, 0, %q1; "
    expected = [shuffled(mode, lane, b, clamp, segment) for lane in range(32)]
    assert run_ptx(body + "mov.b32 %o, %x0;", [x], "u4").tolist() == [int(x[source]) for source, _ in expected]
    assert run_ptx(body + "mov.b32 %o, %x1;", [x], "u4").tolist() == [inside for _, inside in expected]


def test_votes():
    x = (LANES % 3 == 0).astype(np.uint32)
    ballot = sum(1 << lane for lane in range(32) if x[lane])
    predicate = "setp.ne.u32 %q1, %a0, 0; "
    assert (run_ptx(predicate + "vote.sync.ballot.b32 %o, %q1, -1;", [x], "u4") == ballot).all()
    inverted = run_ptx(predicate + "vote.sync.ballot.b32 %o, !%q1, -1;", [x], "u4")
    assert (inverted == ballot ^ 0xFFFFFFFF).all()
    for kind, expected in (("all", 0), ("any", 1), ("uni", 0)):
        got = run_ptx(predicate + f"vote.sync.{kind}.pred %q2, %q1, -1; selp.b32 %o, 1, 0, %q2;", [x], "u4")
        assert (got == expected).all(), kind


def test_match():
    x = (LANES // 5 * 7 % 3).astype(np.uint32)
    same = [sum(1 << j for j in range(32) if x[j] == x[i]) for i in range(32)]
    assert run_ptx("match.any.sync.b32 %o, %a0, -1;", [x], "u4").tolist() == same
    body = "match.all.sync.b32 %o|%q1, {}, -1; @%q1 add.u32 %o, %o, 1;"
    assert (run_ptx(body.format("%a0"), [x], "u4") == 0).all()
    assert (run_ptx(body.format("7"), [x], "u4") == 0).all()  # all ones, plus one


REDUCTIONS = {
    "add.u32": lambda x: int(x.astype(np.uint64).sum()),
    "min.s32": lambda x: int(x.view(np.int32).min()),
    "max.u32": lambda x: int(x.max()),
    "and.b32": lambda x: int(np.bitwise_and.reduce(x)),
    "xor.b32": lambda x: int(np.bitwise_xor.reduce(x)),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_redux(op):
    x = u32()
    assert (run_ptx(f"redux.sync.{op} %o, %a0, -1;", [x], "u4") == REDUCTIONS[op](x) & 0xFFFFFFFF).all()


def test_elect_and_activemask():
    upper = "setp.ge.u32 %q1, %t, 20; mov.u32 %o, 99; @%q1 bra U; bra E; U: {} E:"
    body = upper.format("elect.sync %o|%q2, 0xfff00000; @%q2 add.u32 %o, %o, 1000;")
    assert run_ptx(body, [], "u4").tolist() == [99] * 20 + [1020] + [20] * 11
    assert run_ptx(upper.format("activemask.b32 %o;"), [], "u4").tolist() == [99] * 20 + [0xFFF00000] * 12


def test_barrier_reductions():
    predicate = "setp.lt.u32 %q1, %t, 13; "
    assert (run_ptx(predicate + "barrier.cta.red.popc.sync.aligned.u32 %o, 0, %q1;", [], "u4") == 13).all()
    for kind, expected in (("and", 0), ("or", 1)):
        got = run_ptx(predicate + f"bar.red.{kind}.pred %q2, 0, %q1; selp.b32 %o, 1, 0, %q2;", [], "u4")
        assert (got == expected).all(), kind


ATOMICS = {
    "add.u32": lambda old, x: old + x,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(op, space):
    x, cell = u32() % 50, np.full(32, 7, np.uint32)
    address = "ld.param.u64 %y0, [k_1];"
    setup = f"{address} ld.volatile.global.u32 %x1, [%y0]; st.shared.u32 [smem], %x1; bar.warp.sync -1;"
    target = "[%y0]" if space == "global" else "[smem]"
    body = f"{setup if space == 'shared' else address} atom.{space}.{op} %o, {target}, %a0;"
    got = run_ptx(body, [x, cell], "u4", shared=16)
    value, expected = 7, []
    for operand in x:
        expected.append(value)
        value = ATOMICS[op](value, int(operand)) & 0xFFFFFFFF
    assert got.tolist() == expected
    if space == "global":
        assert cell[0] == value


def test_compare_and_swap():
    cell = np.full(32, 3, np.uint32)
    body = "ld.param.u64 %y0, [k_0]; add.u32 %x0, %t, 100; atom.global.cas.b32 %o, [%y0], 3, %x0;"
    assert run_ptx(body, [cell], "u4").tolist() == [3] + [100] * 31
    assert cell[0] == 100
    cells = np.zeros(32, np.uint64)
    body = """ld.param.u64 %y0, [k_0]; mov.b128 %w0, {1, 2}; setp.eq.u32 %q1, %t, 0;
    @%q1 atom.global.exch.b128 %w1, [%y0], %w0; mov.u64 %o, 5;"""
    run_ptx(body, [cells], "u8")
    assert cells[:3].tolist() == [1, 2, 0]


def test_float_atomics():
    x = RNG.standard_normal(32).astype(np.float32)
    total = np.zeros(32, np.float32)
    run_ptx("ld.param.u64 %y0, [k_1]; red.global.add.f32 [%y0], %a0; mov.u32 %o, 0;", [x, total], "u4")
    assert abs(total[0] - x.sum()) < 1e-5
    tiny = np.full(32, 1e-40, np.float32)  # additions to global memory flush subnormals, those to shared memory do not
    total[:] = 0
    run_ptx("ld.param.u64 %y0, [k_1]; red.global.add.f32 [%y0], %a0; mov.u32 %o, 0;", [tiny, total], "u4")
    assert total[0] == 0
    body = (
        "st.shared.u32 [smem], 0; bar.warp.sync -1; red.shared.add.f32 [smem], %a0; ld.volatile.shared.f32 %o, [smem];"
    )
    assert (run_ptx(body, [tiny], "f4", shared=16) > 3e-39).all()
    halves, sums = RNG.integers(-4, 4, 64).astype(np.float16), np.zeros(64, np.float16)
    body = "ld.param.u64 %y0, [k_1]; red.global.add.noftz.f16x2 [%y0], %a0; mov.u32 %o, 0;"
    run_ptx(body, [halves.view(np.uint32), sums.view(np.uint32)], "u4")
    assert sums[:2].tolist() == [halves[::2].sum(), halves[1::2].sum()]
    pair = np.zeros(64, np.uint16)
    body = "ld.param.u64 %y0, [k_1]; red.global.max.noftz.bf16x2 [%y0], %a0; mov.u32 %o, 0;"
    values = to_bf16(RNG.uniform(1, 9, 64).astype(np.float32))
    run_ptx(body, [values.view(np.uint32), pair.view(np.uint32)], "u4")
    assert from_bf16(pair)[:2].tolist() == [from_bf16(values)[::2].max(), from_bf16(values)[1::2].max()]


def test_vector_atomics():
    total = np.zeros(32, np.float32)
    body = """ld.param.u64 %y0, [k_0]; cvt.rn.f32.u32 %x0, %t; mov.b32 %x1, 0f3F800000;
    red.global.add.v2.f32 [%y0], {%x0, %x1}; mov.u32 %o, 0;"""
    run_ptx(body, [total], "u4")
    assert total[:3].tolist() == [sum(range(32)), 32, 0]
