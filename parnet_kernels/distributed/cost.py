"""What runs where: modelled times of placements of a ParNet's streams on devices, and the fastest placement.

The model, all in seconds: a level of layers (one launch, or one pass of the CPU's schedule) takes
launch + max(FLOPs / (flops · fill), bytes / bandwidth), where fill ≤ 1 is the share of the device's units that its
tiles of 64 × 64 outputs occupy, each split in up to `SPLITS` along its sum; a message takes latency + bytes /
bandwidth, and one after another leaves a device. It knows no caches and no contention. An eager device
takes, layer by layer, the longer of its launches and of that maximum: launches run ahead of the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum, prod

from parnet_kernels.config import Layer, ParNetConfig
from parnet_kernels.distributed.cut import Cut, cut, sizes

#: Of the authors' fused blocks, by reading: convolution and bias, BatchNorms, pooling, gate, products, sum, φ, shuffle.
EAGER_LAUNCHES = {"repvgg_sse": 9, "downsample_se": 8, "fusion_se": 13, "pointwise": 3}
SPLITS = 4
TILE = 64
MAX_PLACEMENTS = 20_000  # that are compared; beyond, those with neighbouring streams together


@dataclass(frozen=True)
class Device:
    """Reached, not peak: what the kernels get."""

    flops: float  # a second, two for each multiply-add
    bandwidth: float  # bytes a second of memory
    launch: float  # of a level
    units: int = 1  # that share a level's tiles: multiprocessors; 1: a CPU's threads, which share anything
    eager: bool = False  # layers one after another, each of several launches (`EAGER_LAUNCHES`), as frameworks do


@dataclass(frozen=True)
class Link:
    latency: float  # of a message
    bandwidth: float  # bytes a second in one direction


@dataclass(frozen=True)
class Placement:
    """Rank 0 runs the fusion and, where others start from its maps, the trunk."""

    streams: tuple[tuple[int, ...], ...]  # of each rank
    starts: tuple[int | None, ...]  # of each rank: from the image (None), or from the source of this stream

    def describe(self, places: Sequence[str] | None = None) -> str:
        """In words. places: the names of the ranks."""
        named = places or [f"rank {rank}" for rank in range(len(self.streams))]

        def one(rank: int) -> str:
            start = self.starts[rank]
            own = " and ".join(map(str, self.streams[rank]))
            plural = "streams" if len(self.streams[rank]) > 1 else "stream"
            origin = "the image" if start is None else f"{named[0]}'s map at the start of stream {start}"
            return f"{named[rank]}: {plural} {own}, from {origin}" + (", fusion" if rank == 0 else "")

        return "; ".join(map(one, range(len(self.streams))))


class Model:
    """Of one network on images of one size. itemsize: bytes of a value in weights and maps, of those sent: `sent`."""

    def __init__(self, config: ParNetConfig, image: Iterable[int], itemsize: int = 4, sent: int = 4) -> None:
        self.cut: Cut = cut(config)
        self.size = sizes(config, image)
        self.itemsize, self.sent = itemsize, sent
        self._depth: dict[str, int] = {"image": 0}
        for layer in self.cut.every():
            self._depth[layer.name] = 1 + max(self._depth[name] for name in layer.inputs)

    def bytes_of(self, name: str) -> int:
        """Of a map that is sent, with its channel sums."""
        n, c, h, w = self.size[name]
        return n * c * (h * w + 1) * self.sent

    def layers_time(self, layers: Iterable[Layer], device: Device) -> float:
        """Of layers on one device, level by level."""
        if device.eager:
            return fsum(
                max(EAGER_LAUNCHES[layer.kind] * device.launch, self._busy_time([layer], device)) for layer in layers
            )
        levels: dict[int, list[Layer]] = {}
        for layer in layers:
            levels.setdefault(self._depth[layer.name], []).append(layer)
        return fsum(device.launch + self._busy_time(level, device) for level in levels.values())

    def _busy_time(self, level: Sequence[Layer], device: Device) -> float:
        """Of layers that run together, without the launch."""
        flops = values = tiles = 0
        for layer in level:
            n, k, h, w = self.size[layer.name]
            taps = 1 if layer.kind == "pointwise" else 9
            weights = k * layer.in_channels * taps
            flops += 2 * n * h * w * weights
            values += weights + prod(self.size[layer.name]) + sum(prod(self.size[name]) for name in layer.inputs)
            tiles += -(-n * h * w // TILE) * -(-k // TILE)
        fill = min(1.0, max(tiles, 1) * SPLITS / device.units)
        return max(flops / (device.flops * fill), values * self.itemsize / device.bandwidth)

    def single_time(self, device: Device) -> float:
        """Of the whole network on one device."""
        return self.layers_time(self.cut.every(), device) + device.launch  # the classifier

    def chain(self, streams: Sequence[int], start: int | None) -> list[Layer]:
        """What a rank with these streams runs, from the image or from the source of stream `start`."""
        first = 0 if start is None else start + 1
        return [*self.cut.trunk_between(first, max(streams)), *self.cut.streams_of(streams)]

    def shared_trunk(self, placement: Placement) -> tuple[int, list[str]]:
        """The last step of the trunk that rank 0 runs for others, −1 for none; and the sources made up to there that
        others, or rank 0 itself, go on from.
        """
        starts = {start for start in placement.starts if start is not None}
        begun = max(starts, default=-1)
        used = starts | {s for s in placement.streams[0] if s <= begun} | ({begun} if starts else set())
        return begun, [self.cut.sources[s] for s in sorted(used)]

    def rest(self, placement: Placement) -> list[Layer]:
        """What rank 0 runs after that: the rest of its trunk, and its streams."""
        own, (begun, _) = placement.streams[0], self.shared_trunk(placement)
        return [*self.cut.trunk_between(begun + 1, max(own)), *self.cut.streams_of(own)]

    def time(self, placement: Placement, device: Device, link: Link, image_sent: bool = False) -> float:
        """Until rank 0 has the result. image_sent: only rank 0 has the images at first."""
        clock, (begun, sources) = 0.0, self.shared_trunk(placement)
        arrivals = []
        if sources:  # the trunk, as far as others start from its maps
            clock = self.layers_time(self.cut.trunk_between(0, begun), device)
        wire = clock  # when the link out of rank 0 is free
        for rank, (own, start) in enumerate(zip(placement.streams, placement.starts, strict=True)):
            if rank == 0:
                continue
            arrived = 0.0
            if start is not None or image_sent:
                name = "image" if start is None else self.cut.sources[start]
                wire = max(wire, clock if start is not None else 0.0) + self.bytes_of(name) / link.bandwidth
                arrived = wire + link.latency
            done = arrived + self.layers_time(self.chain(own, start), device)
            ends = sum(self.bytes_of(self.cut.ends[s]) for s in own)
            arrivals.append(done + link.latency + ends / link.bandwidth)
        ready = clock + self.layers_time(self.rest(placement), device)
        return max([ready, *arrivals]) + self.layers_time(self.cut.fusion, device) + device.launch

    def best(
        self,
        ranks: int,
        device: Device,
        link: Link,
        streams: Sequence[Sequence[int]] | None = None,
        trunk: str = "auto",
        image_sent: bool = False,
    ) -> Placement:
        """The fastest placement; of equal ones, to nine digits, the first, so that every rank finds the same.

        Args:
            streams: of each rank, if they are prescribed.
            trunk: "recompute": every rank from the image; "send": none but rank 0 from it; "auto": whichever is faster.
        """
        placements = self.placements(ranks, streams, trunk)
        return min(placements, key=lambda p: float(f"{self.time(p, device, link, image_sent):.9g}"))

    def placements(
        self, ranks: int, streams: Sequence[Sequence[int]] | None = None, trunk: str = "auto"
    ) -> Iterator[Placement]:
        count = len(self.cut.streams)
        divisions = [tuple(map(tuple, streams))] if streams is not None else _divisions(count, ranks)
        for division in divisions:
            choices: list[list[int | None]] = [[None]]
            for own in division[1:]:
                maps: list[int | None] = [*range(min(own) + 1)]
                starts_by_trunk: dict[str, list[int | None]] = {"recompute": [None], "send": maps}
                choices.append(starts_by_trunk.get(trunk, [None, *maps]))
            if prod(map(len, choices)) * len(divisions) > MAX_PLACEMENTS:
                choices = [[options[0]] if len(options) < 2 else [options[0], options[-1]] for options in choices]
            for starts in itertools.product(*choices):
                yield Placement(tuple(map(tuple, division)), starts)


def _divisions(count: int, ranks: int) -> list[tuple[tuple[int, ...], ...]]:
    """All ways to give `count` streams to `ranks` ranks, each at least one; of many streams, neighbours together."""
    if count**ranks > MAX_PLACEMENTS or count > 6:
        cuts = itertools.combinations(range(1, count), ranks - 1)
        runs = [[tuple(range(a, b)) for a, b in itertools.pairwise((0, *c, count))] for c in cuts]
        return [(run[first], *run[:first], *run[first + 1 :]) for run in runs for first in range(ranks)]
    found = []
    for owners in itertools.product(range(ranks), repeat=count):
        parts = tuple(tuple(s for s in range(count) if owners[s] == rank) for rank in range(ranks))
        if all(parts) and [*parts[1:]] == sorted(parts[1:]):  # ranks but 0 are alike
            found.append(parts)
    return found


def sent_bytes(model: Model, placement: Placement, image_sent: bool = False) -> dict[tuple[int, int], int]:
    """Bytes a call sends, by (from, to)."""
    found: dict[tuple[int, int], int] = {}
    for rank, (own, start) in enumerate(zip(placement.streams, placement.starts, strict=True)):
        if rank:
            name = "image" if start is None else model.cut.sources[start]
            found[0, rank] = model.bytes_of(name) if start is not None or image_sent else 0
            found[rank, 0] = sum(model.bytes_of(model.cut.ends[s]) for s in own)
    return found
