"""Each check fires on a kernel that is wrong in the one way it looks for, and is quiet on the right one."""

import numpy as np
import pytest
from ptxsim import PtxFault, PtxModule, PtxSanitizerError, Uninit

from .helpers import cuda, run_ptx


@pytest.fixture
def basic() -> PtxModule:
    return cuda("basic")


def kinds(error) -> set[str]:
    return {r.kind for r in error.value.result.reports}


def test_out_of_bounds(basic):
    a, b, c = (np.zeros(128, np.float32) for _ in range(3))
    text = (
        r"out-of-bounds global read of 4 bytes.*1 bytes past the end of buffer #\d.*block \(1,0,0\), thread \(0,0,0\)"
    )
    with pytest.raises(PtxFault, match=text) as e:
        basic.launch("vadd_oob", grid=2, block=128, args=[a, b, c, 128])
    assert basic.source[e.value.line - 1].strip().startswith("ld.global")


def test_misaligned(basic):
    with pytest.raises(PtxFault, match="misaligned 16-byte"):
        basic.launch("misaligned", block=4, args=[np.zeros(16, np.float32), np.zeros(64, np.float32)])


def test_null_pointer(basic):
    with pytest.raises(PtxFault, match="out-of-bounds global"):
        basic.launch("vadd", block=32, args=[None, np.zeros(32, np.float32), np.zeros(32, np.float32), 32])


def test_write_to_read_only_array(basic):
    c = np.zeros(32, np.float32)
    c.flags.writeable = False
    with pytest.raises(PtxFault, match="write to read-only"):
        basic.launch("vadd", block=32, args=[np.zeros(32, np.float32), np.zeros(32, np.float32), c, 32])


def test_out_of_bounds_shared():
    with pytest.raises(PtxFault, match=r"out-of-bounds shared write of 4 bytes at byte 64 \(block has 64\)"):
        run_ptx("mov.u32 %o, 0; mad.lo.u32 %x0, %t, 4, smem; st.shared.u32 [%x0], %t;", [], "u4", shared=64)


def test_out_of_bounds_local():
    with pytest.raises(PtxFault, match="out-of-bounds local access"):
        run_ptx(".local .align 4 .b8 here[16]; mov.u64 %y0, here; st.local.u32 [%y0+400], %t; mov.u32 %o, 0;", [], "u4")


def test_uninitialised_global(basic):
    a = np.zeros(64, np.float32)
    with pytest.raises(PtxSanitizerError, match=r"uninitialised global memory at buffer #1 \+ 0") as e:
        basic.launch("vadd", block=64, args=[a, Uninit(a.copy()), a.copy(), 64])
    assert kinds(e) == {"uninit-global"}


def test_uninitialised_shared(basic):
    d = np.arange(64, dtype=np.int32)
    basic.launch("uninit_shared", block=64, args=[d, 64])
    with pytest.raises(PtxSanitizerError, match="uninitialised shared memory at byte 128") as e:
        basic.launch("uninit_shared", block=64, args=[d, 32])
    assert kinds(e) == {"uninit-shared"}


def test_missing_syncthreads(basic):
    d = np.arange(256, dtype=np.int32)
    basic.launch("rev_ok", block=256, args=[d])
    assert np.array_equal(d, np.arange(256)[::-1])
    with pytest.raises(PtxSanitizerError, match="race on shared byte") as e:
        basic.launch("rev_race", block=256, args=[d])
    assert "race" in kinds(e)
    assert not basic.launch("rev_race", block=32, args=[d[:32].copy()]).reports  # within a warp there is none


def test_races_can_be_switched_off(basic):
    d = np.arange(256, dtype=np.int32)
    r = basic.launch("rev_race", block=256, args=[d], races=False, check="collect")
    assert not r.by_kind("race")


def test_barrier_for_part_of_the_threads(basic):
    with pytest.raises(PtxSanitizerError, match="reached by only 64 of 128 threads") as e:
        basic.launch("half_barrier", block=128, args=[np.zeros(128, np.int32)])
    assert kinds(e) == {"barrier"}
    with pytest.raises(PtxFault, match=r"deadlock.*waits at barrier 1.*waits at barrier 2"):
        basic.launch("deadlock", block=64, args=[np.zeros(64, np.int32)])
    with pytest.raises(PtxSanitizerError, match="divergent warp"):
        basic.launch("div_barrier", block=64, args=[np.zeros(64, np.int32)])


def test_warp_sync_masks():
    with pytest.raises(PtxSanitizerError, match="member mask 0x0000ffff does not name it") as e:
        run_ptx("shfl.sync.idx.b32 %o, %t, 0, 31, 0xffff;", [], "u4")
    assert kinds(e) == {"warp-sync"}
    body = "setp.lt.u32 %q0, %t, 16; mov.u32 %o, 0; @%q0 shfl.sync.bfly.b32 %o, %t, 16, 31, 0xffff;"
    with pytest.raises(PtxSanitizerError, match="reads a lane that does not take part"):
        run_ptx(body, [], "u4")


def test_async_hazard():
    copy = "cp.async.ca.shared.global [smem], [%p], 4; cp.async.commit_group;"
    load = "ld.param.u64 %p, [k_0]; "
    x = np.arange(7, 39, dtype=np.uint32)
    good = run_ptx(f"{load}{copy} cp.async.wait_group 0; ld.shared.u32 %o, [smem];", [x], "u4", shared=16, races=False)
    assert (good == 7).all()
    with pytest.raises(PtxSanitizerError, match="while an async copy") as e:
        run_ptx(f"{load}{copy} ld.shared.u32 %o, [smem];", [x], "u4", shared=16, races=False)
    assert kinds(e) == {"async-hazard"}


def test_livelock_and_budget():
    flag = np.zeros(32, np.uint32)
    wait = "L: ld.param.u64 %y0, [k_0]; ld.volatile.global.u32 %o, [%y0]; setp.eq.u32 %q0, %o, 0; @%q0 bra L;"
    with pytest.raises(PtxFault, match="livelock"):
        run_ptx(wait, [flag], "u4")
    with pytest.raises(PtxFault, match="instruction budget of 100000"):
        run_ptx("mov.u32 %o, 0; L: add.u32 %o, %o, 1; bra L;", [], "u4", max_instructions=100000)


def test_trap_and_assert():
    with pytest.raises(PtxFault, match="trap executed at PTX line"):
        run_ptx("mov.u32 %o, 0; setp.eq.u32 %q0, %t, 3; @%q0 trap;", [], "u4")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive.shared.b64 %y0, [smem];", "holds no initialised mbarrier"),
        ("mbarrier.init.shared.b64 [smem], 0;", "with a count of 0"),
        ("mbarrier.init.shared.b64 [smem+4], 1;", "bad mbarrier address"),
        ("mbarrier.init.shared.b64 [smem], 1; mbarrier.arrive.shared.b64 %y0, [smem], 2;", "more arrivals"),
    ],
)
def test_bad_mbarrier(body, message):
    with pytest.raises(PtxFault, match=message):
        run_ptx(f"mov.u32 %o, 0; setp.eq.u32 %q0, %t, 0; @!%q0 bra E; {body} E:", [], "u4", shared=64)


def test_reports_name_the_instruction(basic):
    d = np.arange(256, dtype=np.int32)
    r = basic.launch("rev_race", block=256, args=[d], check="collect")
    assert r.reports
    assert all(report.source.startswith(("ld.shared", "st.shared")) for report in r.reports)


def test_writers_of_the_same_value(basic):
    d = np.zeros(128, np.int32)
    basic.launch("ww", block=128, args=[d, 1])
    assert (d == 5).all()
    text = "race on shared byte 0: write by warp 1, written by warp 0"
    with pytest.raises(PtxSanitizerError, match=text):
        basic.launch("ww", block=128, args=[d, 1], races="strict")
    with pytest.raises(PtxSanitizerError, match=text):
        basic.launch("ww", block=128, args=[d, 0])


def test_conflicts_between_blocks(basic):
    d = np.zeros(256, np.int32)
    basic.launch("overlap", grid=4, block=64, args=[d, 64])
    text = r"\[global-race\] write of buffer #0 \+ 128, which warp 1 of block 0 wrote.*nothing that orders the blocks"
    with pytest.raises(PtxSanitizerError, match=text):
        basic.launch("overlap", grid=4, block=64, args=[d, 32])
    with pytest.raises(
        PtxSanitizerError, match=r"\[global-race\] read of buffer #0 \+ 0, which warp 0 of block 0 wrote"
    ):
        basic.launch("readother", grid=4, block=1, args=[d, d.copy()])
