"""Thread block clusters: registers, shared memory of other blocks, the cluster's barrier, multicast."""

import numpy as np
import pytest
from ptxsim import PtxError, PtxFault, PtxModule, PtxSanitizerError, tensor_map

from .helpers import RNG, cuda

SIZES = [1, 2, 4, 8, 16]
SEEDS = [0, 1, 2]
BLOCKS = 16


def cluster(bug=0):
    return cuda("cluster", "compute_90a", "-std=c++17", f"-DBUG={bug}")


@pytest.mark.parametrize("dims", [None, (2, 1, 1), (1, 2, 2), (4, 2, 1), (1, 1, 1)])
def test_registers(dims):
    grid = (4, 6, 2)
    out = np.zeros((2, 6, 4, 17), np.uint32)
    cluster().launch("where", grid, 32, [out], cluster=dims)
    nx, ny, nz = dims or (1, 1, 1)
    z, y, x = np.indices(out.shape[:3])
    ones = np.ones_like(x)
    inside = [x % nx, y % ny, z % nz]
    rank = inside[0] + nx * (inside[1] + ny * inside[2])
    size = ones * nx * ny * nz
    expected = [x // nx, y // ny, z // nz, ones * 4 // nx, ones * 6 // ny, ones * 2 // nz, *inside]
    expected += [ones * nx, ones * ny, ones * nz, rank, size, ones * (dims is not None), rank, size]
    assert np.array_equal(out, np.stack(expected, -1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", SIZES)
def test_reading_from_another_block(n, seed):
    x = RNG.integers(0, 1 << 30, (BLOCKS, 64), dtype=np.int32)
    y = np.zeros_like(x)
    cluster().launch("exchange", BLOCKS, 64, [x, y], cluster=n, seed=seed)
    assert np.array_equal(y, np.roll(x.reshape(-1, n, 64), -1, axis=1).reshape(BLOCKS, 64)[:, ::-1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", SIZES)
def test_atomics_on_shared_memory_of_another_block(n, seed):
    bins, per_cluster = 32 * n, 700
    x = RNG.integers(0, bins, (BLOCKS // n, per_cluster), dtype=np.uint32)
    y = np.zeros((BLOCKS // n, n, 32), np.uint32)
    cluster().launch("histogram", BLOCKS, 64, [x, y, per_cluster], cluster=n, seed=seed)
    for part, counts in zip(x, y, strict=True):  # value v lies in block v % n, bin v / n
        assert np.array_equal(counts.T.reshape(-1), np.bincount(part, minlength=bins))


def pipeline(n, bug=0, tiles=7, **options):
    x = RNG.integers(-1000, 1000, (BLOCKS // n, tiles, n, 32), dtype=np.int32)
    y = np.zeros((BLOCKS // n, n, 64), np.int32)
    r = cluster(bug).launch("pipeline", BLOCKS, 96, [x, y, tiles], n * 256, cluster=n, **options)
    s = x.sum((1, 2))
    return r, np.array_equal(y, np.concatenate([s, 2 * s], 1)[:, None].repeat(n, 1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", SIZES)
def test_multicast(n, seed):
    r, right = pipeline(n, seed=seed)
    assert right
    copies = BLOCKS * 7
    assert (r.global_load["requests"], r.global_load["bytes"]) == (copies, copies * 128)  # once for the whole cluster
    assert (r.bulk_copy["bytes"], r.bulk_copy["wavefronts"]) == (copies * 128 * n, copies * n)
    assert r.unique_read == copies * 128


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_tensor_multicast(n, seed):
    module, blocks = cluster(), 4
    x = RNG.standard_normal((8 * n, 32 * blocks // n)).astype(np.float32)
    y = np.zeros((blocks // n, n, 8 * n, 32), np.float32)
    args = [tensor_map(module, x, (8, 32)), y]
    r = module.launch("tensor_multicast", blocks, 64, args, 8 * n * 128, cluster=n, seed=seed)
    tiles = x.reshape(8 * n, blocks // n, 32).transpose(1, 0, 2)
    assert np.array_equal(y, tiles[:, None].repeat(n, 1))
    assert r.global_load["bytes"] == x.nbytes
    assert r.bulk_copy["bytes"] == x.nbytes * n


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", SIZES)
def test_copy_to_another_block(n, seed):
    x = RNG.integers(0, 1 << 30, (BLOCKS, 64), dtype=np.int32)
    y = np.zeros_like(x)
    r = cluster().launch("push", BLOCKS, 64, [x, y], cluster=n, seed=seed)
    assert np.array_equal(y, np.roll(x.reshape(-1, n, 64), 1, axis=1).reshape(BLOCKS, 64))
    assert r.bulk_copy["bytes"] == x.nbytes
    assert r.global_load["requests"] == BLOCKS * 2  # by the warps; a copy within the cluster is none


# ---- what is wrong is found ----------------------------------------------------------------------------------
def findings(kernel, bug, block, args, shared=0, n=4, seed=0):
    """Kinds of reports, or the fault's text."""
    try:
        options = {"cluster": n, "seed": seed, "check": "collect", "max_instructions": 10**7}
        r = cluster(bug).launch(kernel, BLOCKS, block, args, shared, **options)
    except PtxFault as fault:
        return str(fault)
    return {report.kind for report in r.reports}


def ints(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier_of_the_cluster(seed):
    args = [ints(BLOCKS, 64), ints(BLOCKS, 64)]
    assert "race" in findings("exchange", 1, 64, args, seed=seed)  # a barrier of the block only
    assert findings("exchange", 2, 64, args, seed=seed) == {"race"}  # relaxed: ordered in time, not in memory
    assert findings("exchange", 7, 64, args, seed=seed) == set()  # ... which a fence makes up for
    assert "which has exited" in findings("exchange", 4, 64, args, seed=seed)
    values = np.arange(4 * 700, dtype=np.uint32) % 128
    assert findings("histogram", 1, 64, [values, ints(BLOCKS, 32), 700], seed=seed) == {"race"}


def test_exit_that_only_happened_to_come_late():
    assert findings("peek", 0, 32, [ints(32)]) == set()
    with pytest.raises(PtxSanitizerError, match="the block exits, and warp 0 of block 3 accesses its shared memory"):
        cluster(4).launch("peek", 4, 32, [ints(32)], cluster=4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bug", "kinds", "fault"),
    [
        pytest.param(1, set(), "more arrivals", id="no empty wait"),
        pytest.param(2, {"race"}, "", id="empty for the own block only"),
        pytest.param(3, {"race"}, "", id="arrival of the block's scope"),
        pytest.param(4, set(), "which has exited", id="no barrier before the exit"),
        pytest.param(5, {"race"}, "no initialised mbarrier", id="no barrier after the initialisation"),
        pytest.param(6, {"race"}, "", id="no fence after the initialisation"),
        pytest.param(7, set(), "(more arrivals|livelock)", id="no full wait"),
        pytest.param(8, {"race"}, "", id="wait of the block's scope"),
    ],
)
def test_pipeline_without(bug, kinds, fault, seed):
    found = findings("pipeline", bug, 96, [ints(4, 7, 4, 32), ints(BLOCKS, 64), 7], 4 * 256, seed=seed)
    if isinstance(found, str):
        assert fault
        assert any(text in found for text in fault.strip("()").split("|"))
    else:
        assert kinds
        assert kinds <= found <= kinds | {"async-hazard"}


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_to_another_block_without(seed):
    args = [ints(BLOCKS, 64), ints(BLOCKS, 64)]
    assert findings("push", 1, 64, args, seed=seed) == {"missing-proxy-fence"}
    assert "but its mbarrier is in block" in findings("push", 2, 64, args, seed=seed)
    assert {"async-hazard", "race"} <= findings("push", 3, 64, args, seed=seed)
    assert "race" in findings("push", 4, 64, args, seed=seed)  # its source may be gone
    found = findings("push", 5, 64, args, seed=seed)
    assert "no initialised mbarrier" in found if isinstance(found, str) else "race" in found
    assert "race" in findings("push", 6, 64, args, seed=seed)


def test_global_memory_within_a_cluster():
    x, y = ints(32), ints(32)
    cluster().launch("through_global", 2, 32, [x, y], cluster=2)
    assert np.array_equal(y, np.arange(32))
    with pytest.raises(PtxSanitizerError, match="with no barrier of the cluster in between"):
        cluster(1).launch("through_global", 2, 32, [x, y], cluster=2)


PTX = """.version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out) .explicitcluster .reqnctapercluster 2, 1, 1
{{
.reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p<4>;
.shared .align 16 .b8 smem[64];
mov.u32 %r0, smem; mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mapa.shared::cluster.u32 %r3, %r0, %r2;
ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r1, 4, %d0; mov.u32 %r4, 0;
{body}
barrier.cluster.arrive; barrier.cluster.wait; st.global.u32 [%d0], %r4; ret;
}}
"""
SYNC = "barrier.cluster.arrive; barrier.cluster.wait;"


def run_pair(body):
    out = np.zeros(2, np.uint32)
    PtxModule(PTX.format(body=body)).launch("k", 2, 1, [out])
    return out.tolist()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"st.shared::cluster.u32 [%r3+4], %r1; {SYNC} ld.shared.u32 %r4, [smem+4];", [1, 0]),
        (f"st.shared.u32 [smem], %r1; {SYNC} ld.shared::cluster.u32 %r4, [%r3];", [1, 0]),
        (f"st.shared.u32 [smem], 5; {SYNC} atom.shared::cluster.add.u32 %r4, [%r3], 1;", [5, 5]),
        (f"st.shared.u32 [smem], 5; {SYNC} red.shared::cluster.add.u32 [%r3], %r1; {SYNC} ld.shared.u32 %r4, [smem];",
         [6, 5]),
        ("getctarank.shared::cluster.u32 %r4, %r3;", [1, 0]),
        ("getctarank.shared::cluster.u32 %r4, %r0;", [0, 1]),
        ("cvt.u64.u32 %d1, %r0; cvta.shared.u64 %d1, %d1; mapa.u64 %d2, %d1, %r2; isspacep.shared::cta %p0, %d2;"
         "isspacep.shared::cluster %p1, %d2; selp.u32 %r4, 1, 0, %p0; selp.u32 %r5, 2, 0, %p1; add.u32 %r4, %r4, %r5;",
         [2, 2]),
        (f"mapa.shared::cluster.u32 %r5, %r0, %r1; st.shared.u32 [%r5], 9; {SYNC} ld.shared::cluster.u32 %r4, [%r3];",
         [9, 9]),
    ],
)  # fmt: skip
def test_instructions(body, expected):
    assert run_pair(body) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mapa.shared::cluster.u32 %r5, %r0, 2;", "block 2 of a cluster of 2 blocks"),
        ("ld.shared.u32 %r4, [%r3];", "in an access to .shared::cta"),
        ("ld.shared::cluster.u32 %r4, [%r3+64];", "out-of-bounds shared read of 4 bytes at byte 64 of block 1"),
        ("st.shared::cluster.u32 [%r3+2], 0;", "misaligned 4-byte shared"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "the one before has not been waited for"),
        ("barrier.cluster.wait;", "without an arrival before it"),
        ("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];", "of block 1, which holds no initialised"),
        (f"mbarrier.init.shared.b64 [smem], 1; {SYNC} "
         "mbarrier.try_wait.parity.b64 %p0, [%r3], 0;", "own mbarriers only"),
        (f"mbarrier.init.shared.b64 [smem], 1; {SYNC} mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r3], "
         "1048576;", "count of bytes"),
        ("mbarrier.init.shared.b64 [smem], 1; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
         ".multicast::cluster [smem+16], [%d0], 16, [smem], 4;", "multicast mask 0x4 for a cluster of 2 blocks"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r3], 16;", "shared memory of another block"),
        ("setp.eq.u32 %p0, %r1, 0; @%p0 bar.sync 1, 64; @!%p0 bra E; E:", "deadlock in the cluster from block"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(PtxFault, match=message):
        run_pair(body)


def test_launches():
    module = cluster()
    for options, message in (
        ({"cluster": 3}, "not a multiple of the cluster"),
        ({"cluster": 32}, "must be 1 to 16"),
        ({"cluster": 0}, "must be 1 to 16"),
    ):
        with pytest.raises(PtxError, match=message):
            module.launch("peek", 4, 32, [ints(32)], **options)
    fixed = PtxModule(PTX.format(body=""))
    with pytest.raises(PtxError, match="requires clusters of"):
        fixed.launch("k", 4, 1, [np.zeros(4, np.uint32)], cluster=4)
    unsaid = PtxModule(PTX.format(body="").replace(".reqnctapercluster 2, 1, 1", ""))
    with pytest.raises(PtxError, match="say cluster="):
        unsaid.launch("k", 4, 1, [np.zeros(4, np.uint32)])
