"""Counted, not guessed: memory traffic and bank conflicts in the simulator; registers, spills and the main loop's
instructions in the cubins.
"""

import functools
import re
import subprocess

import networks
import pytest
import torch
from player import CUDA, decode, play
from ptxsim import Unavailable, compile_cuda, ptxas_info
from ptxsim.toolchain import find_tool
from single import MATHS

from bench import cuda_levels
from parnet_kernels.config import VARIANTS
from parnet_kernels.cuda.plan import A100, H100
from parnet_kernels.cuda.program import ClassifierCall, LevelCall

REGISTERS = 65536  # of a multiprocessor; 128 threads a block, allocated by 8 a thread


@functools.cache
def ptx(math, architecture):
    try:
        return compile_cuda(CUDA / f"level_{math}.cu", f"compute_{architecture}", ["-std=c++20"])
    except Unavailable as reason:
        pytest.skip(str(reason))


def main_loops(math, architecture, tmp_path):
    """Of each loop with matrix instructions in the level kernel: (matrix instructions, all that a usual pass executes).

    A branch over an inner loop is taken: that loop clears another group's channels, which only a fusion whose groups
    meet within a chunk has.
    """
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx(math, architecture))
    subprocess.run([find_tool("ptxas"), "-O3", f"-arch=sm_{architecture}", source, "-o", cubin], check=True)
    try:
        tool = find_tool("cuobjdump")
    except Unavailable as reason:
        pytest.skip(str(reason))
    command = [tool, "-sass", "-fun", f"parnet_level_{math}", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), what) for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.MULTILINE)]
    jumps = [(at, int(target[1], 16)) for at, what in code if (target := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what))]
    back = [(at, to) for at, to in jumps if to <= at]
    loops = []
    for last, first in back:
        skipped = [
            (at, to)
            for at, to in jumps
            if first <= at < to <= last and any(at < inner_to <= inner < to for inner, inner_to in back)
        ]
        body = [i for a, i in code if first <= a <= last and not any(at < a < to for at, to in skipped)]
        if matrix := sum("HMMA" in i for i in body):
            loops.append((matrix, len(body)))
    return loops


@pytest.mark.parametrize(("math", "architecture"), [("f16", 80), ("f16", 90)])
def test_resources(math, architecture):
    check_resources(math, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("math", MATHS)
def test_all_resources(math, architecture):
    check_resources(math, architecture)


def check_resources(math, architecture):
    """No spills, and registers for two blocks on a multiprocessor."""
    told = ptxas_info(ptx(math, architecture))
    for kernel in ("level", "stem"):
        mine = told.split(f"'parnet_{kernel}_{math}'", 1)[1].split("Compiling", 1)[0]
        spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", mine)
        registers = int(re.search(r"Used (\d+) registers", mine)[1])
        assert spilled
        assert set(spilled) == {"0"}, mine
        assert 2 * 128 * -(-registers // 8) * 8 <= REGISTERS, mine


@pytest.mark.parametrize("architecture", [80, 90])
def test_share_of_matrix_instructions(architecture, tmp_path):
    """At least 45 % of the main loop of every tile: 112 rows, 64 rows, 64 rows with stride 2."""
    loops = main_loops("f16", architecture, tmp_path)
    assert sorted(matrix for matrix, _ in loops) == [144, 144, 252]  # a chunk: 9 taps, 4 or 7 x 4 fragments
    for matrix, every in loops:
        assert matrix / every >= 0.45


def count(device, lowered, tensors, index, gpu=A100):
    """Counters of one launch of a program, on arbitrary contents."""
    if not device.simulated:
        pytest.skip("only the simulator counts")
    buffers = [
        torch.zeros(lowered.workspace_bytes, dtype=torch.uint8),
        torch.zeros(lowered.shape, dtype=torch.half),
        torch.zeros(1, 3, 224, 224, dtype=torch.half),
        *tensors,
    ]
    (result,) = play(device, lowered.program, buffers, gpu, only=index, races=False)
    return result


def level_calls(lowered, tensors):
    launches = decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(tensors)))
    return {i: LevelCall.from_buffer_copy(launch.arguments) for i, launch in enumerate(launches[:-1]) if i > 0}


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_three_streams_of_parnet_m(device, gpu):
    """The launch that counts most: three RepVGG-SSE layers, 56², 28² and 14²."""
    lowered, tensors = networks.variant("m", gpu)
    run = count(device, lowered, tensors, 5, gpu)
    requested = run.global_load["bytes"] + run.global_store["bytes"]
    assert run.mma_flops >= 2 * 3 * 462e6 * 0.99  # every product, on tensor cores
    assert run.ldmatrix["bank_conflict"] <= 1.10
    assert run.shared_store["bank_conflict"] <= 1.15
    assert run.shared_load["bank_conflict"] <= 1.02
    sectors = run.global_load["sectors"] + run.global_store["sectors"]
    assert requested / (32 * sectors) >= 0.95
    call = level_calls(lowered, tensors)[5]
    layers = call.layer[: call.layers]
    tiles = [c.column_tiles * c.out.tiles_down * c.out.tiles_across for c in layers]
    partial = sum(  # of each tile, all splits' but one
        4 * 64 * (cuda_levels.parts(c) - 1) * t * c.tile_rows * c.tile_cols for c, t in zip(layers, tiles, strict=True)
    )
    # Without the partial sums, stored once and loaded once, which even out the multiprocessors' work on the A100.
    assert requested - 2 * partial <= 40.5e6
    assert requested <= (32e6 if gpu is H100 else 45e6)
    # Every line that is read or written is needed: weights, gates, maps in and out, and the split layers' partial sums.
    weights = sum(t.nbytes for t in packed_of(tensors, call))
    maps = sum(2 * c.h * c.w * c.inputs[0].pitch * 2 for c in call.layer[: call.layers])
    assert run.unique_lines * 128 <= 1.1 * (weights + maps + partial)


def packed_of(tensors, call):
    """The packed tensors of a level, told by their sizes."""
    wanted = [(c.groups * c.column_tiles * c.chunks, c.column_tiles) for c in call.layer[: call.layers]]
    found = []
    for chunks, tiles in wanted:
        found.append(next(t for t in tensors if t.nbytes == chunks * 9 * 64 * 64))
        found.append(next(t for t in tensors if t.nbytes == chunks * 64 * 64))
        found.append(next(t for t in tensors if t.nbytes == tiles * 6 * 64 * 4))
    return found


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("s", "A100"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("s", "H100"), ("m", "A100"), ("m", "H100"))),
    ],
)
def test_round_trips_in_a_row(device, name, gpu):
    """What the model of bench/cuda_levels.py takes for the latencies of every launch."""
    if not device.simulated:
        pytest.skip("only the simulator counts")
    model = cuda_levels.GPUS[gpu]
    lowered, tensors = networks.variant(name, model.gpu)
    buffers = [
        torch.zeros(lowered.workspace_bytes, dtype=torch.uint8),
        torch.zeros(lowered.shape, dtype=torch.half),
        torch.zeros(1, 3, 224, 224, dtype=torch.half),
        *tensors,
    ]
    runs = play(device, lowered.program, buffers, model.gpu, races=False, round_trips=True)
    launches = decode(lowered.program, [(1 << 40, 1 << 40)] * (3 + len(tensors)))
    assert runs[0].round_trips == (cuda_levels.STEM_TRIPS, 0)
    classifier = ClassifierCall.from_buffer_copy(launches[-1].arguments)
    assert runs[-1].round_trips == (cuda_levels.classifier_trips(classifier, model), 0)
    for run, launch in zip(runs[1:-1], launches[1:-1], strict=True):
        call = LevelCall.from_buffer_copy(launch.arguments)
        before, after = zip(*(cuda_levels.round_trips(c, model) for c in call.layer[: call.layers]), strict=True)
        assert run.round_trips == (max(before), max(after))


@pytest.mark.parametrize("name", VARIANTS)
def test_modelled_time(name):
    """Of a whole forward pass, and the least that a dozen launches can take in the model."""
    most = {"A100": {"s": 1.9, "m": 1.5, "l": 1.4, "xl": 1.3}, "H100": {"s": 2.6, "m": 2.0, "l": 1.85, "xl": 1.8}}
    for gpu, of in most.items():
        rows = cuda_levels.levels(name, cuda_levels.GPUS[gpu], counting=False)
        roofline = sum(row.roofline for row in rows)
        assert sum(row.modelled for row in rows) <= of[name] * roofline
        assert sum(row.floor for row in rows) <= 2 * roofline


@pytest.mark.parametrize("index", [1, 9, 10])
def test_other_levels_of_parnet_m(device, index):
    """Stride 2, a fusion, and the widest layer on the smallest map."""
    lowered, tensors = networks.variant("m")
    run = count(device, lowered, tensors, index)
    requested = run.global_load["bytes"] + run.global_store["bytes"]
    sectors = run.global_load["sectors"] + run.global_store["sectors"]
    assert run.ldmatrix["bank_conflict"] <= 1.10
    assert run.shared_store["bank_conflict"] <= 1.15
    assert requested / (32 * sectors) >= 0.95


def test_gate_is_a_tenth_of_the_bytes(device):
    """Gate weights and channel sums, of all that a three-stream level of ParNet-M asks for."""
    lowered, tensors = networks.variant("m")
    run = count(device, lowered, tensors, 5)
    call = level_calls(lowered, tensors)[5]
    gate = 0
    for c in call.layer[: call.layers]:
        blocks = c.column_tiles * c.out.tiles_down * c.out.tiles_across
        gate += blocks * c.chunks * 64 * 64  # weights: over the splits, once a tile
        gate += blocks * c.chunks * 32 * 4 * c.inputs[0].sum_tiles
    assert gate <= 0.1 * (run.global_load["bytes"] + run.global_store["bytes"])
