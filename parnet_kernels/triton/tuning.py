"""Opt-in: compile ahead of use (`warmup`), and measure tiles on this device (`autotune`). Neither runs by itself.

The backend never tunes during a call, so a call can be captured in a CUDA graph; kernels compile at the first call with
a shape class, which is why `warmup` comes before a capture (`launch.run` says so where it did not).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parnet_kernels.call import Call
from parnet_kernels.triton import launch, policy
from parnet_kernels.triton.backend import backward, run


def warmup(op: str, tensors: list[Tensor | None], options: dict[str, Any], *, training: bool = False) -> None:
    """Compiles, side by side on all cores, and loads every kernel that `op` launches on such arguments; with
    `training`, its backward's as well.

    Args:
        op, tensors, options: as in a call: the positional tensors, and a dictionary of the keyword arguments.

    Raises:
        RuntimeError: while a CUDA graph is being captured.
    """
    _not_while_capturing("warmup")
    work = _work(op, tensors, options, training)
    with launch.recorded() as launches:
        work()
    launch.compile_together(launches)
    work()


def _work(op: str, tensors: list[Tensor | None], options: dict[str, Any], training: bool) -> Callable[[], None]:
    call = Call.of(op, tensors, options)

    def work() -> None:
        with torch.no_grad():
            y = run(call)
            if training:
                backward(call, torch.zeros_like(y), call.tensors.keys())

    return work


def milliseconds(call: Callable[[], None]) -> float:
    """Median time of a call on the current device, warm, in a CUDA graph: by the host's clock all tiles would tie."""
    import triton

    return float(triton.testing.do_bench_cudagraph(call, return_mode="median"))


def autotune(
    op: str,
    tensors: list[Tensor | None],
    options: dict[str, Any],
    *,
    training: bool = False,
    measure: Callable[[Callable[[], None]], float] = milliseconds,
) -> Path:
    """Measures every tile of this architecture's table on such arguments, product by product; keeps the fastest.

    The choice is added to the user's table for this model of GPU (`policy.table_path`), which every later process reads
    first.

    Args:
        op, tensors, options, training: as in `warmup`.
        measure: returns the cost of a call.

    Returns:
        The path of the table.

    Raises:
        RuntimeError: while a CUDA graph is being captured.
    """
    _not_while_capturing("autotune")
    x = tensors[0]
    if x is None:
        raise ValueError("parnet_kernels: `tensors` must begin with x, got None")
    device = x.device
    work = _work(op, tensors, options, training)
    best: dict[str, policy.Tile] = {}
    table = policy.TABLES[policy.architecture(device)]
    with policy.trial() as trial:
        warmup(op, tensors, options, training=training)
        for key, (kind, mode) in dict(trial.asked).items():
            costs: dict[policy.Tile, float] = {}
            for tile in dict.fromkeys(rule.tile for rule in table[kind, mode]):
                trial.tiles[key] = tile
                warmup(op, tensors, options, training=training)  # a graph may not compile
                costs[tile] = measure(work)
            best[key] = trial.tiles[key] = min(costs, key=costs.__getitem__)
    return policy.write_user_table(policy.model(device), best)


def _not_while_capturing(what: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"parnet_kernels: {what} must run before a CUDA graph capture, got a call during one")
