"""Records layers and levels as programs: what the structures of csrc/cuda/layer.h hold, and where maps lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parnet_kernels.cuda.pack import COLUMNS, Layout, PackedLayer, PackedStem
from parnet_kernels.cuda.plan import Gpu, Shape, Tiling, blocks_per_sm, option, plan_level, policy
from parnet_kernels.cuda.program import (
    COOPERATIVE,
    DEPENDENT,
    MAX_LAYERS,
    PAIRS,
    RELU,
    ROUND,
    SKIP,
    VECTOR_STORE,
    Arena,
    ClassifierCall,
    EnterCall,
    Input,
    Kind,
    LayerCall,
    LevelCall,
    Output,
    Pairing,
    Program,
    StemCall,
    address,
    strided,
)

WORKSPACE, RESULT = 0, 1  # buffer numbers; then the inputs, then the packed tensors


@dataclass
class Map:
    """A map as the kernels keep it: [N][h][w][layout.pitch] at `x`, sums of its tiles at `sums`."""

    n: int
    h: int
    w: int
    layout: Layout
    x: int  # addresses
    sums: int
    sum_tiles: int

    def as_input(self) -> Input:
        return Input(self.x, self.sums, self.layout.pitch, self.sum_tiles)


@dataclass
class Step:
    """One layer to be launched. `buffer` is the number of its first packed tensor; `dense`: the result has exactly
    out_channels channels a pixel, in the operator's order, in the buffer RESULT.
    """

    packed: PackedLayer
    buffer: int
    inputs: tuple[Map, ...]
    label: str
    layout: Layout | None = None  # of the result; None: dense
    last_use: int = 0  # the step that reads the result last

    def shape(self) -> Shape:
        m, p = self.inputs[0], self.packed
        return Shape(m.n, m.h, m.w, p.stride, p.groups, p.column_tiles, p.chunks)


class Recorder:
    """Records one program. Buffers: workspace, result, `inputs` user tensors, then packed tensors as they are added."""

    def __init__(self, math: str, dtype: torch.dtype, gpu: Gpu, inputs: int = 1) -> None:
        self.program, self.dtype, self.gpu = Program(math), dtype, gpu
        self.policy = policy(gpu.image)
        self.arena = Arena()
        self.first_packed = 2 + inputs
        self.step = 0

    def _workspace(self, size: int, last: int) -> int:
        """Address of a block that this step writes and step `last` reads last."""
        return address(WORKSPACE, COUNTER_BYTES + self.arena.allocate(size, self.step, last))

    def _counters(self, count: int) -> int:
        at = self.arena.counters(count)
        if self.arena.zeroed > COUNTER_BYTES:
            raise ValueError(f"parnet_kernels: {self.arena.zeroed} bytes of counters exceed {COUNTER_BYTES}")
        return address(WORKSPACE, at)

    @property
    def workspace_bytes(self) -> int:
        return COUNTER_BYTES + self.arena.size

    def _flags(self) -> int:
        return DEPENDENT if len(self.program) else 0

    def _map(self, n: int, h: int, w: int, layout: Layout, tiles: int, last: int) -> Map:
        x = self._workspace(n * h * w * layout.pitch * self.dtype.itemsize, last)
        return Map(n, h, w, layout, x, self._workspace(4 * n * tiles * layout.pitch, last), tiles)

    # ---- launches

    def enter(self, shape: Sequence[int], stride: Sequence[int], buffer: int, last: int, aligned: bool = True) -> Map:
        """A user's map as the kernels read it. One with whole chunks of adjacent channels, at a multiple of 16 bytes
        (`aligned`), stays where it lies.
        """
        n, c, h, w = shape
        layout = Layout.natural(c, self.dtype)
        tiles = -(-h * w // self.policy.enter_pixels)
        rounds = self.program.math == "tf32"
        in_place = aligned and not rounds and layout.pitch == c and list(stride) == [h * w * c, 1, w * c, c]
        sums = self._workspace(4 * n * tiles * layout.pitch, last)
        x = address(buffer) if in_place else self._workspace(n * h * w * layout.pitch * self.dtype.itemsize, last)
        call = EnterCall(
            strided(shape, stride, address(buffer)), 0 if in_place else x, sums, layout.pitch, tiles, rounds
        )
        label = f"enter {list(shape)}"
        self.program.launch(Kind.ENTER, n * tiles, 0, call, label, self._flags())
        return Map(n, h, w, layout, x, sums, tiles)

    def stem(
        self, packed: PackedStem, buffer: int, shape: Sequence[int], stride: Sequence[int], image: int, last: int
    ) -> Map:
        """The first layer on the user's image in buffer `image`."""
        n, c, h, w = shape
        p = self.policy
        out_h, out_w = ((size - 1) // packed.stride + 1 for size in (h, w))
        down, across = -(-out_h // p.stem_rows), -(-out_w // p.stem_cols)
        layout = Layout.natural(packed.out_channels, self.dtype)
        result = self._map(n, out_h, out_w, layout, down * across, last)
        size = self.dtype.itemsize
        patch = c * ((p.stem_rows - 1) * packed.stride + 3) * ((p.stem_cols - 1) * packed.stride + 3) * size
        shared = -(-patch // 128) * 128 + packed.chunks * (COLUMNS * 64 + p.threads * p.cell_bytes)
        resident = blocks_per_sm(self.gpu, shared) * self.gpu.multiprocessors  # they wait for each other
        blocks = min(n * down * across * packed.column_tiles, resident)
        out = Output(result.x, result.sums, address(buffer + 2), layout.pitch, layout.pitch, 0, 1, out_h, out_w)
        out.tiles_down, out.tiles_across = down, across
        out.flags = VECTOR_STORE | ROUND | (RELU if packed.activation == "relu" else 0)
        out.inverse_area = 1 / (h * w)
        call = StemCall(strided(shape, stride, address(image)), out, address(buffer), address(buffer + 1))
        call.image_sums = self._workspace(4 * n * blocks * c, self.step)
        call.barrier = self._counters(2)
        call.stride, call.column_tiles, call.chunks = packed.stride, packed.column_tiles, packed.chunks
        self.program.launch(Kind.STEM, blocks, shared, call, f"stem {list(shape)}", self._flags() | COOPERATIVE)
        self.step += 1
        return result

    def level(self, steps: Sequence[Step]) -> list[Map]:
        """Independent layers, in as few launches as `MAX_LAYERS` allows."""
        results: list[Map] = []
        for i in range(0, len(steps), MAX_LAYERS):
            results += self._launch_layers(steps[i : i + MAX_LAYERS])
        self.step += 1
        return results

    def _launch_layers(self, steps: Sequence[Step]) -> list[Map]:
        shapes = tuple(s.shape() for s in steps)
        tilings = plan_level(shapes, self.gpu, self.program.math)
        call = LevelCall(len(steps))
        results: dict[int, Map] = {}
        blocks = 0
        cost = [-option(s, t, self.gpu).costs[0][0] for s, t in zip(shapes, tilings, strict=True)]
        for position, i in enumerate(sorted(range(len(steps)), key=cost.__getitem__)):  # longest blocks first
            layer, results[i] = self._layer_call(steps[i], shapes[i], tilings[i])
            if tilings[i].pairing != Pairing.ALONE:
                blocks += blocks % 2  # a block of no layer, so that pairs are clusters
            layer.first_block, layer.blocks = blocks, tilings[i].blocks(shapes[i])
            call.layer[position] = layer
            blocks += layer.blocks
        label = " + ".join(s.label for s in steps)
        warpgroups = any(self.policy.shapes[t.tile].warpgroup for t in tilings)
        kind = Kind.HOPPER if warpgroups else Kind.LEVEL
        flags = self._flags()
        if any(t.pairing != Pairing.ALONE for t in tilings):
            blocks, flags = blocks + blocks % 2, flags | PAIRS
        self.program.launch(kind, blocks, max(t.shared for t in tilings), call, label, flags)
        return [results[i] for i in range(len(steps))]

    def _layer_call(self, step: Step, s: Shape, t: Tiling) -> tuple[LayerCall, Map]:
        p, layout = step.packed, step.layout
        k = p.out_channels
        flags = (SKIP if p.kind == "repvgg_sse" else 0) | (RELU if p.activation == "relu" else 0)
        call = LayerCall()
        if len({m.layout.pitch for m in step.inputs}) > 1:
            pitches = [m.layout.pitch for m in step.inputs]
            raise ValueError(f"parnet_kernels: {step.label}: the inputs' pitches must be equal, got {pitches}")
        for i, m in enumerate(step.inputs):
            call.inputs[i] = m.as_input()
        if layout is None:  # the user's result: no padding, no sums
            result = Map(s.n, s.out_h, s.out_w, Layout(tuple(range(k)), k), address(RESULT), 0, 0)
            width, group_step, channel_step = k // p.groups, 1 if p.groups == 2 else 0, p.groups
        else:
            result = self._map(s.n, s.out_h, s.out_w, layout, t.sum_tiles, step.last_use)
            grouped = p.groups == 2 and layout == Layout.grouped(k, self.dtype)
            shuffled = p.groups == 2 and not grouped
            # Padding channels are stored too, as zeros: a shuffled store leaves none behind the last.
            width = layout.pitch // p.groups
            group_step = layout.pitch // 2 if grouped else 1 if shuffled else 0
            channel_step = 2 if shuffled else 1
            flags |= ROUND
        vector = channel_step == 1 and width % 4 == 0 and result.layout.pitch % 4 == 0
        out = Output(result.x, result.sums, address(step.buffer + 2), result.layout.pitch, width, group_step)
        out.channel_step, out.out_h, out.out_w = channel_step, s.out_h, s.out_w
        out.tiles_down, out.tiles_across = t.tiles_down, t.tiles_across
        out.flags = flags | (VECTOR_STORE if vector else 0)
        out.inverse_area = 1 / (s.h * s.w)
        call.out = out
        call.weight, call.gate_weight, call.chunk_table = (address(step.buffer + i) for i in (0, 1, 3))
        if p.masked:
            call.chunk_masks = address(step.buffer + 3, 4 * (p.groups * p.chunks + 1))
        if t.parts > 1:
            halves = 2 if t.pairing == Pairing.SPLITS else 1
            tiles, rows = t.tiles(s) * halves, self.policy.shapes[t.tile].rows // halves
            call.partial = self._workspace(4 * tiles * t.parts * rows * COLUMNS, self.step)
            call.partial_logits = self._workspace(4 * tiles * t.parts * COLUMNS, self.step)
            call.arrivals = self._counters(tiles)
        call.tile, call.pairing = t.tile, t.pairing
        call.h, call.w, call.stride = s.h, s.w, s.stride
        call.groups, call.column_tiles, call.chunks, call.splits = s.groups, s.column_tiles, s.chunks, t.splits
        call.tile_rows, call.tile_cols = t.rows, t.cols
        call.cells, call.cell_pitch, call.images = t.cells, t.cell_pitch, s.n
        return call, result

    def classifier(self, m: Map, features: int, classes: int, weight: int | None, bias: int | None) -> None:
        """Logits [N, classes] to RESULT; without weight (a buffer number) the channel means."""
        call = ClassifierCall(m.sums, 0 if weight is None else address(weight), 0 if bias is None else address(bias))
        call.y = address(RESULT)
        call.n, call.sum_tiles, call.pitch, call.features = m.n, m.sum_tiles, m.layout.pitch, features
        call.classes = classes if weight is not None else features
        call.inverse_area = 1 / (m.h * m.w)
        outputs = m.n * call.classes
        blocks = -(-outputs // (self.policy.threads // 32))
        self.program.launch(Kind.CLASSIFIER, blocks, 0, call, f"classifier [{m.n}, {features}]", self._flags())
        self.step += 1


#: Space for counters at the start of every workspace: two for each stem, one for each tile of a split layer.
COUNTER_BYTES = 256 << 10
