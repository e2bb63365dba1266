"""Thread block clusters: registers, shared memory of other blocks, the cluster's barrier, multicast."""

import numpy as np
import pytest

from ptxsim import tensor_map

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
