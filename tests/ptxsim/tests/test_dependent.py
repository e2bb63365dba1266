"""Launches beside the end of those before them, images older than the GPU, and what L1 keeps."""

import numpy as np
import pytest
from ptxsim import PtxError, PtxFault, PtxModule, PtxSanitizerError, Session

from .helpers import RNG

HEAD = """.version 8.7
.target {target}
.address_size 64
"""
KERNEL = """.visible .entry {name}(.param .u64 x, .param .u64 y)
{{
.reg .b32 %r<8>; .reg .b64 %x<4>; .reg .pred %p<4>;
ld.param.u64 %x0, [x]; ld.param.u64 %x1, [y]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
mad.wide.u32 %x2, %r0, 4, %x0; mad.wide.u32 %x3, %r0, 4, %x1;
{body}
ret;
}}
"""
WAIT, LOAD, STORE = "griddepcontrol.wait;", "ld.global.cg.u32 %r2, [%x2];", "st.global.u32 [%x3], %r2;"
BODIES = {
    "copy": f"{LOAD} {STORE}",
    "late": f"{WAIT} {LOAD} {STORE}",
    "early": f"{LOAD} {WAIT} {STORE}",
    "store_early": f"mov.u32 %r2, 7; {STORE} {WAIT}",
    "one_waits": f"setp.ge.u32 %p0, %r0, 32; @%p0 bra A; {WAIT} A: bar.sync 0; {LOAD} {STORE}",
    "one_waits_alone": f"setp.ge.u32 %p0, %r0, 32; @%p0 bra A; {WAIT} A: {LOAD} {STORE}",
    # The line is in L1 from before the wait.
    "line": f"ld.global.u32 %r3, [%x0+128]; {WAIT} ld.global.u32 %r2, [%x0+192]; {STORE}",
    "line_by_l2": f"ld.global.u32 %r3, [%x0+128]; {WAIT} ld.global.cg.u32 %r2, [%x0+192]; {STORE}",
}


def module(target="sm_90", **bodies):
    kernels = (KERNEL.format(name=name, body=body) for name, body in (bodies or BODIES).items())
    return PtxModule(HEAD.format(target=target) + "".join(kernels))


def numbers(n=64):
    return RNG.integers(0, 1 << 30, n, dtype=np.int32)


def chain(*kernels, found=None):
    """The kernels one after the other, each dependent but the first, each on what the one before wrote."""
    session, compiled = Session(), module()
    maps = [numbers() for _ in range(len(kernels) + 1)]
    for array in maps:
        session.register(array)
    for i, kernel in enumerate(kernels):
        last = i == len(kernels) - 1
        r = session.launch(compiled, kernel, 1, 64, maps[i : i + 2], dependent=i > 0, check="collect")
        assert {report.kind for report in r.reports} == ({found} if found and last else set())
    return maps


def test_what_waits_sees_what_was_written():
    maps = chain("copy", "late", "one_waits", "late")
    assert all(np.array_equal(x, maps[0]) for x in maps)


@pytest.mark.parametrize("kernel", ["early", "copy", "store_early", "one_waits_alone"])
def test_what_does_not_wait_is_found(kernel):
    chain("copy", kernel, found="before-wait")


def test_what_an_earlier_launch_of_the_chain_wrote_is_pending():
    session, compiled = Session(), module()
    a, b, c = numbers(), numbers(), numbers()
    session.launch(compiled, "copy", 1, 64, [a, b])
    session.launch(compiled, "late", 1, 64, [a, c], dependent=True)
    with pytest.raises(PtxSanitizerError, match=r"which a launch before this one wrote, before griddepcontrol.wait"):
        session.launch(compiled, "early", 1, 64, [b, c], dependent=True)


def test_constants_may_be_read_early():
    session, compiled = Session(), module()
    a, b, c = numbers(), numbers(), numbers()
    session.launch(compiled, "copy", 1, 64, [a, b])
    session.launch(compiled, "early", 1, 64, [a, c], dependent=True)
    assert np.array_equal(c, a)


def test_an_ordinary_launch_ends_the_chain():
    session, compiled = Session(), module()
    a, b, c, d = (numbers() for _ in range(4))
    session.launch(compiled, "copy", 1, 64, [a, b])
    session.launch(compiled, "copy", 1, 64, [b, c])  # is not dependent: all before it has ended
    session.launch(compiled, "early", 1, 64, [b, d], dependent=True)
    assert np.array_equal(d, a)


def test_bulk_copies_before_the_wait():
    body = """
.shared .align 16 .b8 smem[32];
setp.ne.u32 %p0, %r0, 0; @%p0 bra E;
mbarrier.init.shared.b64 [smem], 1; mbarrier.arrive.expect_tx.shared.b64 _, [smem], 16;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem+16], [%x0], 16, [smem];
L: mbarrier.try_wait.parity.shared.b64 %p1, [smem], 0; @!%p1 bra L;
griddepcontrol.wait; E:"""
    session, compiled = Session(), module(copy=BODIES["copy"], bulk=body)
    a, b = numbers(), numbers()
    session.launch(compiled, "copy", 1, 64, [a, b])
    session.launch(compiled, "bulk", 1, 32, [a, b], dependent=True)
    session.launch(compiled, "copy", 1, 64, [a, b])
    with pytest.raises(PtxSanitizerError, match="before-wait"):
        session.launch(compiled, "bulk", 1, 32, [b, a], dependent=True)


# ---- the image


def test_the_gpu_bounds_shared_memory_and_the_image_the_instructions():
    compiled, (a, b) = module("sm_80"), (numbers(), numbers())
    compiled.launch("copy", 1, 64, [a, b], 120 << 10)
    compiled.launch("copy", 1, 64, [a, b], 200 << 10, architecture=90)
    with pytest.raises(PtxError, match="sm_89 allows 101376 a block"):
        compiled.launch("copy", 1, 64, [a, b], 120 << 10, architecture=89)
    for target, architecture in (("sm_90", 80), ("sm_90a", 100), ("sm_90a", 89)):
        with pytest.raises(PtxError, match=f"an image for {target} does not run on sm_{architecture}"):
            module(target).launch("copy", 1, 64, [a, b], architecture=architecture)
    module("sm_90a").launch("copy", 1, 64, [a, b], architecture=90)


def test_an_image_that_knows_no_dependent_launch():
    """An sm_80 image launched beside its producer because the GPU could: nothing in it waits."""
    session, (a, b, c) = Session(), (numbers() for _ in range(3))
    session.launch(module(), "copy", 1, 64, [a, b])
    older = module("sm_80", copy=BODIES["copy"])
    with pytest.raises(PtxSanitizerError, match="before-wait"):
        session.launch(older, "copy", 1, 64, [b, c], dependent=True, architecture=90)


# ---- L1


@pytest.mark.parametrize(("kernel", "found"), [("line", {"stale-l1"}), ("line_by_l2", set())])
def test_a_line_from_before_the_wait(kernel, found):
    session, compiled = Session(), module()
    a, x, y = numbers(), numbers(128), numbers()
    for array in (a, x, y):
        session.register(array)
    session.launch(compiled, "copy", 1, 32, [a, x[48:]])  # bytes 192 to 319; 128 to 191 are constant
    r = session.launch(compiled, kernel, 1, 32, [x, y], dependent=True, check="collect")
    assert {report.kind for report in r.reports} == found
    assert (y[:32] == a[0]).all()


# Block 1 loads a line, block 0 writes another word of it and raises a flag; block 1 sees the flag and loads the word.
FLAG = """
setp.ne.u32 %p0, %r1, 0; @%p0 bra READER;
ld.relaxed.gpu.global.u32 %r3, [%x1+4]; mov.u32 %r4, 5;
WAITING: ld.acquire.gpu.global.u32 %r3, [%x1+4]; setp.eq.u32 %p1, %r3, 0; @%p1 bra WAITING;
st.global.u32 [%x0+64], %r4; st.release.gpu.global.u32 [%x1], 1; ret;
READER: {first} st.release.gpu.global.u32 [%x1+4], 1;
POLL: {poll} setp.eq.u32 %p1, %r3, 0; @%p1 bra POLL;
{second} st.global.u32 [%x1+8], %r2;
"""
ACQUIRE, RELAXED = "ld.acquire.gpu.global.u32 %r3, [%x1];", "ld.relaxed.gpu.global.u32 %r3, [%x1];"
PLAIN, BY_L2, CONSTANT = (f"ld.global{how}.u32 %r2, [%x0{{}}];" for how in ("", ".cg", ".nc"))
COPY = """.shared .align 16 .b8 smem[16]; cp.async.ca.shared.global [smem], [%x0{}], 4; cp.async.wait_all;
ld.shared.u32 %r2, [smem];"""


@pytest.mark.parametrize(
    ("first", "poll", "second", "found"),
    [
        pytest.param(PLAIN, ACQUIRE, PLAIN, set(), id="acquired"),
        pytest.param(PLAIN, RELAXED + "fence.acq_rel.gpu;", PLAIN, set(), id="fenced"),
        pytest.param(PLAIN, RELAXED, PLAIN, {"stale-l1", "global-race"}, id="not acquired"),
        pytest.param(PLAIN, RELAXED, BY_L2, {"global-race"}, id="through L2"),
        pytest.param(BY_L2, RELAXED, PLAIN, {"global-race"}, id="not cached before"),
        pytest.param(PLAIN, RELAXED, COPY, {"stale-l1", "global-race"}, id="cp.async.ca"),
        pytest.param(PLAIN, ACQUIRE, COPY, set(), id="cp.async.ca acquired"),
        pytest.param(CONSTANT, ACQUIRE, CONSTANT, {"stale-l1"}, id="ld.nc"),
        pytest.param(BY_L2, ACQUIRE, CONSTANT, {"stale-l1"}, id="ld.nc of what the launch writes"),
    ],
)
def test_a_line_that_another_block_writes(first, poll, second, found):
    body = FLAG.format(first=first.format(""), poll=poll, second=second.format("+64"))
    x, y = numbers(), np.zeros(4, np.int32)
    r = module(flag=body).launch("flag", 2, 1, [x, y], resident=2, check="collect")
    assert {report.kind for report in r.reports} == found
    assert y[2] == 5


# ---- arrivals of CUTLASS's form

PAIR = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 x, .param .u64 y) .explicitcluster .reqnctapercluster 2, 1, 1
{{
.reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p<4>; .reg .b16 %h; .reg .f32 %f<8>; .reg .b32 %a<4>;
.shared .align 1024 .b8 smem[2048];
mov.u32 %r0, smem; mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mapa.shared::cluster.u32 %r3, %r0, %r2;
mov.u32 %r9, %tid.x; setp.ne.u32 %p3, %r9, 0;
ld.param.u64 %d0, [x]; ld.param.u64 %d1, [y];
@%p3 bra READY;
mbarrier.init.shared.b64 [smem+1024], 1; mbarrier.init.shared.b64 [smem+1032], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared.b64 _, [smem+1024], 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem], [%d0], 1024, [smem+1024];
READY:
barrier.cluster.arrive; barrier.cluster.wait;
FULL: mbarrier.try_wait.parity.shared.b64 %p0, [smem+1024], 0; @!%p0 bra FULL;
{use}
bar.sync 0;
@%p3 bra DONE;
add.u32 %r4, %r3, 1032; mbarrier.arrive{semantics}.shared::cluster.b64 _, [%r4];
FREE: mbarrier.try_wait.parity{acquire}.shared.b64 %p0, [smem+1032], 0; @!%p0 bra FREE;
mbarrier.arrive.expect_tx.shared.b64 _, [smem+1024], 1024;
{refill}
AGAIN: mbarrier.try_wait.parity.shared.b64 %p0, [smem+1024], 1; @!%p0 bra AGAIN;
DONE:
barrier.cluster.arrive; barrier.cluster.wait; ret;
}}
"""
PRODUCT = """cvt.u64.u32 %d2, %r0; shr.u64 %d2, %d2, 4; or.b64 %d2, %d2, 0x4000002000010000;
mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0; mov.b32 %a3, 0;
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%a0, %a1, %a2, %a3}, %d2, 1, 1, 1, 0;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
READ = "ld.shared.u32 %r5, [smem];"
WRITE = "st.shared.u32 [smem+1040], %r1;"
# Each block fills the other one's memory, which only that one can know to be free.
REFILL = """mov.u16 %h, 3; mul.lo.u32 %r6, %r1, 512; add.u32 %r7, %r0, %r6;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
[%r7], [%d0], 512, [smem+1024], %h;"""
PEEK = REFILL + "ld.shared::cluster.u32 %r5, [%r3+1040];"
STRONG, STRONG_WAIT = ".release.cluster", ".acquire.cluster"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("use", "semantics", "acquire", "refill", "found"),
    [
        pytest.param(PRODUCT, "", "", REFILL, set(), id="products"),
        pytest.param(PRODUCT, STRONG, STRONG_WAIT, REFILL, set(), id="products, released"),
        pytest.param(READ + PRODUCT, "", "", REFILL, {"race"}, id="plain read"),
        pytest.param(READ + PRODUCT, STRONG, STRONG_WAIT, REFILL, set(), id="plain read, released"),
        pytest.param(WRITE + PRODUCT, "", "", PEEK, {"race"}, id="data"),
        pytest.param(WRITE + PRODUCT, STRONG, STRONG_WAIT, PEEK, set(), id="data, released"),
    ],
)
def test_arrivals_without_a_release(use, semantics, acquire, refill, found, seed):
    text = PAIR.format(use=use, semantics=semantics, acquire=acquire, refill=refill)
    x, y = RNG.integers(0, 100, 512).astype(np.float16), np.zeros(4, np.int32)
    r = PtxModule(text).launch("k", 2, 128, [x, y], seed=seed, check="collect")
    assert {report.kind for report in r.reports} == found


def test_a_refill_that_waits_for_nobody():
    """What makes the arrival right is the wait: without it the copy meets products that go on."""
    text = PAIR.format(use=PRODUCT, semantics="", acquire="", refill=REFILL)
    text = text.replace("FREE: mbarrier.try_wait.parity.shared.b64 %p0, [smem+1032], 0; @!%p0 bra FREE;", "")
    x, y = RNG.integers(0, 100, 512).astype(np.float16), np.zeros(4, np.int32)
    kinds = set()
    for seed in range(4):
        try:
            r = PtxModule(text).launch("k", 2, 128, [x, y], seed=seed, check="collect")
            kinds |= {report.kind for report in r.reports}
        except PtxFault as fault:
            kinds.add(str(fault))
    assert "race" in kinds
