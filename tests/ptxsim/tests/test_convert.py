"""cvt in its many forms against numpy and torch."""

import numpy as np
import pytest
import torch

from .helpers import bf16, f16, f32, from_bf16, run_ptx, to_bf16, u32, u64

F32, F64 = np.float32, np.float64


def test_pairs_of_halves():
    a, b = f32(), f32()
    got = run_ptx("cvt.rn.f16x2.f32 %o, %a0, %a1;", [a, b], "u4").view(np.float16)
    with np.errstate(over="ignore"):
        assert np.array_equal(got[::2], b.astype(np.float16))
        assert np.array_equal(got[1::2], a.astype(np.float16))
    got = run_ptx("cvt.rn.bf16x2.f32 %o, %a0, %a1;", [a, b], "u4").view(np.uint16)
    assert np.array_equal(got[::2], to_bf16(b))
    assert np.array_equal(got[1::2], to_bf16(a))
    relu = run_ptx("cvt.rn.relu.bf16x2.f32 %o, %a0, %a1;", [a, b], "u4").view(np.uint16)
    assert np.array_equal(relu[::2], to_bf16(np.maximum(b, 0)))


def test_between_floats():
    a, h, x = f32(), f16(), bf16()
    assert np.array_equal(run_ptx("cvt.f32.f16 %o, %a0;", [h], "f4"), h.astype(F32))
    assert np.array_equal(run_ptx("cvt.f32.bf16 %o, %a0;", [x], "f4"), from_bf16(x))
    assert np.array_equal(run_ptx("cvt.f64.f32 %o, %a0;", [a], "f8"), a.astype(F64))
    d = a.astype(F64) / 3
    assert np.array_equal(run_ptx("cvt.rn.f32.f64 %o, %a0;", [d], "f4"), d.astype(F32))
    down, up = (run_ptx(f"cvt.{mode}.f32.f64 %o, %a0;", [d], "f4") for mode in ("rm", "rp"))
    assert ((down <= d) & (d <= up) & (np.nextafter(down, F32(np.inf)) >= up)).all()
    down, up = (from_bf16(run_ptx(f"cvt.{mode}.bf16.f32 %o, %a0;", [a], "u2")) for mode in ("rm", "rp"))
    assert ((down <= a) & (a <= up)).all()
    assert np.array_equal(run_ptx("cvt.sat.f32.f32 %o, %a0;", [a], "f4"), np.clip(a, 0, 1))
    # 1 + 2^-11 + 2^-40 must round up in one step; by way of float it would be a tie and round down
    once = np.full(32, 1 + 2.0**-11 + 2.0**-40)
    assert (run_ptx("cvt.rn.f16.f64 %o, %a0;", [once], "f2") == 1 + 2.0**-10).all()


def test_tf32():
    a = f32()
    bits = a.view(np.uint32)
    got = run_ptx("cvt.rna.tf32.f32 %o, %a0;", [a], "u4")
    assert np.array_equal(got, (bits + 0x1000) & ~np.uint32(0x1FFF))
    even = (bits.astype(np.uint64) + 0xFFF + (bits >> 13 & 1)).astype(np.uint32) & ~np.uint32(0x1FFF)
    assert np.array_equal(run_ptx("cvt.rn.tf32.f32 %o, %a0;", [a], "u4"), even)
    assert np.array_equal(run_ptx("cvt.rz.tf32.f32 %o, %a0;", [a], "u4"), bits & ~np.uint32(0x1FFF))


def test_float_to_integer():
    a = f32()
    a[:3] = 2.5, -3.5, 0.5
    assert np.array_equal(run_ptx("cvt.rni.s32.f32 %o, %a0;", [a], "i4"), np.rint(a).astype(np.int32))
    assert np.array_equal(run_ptx("cvt.rzi.s32.f32 %o, %a0;", [a], "i4"), np.trunc(a).astype(np.int32))
    assert np.array_equal(run_ptx("cvt.rpi.s32.f32 %o, %a0;", [a], "i4"), np.ceil(a).astype(np.int32))
    assert np.array_equal(run_ptx("cvt.rmi.f32.f32 %o, %a0;", [a], "f4"), np.floor(a))
    assert (run_ptx("cvt.rzi.u32.f32 %o, %a0;", [-abs(a) - 1], "u4") == 0).all()
    big = np.full(32, 3e9, F32)
    assert (run_ptx("cvt.rzi.s32.f32 %o, %a0;", [big], "i4") == 2**31 - 1).all()
    assert (run_ptx("cvt.rzi.u8.f32 %o, %a0;", [big], "u4") == 255).all()


def test_nan_to_integer():
    nan, wide = np.full(32, np.nan, F32), np.full(32, np.nan)
    assert (run_ptx("cvt.rzi.s32.f32 %o, %a0;", [nan], "u4") == 0).all()
    assert (run_ptx("cvt.rzi.s64.f32 %o, %a0;", [nan], "u8") == 1 << 63).all()
    assert (run_ptx("cvt.rzi.s32.f64 %o, %a0;", [wide], "u4") == 1 << 31).all()
    assert (run_ptx("cvt.rzi.u64.f64 %o, %a0;", [wide], "u8") == 1 << 63).all()


def test_integer_to_float():
    i, j = u32().view(np.int32), u64().view(np.int64)
    assert np.array_equal(run_ptx("cvt.rn.f32.s32 %o, %a0;", [i], "f4"), i.astype(F32))
    assert np.array_equal(run_ptx("cvt.rn.f64.s64 %o, %a0;", [j], "f8"), j.astype(F64))
    down, up = (run_ptx(f"cvt.{mode}.f32.s32 %o, %a0;", [i], "f4").astype(F64) for mode in ("rm", "rp"))
    assert ((down <= i) & (i <= up)).all()
    down, up = (run_ptx(f"cvt.{mode}.f64.s64 %o, %a0;", [j], "f8") for mode in ("rm", "rp"))
    assert all(int(a) <= int(b) <= int(c) for a, b, c in zip(down, j, up, strict=True))
    small = (i % 3000).astype(np.int32)
    assert np.array_equal(run_ptx("cvt.rn.f16.s32 %o, %a0;", [small], "f2"), small.astype(np.float16))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8(kind):
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    largest = torch.finfo(dtype).max
    a, b = ((f32() * 3).clip(-largest, largest) for _ in range(2))
    a[:2] = 0, largest
    got = run_ptx(f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a0, %a1; cvt.u32.u16 %o, %h1;", [a, b], "u4")
    high, low = (torch.from_numpy(x).to(dtype).view(torch.uint8).numpy() for x in (a, b))
    assert np.array_equal(got >> 8, high)
    assert np.array_equal(got & 255, low)
    packed = got.astype(np.uint16)
    halves = run_ptx(f"cvt.rn.f16x2.{kind}x2 %o, %a0;", [packed], "u4").view(np.float16)
    assert np.array_equal(halves[1::2], torch.from_numpy(high).view(dtype).half().numpy())
    back = run_ptx(f"cvt.rn.satfinite.{kind}x2.f16x2 %h1, %a0; cvt.u32.u16 %o, %h1;", [halves.view(np.uint32)], "u4")
    assert np.array_equal(back, got)
    too_big = np.full(32, 1e6, F32)
    saturated = run_ptx(f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a0, %a0; cvt.u32.u16 %o, %h1;", [too_big], "u4")
    assert (saturated & 255 == (0x7E if kind == "e4m3" else 0x7B)).all()
