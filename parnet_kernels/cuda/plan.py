"""How the layers of a level are cut into blocks: tile shape, pixels of a tile, split of the channels, order.

The tile shapes are those compiled into the library (csrc/cuda/policy.h), read through `_cuda_policy`. The choice
minimises a modelled time of the level; it depends on the GPU's multiprocessors and their shared memory only.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Any, Literal, NamedTuple

import torch

from parnet_kernels import _native, environment, verdict
from parnet_kernels.cuda.constants import Constants, constants
from parnet_kernels.cuda.pack import CHUNK_BYTES
from parnet_kernels.cuda.program import Pairing

MAX_SPLITS = 8  # that add their sums by way of global memory
CANDIDATES = 48  # combinations whose schedule is simulated
SPLITS_AT_ONCE = 2  # that a tile of mma.sync adds; a warpgroup tile adds fragments as they come (splits.cuh)


class TileShape(NamedTuple):
    rows: int
    max_cells: int
    stride: int
    cell_bytes: int
    exchange_bytes: int
    warpgroup: bool


class Policy(NamedTuple):
    """csrc/cuda/policy.h for one architecture."""

    stages: int
    threads: int
    cell_bytes: int
    weight_stage_bytes: int
    static_shared: int
    columns: int
    max_layers: int
    max_batch: int
    stem_rows: int
    stem_cols: int
    enter_pixels: int
    shapes: tuple[TileShape, ...]


@functools.cache
def policy(architecture: int) -> Policy:
    """architecture: 10·major + minor."""
    values = list(torch.ops.parnet._cuda_policy(architecture))
    constants = dict(zip(Policy._fields, values, strict=False))
    shapes = zip(*[iter(values[len(Policy._fields) - 1 :])] * len(TileShape._fields), strict=True)
    return Policy(**{**constants, "shapes": tuple(TileShape(*s) for s in shapes)})


#: Whether plans for Hopper use warpgroup tiles: where they pay, in every layer (for tests), in pairs wherever they can
#: be (for tests), or not at all.
Wgmma = Literal["planned", "always", "paired", "never"]
_wgmma: Wgmma = "planned" if environment.WGMMA else "never"


def use_wgmma(when: Wgmma) -> None:
    """For the plans that this process makes from now on."""
    global _wgmma
    _wgmma = when


def wgmma() -> Wgmma:
    return _wgmma if "90a" in _built_for() else "never"


@functools.cache
def _built_for() -> list[str]:
    return _native.cuda_architectures()


@dataclass(frozen=True)
class Gpu:
    """What planning depends on. Rates are the device's; the depth of the pipeline, and with it shared memory, is that
    of the image (PARNET_CUDA_ARCHS may not name the device).
    """

    architecture: int
    multiprocessors: int
    shared_per_sm: int
    shared_per_block: int
    wgmma: Wgmma = "never"
    image: int = 0  # the architecture that the kernels were compiled for, if not `architecture`

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", self.image or self.architecture)

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls._of(index, "never" if verdict.failure("wgmma", index) else wgmma())

    @classmethod
    @functools.cache
    def _of(cls, index: int, wgmma: Wgmma) -> Gpu:
        p: Any = torch.cuda.get_device_properties(index)
        architecture = 10 * p.major + p.minor
        image = torch.ops.parnet._cuda_image(index)
        return cls(
            architecture,
            p.multi_processor_count,
            p.shared_memory_per_multiprocessor,
            p.shared_memory_per_block_optin,
            wgmma if architecture == image == 90 else "never",
            image,
        )


#: For tests and models; from NVIDIA's tuning guides.
A100 = Gpu(80, 108, 164 << 10, 163 << 10)
H100 = Gpu(90, 132, 228 << 10, 227 << 10, "planned")
L4 = Gpu(89, 58, 100 << 10, 99 << 10)
RTX4090 = Gpu(89, 128, 100 << 10, 99 << 10)


@dataclass(frozen=True)
class Shape:
    """The problem of one layer."""

    n: int
    h: int
    w: int
    stride: int
    groups: int
    column_tiles: int
    chunks: int

    @property
    def out_h(self) -> int:
        return (self.h - 1) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.w - 1) // self.stride + 1


@dataclass(frozen=True)
class Tiling:
    """How one layer is cut. Spatial tiles of rows × cols output pixels; a halo of `cells` pixels in shared memory."""

    tile: int
    rows: int
    cols: int
    tiles_down: int
    tiles_across: int
    cells: int
    cell_pitch: int
    splits: int
    shared: int
    pairing: Pairing = Pairing.ALONE

    @property
    def parts(self) -> int:
        """Of a tile's splits, those that meet in global memory."""
        return self.splits // 2 if self.pairing == Pairing.SPLITS else self.splits

    @property
    def sum_tiles(self) -> int:
        """How many sums of an image the blocks store for each channel."""
        return self.image_tiles * (2 if self.pairing == Pairing.SPLITS else 1)

    @property
    def image_tiles(self) -> int:
        return self.tiles_down * self.tiles_across

    def tiles(self, s: Shape) -> int:
        return s.n * self.image_tiles * s.groups * s.column_tiles

    def blocks(self, s: Shape) -> int:
        """With those that an odd number of tiles leaves without one."""
        alone = self.pairing == Pairing.PIXELS and s.n * self.image_tiles % 2
        return (self.tiles(s) + (s.groups * s.column_tiles if alone else 0)) * self.splits


def _cell_pitch(cols: int, stride: int) -> tuple[int, bool]:
    """Cells from one halo row to the next (stride 2: of its even columns), and whether ldmatrix then reads without bank
    conflicts: 8 output pixels in a row must lie in 8 cells that differ modulo 8, also across the end of a tile's row.
    """
    least = cols + 2 if stride == 1 else cols + 1
    for pitch in range(least, least + 8):
        if cols % 8 == 0 or (stride * pitch - cols) % 8 == 0:
            return pitch, True
    return least, False


@functools.cache
def _spatial(s: Shape, tile: int, gpu: Gpu) -> Tiling | None:
    """The best rows and cols for a tile shape: fewest tiles, then no conflicts, then the smallest halo."""
    p = policy(gpu.image)
    shape = p.shapes[tile]
    if s.stride != shape.stride:
        return None
    two_blocks = gpu.shared_per_sm // 2 - 1024 - p.static_shared
    best: tuple[tuple[int, ...], Tiling] | None = None
    for cols in range(1, min(-(-s.out_w // 8) * 8, shape.rows) + 1):
        pitch, free = _cell_pitch(cols, s.stride)
        for rows in range(1, min(s.out_h, shape.rows // cols) + 1):
            down, across = -(-s.out_h // rows), -(-s.out_w // cols)
            halo_rows, halo_cols = s.stride * (rows - 1) + 3, s.stride * (cols - 1) + 3
            plane = (halo_rows - 1) * pitch + (halo_cols if s.stride == 1 else cols + 1)
            cells = plane if s.stride == 1 else shape.max_cells + plane - 1
            if shape.warpgroup:
                cells = -(-cells // 8) * 8  # after which its swizzle repeats
            shared = max(p.stages * p.weight_stage_bytes + 2 * cells * shape.cell_bytes, shape.exchange_bytes)
            if plane > shape.max_cells or shared + p.static_shared > gpu.shared_per_block:
                continue
            # Two blocks on a multiprocessor are worth more than a few tiles.
            key = (shared > two_blocks, down * across, not free, halo_rows * halo_cols, cells)
            if best is None or key < best[0]:
                best = key, Tiling(tile, rows, cols, down, across, cells, pitch, 1, -(-shared // 128) * 128)
    return None if best is None else best[1]


def block_costs(s: Shape, t: Tiling, p: Policy, c: Constants) -> list[tuple[float, int]]:
    """Modelled durations of a layer's blocks, longest first, and how many there are of each."""
    shape = p.shapes[t.tile]
    extra = c.block_cost + c.split_cost * shape.rows / 112 * (t.parts - 1) / t.splits
    row = shape.rows * (c.wgmma_row if shape.warpgroup else 1) + c.stage_cost
    most, longer = -(-s.chunks // t.splits), s.chunks % t.splits or t.splits  # blocks with the most chunks
    costs = [(3.0 * most * row + extra, longer * t.tiles(s))]
    if longer < t.splits:
        costs.append((3.0 * (most - 1) * row + extra, (t.splits - longer) * t.tiles(s)))
    return costs


def waits(t: Tiling, p: Policy, c: Constants) -> float:
    """How long the last blocks wait for others after their products."""
    trips = 0.0
    if t.parts > 1:  # the others' stores, the flag, and their sums as many at a time as there is room for
        shape = p.shapes[t.tile]
        halves = 2 if t.pairing == Pairing.SPLITS else 1
        room = halves * shape.exchange_bytes / (4 * shape.rows * p.columns) if shape.warpgroup else SPLITS_AT_ONCE
        trips += 2 + (t.parts - 1) / room
    return c.trip * (trips + (c.pair_trips if t.pairing == Pairing.SPLITS else 0))


def asked_bytes(s: Shape, t: Tiling, p: Policy) -> int:
    """What a layer's blocks ask L2 for: weights, once a pair, gate weights and halos; partial sums out and in."""
    halo_rows = min(s.h, s.stride * (t.rows - 1) + 3)
    halo_cols = min(s.w, s.stride * (t.cols - 1) + 3)
    weights = 3 * p.weight_stage_bytes * t.tiles(s)
    if t.pairing == Pairing.PIXELS:
        weights = weights * -(-s.n * t.image_tiles // 2) // (s.n * t.image_tiles)
    chunk = weights + t.tiles(s) * (p.columns * CHUNK_BYTES + halo_rows * halo_cols * CHUNK_BYTES)
    return s.chunks * chunk + t.tiles(s) * 2 * (t.parts - 1) * _partial_bytes(t, p)


def exchanged_bytes(s: Shape, t: Tiling, p: Policy) -> int:
    """What the blocks of pairs read from each other."""
    return t.tiles(s) * t.parts * _partial_bytes(t, p) if t.pairing == Pairing.SPLITS else 0


def _partial_bytes(t: Tiling, p: Policy) -> int:
    return 4 * t.rows * t.cols * p.columns


def blocks_per_sm(gpu: Gpu, shared: int) -> int:
    """How many blocks run at once on a multiprocessor; registers allow two."""
    return max(1, min(2, gpu.shared_per_sm // (shared + policy(gpu.image).static_shared + 1024)))


def makespan(costs: list[tuple[float, int]], gpu: Gpu, per_sm: int, alone: float) -> float:
    """Modelled time of a launch: blocks (cost, number) go, in order, to the multiprocessor with the least work."""
    work = [0.0] * gpu.multiprocessors
    for cost, blocks in costs:
        for _ in range(blocks):
            heapq.heapreplace(work, work[0] + cost)
    return max(max(work) * (1.0 if per_sm == 2 else alone), alone * costs[0][0])


def _idle(blocks: int, gpu: Gpu) -> float:
    """How much longer a level takes with fewer blocks than multiprocessors. Before Hopper, where blocks in pairs ask
    for less, all of them are wanted: it takes all to use the memory's bandwidth.
    """
    missing = gpu.multiprocessors / blocks
    return 1.0 if missing <= 1 or gpu.architecture >= 90 else 1.5 * missing


class Option(NamedTuple):
    """One way to cut a layer, and what ranking needs of it."""

    tiling: Tiling
    costs: list[tuple[float, int]]  # of `block_costs`
    total: float
    blocks: int
    asked: int
    exchanged: int
    waits: float

    def dominates(self, other: Option) -> bool:
        """Whether it is at least as good in every respect."""
        ours, theirs = ((o.total, o.costs[0][0], o.asked, o.exchanged, o.waits, -o.blocks) for o in (self, other))
        return all(a <= b for a, b in zip(ours, theirs, strict=True))


def _pairings(s: Shape, t: Tiling, shape: TileShape, wgmma: Wgmma) -> Iterator[Tiling]:
    """The splits and pairings that a tiling may have."""
    alone = [replace(t, splits=splits) for splits in range(1, min(MAX_SPLITS, s.chunks) + 1)]
    if not shape.warpgroup:
        yield from alone
        return
    pairs = [] if s.n * t.image_tiles == 1 else [replace(a, pairing=Pairing.PIXELS) for a in alone]
    for splits in range(2, min(2 * MAX_SPLITS, s.chunks) + 1, 2):
        pairs.append(replace(t, splits=splits, pairing=Pairing.SPLITS))
    if wgmma != "paired" or not pairs:
        yield from alone
    yield from pairs


def option(s: Shape, t: Tiling, gpu: Gpu) -> Option:
    p, c = policy(gpu.image), constants(gpu.architecture)
    costs = block_costs(s, t, p, c)
    total, blocks = fsum(cost * b for cost, b in costs), sum(b for _, b in costs)
    return Option(t, costs, total, blocks, asked_bytes(s, t, p), exchanged_bytes(s, t, p), waits(t, p, c))


def options(s: Shape, gpu: Gpu, math: str) -> list[Option]:
    """The ways to cut a layer that may be the best beside others."""
    p = policy(gpu.image)
    wgmma = gpu.wgmma if math in ("f16", "bf16") else "never"
    found: list[Option] = []
    for tile, shape in enumerate(p.shapes):
        if tile == 0 and math == "f32":
            continue  # the exact kernel has no 112-row tile
        if wgmma in (("never",) if shape.warpgroup else ("always", "paired")):
            continue
        tiling = _spatial(s, tile, gpu)
        if tiling is None:
            continue
        found += [option(s, t, gpu) for t in _pairings(s, tiling, shape, wgmma)]
    best: list[Option] = []
    for one in found:
        if not any(b.dominates(one) for b in best):
            best = [b for b in best if not one.dominates(b)] + [one]
    return best


def traffic(choice: Sequence[Option], gpu: Gpu) -> float:
    """How long L2, or the ports between multiprocessors, take for what the blocks ask for."""
    c = constants(gpu.architecture)
    # Multiprocessors without a block leave their share of L2's rate to others.
    asking = min(gpu.multiprocessors, c.l2_shares * sum(o.blocks for o in choice))
    found = fsum(o.asked for o in choice) / (c.l2_reached * c.l2_bytes * asking)
    return max(found, fsum(o.exchanged for o in choice) / (c.pair_bytes * gpu.multiprocessors))


def level_time(choice: Sequence[Option], gpu: Gpu) -> float:
    """Modelled time of a launch, in the units of `constants.py`."""
    c = constants(gpu.architecture)
    per_sm, asked = blocks_per_sm(gpu, max(o.tiling.shared for o in choice)), traffic(choice, gpu)
    layers = sorted((o.costs for o in choice), key=lambda costs: -costs[0][0])  # as they are launched
    work = max(makespan(list(itertools.chain(*layers)), gpu, per_sm, c.alone), asked)
    # Traffic breaks ties, and lengthens everything a little even where it does not bound.
    work *= _idle(sum(o.blocks for o in choice), gpu)
    return work + asked / 20 + max(o.waits for o in choice)


@functools.lru_cache(maxsize=1024)
def plan_level(shapes: tuple[Shape, ...], gpu: Gpu, math: str) -> tuple[Tiling, ...]:
    """A tiling for each layer of one launch. math: as in `program.math_of`."""
    alone = constants(gpu.architecture).alone
    ranked = []
    for choice in itertools.product(*(options(s, gpu, math) for s in shapes)):
        per_sm = blocks_per_sm(gpu, max(o.tiling.shared for o in choice))
        longest = max(o.costs[0][0] for o in choice)
        busy = fsum(o.total for o in choice) / gpu.multiprocessors * (1.0 if per_sm == 2 else alone)
        bound = max(busy, longest * alone, traffic(choice, gpu)) + longest / 4 + max(o.waits for o in choice)
        ranked.append((bound * _idle(sum(o.blocks for o in choice), gpu), choice))
    candidates = heapq.nsmallest(CANDIDATES, ranked, key=lambda r: r[0])
    return tuple(o.tiling for o in min(candidates, key=lambda r: level_time(r[1], gpu))[1])
