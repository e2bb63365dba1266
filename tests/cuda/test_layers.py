"""Every kernel on single layers, against float64: on a GPU, or in the simulator with no report of its sanitiser."""

import pytest
import torch
from oracle import error
from single import MATHS, run

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
