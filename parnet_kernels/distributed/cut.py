"""A ParNet cut into a trunk, its streams and the fusion: what can run apart, and the maps between the pieces."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from parnet_kernels.config import Layer, ParNetConfig, layers

Size = tuple[int, ...]  # [N, C, H, W]


class Cut(NamedTuple):
    """Layers, in order of execution. S streams."""

    trunk: list[list[Layer]]  # S steps: step s makes `sources[s]` from the image (s = 0) or `sources[s − 1]`
    streams: list[
        list[Layer]
    ]  # stream s makes `ends[s]` from `sources[s]`; the first of several ends with `downsamples_2.0`
    fusion: list[Layer]  # from `ends` to the last map
    sources: list[str]
    ends: list[str]  # a stream without blocks ends where it begins

    def trunk_between(self, first: int, last: int) -> list[Layer]:
        """Steps [first, last] of the trunk."""
        return [*chain.from_iterable(self.trunk[first : last + 1])]

    def streams_of(self, own: Iterable[int]) -> list[Layer]:
        return [*chain.from_iterable(self.streams[s] for s in own)]

    def every(self) -> list[Layer]:
        last = len(self.streams) - 1
        return [*self.trunk_between(0, last), *self.streams_of(range(last + 1)), *self.fusion]


def cut(config: ParNetConfig) -> Cut:
    graph = layers(config)

    def named(*starts: str) -> list[Layer]:
        return [layer for layer in graph if layer.name.startswith(starts)]

    by_name = {layer.name: layer for layer in graph}
    trunk = [named("inits.0."), *([by_name[f"inits.{s}"]] for s in range(1, config.streams))]
    streams = [named(f"streams.{s}.") for s in range(config.streams)]
    streams[0] += named("downsamples_2.0")
    fusion = [layer for layer in named("downsamples_2.", "combine.") if layer.name != "downsamples_2.0"]
    sources = [step[-1].name for step in trunk]
    ends = [stream[-1].name if stream else source for stream, source in zip(streams, sources, strict=True)]
    return Cut(trunk, streams, fusion, sources, ends)


def sizes(config: ParNetConfig, image: Iterable[int]) -> dict[str, Size]:
    """Of the image [N, C, H, W] and of every layer's output."""
    n, c, h, w = image
    found: dict[str, Size] = {"image": (n, c, h, w)}
    for layer in layers(config):
        _, _, h, w = found[layer.inputs[0]]
        found[layer.name] = n, layer.out_channels, -(-h // layer.stride), -(-w // layer.stride)
    return found
