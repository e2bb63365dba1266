"""Levels and whole networks: every launch of a program, against the CPU's result in float64."""

import networks
import pytest
import torch
from oracle import error
from player import PAIRS, decode
from single import MATHS

from parnet_kernels.config import VARIANTS, ParNetConfig
from parnet_kernels.cuda import network as cuda_network
from parnet_kernels.cuda.constants import constants
from parnet_kernels.cuda.plan import A100, H100, L4, RTX4090, policy
from parnet_kernels.cuda.program import Arena, LevelCall

TOLERANCE = {"f16": 5e-3, "bf16": 4e-2, "tf32": 5e-3, "f32": 5e-6}  # a dozen layers, random weights


@pytest.mark.parametrize("math", MATHS)
def test_network(device, math):
    network, x = networks.tiny(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, _, lowered = networks.run(device, network, x, math)
    assert error(logits, expected) <= TOLERANCE[math]
    assert len(lowered.labels) <= 12


@pytest.mark.parametrize("result", ["features", "pooled"])
def test_other_results(device, result):
    network, x = networks.tiny(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = network.forward_features(x)
    y, _, _ = networks.run(device, network, x, "f32", result)
    assert error(y, features if result == "features" else features.mean((2, 3))) <= TOLERANCE["f32"]


@pytest.mark.parametrize(
    "config",
    [
        ParNetConfig((8, 12, 20, 30, 41), (2, 3, 2, 2), num_classes=7, activation="relu"),
        ParNetConfig((6, 6, 6, 8, 12, 10, 9), (8, 7, 6, 5, 4, 3), num_classes=3),
        ParNetConfig((9, 14), (3,), num_classes=3),
        ParNetConfig((9, 10, 14), (2, 2), in_chans=11, num_classes=3),
        ParNetConfig((9, 10, 14), (2, 2), stem_width=9, stem_stride=1, num_classes=3),
    ],
    ids=["four streams", "six streams", "one stream", "many image channels", "stride-1 stem"],
)
def test_configurations(device, config):
    network, x = networks.tiny(config), torch.randn(1, config.in_chans, 40, 36, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    logits, _, _ = networks.run(device, network, x, "f32")
    assert error(logits, expected) <= TOLERANCE["f32"]


def test_image_layouts(device):
    network, x = networks.tiny(), torch.randn(2, 3, 33, 35, dtype=torch.float64)
    plain, _, _ = networks.run(device, network, x, "f32")
    last, _, _ = networks.run(device, network, x.contiguous(memory_format=torch.channels_last), "f32")
    assert torch.equal(plain, last)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_image_that_is_not_finite_leaves_the_others_alone(device, value):
    network, x = networks.tiny(), torch.randn(2, 3, 33, 35, dtype=torch.float64)
    x[0, 1, 5, 6] = value
    with torch.no_grad():
        expected = network(x)
    logits, _, _ = networks.run(device, network, x, "f32")
    assert expected[0].isnan().all()
    assert logits[0].isnan().all()
    assert error(logits[1:], expected[1:]) <= TOLERANCE["f32"]


def test_same_bits_in_any_order(device):
    network, x = networks.tiny(), torch.randn(1, 3, 64, 48, dtype=torch.float64)
    first, _, _ = networks.run(device, network, x, "f16")
    for simulator in ({"block_order": "descending"}, {"seed": 3}):
        again, _, _ = networks.run(device, network, x, "f16", **simulator)
        assert torch.equal(again, first)


@pytest.mark.parametrize("gpu", [A100, H100, L4, RTX4090], ids=["A100", "H100", "L4", "RTX 4090"])
@pytest.mark.parametrize("name", VARIANTS)
def test_published_networks(name, gpu):
    """At 224² and batch 1: twelve launches, each level one, longest blocks first, and enough of them."""
    lowered, tensors = networks.variant(name, gpu)
    assert len(lowered.labels) == 12
    launches = decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(tensors)))
    kinds = [launch.kernel.split("_")[1] for launch in launches]
    assert [kinds[0], kinds[-1]] == ["stem", "classifier"]
    assert set(kinds[1:-1]) <= {"level", "hopper"}
    assert kinds.count("hopper") >= (6 if gpu is H100 else 0)
    assert "hopper" not in kinds or gpu is H100
    assert [launch.flags & ~PAIRS for launch in launches] == [2, *[1] * 11]  # cooperative; then dependent
    assert all(launch.kernel == "parnet_hopper_f16" for launch in launches if launch.flags & PAIRS)
    p = policy(gpu.image)
    for launch in launches[1:11]:
        call = LevelCall.from_buffer_copy(launch.arguments)
        layers = call.layer[: call.layers]
        assert call.layers == launch.label.count(" + ") + 1
        costs = [3 * -(-c.chunks // c.splits) * p.shapes[c.tile].rows for c in layers]
        firsts = [c.first_block for c in layers]
        assert firsts[0] == 0
        assert firsts == sorted(firsts)
        # Two blocks fit on a multiprocessor: shared memory here, registers in test_counters.
        assert 2 * (launch.shared + p.static_shared + 1024) <= gpu.shared_per_sm
        assert max(costs) > 0
        if gpu is A100 and name in "sml":
            assert launch.grid >= gpu.multiprocessors
        # So many that they can use all of L2's rate.
        assert gpu not in (A100, H100) or launch.grid * constants(gpu.architecture).l2_shares >= gpu.multiprocessors


@pytest.mark.parametrize("channels", [3, 7])
@pytest.mark.parametrize("gpu", [A100, H100, L4, RTX4090], ids=["A100", "H100", "L4", "RTX 4090"])
def test_the_blocks_of_a_stem_fit_on_the_gpu_together(gpu, channels):
    """They wait for each other. In fp32 with 7 channels there is shared memory for one a multiprocessor on an L4."""
    network = networks.tiny(ParNetConfig((9, 10, 14), (2, 2), in_chans=channels, num_classes=3)).float()
    weights = cuda_network.pack_network(network.whole(), "ieee")
    shape, stride = (8, channels, 224, 224), (channels * 224 * 224, 224 * 224, 224, 1)
    lowered = cuda_network.lower(network.config, weights, shape, stride, torch.float32, "ieee", gpu, "logits")
    stem = decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(weights.tensors)))[0]
    assert stem.kernel == "parnet_stem_f32"
    taken = stem.shared + policy(gpu.image).static_shared + 1024
    assert stem.grid <= gpu.multiprocessors * (gpu.shared_per_sm // taken)


def test_arena_keeps_the_living_apart():
    arena, generator = Arena(), torch.Generator().manual_seed(0)
    blocks = []
    for step in range(40):
        for _ in range(3):
            size, life = (int(torch.randint(1, limit, (1,), generator=generator)) for limit in (5000, 6))
            blocks.append((step, step + life, arena.allocate(size, step, step + life), size))
    for i, (first, last, offset, size) in enumerate(blocks):
        assert offset % 256 == 0
        assert offset + size <= arena.size
        for first2, last2, offset2, size2 in blocks[:i]:
            together = first <= last2 and first2 <= last
            assert not together or offset + size <= offset2 or offset2 + size2 <= offset
    assert arena.size < sum(size for *_, size in blocks) / 4  # memory is used again
