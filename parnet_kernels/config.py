"""Which ParNet: widths, depths and the variants of the paper; and the network as a graph of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ParNetConfig:
    """A ParNet with S = len(planes) − 1 streams.

    Attributes:
        planes: widths of the S streams, then of the last map (P).
        num_blocks: for each stream, its identity blocks plus one, as the published configurations count them.
        in_chans: channels of the image.
        stem_width: width after the first layer; None: min(64, planes[0]), as published.
        stem_stride: stride of each of the two stem layers, 2 (ImageNet) or 1 (CIFAR).
        pointwise_head: the last layer is a 1×1 convolution with BatchNorm and φ (CIFAR), not a downsampling block.
        num_classes: outputs of the classifier; 0 for none.
        activation: φ, "silu" (paper) or "relu" (what the published scripts build).
        dropout: probability before the classifier.
    """

    planes: tuple[int, ...]
    num_blocks: tuple[int, ...]
    in_chans: int = 3
    stem_width: int | None = None
    stem_stride: int = 2
    pointwise_head: bool = False
    num_classes: int = 1000
    activation: str = "silu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", tuple(self.planes))
        object.__setattr__(self, "num_blocks", tuple(self.num_blocks))
        if self.planes and self.stem_width == min(64, self.planes[0]):
            object.__setattr__(self, "stem_width", None)  # one network, one configuration

        def require(condition: bool, argument: str, requirement: str) -> None:
            if not condition:
                raise ValueError(f"ParNetConfig: `{argument}` must {requirement}, got {getattr(self, argument)!r}")

        require(
            len(self.planes) >= 2 and min(self.planes) >= 1,
            "planes",
            "name at least 1 stream and P, all ≥ 1",
        )
        require(
            self.streams == 1 or all(p % 2 == 0 for p in (*self.planes[2:-1], self.planes[-2])),
            "planes",
            "be even for the last stream and every stream from the third on: fusions write two groups",
        )
        require(
            len(self.num_blocks) == len(self.planes) - 1 and min(self.num_blocks) >= 1,
            "num_blocks",
            f"have {len(self.planes) - 1} entries ≥ 1, one a stream",
        )
        require(self.in_chans >= 1, "in_chans", "be ≥ 1")
        require(self.stem_width is None or self.stem_width >= 1, "stem_width", "be ≥ 1 or None")
        require(self.stem_stride in (1, 2), "stem_stride", "be 1 or 2")
        require(self.num_classes >= 0, "num_classes", "be ≥ 0")
        require(self.activation in ("silu", "relu"), "activation", "be 'silu' or 'relu'")
        require(0 <= self.dropout < 1, "dropout", "be in [0, 1)")

    @property
    def streams(self) -> int:
        return len(self.planes) - 1

    @property
    def stem(self) -> int:
        return min(64, self.planes[0]) if self.stem_width is None else self.stem_width

    def replace(self, **changes: object) -> ParNetConfig:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


VARIANTS: dict[str, ParNetConfig] = {
    "s": ParNetConfig((92, 192, 384, 1280), (5, 6, 6)),
    "m": ParNetConfig((128, 256, 512, 2048), (5, 6, 6)),
    "l": ParNetConfig((160, 320, 640, 2560), (5, 6, 6), dropout=0.1),
    "xl": ParNetConfig((200, 400, 800, 3200), (5, 6, 6), dropout=0.1),
}


def cifar_config(width: int = 32, head_width: int | None = None) -> ParNetConfig:
    """The CIFAR form, for 32×32 images: stride-1 stem; streams of `width`, 2·`width`, 4·`width`; a 1×1 convolution.

    `head_width` None: 16·`width`. The paper's text leaves details open; this is our reading: streams of 3, 4 and 4
    identity blocks, stem and first stream of one width, BatchNorm and φ after the 1×1 convolution.
    """
    return ParNetConfig(
        (width, 2 * width, 4 * width, 16 * width if head_width is None else head_width),
        (4, 5, 5),
        stem_width=width,
        stem_stride=1,
        pointwise_head=True,
        num_classes=10,
    )


class Layer(NamedTuple):
    """One layer of the network: its name is that of its module and of its output."""

    name: str
    kind: str  # "repvgg_sse", "downsample_se", "fusion_se" or "pointwise"
    inputs: tuple[str, ...]  # names of layers, or "image"; of a fusion: (stream, fused so far)
    in_channels: int  # of each input
    out_channels: int
    stride: int = 1


def layers(config: ParNetConfig) -> list[Layer]:
    """The network in an order of execution; names are the module paths of the published checkpoints."""
    planes = config.planes
    found: list[Layer] = []

    def add(name: str, kind: str, inputs: Sequence[str], c: int, k: int, stride: int = 1) -> str:
        if kind == "downsample_se" and c == k and stride == 1:
            kind = "repvgg_sse"  # such a block has an identity branch, wherever it stands
        found.append(Layer(name, kind, tuple(inputs), c, k, stride))
        return name

    last = add("inits.0.0", "downsample_se", ["image"], config.in_chans, config.stem, config.stem_stride)
    last = add("inits.0.1", "downsample_se", [last], config.stem, planes[0], config.stem_stride)
    outputs = []
    for s in range(config.streams):
        if s:
            last = add(f"inits.{s}", "downsample_se", [last], planes[s - 1], planes[s], 2)
        output = last
        for i in range(config.num_blocks[s] - 1):
            output = add(f"streams.{s}.{i}", "repvgg_sse", [output], planes[s], planes[s])
        outputs.append(output)
    fused, final = outputs[0], config.streams - 1
    if final:  # one stream has nothing to be fused with
        fused = add("downsamples_2.0", "downsample_se", [fused], planes[0], planes[1], 2)
        for s in range(1, final):
            fused = add(f"downsamples_2.{s}.2", "fusion_se", [outputs[s], fused], planes[s], planes[s + 1], 2)
        fused = add("combine.2", "fusion_se", [outputs[final], fused], planes[final], planes[final])
    kind, stride = ("pointwise", 1) if config.pointwise_head else ("downsample_se", 2)
    add("combine.3", kind, [fused], planes[final], planes[-1], stride)
    return found


def levels(config: ParNetConfig) -> list[list[Layer]]:
    """The layers by depth: a level's layers depend on earlier levels only, and can run together. The paper's depth is
    the number of levels plus one, the classifier.
    """
    depth = {"image": 0}
    grouped: list[list[Layer]] = []
    for layer in layers(config):
        depth[layer.name] = level = 1 + max(depth[name] for name in layer.inputs)
        if level > len(grouped):
            grouped.append([])
        grouped[level - 1].append(layer)
    return grouped


def with_streams(config: ParNetConfig, streams: int) -> ParNetConfig:
    """`config` with another number of streams, ≥ 1: the finest ones are kept; new ones are coarser, twice as wide, and
    as long as the last. The last map keeps its width, and is at the resolution that follows the last stream.
    """
    planes, blocks = [*config.planes[:-1]], [*config.num_blocks]
    while len(planes) < streams:
        planes.append(2 * planes[-1])
        blocks.append(blocks[-1])
    return config.replace(planes=(*planes[:streams], config.planes[-1]), num_blocks=tuple(blocks[:streams]))
