"""How the layers of a level are cut into blocks: tile shape, pixels of a tile, split of the channels, order.

The tile shapes are those compiled into the library (csrc/cuda/policy.h), read through `_cuda_policy`. The choice
minimises a modelled time of the level; it depends on the GPU's multiprocessors and their shared memory only.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from parnet_kernels import environment
from parnet_kernels.cuda_pack import CHUNK_BYTES

SPLITS = range(1, 9)
# Units: one output row of a tile in one stage, 6 clocks of an A100's tensor cores. Estimates: a stage's cost besides
# its products (weights to shared memory, barrier), a block's start and end, and for each split of a tile 28 KB of
# partial sums at 64 bytes a clock. So long a block keeps its multiprocessor busy if a second one fills its pauses;
# alone it takes ALONE times as long. L2_REACHED of L2's rate is what blocks get that all start together. Not measured:
# of a few values of STAGE_COST, ALONE and L2_REACHED those for which bench/cuda_levels.py models the least time.
STAGE_COST, BLOCK_COST, SPLIT_COST = 16, 150, 75
ALONE, L2_REACHED = 1.1, 0.625
WGMMA_ROW = 0.9  # a row of a warpgroup tile; 0.63 / 0.82 by the rates, chosen like the others
CANDIDATES = 48  # combinations whose schedule is simulated
#: Bytes that L2 gives a multiprocessor at most while it does a unit: their rates are in bench/cuda_levels.py.
L2_BYTES = {80: 280, 86: 300, 89: 300, 90: 136, 100: 127, 120: 300}


class TileShape(NamedTuple):
    rows: int
    max_slots: int
    stride: int
    slot_bytes: int
    exchange_bytes: int
    warpgroup: bool


class Policy(NamedTuple):
    """csrc/cuda/policy.h for one architecture."""

    stages: int
    threads: int
    slot_bytes: int
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


#: Whether plans for Hopper use warpgroup tiles: where they pay, in every layer (for tests), or not at all.
Wgmma = Literal["planned", "always", "never"]
_wgmma: Wgmma = "planned" if environment.WGMMA else "never"


def use_wgmma(when: Wgmma) -> None:
    """For the plans that this process makes from now on. A failed self-test says "never"."""
    global _wgmma
    _wgmma = when


def wgmma() -> Wgmma:
    return _wgmma if "90a" in _built_for() else "never"


@functools.cache
def _built_for() -> list[str]:
    return torch.ops.parnet._cuda_info().split()


@dataclass(frozen=True)
class Gpu:
    """What planning depends on."""

    architecture: int
    multiprocessors: int
    shared_per_sm: int
    shared_per_block: int
    wgmma: Wgmma = "never"

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        return cls._of(device, wgmma())

    @classmethod
    @functools.cache
    def _of(cls, device: torch.device, wgmma: Wgmma) -> Gpu:
        p: Any = torch.cuda.get_device_properties(device)
        architecture = 10 * p.major + p.minor
        return cls(
            architecture,
            p.multi_processor_count,
            p.shared_memory_per_multiprocessor,
            p.shared_memory_per_block_optin,
            wgmma if architecture == 90 else "never",
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
    """How one layer is cut. Spatial tiles of rows × cols output pixels; a halo of `slots` pixels in shared memory."""

    tile: int
    rows: int
    cols: int
    tiles_down: int
    tiles_across: int
    slots: int
    slot_pitch: int
    splits: int
    shared: int

    @property
    def image_tiles(self) -> int:
        return self.tiles_down * self.tiles_across

    def tiles(self, s: Shape) -> int:
        return s.n * self.image_tiles * s.groups * s.column_tiles

    def blocks(self, s: Shape) -> int:
        return self.tiles(s) * self.splits


def _slot_pitch(cols: int, stride: int) -> tuple[int, bool]:
    """Slots from one halo row to the next (stride 2: of its even columns), and whether ldmatrix then reads without bank
    conflicts: 8 output pixels in a row must lie in 8 slots that differ modulo 8, also across the end of a tile's row.
    """
    least = cols + 2 if stride == 1 else cols + 1
    for pitch in range(least, least + 8):
        if cols % 8 == 0 or (stride * pitch - cols) % 8 == 0:
            return pitch, True
    return least, False


@functools.cache
def _spatial(s: Shape, tile: int, gpu: Gpu) -> Tiling | None:
    """The best rows and cols for a tile shape: fewest tiles, then no conflicts, then the smallest halo."""
    p = policy(gpu.architecture)
    shape = p.shapes[tile]
    if s.stride != shape.stride:
        return None
    two_blocks = gpu.shared_per_sm // 2 - 1024 - p.static_shared
    best: tuple[tuple[int, ...], Tiling] | None = None
    for cols in range(1, min(-(-s.out_w // 8) * 8, shape.rows) + 1):
        pitch, free = _slot_pitch(cols, s.stride)
        for rows in range(1, min(s.out_h, shape.rows // cols) + 1):
            down, across = -(-s.out_h // rows), -(-s.out_w // cols)
            halo_rows, halo_cols = s.stride * (rows - 1) + 3, s.stride * (cols - 1) + 3
            plane = (halo_rows - 1) * pitch + (halo_cols if s.stride == 1 else cols + 1)
            slots = plane if s.stride == 1 else shape.max_slots + plane - 1
            if shape.warpgroup:
                slots = -(-slots // 8) * 8  # after which its swizzle repeats
            shared = max(p.stages * p.weight_stage_bytes + 2 * slots * shape.slot_bytes, shape.exchange_bytes)
            if plane > shape.max_slots or shared + p.static_shared > gpu.shared_per_block:
                continue
            # Two blocks on a multiprocessor are worth more than a few tiles.
            key = (shared > two_blocks, down * across, not free, halo_rows * halo_cols, slots)
            if best is None or key < best[0]:
                best = key, Tiling(tile, rows, cols, down, across, slots, pitch, 1, -(-shared // 128) * 128)
    return None if best is None else best[1]


def block_costs(s: Shape, t: Tiling, p: Policy) -> list[tuple[float, int]]:
    """Modelled durations of a layer's blocks, longest first, and how many there are of each."""
    shape = p.shapes[t.tile]
    extra = BLOCK_COST + (SPLIT_COST * t.splits if t.splits > 1 else 0)
    row = shape.rows * (WGMMA_ROW if shape.warpgroup else 1) + STAGE_COST
    most, longer = -(-s.chunks // t.splits), s.chunks % t.splits or t.splits  # blocks with the most chunks
    costs = [(3.0 * most * row + extra, longer * t.tiles(s))]
    if longer < t.splits:
        costs.append((3.0 * (most - 1) * row + extra, (t.splits - longer) * t.tiles(s)))
    return costs


def asked_bytes(s: Shape, t: Tiling, p: Policy) -> int:
    """What a layer's blocks ask L2 for: weights, gate weights and halos; partial sums out and in."""
    halo_rows = min(s.h, s.stride * (t.rows - 1) + 3)
    halo_cols = min(s.w, s.stride * (t.cols - 1) + 3)
    chunk = 3 * p.weight_stage_bytes + p.columns * CHUNK_BYTES + halo_rows * halo_cols * CHUNK_BYTES
    partial = 4 * t.rows * t.cols * p.columns
    return t.tiles(s) * (s.chunks * chunk + 2 * (t.splits - 1) * partial)


def blocks_per_sm(gpu: Gpu, shared: int) -> int:
    """How many blocks run at once on a multiprocessor; registers allow two."""
    return max(1, min(2, gpu.shared_per_sm // (shared + policy(gpu.architecture).static_shared + 1024)))


def makespan(costs: list[tuple[float, int]], gpu: Gpu, per_sm: int) -> float:
    """Modelled time of a launch: blocks (cost, number) go, in order, to the multiprocessor with the least work."""
    work = [0.0] * gpu.multiprocessors
    for cost, blocks in costs:
        for _ in range(blocks):
            heapq.heapreplace(work, work[0] + cost)
    return max(max(work) * (1.0 if per_sm == 2 else ALONE), ALONE * costs[0][0]) * _idle(sum(b for _, b in costs), gpu)


def _idle(blocks: int, gpu: Gpu) -> float:
    """A penalty for fewer blocks than multiprocessors: it takes all of them to use the memory's bandwidth."""
    missing = gpu.multiprocessors / blocks
    return 1.0 if missing <= 1 else 1.5 * missing


class _Option(NamedTuple):
    """One way to cut a layer, and what ranking needs of it."""

    tiling: Tiling
    costs: list[tuple[float, int]]  # of `block_costs`
    total: float
    blocks: int
    asked: int


def _options(s: Shape, gpu: Gpu, math: str) -> list[_Option]:
    p = policy(gpu.architecture)
    wgmma = gpu.wgmma if math in ("f16", "bf16") else "never"
    found = []
    for tile, shape in enumerate(p.shapes):
        if tile == 0 and math == "f32":
            continue  # the exact kernel has no 112-row tile
        if wgmma == ("never" if shape.warpgroup else "always"):
            continue
        tiling = _spatial(s, tile, gpu)
        if tiling is None:
            continue
        for splits in SPLITS:
            if splits <= s.chunks:
                t = replace(tiling, splits=splits)
                costs = block_costs(s, t, p)
                total, blocks = sum(c * b for c, b in costs), sum(b for _, b in costs)
                found.append(_Option(t, costs, total, blocks, asked_bytes(s, t, p)))
    return found


@functools.lru_cache(maxsize=1024)
def plan_level(shapes: tuple[Shape, ...], gpu: Gpu, math: str) -> tuple[Tiling, ...]:
    """A tiling for each layer of one launch. math: as in `cuda_program.math_of`."""
    rate = gpu.multiprocessors * L2_REACHED * L2_BYTES.get(gpu.architecture, L2_BYTES[90])
    ranked = []
    for choice in itertools.product(*(_options(s, gpu, math) for s in shapes)):
        per_sm = blocks_per_sm(gpu, max(o.tiling.shared for o in choice))
        longest = max(o.costs[0][0] for o in choice)
        traffic = sum(o.asked for o in choice) / rate
        busy = sum(o.total for o in choice) / gpu.multiprocessors * (1.0 if per_sm == 2 else ALONE)
        bound = max(busy, longest * ALONE, traffic) + longest / 4
        ranked.append((bound * _idle(sum(o.blocks for o in choice), gpu), traffic, per_sm, choice))
    candidates = heapq.nsmallest(CANDIDATES, ranked, key=lambda r: r[0])

    def time(traffic: float, per_sm: int, choice: tuple[_Option, ...]) -> float:
        layers = sorted((o.costs for o in choice), key=lambda costs: -costs[0][0])  # as they are launched
        # Traffic breaks ties, and lengthens everything a little even where it does not bound.
        return max(makespan(list(itertools.chain(*layers)), gpu, per_sm), traffic) + traffic / 6

    return tuple(o.tiling for o in min(candidates, key=lambda r: time(*r[1:]))[3])
