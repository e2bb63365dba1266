"""Ordering in global memory: within a block, and between blocks through counters and flags."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ptxsim import PtxModule, PtxSanitizerError, Uninit

from .helpers import RNG, cuda

BLOCKS, WIDTH, THREADS = 6, 100, 64


def arrive(kernel, **options):
    """Runs a last-arriver reduction; returns its result, its reports and what is right."""
    module = cuda("ordering", "compute_80", "-std=c++17")
    x = RNG.standard_normal((BLOCKS, WIDTH)).astype(np.float32)
    partial, out = np.empty_like(x), np.zeros(WIDTH, np.float32)
    r = module.launch(kernel, BLOCKS, THREADS, [x, Uninit(partial), Uninit(out), WIDTH], check="collect", **options)
    return out, r.reports, 2 * x.sum(0)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", ["last_ok", "last_fence_first"])
def test_last_arriver(kernel, seed):
    out, reports, expected = arrive(kernel, seed=seed, resident=3)
    assert not reports
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


MISSING = {
    "last_no_barrier": "no barrier between it and the fence or release",
    "last_no_fence": r"no fence|nothing that orders the blocks",
    "last_no_acquire": r"relaxed access only: a fence \(__threadfence\) must follow",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", MISSING)
def test_last_arriver_with_something_missing(kernel, seed):
    _, reports, _ = arrive(kernel, seed=seed)
    assert {r.kind for r in reports} == {"global-race"}
    assert any(r.source.startswith("ld.global") for r in reports)
    assert re.search(MISSING[kernel], "\n".join(map(str, reports)))


def test_block_order_shows_in_the_result():
    """Without an order between them the block that starts last wins."""
    module = cuda("basic")
    winner = []
    for order in ("ascending", "descending", [2, 0, 3, 1]):
        d = np.zeros(64, np.int32)
        module.launch("overlap", 4, 64, [d, 0], block_order=order, check="collect")
        winner.append(int(d[0]))
    assert winner == [4, 1, 2]
    shuffled = set()
    for seed in range(1, 9):
        d = np.zeros(64, np.int32)
        module.launch("overlap", 4, 64, [d, 0], seed=seed, check="collect")
        shuffled.add(int(d[0]))
    assert len(shuffled) > 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chain_of_blocks(seed):
    module = cuda("ordering", "compute_80", "-std=c++17")
    x = RNG.standard_normal((5, 32)).astype(np.float32)
    expected = x[0]
    for row in x[1:]:
        expected = expected + row
    for kernel, right in (("chain_ok", True), ("chain_relaxed", False)):
        turn, total = np.zeros(1, np.int32), np.zeros(32, np.float32)
        r = module.launch(kernel, 5, 32, [turn, total, x], seed=seed, check="collect")
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
        assert bool(r.by_kind("global-race")) is not right


@pytest.mark.parametrize("kernel", ["exchange", "read_write"])
def test_races_within_a_block(kernel):
    module = cuda("ordering", "compute_80", "-std=c++17")

    def args(n=128):
        return [np.arange(n, dtype=np.int32), np.zeros(n, np.int32)]

    assert not module.launch(f"{kernel}_ok", 1, 128, args()).reports
    with pytest.raises(PtxSanitizerError, match=r"with no barrier in between") as e:
        module.launch(f"{kernel}_race", 1, 128, args())
    assert {r.kind for r in e.value.result.reports} == {"global-race"}
    assert not module.launch(f"{kernel}_race", 1, 32, args(32)).reports  # one warp


@pytest.mark.parametrize("seed", [0, 5])
def test_atomics_on_data_need_no_order(seed):
    x, bins = RNG.integers(0, 50, 3000).astype(np.uint8), np.zeros(64, np.uint32)
    cuda("ordering", "compute_80", "-std=c++17").launch("count", 4, 128, [bins, x, x.size], seed=seed, resident=2)
    assert np.array_equal(bins, np.bincount(x, minlength=64))


SHARED_FLAG = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 data, .param .u64 out)
{
.reg .b64 %d, %o; .reg .b32 %b, %v; .reg .pred %p;
.shared .align 4 .b8 flag[4];
ld.param.u64 %d, [data]; ld.param.u64 %o, [out]; mov.u32 %b, %ctaid.x; setp.eq.u32 %p, %b, 0;
st.volatile.shared.u32 [flag], %b;
@!%p bra R;
st.global.u32 [%d], 7; membar.gl; st.volatile.shared.u32 [flag], 1;
ret;
R: ld.volatile.shared.u32 %v, [flag]; membar.gl; ld.global.u32 %v, [%d]; st.global.u32 [%o], %v;
ret;
}
"""


def test_flags_in_shared_memory_order_no_blocks():
    with pytest.raises(PtxSanitizerError, match="with nothing that orders the blocks"):
        PtxModule(SHARED_FLAG).launch("k", 2, 1, [np.zeros(1, np.uint32), np.zeros(1, np.uint32)])


def test_launches_from_two_threads():
    """They take turns on a module."""
    module = cuda("ordering", "compute_80", "-std=c++17")
    x, results = np.ones(4096, np.float32), [np.zeros(4096, np.float32) for _ in range(4)]

    def run(y):
        for _ in range(5):
            assert module.launch("scale", 32, 128, [x, y, 2.0, 4096]).unique_written == y.nbytes

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, results))
    assert all((y == 2).all() for y in results)
