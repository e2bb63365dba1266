"""`parnet latency`: how long a network takes for one call, and for one frame of a camera."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from parnet_kernels.app.classifier import Classifier
from parnet_kernels.app.console import print_table
from parnet_kernels.app.options import (
    ActivationOption,
    CheckpointArgument,
    EmaOption,
    IgnoreClassesOption,
    SizeOption,
    ThreadsOption,
    preprocessing_of,
    use_threads,
)
from parnet_kernels.checkpoint import load_network

WARMUP, LEAST, MOST = 3, 20, 100_000  # calls
BINS, BAR = 16, 40  # rows of the histogram, characters of its longest bar


def latency(
    checkpoint: CheckpointArgument,
    size: SizeOption = None,
    threads: ThreadsOption = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Images a call.")] = 1,
    frame: Annotated[str, typer.Option(help="Pixels of the camera's frames, width x height.")] = "640x480",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long to measure.")] = 5,
    ema: EmaOption = False,
    activation: ActivationOption = None,
    ignore_classes: IgnoreClassesOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time single calls: percentiles, a histogram, and what preprocessing takes of a frame."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", frame, re.ASCII)
    if match is None:
        raise typer.BadParameter(f"--frame must be width x height such as 640x480, got {frame!r}")
    use_threads(threads)
    network = load_network(checkpoint, ema, activation, ignore_classes=ignore_classes)
    network.preprocessing, told = preprocessing_of(network, checkpoint, size=size)
    typer.echo(f"parnet: {told}", err=True)
    classifier = Classifier(network)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (int(match[2]), int(match[1]), 3), dtype=np.uint8) for _ in range(batch)]
    x = classifier.inputs(pictures)
    answer = classifier if network.num_classes else classifier.features
    calls: dict[str, Callable[[], object]] = {
        "network": lambda: network(x),
        "preprocessing": lambda: classifier.inputs(pictures),
        "frame to result": lambda: answer(pictures),
    }
    with torch.inference_mode():
        how = network.why_layer_by_layer(x)
        times = measure(calls, seconds)
    p50 = {name: float(np.percentile(values, 50)) for name, values in times.items()}
    share = p50["preprocessing"] / p50["frame to result"]
    facts = {
        "input": [*x.shape],
        "frame": [int(match[1]), int(match[2])],
        "dtype": str(x.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "runs as": "one call of the native kernels" if how is None else f"layer by layer: {how}",
        "preprocessing, share of a frame": round(share, 4),
    }
    if as_json:
        summary = {name: {**quantiles(values), "calls": len(values)} for name, values in times.items()}
        typer.echo(json.dumps({**facts, "ms": summary}, indent=2))
        return
    console = Console()
    texts = {**facts, "input": "×".join(map(str, facts["input"])), "frame": "×".join(match.groups())}  # type: ignore[call-overload]
    print_table(console, (), [*({**texts, "preprocessing, share of a frame": f"{share:.1%}"}).items()])
    columns = [*quantiles([0.0])]
    rows = [(name, *(f"{v:.3g}" for v in quantiles(values).values()), len(values)) for name, values in times.items()]
    print_table(console, ("ms", *columns, "calls"), rows)
    print_table(console, ("network, ms", "calls", ""), histogram(times["network"]))


def measure(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call; they take turns, so that each sees the same machine."""
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= LEAST and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the least, what half, 90 % and 99 % of the calls stay within, and the most."""
    found = np.percentile(values, [0, 50, 90, 99, 100])
    return dict(zip(("min", "p50", "p90", "p99", "max"), map(float, found), strict=True))


def histogram(values: Sequence[float]) -> list[tuple[str, int, str]]:
    """(range of milliseconds, calls, bar): equal ranges up to the 99th percentile, then one for all others."""
    edges = np.linspace(min(values), float(np.percentile(values, 99)), BINS)
    edges = np.append(np.unique(edges), np.inf)
    counts, _ = np.histogram(values, edges)
    bar = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    rows = []
    for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        text = f"{low:.3f} …" if np.isinf(high) else f"{low:.3f} … {high:.3f}"
        rows.append((text, count, bar * -(-BAR * count // max(counts.tolist()))))
    return rows
