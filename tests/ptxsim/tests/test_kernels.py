"""Whole kernels that are right: results, divergence, synchronisation, counters."""

import numpy as np
import pytest
from ptxsim import PtxModule, Uninit, ptxas_info

from .helpers import RNG, cuda


@pytest.fixture
def basic() -> PtxModule:
    return cuda("basic")


@pytest.mark.parametrize("n", [1, 31, 128, 1000, 4097])
def test_vector_add(basic, n):
    a, b = (RNG.standard_normal(n).astype(np.float32) for _ in range(2))
    c = np.empty(n, np.float32)
    r = basic.launch("vadd", grid=-(-n // 128), block=128, args=[a, b, Uninit(c), n])
    assert np.array_equal(c, a + b)
    assert (r.unique_read, r.unique_written) == (8 * n, 4 * n)
    assert r.unique_lines == 3 * -(-n // 32)
    assert r.global_load["bytes"] == 8 * n


@pytest.mark.parametrize(("n", "grid"), [(5000, 10), (100, 3), (40000, 64)])
def test_last_block_reduces(basic, n, grid):
    x, partial, out = RNG.standard_normal(n).astype(np.float32), np.empty(grid, np.float32), np.zeros(1, np.float32)
    for seed in range(3):  # the counter wraps, so it can be launched again
        basic.launch("reduce_last", grid=grid, block=128, args=[x, Uninit(partial), Uninit(out), n], seed=seed)
        assert abs(out[0] - x.astype(np.float64).sum()) < 1e-3 * np.sqrt(n)
    assert basic.symbol("counter", np.uint32)[0] == 0


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_named_barriers(basic, seed):
    d = np.zeros(128, np.int32)
    basic.launch("named", block=64, args=[d], seed=seed)
    assert np.array_equal(d, [i * 100 + 31 - lane for i in range(4) for lane in range(32)])


def _divergent(t: int) -> int:
    r = 0
    for i in range(t % 7):
        if (i + t) & 1:
            r += i
        else:
            for j in range(i):
                if j == t % 5:
                    break
                r += j * t
            continue
        r ^= t
    return [r + 11, r * 3, r - t, (r ^ 0x55) + 7, r + 7, -r][t % 6]


def test_divergence(basic):
    d = np.zeros(1000, np.int32)
    basic.launch("divergent", grid=8, block=128, args=[d, d.size])
    assert np.array_equal(d, [_divergent(t) for t in range(d.size)])


def test_blocks_that_wait_for_later_blocks(basic):
    flag, out = np.zeros(20, np.int32), np.zeros(20, np.int32)
    basic.launch("spin", grid=20, block=32, args=[flag, out])
    assert np.array_equal(out, np.arange(20, 0, -1))


def test_shared_atomics(basic):
    x, bins = RNG.integers(0, 256, 10000).astype(np.uint8), np.zeros(256, np.uint32)
    basic.launch("hist", grid=4, block=256, args=[x, bins, x.size])
    assert np.array_equal(bins, np.bincount(x, minlength=256))


@pytest.mark.parametrize(("pad", "conflict"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1)])
def test_bank_conflicts(basic, pad, conflict):
    x, y = RNG.standard_normal(32).astype(np.float32), np.zeros(32, np.float32)
    r = basic.launch("banks", block=32, args=[x, y, pad], shared_bytes=4 * 33 * 32)
    assert r.shared_load["bank_conflict"] == conflict
    assert np.array_equal(x, y)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (16, 32)])
def test_sectors(basic, stride, sectors):
    x, y = RNG.standard_normal(32 * 16).astype(np.float32), np.zeros(32, np.float32)
    r = basic.launch("strided", block=32, args=[x, y, stride])
    assert r.global_load["sectors_per_request"] == sectors
    assert r.hot(1, "sectors")[0]["text"].startswith("ld.global")


def test_printf(basic):
    assert basic.launch("hello", block=32, args=[5]).output == "t 0 x 2.50 ok\nt 1 x 2.50 ok\n"


@pytest.mark.parametrize("kernel", ["lanelock", "lanelock2"])
def test_lock_between_lanes(basic, kernel):
    lock, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    basic.launch(kernel, grid=3, block=64, args=[lock, count])
    assert count[0] == 192


def test_warp_sync_in_divergent_code(basic):
    d = np.zeros(64, np.int32)
    basic.launch("syncwarp_div", block=64, args=[d])
    assert np.array_equal(d, [(t ^ 16) * 3 if t & 16 else (t ^ 16) * 2 + 1 for t in range(64)])
    basic.launch("halfshfl", block=64, args=[d])
    first = [t // 32 * 32 for t in range(64)]
    expected = [sum(range(f, f + 8)) if t % 32 < 8 else (f + 9) * 7 if t % 32 < 16 else -1 for t, f in enumerate(first)]
    assert np.array_equal(d, expected)


def test_indices_in_three_dimensions(basic):
    grid, block = (2, 3, 2), (5, 4, 3)
    out = np.zeros((12 * 60, 4), np.int32)
    basic.launch("ids", grid=grid, block=block, args=[Uninit(out)])
    blocks = [(x, y, z) for z in range(2) for y in range(3) for x in range(2)]
    threads = [(x, y, z) for z in range(3) for y in range(4) for x in range(5)]
    code = lambda p: p[0] + 100 * p[1] + 10000 * p[2]  # noqa: E731
    assert np.array_equal(out, [(code(b), code(t), i, j) for j, t in enumerate(blocks) for i, b in enumerate(threads)])


def test_ptxas_figures(basic):
    x = np.zeros(32, np.float32)
    info = ptxas_info(basic.text)
    r = basic.launch("banks", block=32, args=[x, x.copy(), 1], shared_bytes=4096, ptxas=info)
    assert r.ptxas["registers"] > 4
    assert r.ptxas["spill_stores"] == 0


def test_summary_reads_like_a_report(basic):
    x, y = np.ones(32, np.float32), np.zeros(32, np.float32)
    text = basic.launch("banks", block=32, args=[x, y, 2], shared_bytes=4096).summary()
    assert "shared_load: requests=1, bytes=128, wavefronts=2, ideal_wavefronts=1, bank_conflict=2" in text
    assert "compulsory traffic: 128 B read + 128 B written (2 lines of 128 B)" in text
