"""Registered buffers, several launches in a row, and the L2 model."""

import numpy as np
import pytest
from ptxsim import PtxFault, PtxSanitizerError, Session, Uninit

from .helpers import RNG, cuda

FLAGS = ("compute_80", "-std=c++17")


def ordering():
    return cuda("ordering", *FLAGS)


def test_array_of_pointers():
    module = ordering()
    rows = [RNG.standard_normal(32).astype(np.float32) for _ in range(3)]
    table = np.array([module.register(row) for row in rows], np.uint64)
    out = np.zeros((3, 32), np.float32)
    r = module.launch("gather", 3, 32, [table, Uninit(out), 32])
    assert np.array_equal(out, rows)
    assert [b["unique_read"] for b in r.buffers] == [128, 128, 128, 24, 0]  # registered buffers come first
    assert r.unique_read == 3 * 128 + 24


def test_registered_buffers_are_checked():
    module = ordering()
    short, unset = np.zeros(16, np.float32), np.zeros(32, np.float32)
    table = np.array([module.register(short)], np.uint64)
    out = np.zeros(32, np.float32)
    with pytest.raises(PtxFault, match="1 bytes past the end of registered buffer #0 of 64 bytes"):
        module.launch("gather", 1, 32, [table, out, 32])
    table = np.array([module.register(Uninit(unset))], np.uint64)
    with pytest.raises(PtxSanitizerError, match=r"uninitialised global memory at registered buffer #1 \+ 0"):
        module.launch("gather", 1, 32, [table, out, 32])


def test_races_on_registered_buffers():
    session = Session()
    d, scratch = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    for array in (d, scratch):
        session.register(array)
    with pytest.raises(PtxSanitizerError, match="with no barrier in between"):
        session.launch(ordering(), "exchange_race", 1, 128, [d, scratch])


def test_launches_on_the_same_buffers():
    session, module = Session(), ordering()
    x, y, z = RNG.standard_normal(1000).astype(np.float32), np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    session.launch(module, "scale", 8, 128, [x, Uninit(y), 2.0, 1000])
    session.launch(module, "scale", 8, 128, [y, Uninit(z), 3.0, 1000])  # y is initialised now
    session.launch(module, "scale", 8, 128, [z, x, 1.0, 1000])
    assert np.array_equal(z, 3 * (2 * z / 6))
    assert np.array_equal(x, z)
    assert [r.kernel for r in session.results] == ["scale"] * 3
    assert all((r.unique_read, r.unique_written) == (4000, 4000) for r in session.results)
    assert "3 launches" in session.summary()
    assert session.summary().count("4000 + 4000 B compulsory") == 3


def test_a_launch_that_leaves_a_hole():
    session, module = Session(), ordering()
    x, y, z = (np.ones(1000, np.float32) for _ in range(3))
    session.launch(module, "scale", 8, 128, [x, Uninit(y), 2.0, 900])
    with pytest.raises(PtxSanitizerError, match=r"uninitialised global memory at buffer #0 \+ 3600"):
        session.launch(module, "scale", 8, 128, [y, z, 3.0, 1000])
    assert len(session.results) == 2  # the launch that was reported on is there too


def test_addresses_last():
    session = Session()
    x = np.zeros((4, 64), np.float32)
    address = session.register(x)
    assert session.memory.address(x) == address
    assert session.memory.address(x[2]) == address + 2 * 256  # views keep their distance
    assert session.memory.address(np.zeros(8)) > address + x.nbytes


def test_views_are_bounded_by_themselves():
    module = cuda("basic")
    big = np.zeros(256, np.float32)
    with pytest.raises(PtxFault, match="1 bytes past the end of buffer #0 of 512 bytes"):
        module.launch("vadd_oob", 2, 128, [big[:128], np.zeros(256, np.float32), np.zeros(256, np.float32), 128])


def test_l2_within_capacity():
    session, module = Session(l2_bytes=1 << 20), ordering()
    x, y = np.ones(4096, np.float32), np.zeros(4096, np.float32)
    first = session.launch(module, "scale", 32, 128, [x, y, 2.0, 4096])
    assert first.l2["requested_bytes"] == 2 * x.nbytes
    assert first.l2["fetched_bytes"] == x.nbytes
    assert first.l2["dirty_bytes"] == y.nbytes
    assert first.unique_lines * 128 == 2 * x.nbytes
    second = session.launch(module, "scale", 32, 128, [x, y, 2.0, 4096])
    assert second.l2["fetched_bytes"] == 0
    assert second.l2["hit_rate"] == 1.0
    assert "L2 fetches 0 B" in session.summary()


def test_l2_beyond_capacity():
    session, module = Session(l2_bytes=8192), ordering()
    x, y = np.ones(16384, np.float32), np.zeros(16384, np.float32)
    for _ in range(2):
        r = session.launch(module, "scale", 128, 128, [x, y, 2.0, x.size])
        assert r.l2["fetched_bytes"] > 0.9 * x.nbytes  # what a pass leaves behind is of no use to the next
        assert r.l2["written_back_bytes"] > 0.8 * y.nbytes


def test_l2_of_a_single_launch():
    x, y = np.ones(1024, np.float32), np.zeros(1024, np.float32)
    assert ordering().launch("scale", 8, 128, [x, y, 2.0, 1024]).l2 is None
    r = ordering().launch("scale", 8, 128, [x, y, 2.0, 1024], l2_bytes=1 << 16)
    assert r.l2["capacity"] == 1 << 16
    assert "L2 (modelled)" in r.summary()
