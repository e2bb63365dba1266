"""Measures the constants of the CUDA planner on this GPU: `python -m bench.cuda_constants [--write]`.

Layers of ParNet-S and M are timed one at a time in many tilings each, in a CUDA graph and with warm caches, and the
constants of parnet_kernels/cuda/constants.py are fitted so that the model's times are proportional to the measured
ones, plus what a launch costs. --write puts them into measured.json beside that file, which the planner then reads
instead of the modelled ones, with the GPU, versions and the errors before and after. The table of measured times goes
to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parnet_kernels.cuda import constants as table
from parnet_kernels.cuda import plan
from parnet_kernels.cuda.constants import Constants
from parnet_kernels.cuda.plan import Gpu, Option, Shape

TILINGS = 8  # of a layer, spread over its options from the best modelled to the worst
STEPS = (0.5, 0.7, 0.85, 0.95, 1.05, 1.2, 1.4, 2.0)
ROUNDS = 6
#: Operator, channels, result channels, size and stride of S's and M's layers.
LAYERS = [
    (op, c * w // 64, k * w // 64, size, stride)
    for w in (96, 128)
    for op, c, k, size, stride in (
        ("repvgg_sse", 64, 64, 56, 1),
        ("repvgg_sse", 128, 128, 28, 1),
        ("repvgg_sse", 256, 256, 14, 1),
        ("downsample_se", 64, 128, 56, 2),
        ("fusion_se", 128, 256, 28, 2),
    )
]


class Timed(NamedTuple):
    """A layer in one tiling."""

    shape: Shape
    option: Option
    microseconds: float


def with_constants(c: Constants, gpu: Gpu, call: Callable[[], Any]) -> Any:
    """`call` with these constants in the planner's model."""
    before = plan.constants
    plan.constants = lambda _: c  # type: ignore[assignment]
    try:
        return call()
    finally:
        plan.constants = before


def units(rows: Sequence[Timed], gpu: Gpu, c: Constants) -> list[float]:
    """Modelled times of the rows."""
    return with_constants(
        c, gpu, lambda: [plan.level_time((plan.option(r.shape, r.option.tiling, gpu),), gpu) for r in rows]
    )


def line(modelled: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(start, unit) of measured ≈ start + unit · modelled, in µs; least squares of relative errors, start ≥ 0."""
    weighted = [(1 / m, u / m) for u, m in zip(modelled, measured, strict=True)]  # their sum times (start, unit) is 1
    a, b, d = (sum(r[i] * r[j] for r in weighted) for i, j in ((0, 0), (0, 1), (1, 1)))
    e, f = (sum(r[i] for r in weighted) for i in (0, 1))
    determinant = a * d - b * b
    start = (e * d - f * b) / determinant if determinant > 1e-12 * a * d else 0.0
    if start <= 0:
        return 0.0, f / d
    return start, (f - b * start) / d


def error(rows: Sequence[Timed], gpu: Gpu, c: Constants) -> float:
    """Mean |log| of modelled over measured times, after the line; infinite where the model contradicts the times."""
    modelled, measured = units(rows, gpu, c), [r.microseconds for r in rows]
    start, unit = line(modelled, measured)
    if unit <= 0:
        return math.inf
    return statistics.fmean(abs(math.log((start + unit * u) / m)) for u, m in zip(modelled, measured, strict=True))


def fit(rows: Sequence[Timed], gpu: Gpu, c: Constants, rounds: int = ROUNDS) -> Constants:
    """One constant after the other, as long as the error falls. `alone` and `wgmma_row` too; the unit is the line's."""
    least = error(rows, gpu, c)
    for _ in range(rounds):
        before = least
        for name in Constants._fields:
            for step in STEPS:
                tried = c._replace(**{name: getattr(c, name) * step})
                if (found := error(rows, gpu, tried)) < least * (1 - 1e-3):
                    least, best = found, tried
                    c = best
        if least > before * 0.99:
            break
    return c


def tilings(shape: Shape, gpu: Gpu, math: str) -> list[Option]:
    ranked = sorted(plan.options(shape, gpu, math), key=lambda o: plan.level_time((o,), gpu))
    step = max(1, len(ranked) // TILINGS)
    return ranked[::step][:TILINGS]


# ------------------------------------------------------------------ on a GPU


def measure(gpu: Gpu) -> Iterator[Timed]:
    """Every layer in its tilings; a tiling that fails is left out, which is said."""
    from parnet_kernels.call import Call
    from parnet_kernels.cuda import backend, record
    from parnet_kernels.cuda.workspace import allocate

    for op, c, k, size, stride in LAYERS:
        torch.manual_seed(0)
        maps = [torch.randn(1, c, size, size, device="cuda").half().contiguous(memory_format=torch.channels_last)]
        maps *= 2 if op == "fusion_se" else 1
        k = c if op == "repvgg_sse" else k
        vectors = [torch.randn(c, device="cuda").half() for _ in range(2)] if op == "repvgg_sse" else []
        weights = [torch.randn(k, c, 3, 3, device="cuda").half(), torch.randn(k, device="cuda").half(), *vectors]
        tensors = [*maps, *weights, torch.randn(k, c, device="cuda").half(), None]
        call = Call.of(op, tensors, {} if op == "repvgg_sse" else {"stride": stride})
        packed = backend._pack(call, "ieee")
        recorder = record.Recorder("f16", torch.float16, gpu, len(maps))
        inputs = tuple(
            recorder.enter(tuple(m.shape), m.stride(), record.RESULT + 1 + i, 0, True) for i, m in enumerate(maps)
        )
        step = record.Step(packed, recorder.first_packed, inputs, op)
        for one in tilings(step.shape(), gpu, "f16"):
            try:
                yield Timed(step.shape(), one, _time(gpu, maps, packed, step, one, allocate))
            except RuntimeError as failure:
                print(f"{op} {c} {size}: {one.tiling}: {failure}", file=sys.stderr)


def _time(gpu: Gpu, maps: list[Any], packed: Any, step: Any, one: Option, allocate: Callable[..., Any]) -> float:
    """Of the layer's launch alone, in µs: a graph of 50, by events, the median of 11."""
    from parnet_kernels.cuda import record
    from parnet_kernels.cuda.program import play

    before = record.plan_level
    record.plan_level = lambda *_: (one.tiling,)  # type: ignore[assignment]
    try:
        recorder = record.Recorder("f16", torch.float16, gpu, len(maps))
        inputs = tuple(
            recorder.enter(tuple(m.shape), m.stride(), record.RESULT + 1 + i, 0, True) for i, m in enumerate(maps)
        )
        entering = recorder.program.tensor()
        (result,) = recorder.level([step.__class__(packed, recorder.first_packed, inputs, step.label)])
    finally:
        record.plan_level = before
    memory = allocate(maps[0].device, recorder.workspace_bytes)
    y = torch.empty(result.n, result.h, result.w, result.layout.pitch, dtype=torch.float16, device="cuda")
    buffers = [memory, y, *maps, *packed[:4]]
    play(buffers, entering)
    only = recorder.program.tensor()[entering.numel() :].clone()
    play(buffers, only)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            play(buffers, only)
    samples = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / 50)
    return statistics.median(samples)


def entry(rows: Sequence[Timed], gpu: Gpu, c: Constants, name: str) -> dict[str, object]:
    """What the file holds for an architecture."""
    start, unit = line(units(rows, gpu, c), [r.microseconds for r in rows])
    modelled = table.MODELLED.get(gpu.architecture, table.MODELLED[90])
    return {
        "constants": c._asdict(),
        "source": f"python -m bench.cuda_constants on {name}, {datetime.date.today()}, torch {torch.__version__}",
        "launches": len(rows),
        "start in µs": round(start, 3),
        "unit in ns": round(1e3 * unit, 3),
        "mean error before": round(error(rows, gpu, modelled), 4),
        "mean error after": round(error(rows, gpu, c), 4),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_constants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {table.MEASURED.name}, which the planner reads")
    parser.add_argument("--out", type=Path, default=Path("out/cuda_constants.json"), help="the measured times")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("cuda_constants: needs a CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu.of(device)
    rows = list(measure(gpu))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    times = [{"shape": asdict(r.shape), "tiling": asdict(r.option.tiling), "us": r.microseconds} for r in rows]
    asked.out.write_text(json.dumps(times, indent=1) + "\n")
    found = entry(rows, gpu, fit(rows, gpu, table.constants(gpu.architecture)), torch.cuda.get_device_name(device))
    print(json.dumps(found, indent=1))
    if asked.write:
        print(f"wrote {table.write_measured(gpu.architecture, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
