"""Pairs of blocks with warpgroup tiles, launched as clusters: neighbouring pixels that share their weights, and splits
that add their sums.
"""

from dataclasses import replace

import networks
import pytest
import torch
from oracle import error
from player import PAIRS, decode
from single import MATHS, run

from parnet_kernels.cuda import record as cuda_record
from parnet_kernels.cuda.plan import A100, H100, Gpu, Shape, plan_level
from parnet_kernels.cuda.program import LevelCall, Pairing

TILES = {3: 1, 4: 2}  # stride of each
PAIRED = Gpu(90, 132, 228 << 10, 227 << 10, "paired")
NEVER = Gpu(90, 132, 228 << 10, 227 << 10, "never")
PAIRINGS = [Pairing.PIXELS, Pairing.SPLITS]
HALVES = ["f16", "bf16"]


def check(device, pairing, op="repvgg_sse", math="f16", tile=3, **case):
    result, expected, runs = run(device, op, math, gpu=H100, tile=tile, pairing=pairing, **case)
    assert result.shape == expected.shape
    assert error(result, expected) <= MATHS[math][2]
    return result, runs[-1] if device.simulated else None


def names(values):
    return pytest.mark.parametrize("pairing", values, ids=lambda p: p.name.lower())


@names(PAIRINGS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("math", HALVES)
@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
def test_layer(device, op, math, tile, pairing):
    if op == "repvgg_sse" and tile == 4:
        pytest.skip("a skip needs stride 1")
    case = {"n": 2, "c": 70, "k": 70, "size": (19, 23), "stride": TILES[tile], "splits": 2}
    result, counted = check(device, pairing, op, math, tile, **case)
    alone, alone_counted = check(device, Pairing.ALONE, op, math, tile, **case)
    assert torch.equal(result, alone)  # the splits are added in the same order
    if device.simulated:
        # Half of the weights less, or no sums by way of global memory.
        asked, before = (r.global_load["bytes"] + r.global_store["bytes"] for r in (counted, alone_counted))
        assert counted.bulk_copy["bytes"] == alone_counted.bulk_copy["bytes"]
        assert before - asked >= (0.4 * counted.bulk_copy["bytes"] if pairing == Pairing.PIXELS else 100_000)
        assert counted.shared_load["bank_conflict"] <= 1.02
        assert counted.shared_store["bank_conflict"] <= 1.1


@names(PAIRINGS)
@pytest.mark.parametrize("splits", [4, 8])
@pytest.mark.parametrize("tile", TILES)
def test_split(device, tile, splits, pairing):
    """Clusters interleave, and wait for each other's sums."""
    op = "repvgg_sse" if tile == 3 else "fusion_se"
    case = {"n": 1, "c": 256, "k": 34, "size": (14, 33), "stride": TILES[tile], "splits": splits}
    check(device, pairing, op, tile=tile, simulator={"resident": 1 + splits % 3, "seed": splits}, **case)


def test_sixteen_splits(device):
    check(device, Pairing.SPLITS, n=1, c=512, size=(7, 8), splits=16, simulator={"resident": 3, "seed": 1})


@names(PAIRINGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (14, 14), (17, 33), (43, 14)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_sizes(device, size, n, pairing):
    """Also of an odd number of tiles, whose last has no partner, and of half tiles without a pixel."""
    check(device, pairing, math="bf16", n=n, c=66, size=size, splits=2)


@names(PAIRINGS)
@pytest.mark.parametrize("size", [(1, 1), (7, 30), (33, 17)], ids=str)
def test_sizes_with_stride(device, size, pairing):
    check(device, pairing, "downsample_se", tile=4, n=1, c=66, k=66, size=size, stride=2, splits=2)


@names(PAIRINGS)
@pytest.mark.parametrize(("c", "k"), [(33, 2), (48, 130), (130, 6)])
@pytest.mark.parametrize("tile", TILES)
def test_channels(device, c, k, tile, pairing):
    """Splits of different lengths, and results that are not stored as vectors."""
    case = {"n": 1, "c": c, "k": k, "size": (9, 60), "stride": TILES[tile]}
    check(device, pairing, "fusion_se", "f16", tile, splits=2, **case)


@names(PAIRINGS)
def test_blocks_without_chunks(device, pairing):
    """The planner makes no more splits than chunks, but a pair without products must do no harm."""
    check(device, pairing, n=2, c=64, size=(5, 5), splits=4)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_weights_for_both(device, chunks):
    """Fewer stages than there are, as many, and more, without splits."""
    check(device, Pairing.PIXELS, n=2, c=32 * chunks, size=(14, 14), simulator={"seed": chunks})


@names(PAIRINGS)
def test_relu_without_options(device, pairing):
    check(device, pairing, n=2, c=48, size=(4, 5), splits=2, activation="relu", affine=False, gate_bias=False)


@names(PAIRINGS)
def test_same_bits_in_any_order(device, pairing):
    case = {"n": 3, "c": 130, "size": (15, 18), "splits": 4}
    first, _ = check(device, pairing, **case)
    for simulator in ({"block_order": "descending"}, {"seed": 1}, {"seed": 2, "resident": 5}, {"seed": 3}):
        again, _ = check(device, pairing, simulator=simulator, **case)
        assert torch.equal(again, first)


@pytest.mark.slow
@names(PAIRINGS)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("math", HALVES)
def test_sweep(device, math, tile, n, pairing):
    """Sizes around the tiles' edges, channels around the chunks', several interleavings."""
    for i, size in enumerate([(8, 14), (15, 16), (16, 29), (31, 5)]):
        for j, (c, k) in enumerate([(34, 62), (64, 64), (130, 130)]):
            op = ("downsample_se", "fusion_se")[j % 2]
            simulator = {"seed": 1 + i, "resident": 1 + j}
            case = {"n": n, "c": c, "k": k, "size": size, "stride": TILES[tile], "activation": ("silu", "relu")[j % 2]}
            check(device, pairing, op, math, tile, splits=2, seed=i, simulator=simulator, **case)


# ------------------------------------------------------------------ levels and networks


def paired(lowered, buffers=400):
    """The pairings of the program's levels, and whether each launch is of clusters."""
    launches = decode(lowered.program, [(1 << 40, 1 << 40)] * buffers)
    calls = [(LevelCall.from_buffer_copy(x.arguments), x) for x in launches[1:-1]]
    return [[Pairing(c.pairing) for c in call.layer[: call.layers]] for call, _ in calls], [x for _, x in calls]


@pytest.mark.parametrize("math", HALVES)
def test_network(device, math):
    network, x = networks.tiny(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, _, lowered = networks.run(device, network, x, math, gpu=PAIRED, seed=1)
    assert error(logits, expected) <= {"f16": 5e-3, "bf16": 4e-2}[math]
    found, launches = paired(lowered)
    assert {p for level in found for p in level} >= set(PAIRINGS)
    assert all(bool(x.flags & PAIRS) == any(level) for level, x in zip(found, launches, strict=True))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_pairs_beside_other_tiles(device, monkeypatch, first):
    """Each layer in turn of a level with three is in pairs; the others have an odd number of blocks."""

    def plan(shapes, gpu, math):
        choice = [plan_level((s,), PAIRED if i == first else NEVER, math)[0] for i, s in enumerate(shapes)]
        return tuple(t if i == first else replace(t, splits=1) for i, t in enumerate(choice))

    monkeypatch.setattr(cuda_record, "plan_level", plan)
    network, x = networks.tiny(), torch.randn(3, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, _, lowered = networks.run(device, network, x, "f16", gpu=H100)
    assert error(logits, expected) <= 5e-3
    found, launches = paired(lowered)
    assert any(len(level) == 3 and any(level) for level in found)
    assert all(x.grid % 2 == 0 for x in launches if x.flags & PAIRS)
    calls = [LevelCall.from_buffer_copy(x.arguments) for x in launches]
    layers = [(x.grid, call.layer[: call.layers]) for x, call in zip(launches, calls, strict=True)]
    starts = [[c.first_block for c in level[1:]] + [grid] for grid, level in layers]
    ends = [[c.first_block + c.blocks for c in level] for _, level in layers]
    assert starts != ends  # some blocks have nothing to do


# ------------------------------------------------------------------ plans


def test_only_where_it_can_be():
    """A pair needs two tiles or two chunks; other GPUs and turned-off plans have none."""
    for shape, pairing in (
        (Shape(1, 7, 7, 1, 1, 1, 1), Pairing.ALONE),
        (Shape(2, 7, 7, 1, 1, 1, 1), Pairing.PIXELS),
        (Shape(1, 7, 7, 1, 1, 1, 2), Pairing.SPLITS),
    ):
        assert plan_level((shape,), PAIRED, "f16")[0].pairing == pairing
        for gpu in (NEVER, A100):
            assert plan_level((shape,), gpu, "f16")[0].pairing == Pairing.ALONE
        assert plan_level((shape,), PAIRED, "tf32")[0].pairing == Pairing.ALONE


@pytest.mark.parametrize("name", ["s", "m", "l", "xl"])
def test_published_networks(name):
    """Most levels have pairs."""
    lowered, _ = networks.variant(name, H100)
    found, launches = paired(lowered)
    assert sum(any(level) for level in found) >= 7
    assert all(bool(x.flags & PAIRS) == any(level) for level, x in zip(found, launches, strict=True))
