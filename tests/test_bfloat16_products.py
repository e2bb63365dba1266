"""Products in bfloat16: layers against float64, the instructions against their emulation, and what falls back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import _native, reference
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cpu import bfloat16, direct
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

BF16 = torch.bfloat16
KERNELS = direct.supported(BF16)
CONFIGS = {
    "even": ParNetConfig((16, 32, 48, 64), (2, 2, 2), num_classes=10),
    "odd channels, relu": ParNetConfig((12, 34, 50, 30), (2, 3, 2), num_classes=7, activation="relu"),
    "wide, no classifier": ParNetConfig((92, 130, 12, 70), (2, 2, 2), num_classes=0, in_chans=1),
    "one stream": ParNetConfig((7, 70), (3,), num_classes=3),
    "two streams, pointwise": ParNetConfig((3, 8, 70), (2, 2), num_classes=3, pointwise_head=True),
}


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 also where the processor has no instructions for them: emulated."""
    why_not = direct.why_not
    monkeypatch.setattr(direct, "why_not", lambda dtype=torch.int8: None if dtype == BF16 else why_not(dtype))


def deployed(config: ParNetConfig) -> DeployedParNet:
    """In bfloat16; its BatchNorms have seen data."""
    torch.manual_seed(0)
    model = ParNet(config).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, config.in_chans, 32, 32))
    return model.eval().deploy().bfloat16()


def norm_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def random_layer(kind: str, c: int, k: int, stride: int, last: bool) -> direct.DirectLayer:
    def vector(around: float = 0.0) -> Tensor:
        return torch.randn(k) * 0.3 + around

    skip = kind == "repvgg_sse"
    return direct.DirectLayer(
        kind=kind,
        stride=stride,
        weight=(torch.randn(k, c, 3, 3) / (3 * c**0.5)).to(BF16),
        weight_scale=torch.ones(k),
        bias=vector(),
        gate_weight=(torch.randn(k, c) / c**0.5).to(BF16),
        gate_scale=torch.ones(k),
        gate_bias=vector(),
        skip_scale=vector(1) if skip else None,
        skip_shift=vector() if skip else None,
        out_scale=vector(1),
        out_shift=vector(),
        scale_in=1.0,
        zero_in=0,
        scale_out=1.0,
        zero_out=0,
        last=last,
    )


def defined(a: direct.DirectLayer, activation: str, *inputs: Tensor) -> Tensor:
    """The layer in float64."""
    groups = len(inputs)
    x = (reference.interleave(*inputs) if groups == 2 else inputs[0]).double()
    d = {name: t.double() for name, t in vars(a).items() if isinstance(t, Tensor)}
    g = reference.gate(x.mean((2, 3), keepdim=True), d["gate_weight"], d["gate_bias"], groups)
    t = F.conv2d(x, d["weight"], d["bias"], a.stride, 1, groups=groups)
    if "skip_scale" in d:
        t = t + g * (x * d["skip_scale"][:, None, None] + d["skip_shift"][:, None, None])
    else:
        t = 2 * g * t
    y = reference.ACTIVATIONS[activation](reference.shuffle(t) if groups == 2 else t)
    return y * d["out_scale"][:, None, None] + d["out_shift"][:, None, None]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("c", "size"), [(3, (9, 30)), (12, (5, 17)), (32, (1, 1)), (92, (3, 17)), (130, (2, 5))])
def test_layers_equal_float64(kernels: str, c: int, size: tuple[int, int]) -> None:
    """A layer of every kind, and one behind it that reads what it rounded."""
    torch.manual_seed(c)
    number = direct.choose(kernels, BF16)
    x = torch.randn(3, c, *size).to(BF16)
    for kind, k, stride in (("repvgg_sse", c, 1), ("downsample_se", 40, 2), ("downsample_se", 7, 1)):
        for activation in ("silu", "relu"):
            one = random_layer(kind, c, k, stride, True)
            y = direct.run(direct.pack([(one, (0, -1, 1))], activation, number), x)
            assert norm_error(y, defined(one, activation, x)) < 2e-6, kind
    first, second = random_layer("downsample_se", c, 42, 1, False), random_layer("downsample_se", c, 42, 1, False)
    fusion = random_layer("fusion_se", 42, 26, 2, True)
    layers = [(first, (0, -1, 1)), (second, (0, -1, 2)), (fusion, (1, 2, 3))]
    y = direct.run(direct.pack(layers, "silu", number), x)
    maps = [defined(layer, "silu", x).to(BF16) for layer in (first, second)]
    # A value halfway between two of bfloat16 may round either way.
    assert norm_error(y, defined(fusion, "silu", *maps)) < 1e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", [(1, 1), (33, 47)], ids=str)
def test_kernels_give_the_same_bits(config: ParNetConfig, size: tuple[int, int]) -> None:
    network = deployed(config).whole()
    x = torch.randn(2, config.in_chans, *size).to(BF16)
    results = "features", "pooled", "logits"
    found = []
    for kernels in KERNELS:
        packed = bfloat16.pack(network, direct.choose(kernels, BF16))
        found.append([bfloat16.run(packed, network, x, result) for result in results[: 3 if config.num_classes else 2]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_networks(config: ParNetConfig, in_bfloat16: None) -> None:
    network = deployed(config)
    x = torch.randn(3, config.in_chans, 40, 33).to(BF16)
    exact = copy.deepcopy(network).double()
    plain = network(x)
    network.prepare(products="bfloat16")
    y = network(x)
    assert not torch.equal(y, plain)
    assert network._native._packed is None  # no weights for products in float32
    assert y.dtype == BF16
    assert y.shape == plain.shape
    assert norm_error(y, exact(x.double())) < 0.02
    features = network.forward_features(x)
    assert features.dtype == BF16
    assert norm_error(features, exact.forward_features(x.double())) < 0.02
    assert torch.equal(network(x.contiguous(memory_format=torch.channels_last)), y)
    assert network(x[:0]).shape == (0, *y.shape[1:])
    assert torch.equal(network.prepare(products="float32")(x), plain)


def test_threads_and_batches_do_not_change_bits(in_bfloat16: None) -> None:
    network = deployed(CONFIGS["odd channels, relu"]).prepare(products="bfloat16")
    x = torch.randn(5, 3, 70, 50).to(BF16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = network.forward_features(x)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(network.forward_features(x), expected)
    finally:
        torch.set_num_threads(before)
    one = torch.cat([network.forward_features(x[i : i + 1]) for i in range(5)])
    assert norm_error(one, expected) < 5e-3  # the first layer has other tiles


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_maps_fall_back_to_float32(value: float, in_bfloat16: None) -> None:
    network = deployed(CONFIGS["wide, no classifier"])
    x = torch.randn(2, 1, 20, 20).to(BF16)
    x[1, 0, 9, 9] = value
    expected = network.forward_features(x)
    y = network.prepare(products="bfloat16").forward_features(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_infinite_weights_fall_back_to_float32(in_bfloat16: None) -> None:
    network = deployed(CONFIGS["even"])
    with torch.no_grad():
        network.layers["combine_3"].weight[0, 0, 0, 0] = float("inf")
    x = torch.randn(1, 3, 32, 32).to(BF16)
    expected = network(x)
    torch.testing.assert_close(network.prepare(products="bfloat16")(x), expected, rtol=0, atol=0, equal_nan=True)


def test_changes_copies_and_dtypes(in_bfloat16: None) -> None:
    network = deployed(CONFIGS["even"]).prepare(products="bfloat16")
    x = torch.randn(1, 3, 32, 32).to(BF16)
    before = network(x)
    for same in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(same(x), before)
    with torch.no_grad():
        network.layers["combine_3"].weight.mul_(2)
    changed = network(x)
    assert not torch.equal(changed, before)
    assert torch.equal(copy.deepcopy(network).prepare()(x), changed)
    wide = copy.deepcopy(network).float()
    assert torch.equal(wide(x.float()), copy.deepcopy(wide).prepare(products="float32")(x.float()))
    network.prepare("taps")
    assert torch.equal(network(x), changed)  # products stay as they were


def test_without_instructions_float32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network = deployed(CONFIGS["even"])
    x = torch.randn(1, 3, 32, 32).to(BF16)
    expected = network(x)
    monkeypatch.setattr(direct, "why_not", lambda dtype=torch.int8: "no instructions")
    assert torch.equal(network.prepare(products="bfloat16")(x), expected)


def test_maps_that_are_too_large_fall_back_to_float32(monkeypatch: pytest.MonkeyPatch, in_bfloat16: None) -> None:
    network = deployed(CONFIGS["even"])
    x = torch.randn(1, 3, 32, 32).to(BF16)
    expected = network(x)
    network.prepare(products="bfloat16")
    assert not torch.equal(network(x), expected)
    monkeypatch.setattr(direct, "MAX_PIXELS", 16 * 16 - 1)
    assert torch.equal(network(x), expected)


def test_no_profile_of_other_products(in_bfloat16: None) -> None:
    network = deployed(CONFIGS["even"]).prepare(products="bfloat16")
    x = torch.randn(1, 3, 32, 32).to(BF16)
    with pytest.raises(RuntimeError, match=r"no profile .*: products are bfloat16"):
        network.profile(x)
    assert network.prepare(products="float32").profile(x)


def test_bad_arguments() -> None:
    network = deployed(CONFIGS["even"])
    with pytest.raises(ValueError, match=r"`products` must be one of .*'int8'"):
        network.prepare(products="int8")
    with pytest.raises(ValueError, match=r"need a bfloat16 network, got torch\.float32; convert it with"):
        copy.deepcopy(network).float().prepare(products="bfloat16")
    with pytest.raises(ValueError, match=r"`kernels` must be one of .*bf16_tiles.* got 'portable'"):
        direct.choose("portable", BF16)
    packed = bfloat16.pack(network.whole(), direct.choose(None, BF16)).rest
    with pytest.raises(RuntimeError, match="bfloat16 CPU tensor"):
        direct.run(packed, torch.randn(1, 16, 8, 8))


def test_instructions_are_those_of_the_emulation() -> None:
    """Values that leave the normal range, and sums that cancel: where an emulation would differ first."""
    if len(KERNELS) < 2:
        pytest.skip("this processor has no AMX for bfloat16")
    torch.manual_seed(0)
    layer = random_layer("downsample_se", 64, 64, 1, True)
    found: dict[str, list[Tensor]] = {name: [] for name in KERNELS}
    for scale in (1e-38, 1e-20, 1.0, 1e30):
        x = (torch.randn(1, 64, 9, 15) * scale).to(BF16)
        x[0, ::2] = -x[0, 1::2]
        for name in KERNELS:
            packed = direct.pack([(layer, (0, -1, 1))], "relu", direct.choose(name, BF16))
            found[name].append(direct.run(packed, x))
    for name in KERNELS[1:]:
        for a, b in zip(found[KERNELS[0]], found[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
