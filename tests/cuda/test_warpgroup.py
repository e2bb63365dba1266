"""Hopper's tiles that multiply by wgmma: each of them on single layers and in levels, against float64; resources."""

import functools
import re

import networks
import pytest
import torch
from oracle import error
from player import CUDA, decode
from ptxsim import Unavailable, compile_cuda, ptxas_info
from single import MATHS, run

from parnet_kernels.cuda import plan as cuda_plan
from parnet_kernels.cuda import record as cuda_record
from parnet_kernels.cuda.plan import H100, Gpu, Shape, plan_level, policy
from parnet_kernels.cuda.program import LevelCall

TILES = {3: 1, 4: 2}  # stride of each
ALWAYS = Gpu(90, 132, 228 << 10, 227 << 10, "always")
NEVER = Gpu(90, 132, 228 << 10, 227 << 10, "never")
HALVES = ["f16", "bf16"]


def check(device, op, math="f16", tile=3, **case):
    result, expected, runs = run(device, op, math, gpu=H100, tile=tile, **case)
    assert result.shape == expected.shape
    assert error(result, expected) <= MATHS[math][2]
    return result, runs


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("math", HALVES)
@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
def test_layer(device, op, math, tile):
    if op == "repvgg_sse" and tile == 4:
        pytest.skip("a skip needs stride 1")
    _, runs = check(device, op, math, tile, n=2, c=40, k=70, size=(19, 23), stride=TILES[tile])
    if device.simulated:
        assert runs[-1].kernel == f"parnet_hopper_{math}"
        assert runs[-1].ldmatrix["bank_conflict"] <= 1.1
        assert runs[-1].shared_store["bank_conflict"] <= 1.1


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_split(device, splits, tile):
    """Eight are more than a ring of fragments holds."""
    simulator = {"resident": 1 + splits % 3, "seed": splits}
    op = "repvgg_sse" if tile == 3 else "fusion_se"
    case = {"n": 1, "c": 256, "k": 34, "size": (14, 15), "stride": TILES[tile], "splits": splits}
    check(device, op, tile=tile, simulator=simulator, **case)


@pytest.mark.parametrize("splits", [2, 4])
def test_split_of_one_pixel_and_blocks_without_chunks(device, splits):
    """The planner makes no more splits than chunks, but a block without products must do no harm."""
    check(device, "repvgg_sse", n=1, c=64, size=(1, 1), splits=splits)


@pytest.mark.parametrize("size", [(1, 9), (23, 2), (14, 14), (17, 33)], ids=str)
def test_sizes(device, size):
    check(device, "repvgg_sse", "bf16", n=1, c=32, size=size)


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (33, 17)], ids=str)
def test_sizes_with_stride(device, size):
    check(device, "downsample_se", tile=4, n=3, c=33, k=66, size=size, stride=2)


@pytest.mark.parametrize(("c", "k"), [(1, 2), (17, 6), (31, 130)])
@pytest.mark.parametrize("tile", TILES)
def test_channels(device, c, k, tile):
    check(device, "fusion_se", "bf16", tile, n=1, c=c, k=k, size=(5, 6), stride=TILES[tile])


def test_relu_without_options(device):
    check(device, "repvgg_sse", n=3, c=16, k=16, size=(4, 5), activation="relu", affine=False, gate_bias=False)


def test_same_bits_in_any_order(device):
    case = {"n": 2, "c": 96, "size": (15, 18), "splits": 3}
    first, _ = check(device, "repvgg_sse", **case)
    for simulator in ({"block_order": "descending"}, {"seed": 1}, {"seed": 2, "resident": 5}):
        again, _ = check(device, "repvgg_sse", simulator=simulator, **case)
        assert torch.equal(again, first)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("math", HALVES)
@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
def test_sweep(device, op, math, tile, n):
    """Sizes around the tiles' edges, channels around the chunks'."""
    if op == "repvgg_sse" and tile == 4:
        pytest.skip("a skip needs stride 1")
    for i, size in enumerate([(8, 14), (15, 16), (16, 29), (31, 5)]):
        for j, (c, k) in enumerate([(30, 62), (64, 64), (65, 130)]):
            case = {"n": n, "c": c, "k": k, "size": size, "stride": TILES[tile], "activation": ("silu", "relu")[j % 2]}
            check(device, op, math, tile, splits=1 + (i + j) % 2, seed=i, **case)


# ------------------------------------------------------------------ levels and networks


@pytest.mark.parametrize("math", HALVES)
def test_network(device, math):
    network, x = networks.tiny(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, runs, lowered = networks.run(device, network, x, math, gpu=ALWAYS)
    assert error(logits, expected) <= {"f16": 5e-3, "bf16": 4e-2}[math]
    assert len(lowered.labels) <= 12
    if device.simulated:
        assert [r.kernel for r in runs[1:-1]] == [f"parnet_hopper_{math}"] * (len(runs) - 2)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_old_and_new_tiles_in_one_level(device, monkeypatch, first):
    """Where a level has three layers, each of them in turn is multiplied by wgmma, the others by mma.sync."""
    mixed = []

    def plan(shapes, gpu, math):
        choice = [plan_level((s,), ALWAYS if i == first else NEVER, math)[0] for i, s in enumerate(shapes)]
        if len(shapes) == 3:
            mixed.append([t.tile for t in choice])
        return tuple(choice)

    monkeypatch.setattr(cuda_record, "plan_level", plan)
    network, x = networks.tiny(), torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, _, _ = networks.run(device, network, x, "f16", gpu=H100)
    assert error(logits, expected) <= 5e-3
    assert mixed
    assert all([tile in TILES for tile in tiles] == [i == first for i in range(3)] for tiles in mixed)


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize("math", MATHS)
def test_only_where_it_can_be(math):
    """Architecture 90, 16-bit types, and not if turned off."""
    shapes = (Shape(1, 56, 56, 1, 1, 2, 4), Shape(1, 28, 28, 2, 1, 4, 8))
    for gpu in (ALWAYS, NEVER, cuda_plan.A100, cuda_plan.RTX4090):
        tiles = [t.tile in TILES for t in plan_level(shapes, gpu, math)]
        assert tiles == [gpu is ALWAYS and math in HALVES] * 2


def test_turning_it_off(monkeypatch):
    monkeypatch.setattr(cuda_plan, "_built_for", lambda: ["80", "90", "90a"])
    before = cuda_plan.wgmma()
    try:
        for when in ("planned", "always", "never"):
            cuda_plan.use_wgmma(when)
            assert cuda_plan.wgmma() == when
        cuda_plan.use_wgmma("planned")
        monkeypatch.setattr(cuda_plan, "_built_for", lambda: ["80", "90"])
        assert cuda_plan.wgmma() == "never"
    finally:
        cuda_plan.use_wgmma(before)


@pytest.mark.parametrize("name", ["s", "m", "l", "xl"])
def test_published_networks_without_it(name):
    lowered, tensors = networks.variant(name, NEVER)
    launches = decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(tensors)))
    assert [launch.kernel for launch in launches[1:-1]] == ["parnet_level_f16"] * 10


@pytest.mark.parametrize("name", ["s", "m", "l", "xl"])
def test_two_blocks_fit(name):
    """Shared memory on a multiprocessor; registers below."""
    lowered, tensors = networks.variant(name, ALWAYS)
    p = policy(90)
    for launch in decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(tensors)))[1:-1]:
        call = LevelCall.from_buffer_copy(launch.arguments)
        assert all(p.shapes[c.tile].warpgroup for c in call.layer[: call.layers])
        assert 2 * (launch.shared + p.static_shared + 1024) <= H100.shared_per_sm


# ------------------------------------------------------------------ the cubin


@functools.cache
def ptx(math):
    try:
        return compile_cuda(CUDA / f"hopper_{math}.cu", "compute_90a", ["-std=c++20"])
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("math", ["f16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_resources(math):
    """No spills, registers for two blocks on a multiprocessor, and no product that waits where none was asked to."""
    told = ptxas_info(ptx(math))
    assert "serialized" not in told
    mine = told.split(f"'parnet_hopper_{math}'", 1)[1].split("Compiling", 1)[0]
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", mine)
    assert spilled
    assert set(spilled) == {"0"}, mine
    registers = int(re.search(r"Used (\d+) registers", mine)[1])
    assert 2 * 128 * -(-registers // 8) * 8 <= 65536, mine
