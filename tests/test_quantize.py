"""int8 networks: kernels against the layers' definition, calibration against what it promises, bad input."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch

from parnet_kernels import _native, parnet_cifar
from parnet_kernels import quantize as calibration
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cpu import direct
from parnet_kernels.model import ParNet
from parnet_kernels.quantize import _Histogram, round_weight
from parnet_kernels.quantized import QuantizedParNet

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

CONFIGS = {
    "even": ParNetConfig((16, 32, 48, 64), (2, 2, 2), num_classes=10),
    "odd channels, relu": ParNetConfig((12, 34, 50, 30), (2, 3, 2), num_classes=7, activation="relu"),
    "wide, no classifier": ParNetConfig((92, 130, 12, 70), (2, 2, 2), num_classes=0, in_chans=1),
    "one stream": ParNetConfig((7, 70), (3,), num_classes=3),
    "two streams": ParNetConfig((3, 8, 70), (2, 2), num_classes=3),
}


def deployed(config: ParNetConfig, seed: int = 0):
    """A deployed network whose BatchNorms have seen data."""
    torch.manual_seed(seed)
    model = ParNet(config).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, config.in_chans, 32, 32))
    return model.eval().deploy()


def deployed_without_training():
    torch.manual_seed(0)
    return ParNet(CONFIGS["even"]).eval().deploy()


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def networks(request: pytest.FixtureRequest):
    network = deployed(request.param)
    return network, network.quantize(torch.randn(8, request.param.in_chans, 64, 64))


def norm_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1), (3, 90)], ids=str)
def test_kernels_equal_the_definition_and_each_other(networks, size: tuple[int, int]) -> None:
    network, quantized = networks
    x = torch.randn(2, network.config.in_chans, *size)
    expected = quantized.prepare("portable")(x)
    # The definition's φ is not the kernels' to the last bit: a value halfway between two bytes may round either way.
    assert norm_error(expected, quantized.emulate(x)) < 5e-3
    for name in direct.supported():
        assert torch.equal(quantized.prepare(name)(x), expected), name
    assert norm_error(expected, network(x)) < 0.1


def test_threads_and_batches_do_not_change_results(networks) -> None:
    network, quantized = networks
    quantized.prepare()
    x = torch.randn(5, network.config.in_chans, 40, 40)
    expected = quantized(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(quantized(x), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(quantized(x.to(memory_format=torch.channels_last)), expected)
    assert quantized(x[:0]).shape == (0, *expected.shape[1:])
    errors = [norm_error(quantized(x[i : i + 1]), expected[i : i + 1]) for i in range(5)]
    assert max(errors) < 1e-5  # the float32 first layer and classifier are not the same bits for another batch


def test_pointwise_head() -> None:
    torch.manual_seed(0)
    model = parnet_cifar(8).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, 3, 32, 32))
    network = model.eval().deploy()
    x = torch.randn(4, 3, 32, 32)
    quantized = network.quantize(x)
    assert norm_error(quantized(x), network(x)) < 0.05
    assert norm_error(quantized(x), quantized.emulate(x)) < 5e-3
    assert quantized.forward_features(x).shape == network.forward_features(x).shape


def test_single_layer_is_exact() -> None:
    """Where weights, input and output are representable, int8 loses nothing."""
    network = deployed(ParNetConfig((8, 8, 8), (1, 1), num_classes=0))
    quantized = network.quantize(torch.randn(2, 3, 32, 32))
    layer = quantized.layers["combine_3"]
    q = torch.randint(0, 256, (1, 8, 5, 7), dtype=torch.uint8)
    a = layer.plain()
    y = layer(q)
    x = a.scale_in * (q.double() - a.zero_in)
    w = a.weight.double() * a.weight_scale.double()[:, None, None, None]
    g = 2 * (x.mean((2, 3)) @ (a.gate_weight.double() * a.gate_scale.double()[:, None]).T + a.gate_bias).sigmoid()
    t = torch.nn.functional.conv2d(x, w, a.bias.double(), 2, 1) * g[:, :, None, None]
    expected = torch.nn.functional.silu(t) * a.out_scale[:, None, None] + a.out_shift[:, None, None]
    assert norm_error(y, expected) < 1e-6


def test_weights_are_rounded_with_least_error() -> None:
    weight = torch.randn(5, 40)
    weight[1, 0], weight[2] = 30, 0
    rounded, scale = round_weight(weight)
    assert rounded.dtype == torch.int8
    assert rounded.abs().max() <= 127
    error = (rounded * scale[:, None] - weight).square().sum(1)
    widest = (weight / (weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127)).round()
    widest = (widest * weight.abs().amax(1, keepdim=True) / 127 - weight).square().sum(1)
    assert (error <= widest * 1.0001).all()
    assert error[2] == 0


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_ranges_hold_zero_and_clip_outliers(method: str) -> None:
    histogram = _Histogram()
    values = [torch.rand(1_000_000) + 0.5, torch.tensor([10.0])]
    for v in values:
        histogram.add(v)
    scale, zero = histogram.range(method)
    assert zero == 0  # all values are positive: zero is the lowest byte
    assert scale * 255 == pytest.approx(10, rel=0.01) if method == "minmax" else scale * 255 < 5
    constant = _Histogram()
    constant.add(torch.zeros(4))
    assert constant.range(method) == (1.0, 0)


def test_bias_takes_back_what_rounding_shifts_the_mean_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def round_down(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.double().flatten(1).abs().amax(1).clamp_min(1e-9).float() / 127
        shape = (-1, *[1] * (weight.dim() - 1))
        return (weight.double() / scale.double().view(shape)).floor().clamp(-127, 127).to(torch.int8), scale

    monkeypatch.setattr(calibration, "round_weight", round_down)
    network = deployed(CONFIGS["even"])
    x = torch.randn(8, 3, 64, 64)
    quantized = network.quantize(x)
    uncorrected = copy.deepcopy(quantized)
    for name, layer in uncorrected.layers.items():
        layer.bias.copy_(network.layers[name].bias)
    corrected_error, error = (norm_error(q(x).mean(0), network(x).mean(0)) for q in (quantized, uncorrected))
    assert corrected_error < 0.75 * error


def test_the_least_slow_kernels_run_where_none_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for dtype in direct.DTYPES for name in direct.supported(dtype)]
    assert [able for able, _ in direct.info()[1]] == [name in names for name in direct.KERNELS]
    every = direct.info()[1]
    monkeypatch.setattr(direct, "info", lambda: (dict.fromkeys(direct.DTYPES, -1), every))
    assert direct.KERNELS[direct.choose(None)] == ("avx2" if "avx2" in direct.supported() else "portable")
    assert "no instructions" in str(direct.why_not())
    only = [(name == "portable", 1) for name in direct.KERNELS]
    monkeypatch.setattr(direct, "info", lambda: (dict.fromkeys(direct.DTYPES, -1), only))
    assert direct.KERNELS[direct.choose(None)] == "portable"


def test_not_finite_images_give_nan_and_leave_the_others_alone() -> None:
    network = deployed(CONFIGS["even"])
    quantized = network.quantize(torch.randn(4, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    expected = quantized(x)
    x[1, 0, 5, 5] = float("nan")
    y = quantized(x)
    assert y[1].isnan().all()
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[2], expected[2])


def test_changed_weights_are_seen() -> None:
    quantized = deployed(CONFIGS["even"]).quantize(torch.randn(4, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    before = quantized(x)
    quantized.layers["streams_0_0"].bias.add_(1)
    assert norm_error(quantized(x), quantized.emulate(x)) < 5e-3
    assert not torch.equal(quantized(x), before)
    same = copy.deepcopy(quantized)
    assert torch.equal(same(x), quantized(x))


def patch(quantized: QuantizedParNet) -> None:
    layer = quantized.layers["streams_0_0"]
    original = layer.forward
    layer.forward = lambda x: 255 - original(x)


def hook(quantized: QuantizedParNet) -> None:
    quantized.layers["streams_0_0"].register_forward_hook(lambda m, x, y: 255 - y)


def wrap(quantized: QuantizedParNet) -> None:
    class Opposite(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 255 - self.layer(x)

    quantized.layers["streams_0_0"] = Opposite(quantized.layers["streams_0_0"])


def wrap_first(quantized: QuantizedParNet) -> None:
    quantized.layers["inits_0_1"] = torch.nn.Sequential(quantized.layers["inits_0_1"])
    quantized.layers["streams_0_0"].bias.data.add_(1)


def behind(quantized: QuantizedParNet) -> None:
    quantized.layers["streams_0_0"].bias.data.add_(1)


def assign(quantized: QuantizedParNet) -> None:
    layer = quantized.layers["streams_0_0"]
    layer.weight = -layer.weight


CHANGES = [patch, hook, wrap, wrap_first, behind, assign]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_what_is_done_to_layers_is_seen(change: Callable[[QuantizedParNet], None]) -> None:
    quantized = deployed(CONFIGS["even"]).quantize(torch.randn(4, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    before = quantized(x)
    change(quantized)
    assert not torch.allclose(quantized(x), before, rtol=1e-3, atol=1e-3)
    assert norm_error(quantized(x), quantized.emulate(x)) < 5e-3
    assert (quantized.why_layer_by_layer() is None) == (change in (behind, assign))


def test_other_dtypes_and_devices_are_refused() -> None:
    quantized = deployed(CONFIGS["two streams"]).quantize(torch.randn(2, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    before = quantized(x)
    for move in (lambda q: q.half(), lambda q: q.double(), lambda q: q.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="stays float32 and int8 on the CPU"):
            move(quantized)
    assert torch.equal(quantized.float().cpu().share_memory()(x), before)
    layer = quantized.layers["combine_3"]
    layer.bias = layer.bias.double()
    reason = quantized.why_layer_by_layer()
    assert reason is not None
    assert "layers.combine_3: bias is torch.float64" in reason
    assert norm_error(quantized(x), before) < 1e-5


def test_modes() -> None:
    with torch.inference_mode():
        quantized = deployed_without_training().quantize(torch.randn(2, 3, 32, 32))
        x = torch.randn(1, 3, 32, 32)
        before = quantized(x)
    assert quantized.why_layer_by_layer() is None
    quantized.layers["streams_0_0"].bias.add_(1)
    changed = quantized(x)
    assert not torch.equal(changed, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized.forward_features(x), quantized.forward_features(x))
        assert quantized.forward_features(x).dtype == torch.float32
    with torch.device("meta"):
        assert torch.equal(quantized(x), changed)
    assert norm_error(torch.compile(quantized, backend="eager")(x), changed) < 5e-3


def test_torch_export_takes_the_definitions() -> None:
    quantized = deployed(CONFIGS["two streams"]).quantize(torch.randn(2, 3, 32, 32))
    x = torch.randn(2, 3, 32, 40)
    program = torch.export.export(quantized, (x,))
    assert norm_error(program.module()(x), quantized(x)) < 5e-3
    assert not any("parnet._cpu" in str(node.target) for node in program.graph.nodes)


def test_threads_of_callers_do_not_disturb_each_other() -> None:
    quantized = deployed(CONFIGS["even"]).quantize(torch.randn(4, 3, 32, 32))
    images = [torch.randn(1, 3, 32 + i, 40) for i in range(3)]
    expected = [quantized(x) for x in images]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(5):
            if not torch.equal(quantized(images[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


BAD_IMAGES = {
    "none": (torch.zeros(0, 3, 32, 32), "at least one picture"),
    "channels": (torch.randn(2, 4, 32, 32), r"\[N, 3, H, W\]"),
    "not finite": (torch.full((1, 3, 32, 32), float("nan")), "finite"),
    "constant": (torch.ones(2, 3, 32, 32), "one value"),
    "bytes": (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "floating-point"),
}


@pytest.mark.parametrize(("images", "match"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_pictures_are_refused(images: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deployed(CONFIGS["two streams"]).quantize(images)


def test_bad_calls_are_refused() -> None:
    network = deployed(CONFIGS["two streams"])
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="`dtype` must be 'int8'"):
        network.quantize(x, dtype="int4")
    with pytest.raises(ValueError, match="`range` must be one of"):
        network.quantize(x, range="max")
    with pytest.raises(TypeError, match="must be tensors"):
        network.quantize([x.numpy()])
    with pytest.raises(ValueError, match="float32 on the CPU"):
        copy.deepcopy(network).half().quantize(x)
    hooked = copy.deepcopy(network)
    hooked.layers["combine_3"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        hooked.quantize(x)
    quantized = network.quantize(x)
    with pytest.raises(ValueError, match="`kernels` must be one of"):
        quantized.prepare("sse2")
    with pytest.raises(RuntimeError, match="no gradients"):
        quantized(x.requires_grad_())
    with torch.no_grad():
        assert not quantized(x).requires_grad
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        quantized(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="float32 on the CPU"):
        quantized(torch.randn(1, 3, 8, 8).double())


def test_damaged_program_is_refused() -> None:
    quantized = deployed(CONFIGS["two streams"]).quantize(torch.randn(2, 3, 32, 32))
    packed = quantized._packed()
    assert isinstance(packed, direct.Packed)
    with_skip = int((packed.program[:, 0] == 0).nonzero()[0])
    x = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for column in range(packed.program.shape[1]):
        program = packed.program.clone()
        program[with_skip, column] = 1 << 40
        with pytest.raises(RuntimeError):
            torch.ops.parnet._cpu_direct_workspace(*x.shape, packed.weights, program, packed.kernels)


def test_repr_names_the_layers() -> None:
    quantized = deployed(CONFIGS["two streams"]).quantize(torch.randn(2, 3, 32, 32))
    assert isinstance(quantized, QuantizedParNet)
    assert "int8" in repr(quantized)


def test_maps_whose_sums_would_leave_32_bits_are_refused() -> None:
    network = deployed(CONFIGS["even"])
    packed = network.quantize(torch.randn(4, 3, 64, 64)).prepare()._packed()
    assert isinstance(packed, direct.Packed)
    given = packed.weights, packed.program, packed.kernels
    assert torch.ops.parnet._cpu_direct_workspace(1, 16, 2, direct.MAX_PIXELS // 2, *given) > direct.MAX_PIXELS
    for h, w in ((1, direct.MAX_PIXELS + 1), (1 << 40, 1 << 40), (0, 1)):
        with pytest.raises(RuntimeError, match=f"1 to {direct.MAX_PIXELS} pixels, got"):
            torch.ops.parnet._cpu_direct_workspace(1, 16, h, w, *given)
