"""Every kernel on single layers, against float64: on a GPU, or in the simulator with no report of its sanitiser."""

import re
from dataclasses import replace
from unittest import mock

import player
import pytest
import single
import torch
from cases import arguments, to
from oracle import error
from ptxsim import PtxFault, PtxModule, PtxSanitizerError
from single import MATHS, pack, run

from parnet_kernels.cuda.plan import A100, H100, L4

OPS = ["repvgg_sse", "downsample_se", "fusion_se"]


def sliced(x):
    """Part of a wider tensor: no stride is what its shape suggests."""
    n, c, h, w = x.shape
    wider = torch.full((n, c + 3, h + 2, w + 1), float("nan"), dtype=x.dtype)
    wider[:, 2 : 2 + c, 1 : 1 + h, :w] = x
    return wider[:, 2 : 2 + c, 1 : 1 + h, :w]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def check(device, op, math, **case):
    result, expected, _ = run(device, op, math, **case)
    assert result.shape == expected.shape
    assert error(result, expected) <= MATHS[math][2]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("op", OPS)
def test_layer(device, op, math, stride):
    if op == "repvgg_sse" and stride == 2:
        pytest.skip("a skip needs stride 1")
    check(device, op, math, n=2, c=40, k=70, size=(9, 13), stride=stride)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("op", ["repvgg_sse", "fusion_se"])
def test_split(device, op, math, splits):
    c = 96 if math in ("f16", "bf16") else 48
    check(device, op, math, n=1, c=c, k=34, size=(6, 7), splits=splits)


@pytest.mark.parametrize("resident", [1, 5])
@pytest.mark.parametrize(("splits", "gpu"), [(5, A100), (8, H100), (8, L4)], ids=["5 sm_80", "8 sm_90", "8 sm_89"])
def test_many_splits(device, splits, gpu, resident):
    """More than shared memory holds at a time, also where blocks interleave and wait for each other."""
    simulator = {"resident": resident, "seed": resident}
    check(device, "repvgg_sse", "f16", n=1, c=256, size=(7, 14), splits=splits, gpu=gpu, tile=0, simulator=simulator)


@pytest.mark.parametrize("gpu", [A100, H100, L4], ids=["sm_80", "sm_90", "sm_89"])
def test_more_splits_than_chunks(device, gpu):
    """The planner makes none, but a block without products must do no harm."""
    check(device, "repvgg_sse", "f16", n=1, c=64, size=(7, 8), splits=4, gpu=gpu)


@pytest.mark.parametrize("gpu", [A100, L4], ids=["sm_80", "sm_89"])
def test_split_of_one_pixel(device, gpu):
    """Its halo is smaller than the sums that take its place."""
    check(device, "repvgg_sse", "f16", n=1, c=64, size=(1, 1), splits=2, tile=0, gpu=gpu)


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (23, 2), (14, 14), (17, 33)], ids=str)
def test_sizes(device, size, tile):
    check(device, "repvgg_sse", "f16", n=1, c=32, size=size, tile=tile)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 30), (21, 21)], ids=str)
def test_sizes_with_stride(device, size):
    check(device, "downsample_se", "f16", n=1, c=33, k=66, size=size, stride=2)


@pytest.mark.parametrize(("c", "k"), [(1, 2), (17, 6), (31, 130), (66, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels(device, c, k, stride):
    check(device, "fusion_se", "bf16", n=1, c=c, k=k, size=(5, 6), stride=stride)


@pytest.mark.parametrize("layout", [sliced, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("math", ["f16", "f32"])
def test_layouts(device, layout, math):
    check(device, "repvgg_sse", math, n=2, c=64, size=(6, 5), layout=layout)


@pytest.mark.parametrize("op", OPS)
def test_relu_without_options(device, op):
    check(device, op, "f16", n=3, c=16, k=16, size=(4, 5), activation="relu", affine=False, gate_bias=False)


@pytest.mark.parametrize("gpu", [H100, L4], ids=["sm_90", "sm_89"])
def test_architectures(device, gpu):
    """Their pipelines differ: dependent launches from sm_90 on, two stages where shared memory is scarce."""
    check(device, "fusion_se", "f16", gpu=gpu, n=1, c=96, k=64, size=(9, 9), stride=1, splits=2)


@pytest.mark.parametrize("math", ["f16", "f32"])
def test_same_bits_in_any_order(device, math):
    """The result does not depend on which block of a split tile arrives last, nor on how warps interleave."""
    case = {"n": 2, "c": 96, "size": (9, 10), "splits": 3}
    first, expected, _ = run(device, "repvgg_sse", math, **case)
    assert error(first, expected) <= MATHS[math][2]
    for simulator in ({"block_order": "descending"}, {"seed": 1}, {"seed": 2, "resident": 5}):
        again, _, _ = run(device, "repvgg_sse", math, simulator=simulator, **case)
        assert torch.equal(again, first)


def test_not_a_number_stays_visible(device):
    def spoiled(x):
        x[0, 3, 2, 2] = float("nan")
        return x

    result, _, _ = run(device, "downsample_se", "f16", n=1, c=16, k=8, size=(6, 6), activation="relu", layout=spoiled)
    assert result.isnan().all()  # through the gate, every pixel


def spoil(channel, value):
    """Of one map of a fusion: the other one stays as it is."""
    maps = []

    def layout(x):
        if not maps:
            x[:, channel, 1, 2] = value
        maps.append(x)
        return x

    return layout


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("math", "c", "gpu", "tile"),
    [("f16", 40, A100, 2), ("f16", 41, A100, 1), ("tf32", 24, A100, 2), ("f32", 12, L4, 2), ("bf16", 92, H100, 4)],
)
def test_a_group_of_a_fusion_does_not_see_the_other(device, value, math, c, gpu, tile):
    """Where the groups meet within a chunk of channels, zero weights do not keep infinities out: 0 · ∞ is NaN."""
    case = {"n": 2, "c": c, "k": 12, "size": (9, 11), "stride": 1 if tile == 1 else 2, "splits": 1 + (c > 64)}
    for channel in (0, c - 1):  # of the first map: channels 0 and 2c - 2 of the interleaved ones
        result, expected, _ = run(device, "fusion_se", math, gpu=gpu, tile=tile, layout=spoil(channel, value), **case)
        assert not expected[:, channel > 0 :: 2].isfinite().all()
        clean, exact = result[:, channel == 0 :: 2], expected[:, channel == 0 :: 2]
        assert exact.isfinite().all()
        assert error(clean, exact) <= MATHS[math][2]


def test_channels_without_neighbours_have_no_masks():
    for c, masked in ((64, False), (128, False), (40, True), (96, True), (41, True), (2, True)):
        args, options = arguments("fusion_se", c=c, k=8)
        packed = pack("fusion_se", *to(torch.float16, args, options), "ieee")[1]
        assert packed.masked == masked
        assert packed.chunk_table.numel() == packed.groups * packed.chunks * (2 if masked else 1) + 1


@pytest.mark.parametrize(("math", "image"), [("f16", 80), ("f16", 89), ("f32", 80)])
def test_images_older_than_the_gpu(device, math, image):
    """PARNET_CUDA_ARCHS need not name the GPU: the plan is for the pipeline of the image, not for the GPU's."""
    for gpu in (L4, H100):
        gpu = replace(gpu, image=image, wgmma="never")
        check(device, "downsample_se", math, gpu=gpu, n=1, c=64, k=64, size=(18, 20), stride=2, splits=2)


def test_a_plan_for_another_image_overruns(device):
    """What the test above would find: three stages in shared memory for two."""
    if not device.simulated:
        pytest.skip("an overrun is not to be tried on a GPU")
    plan = single.plan_level
    try:
        single.plan_level = lambda shapes, gpu, math: plan(shapes, replace(gpu, image=89), math)
        with pytest.raises(PtxFault, match="out-of-bounds shared"):
            check(device, "repvgg_sse", "f16", gpu=replace(L4, image=80), n=1, c=64, size=(14, 14))
    finally:
        single.plan_level = plan


def test_programs_are_dependent(device):
    """The layer's launch waits for the one that lays out the maps; where it did not, the simulator would tell."""
    if not device.simulated:
        pytest.skip("found by the simulator")
    text = player.module(device, "parnet_level_f16", 90).text
    hasty = PtxModule(re.sub(r"griddepcontrol\.wait;", "", text))
    case = {"gpu": replace(H100, wgmma="never"), "n": 1, "c": 32, "size": (6, 5)}
    check(device, "repvgg_sse", "f16", **case)
    with mock.patch.object(player, "module", return_value=hasty), pytest.raises(PtxSanitizerError, match="before-wait"):
        check(device, "repvgg_sse", "f16", **case)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("op", OPS)
def test_sweep(device, op, math, stride, n):
    """Sizes around the tiles' edges, channels around the chunks', all architectures' pipelines."""
    for i, size in enumerate([(7, 8), (8, 14), (15, 16), (16, 29), (31, 5)]):
        for j, (c, k) in enumerate([(30, 62), (64, 64), (65, 130)]):
            gpu = (A100, H100, L4)[(i + j) % 3]
            case = {"n": n, "c": c, "k": k, "size": size, "stride": stride, "activation": ("silu", "relu")[j % 2]}
            check(device, op, math, gpu=gpu, splits=1 + (i + j) % 2, seed=i, **case)
