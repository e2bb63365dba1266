"""The CUDA kernels level by level: `python -m bench.cuda_levels [--count] [--gpu A100 H100] [--variant s m]`.

For each launch of a published network at 224² and batch 1, in fp16:

* blocks and waves (blocks over blocks that run at once), and FLOPs of the layers: from the program;
* needed bytes: weights, gates, maps in and out once each (modelled); asked bytes: what all blocks load and store, what
  a pair of blocks loads for both once, in the simulator (counted, with --count) or by the same sums, which it confirms
  to a few percent (modelled);
* roofline: max(FLOPs / peak, needed bytes / memory bandwidth);
* time (modelled): start and latencies (fixed) + max(matrix instructions of the busiest multiprocessor (products), asked
  bytes / L2 bandwidth, the busiest multiprocessor's bytes / bandwidth of its port (port), bytes that pairs of blocks
  read from each other / bandwidth between multiprocessors (pairs), needed bytes / memory bandwidth). Latencies are
  those of round trips to memory that wait for each other, whose number the simulator counts (`round_trips`), and those
  of pairs. Constants and their sources: `Model`, `GPUS` and what follows them;
* floor (modelled): start + roofline + latencies, the least that one launch a level can take in this model, however it
  is cut.

Where there is a GPU, also measured times, each launch alone and the whole network against PyTorch (eager, compiled) and
TensorRT if it is installed.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parnet_kernels import ops
from parnet_kernels.config import VARIANTS
from parnet_kernels.cuda.network import Lowered, Weights, lower, pack_network
from parnet_kernels.cuda.plan import A100, H100, L4, RTX4090, Gpu, blocks_per_sm, policy
from parnet_kernels.cuda.program import SKIP, ClassifierCall, LevelCall, Pairing
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.whole import WholeNetwork

HALF = 2  # bytes


@dataclass(frozen=True)
class Model:
    """What a GPU is modelled by.

    tflops: dense fp16 with fp32 accumulation, data sheet. mma: the share of it that mma.sync reaches; on Hopper 0.63,
    the rest needs wgmma (arXiv 2402.13499), see `share`. memory: GB/s, data sheet. l2: GB/s from L2 to the
    multiprocessors; A100 5120 bytes a clock (NVIDIA's white paper); H100 5700 measured on the PCIe card's 114
    multiprocessors (Chips and Cheese, "Nvidia's H100: Funny L2"), so 6600 for the 132 here; the others are estimates.
    What a pair loads for both leaves L2 once: an assumption, as is that pairs find places as single blocks do.
    clock: GHz, boost. start: µs of a launch inside a CUDA graph; with dependent launches, an estimate of what they
    leave of it.
    """

    gpu: Gpu
    tflops: float
    mma: float
    memory: float
    l2: float
    clock: float
    start: float


GPUS = {
    "A100": Model(A100, 312, 1.0, 1555, 7200, 1.41, 1.3),
    "H100": Model(H100, 989, 0.63, 3350, 6600, 1.75, 0.7),
    "L4": Model(L4, 121, 1.0, 300, 2000, 2.04, 1.3),
    "RTX 4090": Model(RTX4090, 165, 1.0, 1008, 5000, 2.52, 1.3),
}
L2_CLOCKS, MEMORY_CLOCKS = 200, 290  # latencies of a hit and of a miss on A100 (arXiv 2208.11174)
PORT_BYTES = 64  # that a multiprocessor takes from L2 in a clock, an estimate
# Between multiprocessors in a cluster of two: GB/s of all, and latency (arXiv 2402.13499).
PAIR_GBPS, PAIR_CLOCKS = 3270, 180
# Round trips in a row of a stem: image, tile, barrier, all blocks' sums.
STEM_TRIPS = 4
PASS_CHUNKS, SUMS_AT_ONCE, STEPS_AT_ONCE = 4, 16, 4  # channel_gate.cuh, maps.cuh


class Level(NamedTuple):
    """One launch of a program."""

    label: str
    blocks: int
    waves: float
    gflop: float
    needed: int  # bytes
    asked: int  # bytes
    roofline: float  # µs
    fixed: float  # µs: start and latencies
    products: float  # µs: matrix instructions of the busiest multiprocessor
    l2: float  # µs: asked bytes
    port: float  # µs: those of the busiest multiprocessor
    pairs: float  # µs: what pairs of blocks read from each other
    memory: float  # µs: needed bytes

    @property
    def modelled(self) -> float:
        return self.fixed + max(self.products, self.l2, self.port, self.pairs, self.memory)

    @property
    def floor(self) -> float:
        return self.fixed + self.roofline


def lowered(name: str, gpu: Gpu) -> tuple[Weights, Lowered]:
    """A published network with arbitrary weights."""
    network = DeployedParNet(VARIANTS[name]).half()
    whole = network.whole()
    assert isinstance(whole, WholeNetwork), whole
    weights = pack_network(whole, "ieee")
    stride = (3 * 224 * 224, 224 * 224, 224, 1)
    return weights, lower(network.config, weights, (1, 3, 224, 224), stride, torch.float16, "ieee", gpu, "logits")


def launches(weights: Weights, low: Lowered) -> list[Any]:
    """The launches as the package's host code decodes them."""
    from tests.cuda.player import decode

    return decode(low.program, [(1 << 40, 1 << 40)] * (3 + len(weights.tensors)))


def count(weights: Weights, low: Lowered, gpu: Gpu) -> list[int]:
    """Bytes that each launch loads and stores, in the simulator."""
    from tests.cuda.player import play
    from tests.ptxsim.device import Simulator

    memory = torch.zeros(low.workspace_bytes, dtype=torch.uint8)
    buffers = [memory, torch.zeros(low.shape).half(), torch.zeros(1, 3, 224, 224).half(), *weights.tensors]
    results = play(Simulator(), low.program, buffers, gpu, races=False)
    # Waiting in the stem's grid barrier takes as many loads as it takes time, which the simulator does not know.
    waits = [sum(line["bytes"] for line in r.lines if "ld.acquire" in line["text"]) for r in results]
    return [r.global_load["bytes"] + r.global_store["bytes"] - w for r, w in zip(results, waits, strict=True)]


def share(c: Any, m: Model) -> float:
    """The share of the data sheet's rate that a layer's matrix instructions reach.

    wgmma's: at the data sheet's rate 64 rows, 64 columns and 16 channels take 32 clocks. Shared memory, 128 bytes a
    clock (32 banks of 4, CUDA programming guide), hands out the 4 KB that these multiply in as many, and what copies
    write into it, weights and halo, comes on top.
    """
    shape = policy(m.gpu.image).shapes[c.tile]
    if not shape.warpgroup:
        return m.mma
    read = 9 * 2 * (shape.rows // 64) * 4096  # of a chunk: taps, halves, products
    written = 9 * 64 * 64 + c.cells * 64
    return read / (read + written)


class Terms(NamedTuple):
    """Of a level's layer."""

    flops: int
    needed: int  # bytes
    asked: int  # bytes
    exchanged: int  # bytes that pairs of blocks read from each other
    chunk_flops: int  # that a block's matrix instructions do for a chunk
    chunk_bytes: int  # that a block takes for a chunk
    partial: int  # bytes of sums, of a block that shares its tile with others


def parts(c: Any) -> int:
    """Of a tile's splits, those that meet in global memory."""
    return c.splits // 2 if c.pairing == Pairing.SPLITS else c.splits


def layer_terms(c: Any, rows: int) -> Terms:
    columns, spatial = c.groups * c.column_tiles, c.out.tiles_down * c.out.tiles_across
    tiles = spatial * columns
    weight = columns * c.chunks * 9 * 64 * 64
    gate = columns * c.chunks * 64 * 64
    inputs = [c.inputs[i] for i in range(2) if c.inputs[i].x]
    maps = sum(c.h * c.w * m.pitch * HALF for m in inputs)
    result = c.out.out_h * c.out.out_w * c.out.pitch * HALF
    width = c.groups * c.chunks * 32 * c.out.width
    halo = min(c.h, c.stride * (c.tile_rows - 1) + 3) * min(c.w, c.stride * (c.tile_cols - 1) + 3) * 64
    sums = 32 * 4 * c.inputs[0].sum_tiles
    asked = spatial * gate + tiles * c.chunks * (halo + sums) + result * (2 if c.out.flags & SKIP else 1)
    asked += weight * (-(-spatial // 2) if c.pairing == Pairing.PIXELS else spatial)
    # Partial sums: every split but one leaves them, and that one loads them.
    partial = min(rows, c.tile_rows * c.tile_cols) * 64 * 4
    asked += tiles * 2 * (parts(c) - 1) * partial
    paired = c.pairing == Pairing.SPLITS
    return Terms(
        2 * 9 * c.out.out_h * c.out.out_w * width,
        weight + gate + maps + result,
        asked,
        tiles * parts(c) * partial if paired else 0,
        2 * 9 * rows * 64 * 32,
        10 * 64 * 64 + halo + sums,
        partial // 2 if paired else partial,
    )


def latency(m: Model, trips: int) -> float:
    """µs of round trips in a row: the first to memory, where the weights are, the others to L2."""
    return (MEMORY_CLOCKS + (trips - 1) * L2_CLOCKS) / (1e3 * m.clock)


def round_trips(c: Any, m: Model) -> tuple[int, int]:
    """Round trips in a row (before, after) the products of a layer's blocks, as the simulator counts them.

    Before: the chunk table, unless the launch is dependent and can read it early; then the channel sums of each pass of
    the gate. After: the skip; or of a split layer the flag, then the others' partial sums, as many as fit into shared
    memory at a time, in a warpgroup tile by 64 rows.
    """
    p = policy(m.gpu.image)
    batches = -(-c.inputs[0].sum_tiles // (p.threads // 32 * SUMS_AT_ONCE))
    passes = -(-c.chunks // c.splits // PASS_CHUNKS)
    before = batches * passes + (m.gpu.image < 90)
    shape = p.shapes[c.tile]
    pipeline = p.stages * p.weight_stage_bytes + 2 * c.cells * shape.cell_bytes
    fragments = shape.rows // 64 if shape.warpgroup else 1
    room = (shape.exchange_bytes if shape.warpgroup else pipeline) // (shape.rows // fragments * p.columns * 4)
    fragments //= 2 if c.pairing == Pairing.SPLITS else 1
    others = 1 + -(-fragments * (parts(c) - 1) // room) if parts(c) > 1 else 0
    # A warpgroup tile has registers for the skip only after that, unless it has half of the sums.
    late = shape.warpgroup and c.pairing != Pairing.SPLITS
    return before, others + (c.out.flags & SKIP if late or not others else 0)


def pair_trips(c: Any) -> int:
    """Round trips in a row between the blocks of a pair: a barrier and reading the other's sums. Other barriers are
    while the launch before still runs, or while the block waits for something else.
    """
    return 2 if c.pairing == Pairing.SPLITS else 0


def classifier_trips(c: Any, m: Model) -> int:
    """The same of the classifier: the bias, unless it is read early, and the sums' tiles."""
    return -(-c.features // (32 * 8 * STEPS_AT_ONCE)) * c.sum_tiles + (m.gpu.image < 90)


def analyse(launch: Any, m: Model, counted: int | None) -> Level:
    """A level launch by the model above."""
    call = LevelCall.from_buffer_copy(launch.arguments)
    shapes = policy(m.gpu.image).shapes
    layers = [call.layer[i] for i in range(call.layers)]
    terms = [layer_terms(c, shapes[c.tile].rows) for c in layers]
    clocks = 0
    work = [(0.0, i) for i in range(m.gpu.multiprocessors)]  # matrix instructions of each multiprocessor
    taken = [0] * m.gpu.multiprocessors  # bytes
    for c, t in zip(layers, terms, strict=True):
        # And one that the simulator, which runs block after block, does not see: the others' stores before the flag.
        trips = sum(round_trips(c, m)) + (parts(c) > 1)
        clocks = max(clocks, MEMORY_CLOCKS + (trips - 1) * L2_CLOCKS + pair_trips(c) * PAIR_CLOCKS)
        tiles = c.out.tiles_down * c.out.tiles_across * c.groups * c.column_tiles
        for split in range(c.splits):
            chunks = c.chunks // c.splits + (split < c.chunks % c.splits)
            others = parts(c) - 1 if split >= c.splits - c.splits // parts(c) else min(1, parts(c) - 1)
            for _ in range(tiles):
                done, at = work[0]
                heapq.heapreplace(work, (done + t.chunk_flops * chunks / share(c, m), at))
                taken[at] += t.chunk_bytes * chunks + t.partial * others
    needed = sum(t.needed for t in terms)
    flops = sum(t.flops for t in terms)
    asked = counted if counted is not None else sum(t.asked for t in terms)
    roofline = max(flops / (1e6 * m.tflops), needed / (1e3 * m.memory))
    waves = launch.grid / (m.gpu.multiprocessors * blocks_per_sm(m.gpu, launch.shared))
    bounds = {
        "products": max(work)[0] / (1e6 * m.tflops / m.gpu.multiprocessors),
        "l2": asked / (1e3 * m.l2),
        "port": max(taken) / (1e3 * PORT_BYTES * m.clock),
        "pairs": sum(t.exchanged for t in terms) / (1e3 * PAIR_GBPS),
        "memory": needed / (1e3 * m.memory),
    }
    fixed = m.start + clocks / (1e3 * m.clock)
    return Level(launch.label, launch.grid, waves, flops / 1e9, needed, asked, roofline, fixed, **bounds)


def small(launch: Any, m: Model, needed: int, counted: int | None, flops: float, trips: int) -> Level:
    """The stem or the classifier: bound by latency and their bytes."""
    asked = counted if counted is not None else needed
    bounds = flops / (1e6 * m.tflops * m.mma), asked / (1e3 * m.l2), 0.0, 0.0, needed / (1e3 * m.memory)
    roofline = max(flops / (1e6 * m.tflops), needed / (1e3 * m.memory))
    waves = launch.grid / (2 * m.gpu.multiprocessors)
    fixed = m.start + latency(m, trips)
    return Level(launch.label, launch.grid, waves, flops / 1e9, needed, asked, roofline, fixed, *bounds)


def levels(name: str, m: Model, counting: bool) -> list[Level]:
    weights, low = lowered(name, m.gpu)
    found = launches(weights, low)
    counted: list[int] | list[None] = count(weights, low, m.gpu) if counting else [None] * len(found)
    config = VARIANTS[name]
    rows = []
    for launch, asked in zip(found, counted, strict=True):
        if "level" in launch.kernel or "hopper" in launch.kernel:
            rows.append(analyse(launch, m, asked))
        elif "stem" in launch.kernel:
            needed = 3 * 224 * 224 * HALF + 112 * 112 * config.stem * HALF
            rows.append(small(launch, m, needed, asked, 2 * 27 * config.stem * 112 * 112, STEM_TRIPS))
        else:
            size = config.planes[-1] * config.num_classes
            trips = classifier_trips(ClassifierCall.from_buffer_copy(launch.arguments), m)
            rows.append(small(launch, m, size * HALF, asked, 2 * size, trips))
    return rows


def show(console: Console, name: str, gpu: str, rows: list[Level], counting: bool) -> None:
    title = f"ParNet-{name.upper()} on {gpu}: modelled, not measured"
    table = Table(title=title)
    asked = "MB asked (counted)" if counting else "MB asked (modelled)"
    times = ("roofline", "fixed", "products", "l2", "port", "pairs", "memory", "modelled")
    for column in ("launch", "blocks", "waves", "GFLOP", "MB needed", asked, *(f"{name} µs" for name in times)):
        table.add_column(column, justify="left" if column == "launch" else "right")
    for r in rows:
        label = r.label if len(r.label) <= 44 else r.label[:41] + "…"
        numbers = [f"{r.waves:.2f}", f"{r.gflop:.2f}", f"{r.needed / 1e6:.2f}", f"{r.asked / 1e6:.2f}"]
        table.add_row(label, str(r.blocks), *numbers, *(f"{getattr(r, name):.2f}" for name in times))
    sums = [f"{sum(getattr(r, name) for r in rows) / 1e6:.1f}" for name in ("needed", "asked")]
    total = {name: sum(getattr(r, name) for r in rows) for name in (*times, "floor")}
    spent = [f"{total[name]:.1f}" for name in times]
    table.add_row("sum", "", "", f"{sum(r.gflop for r in rows):.2f}", *sums, *spent, style="bold")
    table.caption = (
        f"{total['modelled'] / total['roofline']:.2f} times the roofline; the floor, {total['floor']:.1f} µs, is "
        f"{total['floor'] / total['roofline']:.2f} times"
    )
    console.print(table)


# ------------------------------------------------------------------ on a GPU


def records(program: Tensor) -> Iterator[Tensor]:
    """Programs of one launch each."""
    at = 0
    while at < program.numel():
        size = int(program[at + 28 : at + 32].view(torch.int32))
        yield program[at : at + size].clone()
        at += size


def microseconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """Median of `repeats` calls, by events around each."""
    for _ in range(20):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * sorted(start.elapsed_time(end) for start, end in pairs)[repeats // 2]


@torch.inference_mode()
def measured(console: Console, name: str) -> None:
    """Times on this machine's GPU: whole networks, and each launch of ours alone."""
    x = torch.randn(1, 3, 224, 224, device="cuda").half()
    with torch.inference_mode(False):
        network = DeployedParNet(VARIANTS[name]).half().cuda()
    captured = network.capture(x)
    runs: dict[str, Callable[[], Any]] = {"ours, CUDA graph": lambda: captured(x), "ours": lambda: network(x)}

    def stock(image: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return network(image)

    runs["PyTorch eager"] = lambda: stock(x)
    compiled = torch.compile(stock, mode="reduce-overhead")
    runs["torch.compile"] = lambda: compiled(x)
    try:
        import torch_tensorrt

        engine = torch_tensorrt.compile(network, inputs=[x], enabled_precisions={torch.half})
        runs["TensorRT"] = lambda: engine(x)
    except ImportError:
        console.print("TensorRT is not installed")
    table = Table("ParNet-" + name.upper(), "µs (measured)", title=torch.cuda.get_device_name())
    for label, run in runs.items():
        table.add_row(label, f"{microseconds(run):.1f}")
    low, weights = captured._lowered, captured._weights
    buffers = [captured._memory, captured.result, captured.input, *weights.tensors]
    for label, record in zip(low.labels, records(low.program), strict=True):
        play = partial(torch.ops.parnet._cuda_play, buffers, record)
        table.add_row(f"  {label}", f"{microseconds(play):.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_levels", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--count", action="store_true", help="count the asked bytes in the simulator (needs nvcc)")
    arguments = parser.parse_args()
    console = Console(width=160)
    for name in arguments.variant:
        for gpu in arguments.gpu:
            show(console, name, gpu, levels(name, GPUS[gpu], arguments.count), arguments.count)
        if torch.cuda.is_available():
            measured(console, name)


if __name__ == "__main__":
    main()
