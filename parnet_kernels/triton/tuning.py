"""Compile ahead of use (`warmup`, `compile_step`), and measure tiles on this device (`autotune`). Only `parnet train`
calls one of them by itself: `compile_step`, on a GPU.

The backend never tunes during a call, so a call can be captured in a CUDA graph; kernels compile at the first call with
a shape class, which is why `warmup` comes before a capture (`launch.run` says so where it did not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parnet_kernels.call import Call
from parnet_kernels.triton import compilation, launch, policy
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
    compilation.together(launches)
    work()


def compile_step(
    model: nn.Module, x: Tensor, *, autocast: torch.dtype | None = None, told: compilation.Told | None = None
) -> int:
    """Compiles, side by side on all cores, every Triton kernel that a training step of `model` on inputs like x
    launches: the first step would compile one after the other. Of a model in eval mode, those of its forward.

    One step is made in which our kernels do not run: it takes the memory of a step, and what it computes means nothing.
    Parameters, buffers, gradients and the state of random numbers stay as they are; hooks of modules run. In a process
    group with SyncBatchNorm, all processes call it.

    Args:
        autocast: the dtype of autocast around the forward pass, if there is one.
        told: called with the number of kernels that are compiled, and of all. By default a line on standard error shows
            them while it lasts, if that is a terminal.

    Returns:
        The number of kernels that were compiled; 0 where all had been.

    Raises:
        RuntimeError: a kernel cannot be compiled, which it names; or a CUDA graph is being captured.
        TypeError: the model returns something else than a tensor.
    """
    _not_while_capturing("compile_step")
    training, cpu = model.training, x.device.type == "cpu"
    buffers = {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)}
    x = x.detach().requires_grad_(x.requires_grad)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    with (
        nullcontext(told) if told is not None else _shown() as tell,
        torch.random.fork_rng([] if cpu else [x.device]),
        torch.autograd.set_multithreading_enabled(False),  # backward too: launches are taken from this thread alone
        torch.set_grad_enabled(training),
        compilation.compiling(tell) as compiled,
    ):
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            y = torch.func.functional_call(model, buffers, (x,))
        if not isinstance(y, Tensor):
            raise TypeError(f"parnet_kernels: `model` must return a tensor, got a {type(y).__name__}")
        if training and wanted and y.requires_grad:
            torch.autograd.grad(y, wanted, torch.zeros_like(y), allow_unused=True)
    return len(compiled.names)


@contextmanager
def _shown() -> Iterator[compilation.Told]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("compiling Triton kernels"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
