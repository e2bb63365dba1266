"""mbarrier, bulk and tensor copies, wgmma (sm_90a)."""

import numpy as np
import pytest
import torch
from ptxsim import PtxError, PtxFault, PtxSanitizerError, Session, tensor_map

from .helpers import cuda, run_ptx


def hopper(bug=0):
    return cuda("hopper", "compute_90a", f"-DBUG={bug}")


def product(bug, M, N, K, **options):
    module = hopper(bug)
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).half(), torch.randn(N, K).half(), torch.zeros(M, N)
    maps = [tensor_map(module, x, (64, 64), 3) for x in (a, b)]
    grid = (-(-N // 64), -(-M // 64))
    r = module.launch("hgemm", grid, 160, [*maps, c, M, N, K], shared_bytes=4 * 64 * 64 * 2, **options)
    return r, float((c.double() - a.double() @ b.double().T).abs().max())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 64, 64), (64, 128, 320), (100, 72, 200)])
def test_wgmma_and_tma(M, N, K, seed):
    r, error = product(0, M, N, K, seed=seed)
    assert error < 1e-3
    tiles = -(-M // 64) * -(-N // 64) * -(-K // 64)
    assert r.mma_flops == 2 * 64 * 64 * 64 * tiles
    # Two tiles of 64 rows of 128 bytes; A and B are each read once by the warpgroup, without conflicts in this swizzle
    assert r.bulk_copy["wavefronts"] == r.bulk_copy["ideal_wavefronts"] == tiles * 2 * 64
    assert r.wgmma_operands["bytes"] == tiles * 2 * 64 * 64 * 2
    assert r.wgmma_operands["bank_conflict"] == 1.0


@pytest.mark.parametrize("bug", [1, 2, 3], ids=["no full wait", "no empty wait", "no wgmma wait"])
@pytest.mark.parametrize("seed", [0, 1])
def test_wgmma_and_tma_without_a_wait(bug, seed):
    with pytest.raises((PtxSanitizerError, PtxFault)) as e:  # without its wait the consumer can also hang the producer
        product(bug, 64, 64, 320, seed=seed)
    if isinstance(e.value, PtxFault):
        assert "livelock" in str(e.value) or "more arrivals" in str(e.value)
    else:
        assert {r.kind for r in e.value.result.reports} & {"race", "async-hazard", "uninit-shared"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bulk_copy(seed):
    x, y = np.arange(200, dtype=np.int32), np.zeros(200, np.int32)
    r = hopper().launch("bulk", block=256, args=[x, y, 200], seed=seed)
    assert np.array_equal(y, x[::-1])
    assert r.bulk_copy == {"requests": 2, "bytes": 1600, "wavefronts": 14, "ideal_wavefronts": 14, "bank_conflict": 1.0}
    assert (r.unique_read, r.unique_written) == (800, 800)


def copy_tiles(bug, shape, **options):
    module = hopper(bug)
    x, y = torch.randn(shape), torch.zeros(shape)
    maps = [tensor_map(module, t, (32, 32)) for t in (x, y)]
    grid = (-(-shape[1] // 32), -(-shape[0] // 32))
    return x, y, module.launch("tile_copy", grid, 64, maps, **options)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (40, 100)])
def test_tensor_copies(shape, seed):
    x, y, r = copy_tiles(0, shape, seed=seed)
    assert torch.equal(y, x + 1)
    assert r.global_load["bytes"] == r.global_store["bytes"] == 4 * x.numel()  # not what lies outside


def test_bulk_store_that_is_not_waited_for():
    with pytest.raises(PtxSanitizerError, match="exits without waiting") as e:
        copy_tiles(4, (32, 32))
    assert {r.kind for r in e.value.result.reports} == {"async-hazard"}


def test_missing_proxy_fence():
    with pytest.raises(PtxSanitizerError, match=r"no fence.proxy.async follows the write by warp 0") as e:
        copy_tiles(5, (32, 32))
    assert {r.kind for r in e.value.result.reports} == {"missing-proxy-fence"}


STORE = """ld.param.u64 %y0, [k_0]; mov.u32 %x0, smem; mad.lo.u32 %x1, %t, 4, %x0; st.shared.u32 [%x1], %t;
fence.proxy.async.shared::cta; bar.warp.sync -1; setp.eq.u32 %q1, %t, 0; mov.u32 %o, 0;
@%q1 cp.async.bulk.global.shared::cta.bulk_group [%y0], [smem], 128; @%q1 cp.async.bulk.commit_group;"""
WAIT = "@%q1 cp.async.bulk.wait_group{} 0; bar.warp.sync -1;"


def test_the_bulk_engine_is_another_agent():
    """What it reads must not be overwritten, and what it wrote not be read, before the right wait."""
    out = np.zeros(32, np.uint32)
    overwrite, read = "st.shared.u32 [%x1], 7;", "mad.wide.u32 %y1, %t, 4, %y0; ld.global.u32 %o, [%y1];"
    run_ptx(STORE + WAIT.format(".read") + overwrite, [out], "u4", shared=128)
    assert np.array_equal(out, np.arange(32))
    assert np.array_equal(run_ptx(STORE + WAIT.format("") + read, [out], "u4", shared=128), np.arange(32))
    with pytest.raises(PtxSanitizerError, match="race on shared byte 0: write by warp 0, read by the bulk-copy engine"):
        run_ptx(STORE + overwrite + WAIT.format(""), [out], "u4", shared=128)
    with pytest.raises(PtxSanitizerError, match="which the bulk-copy engine wrote"):
        run_ptx(STORE + WAIT.format(".read") + read, [out], "u4", shared=128)


def test_mbarrier_tokens():
    body = """setp.eq.u32 %q1, %t, 0; mov.u32 %o, 0; @%q1 mbarrier.init.shared.b64 [smem], 32; bar.warp.sync -1;
    mbarrier.arrive.shared.b64 %y0, [smem]; L: mbarrier.test_wait.shared.b64 %q2, [smem], %y0; @!%q2 bra L;
    mbarrier.pending_count.b64 %o, %y0;"""
    assert sorted(run_ptx(body, [], "u4", shared=16).tolist()) == list(range(1, 33))


@pytest.mark.parametrize(
    ("shape", "box", "swizzle", "problem"),
    [
        ((64, 64), (64, 64), 3, "at most the swizzle's 128"),
        ((64, 65), (64, 32), 0, "multiples of 16"),
        ((64, 64), (64,), 0, "rank"),
        ((512, 64), (300, 32), 0, "1 to 256"),
    ],
)
def test_tensor_map_limits(shape, box, swizzle, problem):
    dtype = torch.float32 if swizzle else torch.float16
    with pytest.raises(PtxError, match=problem):
        tensor_map(Session(), torch.zeros(shape, dtype=dtype), box, swizzle)


def wgmma(n: int, a: str, b: str, d: str, k: int, flags: str) -> str:
    """One wgmma of descriptors %y2 and %y3 with n / 2 accumulators from %x0"""
    accumulators = "{" + ",".join(f"%x{i}" for i in range(n // 2)) + "}"
    return f"""setp.ne.u32 %q1, 1, 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b} {accumulators}, %y2, %y3, %q1{flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""


FILL = """mov.u32 %x60, smem; mov.u32 %x61, 0; F: mad.lo.u32 %x62, %t, 4, %x60; add.u32 %x62, %x62, %x61;
st.shared.u32 [%x62], {value}; add.u32 %x61, %x61, 128; setp.lt.u32 %q3, %x61, {size}; @%q3 bra F;
fence.proxy.async.shared::cta; bar.warp.sync -1;"""
# No swizzle; core matrices lie 128 bytes apart along k and 256 along m and n.
OFFSETS = (128 >> 4) << 16 | (256 >> 4) << 32
DESCRIPTOR = f"shr.u32 %x60, %x60, 4; cvt.u64.u32 %y2, %x60; or.b64 %y2, %y2, {OFFSETS}; mov.b64 %y3, %y2;"


def test_wgmma_integers_are_exact():
    """A warp's rows of an 8-bit product, with accumulators that a float could not hold"""
    start = "".join(f"mov.u32 %x{i}, 33554433;" for i in range(4))
    body = FILL.format(value="0x01010101", size=4096) + DESCRIPTOR + start + wgmma(8, "s8", "s8", "s32", 32, "")
    assert (run_ptx(body + "mov.u32 %o, %x2;", [], "i4", target="sm_90a", shared=4096) == 33554433 + 32).all()


@pytest.mark.parametrize(("kind", "one", "k", "flags"), [("e4m3", 0x38, 32, ", 1, 1"), ("e5m2", 0x3C, 32, ", -1, 1")])
def test_wgmma_fp8_and_negation(kind, one, k, flags):
    start = "".join(f"mov.b32 %x{i}, 0f3F800000;" for i in range(4))
    fill = FILL.format(value=one * 0x01010101, size=4096)
    body = fill + DESCRIPTOR + start + wgmma(8, kind, kind, "f32", k, flags)
    expected = 1 - k if "-" in flags else 1 + k
    assert (run_ptx(body + "mov.b32 %o, %x3;", [], "f4", target="sm_90a", shared=4096) == expected).all()


def test_wgmma_refuses_base_offsets():
    body = FILL.format(value=0, size=4096) + DESCRIPTOR + f"or.b64 %y2, %y2, {1 << 49}; mov.u32 %o, 0;"
    with pytest.raises(PtxFault, match="base offset"):
        run_ptx(body + wgmma(8, "s8", "s8", "s32", 32, ""), [], "u4", target="sm_90a", shared=4096)
