"""Parts of a network on the native CPU kernels: run one after the other, they give the bits of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig, _native
from parnet_kernels.config import Layer, cifar_config
from parnet_kernels.cpu.parts import CpuParts, Summed
from parnet_kernels.distributed.cut import cut, sizes
from parnet_kernels.whole import WholeNetwork

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

CONFIGS = {
    "three streams": ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=5),
    "odd widths, relu": ParNetConfig((3, 12, 92, 130), (3, 2, 2), num_classes=7, activation="relu"),
    "one stream": ParNetConfig((12, 24), (3,), num_classes=3),
    "two streams": ParNetConfig((12, 92, 24), (3, 2), num_classes=3),
    "four streams, no classifier": ParNetConfig((4, 12, 24, 16, 10), (3, 2, 2, 3), num_classes=0),
    "cifar": cifar_config(8),
    "maps of few channels": ParNetConfig((3, 3, 8, 8), (2, 2, 2), in_chans=5, num_classes=5),
}
IMAGES = [(1, 1, 1), (3, 33, 65), (2, 97, 130), (0, 32, 32), (5, 64, 64)]


def deployed(config: ParNetConfig) -> DeployedParNet:
    model = ParNet(config).eval()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for t, low, high in ((bn.running_mean, -0.2, 0.2), (bn.running_var, 0.5, 1.5), (bn.bias, -0.2, 0.2)):
            nn.init.uniform_(t, low, high)
    return model.deploy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def empty(size: tuple[int, ...], layout: torch.memory_format = torch.channels_last) -> Summed:
    return Summed(torch.full(size, torch.nan).contiguous(memory_format=layout), torch.full(size[:2], torch.nan))


class Run:
    """Runs layers of one network; packs each choice of them once."""

    def __init__(self, network: WholeNetwork) -> None:
        self.network = network
        self.packed: dict[tuple[str, ...], CpuParts] = {}

    def __call__(self, pieces: list[Layer], given: dict[str, Summed], wanted: dict[str, Summed]) -> None:
        names = tuple(layer.name for layer in pieces)
        if names not in self.packed:
            self.packed[names] = CpuParts(self.network, names)
        self.packed[names].run(given, names, wanted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_parts_give_the_bits_of_the_whole(config: ParNetConfig, dtype: torch.dtype) -> None:
    model = deployed(config).to(dtype)
    network = model.whole()
    assert isinstance(network, WholeNetwork)
    pieces, run = cut(config), Run(network)
    last = [layer.name for layer in pieces.fusion if layer.kind != "pointwise"]
    parts = CpuParts(network, last)
    for n, h, w in IMAGES:
        x = torch.randn(n, config.in_chans, h, w).to(dtype)
        size = sizes(config, x.shape)
        image = {"image": Summed(x, torch.empty(0))}
        ends: dict[str, Summed] = {}
        # Each stream with a trunk of its own, from the image.
        for s, name in enumerate(pieces.ends):
            own = [layer for step in pieces.trunk[: s + 1] for layer in step] + pieces.streams[s]
            ends[name] = empty(size[name])
            run(own, image, {name: ends[name]})
        # The trunk once, its maps handed on.
        sources = {name: empty(size[name], torch.contiguous_format) for name in pieces.sources}
        run([layer for step in pieces.trunk for layer in step], image, sources)
        for s, (source, name) in enumerate(zip(pieces.sources, pieces.ends, strict=True)):
            again = {name: empty(size[name])}
            run(pieces.streams[s], {source: sources[source]}, again)
            assert same_bits(again[name].map, ends[name].map)
            assert same_bits(again[name].sums, ends[name].sums)
        logits = parts.finish(ends, last, x, "logits" if config.num_classes else "pooled")
        assert same_bits(logits, model(x))
        features = parts.finish(ends, last, x, "features")
        assert same_bits(features, model.forward_features(x))
        assert features.stride() == model.forward_features(x).stride()


@torch.inference_mode()
def test_a_broken_image_costs_that_image() -> None:
    config = CONFIGS["three streams"]
    model, pieces = deployed(config), cut(config)
    network = model.whole()
    x = torch.randn(3, 3, 40, 40)
    x[1, 0, 7, 9] = torch.inf
    size = sizes(config, x.shape)
    every = [layer for step in (*pieces.trunk, *pieces.streams) for layer in step]
    ends = {name: empty(size[name]) for name in pieces.ends}
    Run(network)(every, {"image": Summed(x, torch.empty(0))}, ends)
    last = [layer.name for layer in pieces.fusion]
    got, expected = CpuParts(network, last).finish(ends, last, x, "logits"), model(x)
    assert same_bits(got[[0, 2]], expected[[0, 2]])
    assert not got[1].isfinite().any()


def test_wrong_arguments_are_errors() -> None:
    config = CONFIGS["three streams"]
    network, pieces = deployed(config).whole(), cut(config)
    names = [layer.name for layer in pieces.trunk[0]]
    parts = CpuParts(network, names)
    x = {"image": Summed(torch.randn(1, 3, 16, 16), torch.empty(0))}
    with pytest.raises(RuntimeError, match=r"`maps` 0 must be \[1, 4, 4, 4\]"):
        parts.run(x, names, {names[-1]: empty((1, 4, 4, 5))})
    with pytest.raises(RuntimeError, match=r"sums must be a float32 CPU tensor \[1, 4\]"):
        parts.run(x, names, {names[-1]: Summed(empty((1, 4, 4, 4)).map, torch.empty(1, 5))})
    with pytest.raises(RuntimeError, match=r"sums must be a float32 CPU tensor \[1, 3\]"):
        parts.run({"image": Summed(x["image"].map, torch.empty(2, 3))}, names, {names[-1]: empty((1, 4, 4, 4))})
