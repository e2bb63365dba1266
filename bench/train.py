"""Training steps on the CPU: this package's operators against PyTorch's modules, for `python -m bench train`.

Each engine is a process of its own; steps are interleaved, one of each engine a round. Before any time is taken, the
gradients of a small batch are compared with float64. Memory is the peak of the resident set during steps above what the
process had before it made the model.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels.model import ParNet, parnet_cifar
from parnet_kernels.ops import use_backend

ENGINES = ("eager", "channels_last", "compile", "ours")
NETS = ("s", "m", "l", "xl", "cifar")
#: Norm-wise, over all gradients together.
MAX_ERROR = 1e-4


class Row(NamedTuple):
    net: str
    batch: int
    threads: int
    engine: str
    seconds: float | None  # median of the rounds
    processor: float | None  # likewise, of all threads: other work on the machine changes it less
    memory: float | None  # bytes
    error: float | None
    status: str  # "ok", or why there is no time


def make(net: str) -> nn.Module:
    torch.manual_seed(0)
    return parnet_cifar(32) if net == "cifar" else ParNet(net)


def images(net: str, batch: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x, torch.randint(0, 10, (batch,), generator=generator)


class Step:
    """Forward, backward and SGD with momentum, by one engine."""

    def __init__(self, engine: str, model: nn.Module) -> None:
        if engine not in ENGINES:
            raise ValueError(f"bench train: engine must be one of {list(ENGINES)}, got {engine!r}")
        self.backend = "cpu" if engine == "ours" else "reference"
        self.last = engine == "channels_last"
        self.model: nn.Module = model.to(memory_format=torch.channels_last) if self.last else model  # type: ignore[call-overload]
        self.call: Any = torch.compile(model) if engine == "compile" else self.model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if self.last else x
        return F.cross_entropy(self.call(x), target)

    def __call__(self, x: Tensor, target: Tensor) -> None:
        with use_backend(self.backend):
            self.optimizer.zero_grad()
            self.loss(x, target).backward()
            self.optimizer.step()


def gradient_error(engine: str, net: str, size: int) -> float:
    """Of all gradients together, against float64 in plain PyTorch; norm-wise."""
    x, target = images(net, 4, size)
    step, exact = Step(engine, make(net)), Step("eager", make(net).double())
    for each, pixels in ((step, x), (exact, x.double())):
        with use_backend(each.backend):
            each.loss(pixels, target).backward()
    found, expected = ([p.grad for p in s.model.parameters()] for s in (step, exact))
    pairs = [(f.double(), e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    off = sum((f - e).square().sum().item() for f, e in pairs)
    return float((off / sum(e.square().sum().item() for _, e in pairs)) ** 0.5)


def _memory(which: str) -> int:
    """Of this process, bytes: VmRSS, what is resident, or VmHWM, its peak since `_forget_peak`."""
    found = re.search(rf"^{which}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _answers() -> Any:
    """Where this process answers; what compilers print goes elsewhere."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answer


def check(engine: str, net: str, size: int) -> None:
    """The process of its own that compares gradients: its memory would hide that of steps."""
    answer = _answers()
    print(
        json.dumps({"error": gradient_error(engine, net, 64 if size > 64 else min(size, 16))}), file=answer, flush=True
    )


def serve(engine: str, net: str, batch: int, size: int, threads: int) -> None:
    """The process of steps: a line in asks for one, a line out gives its seconds and the peak memory."""
    torch.set_num_threads(threads)
    answer = _answers()
    torch.optim.SGD([nn.Parameter(torch.empty(1))])  # imports what optimizers import
    before = _memory("VmRSS")
    step, (x, target) = Step(engine, make(net)), images(net, batch, size)
    step(x, target)
    _forget_peak()  # that of compilers
    print("{}", file=answer, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        step(x, target)
        found = {"seconds": time.perf_counter() - start[0], "processor": time.process_time() - start[1]}
        print(json.dumps({**found, "memory": _memory("VmHWM") - before}), file=answer, flush=True)


class _Engine:
    def __init__(self, name: str, *where: Any) -> None:
        """where: network, batch, size, threads; without batch and threads, the process that compares gradients."""
        command = [sys.executable, "-m", "bench.train", name, *map(str, where)]
        self.steps: list[dict[str, float]] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with code {self.process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def step(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.steps.append(self.answer())

    def medians(self) -> tuple[float, float, float]:
        """Seconds, seconds of processors, peak memory."""
        seconds, processor = (statistics.median(step[key] for step in self.steps) for key in ("seconds", "processor"))
        return seconds, processor, self.steps[-1]["memory"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def _compare(name: str, net: str, size: int) -> tuple[float, str]:
    """The error of an engine's gradients, and "ok" or what is wrong."""
    checking = _Engine(name, net, size)
    try:
        error = checking.answer()["error"]
        return error, "ok" if error <= MAX_ERROR else f"wrong gradients: {error:.1e}"
    except RuntimeError as reason:
        return float("nan"), str(reason)
    finally:
        checking.close()


def cell(net: str, batch: int, size: int, threads: int, engines: list[str], rounds: int) -> list[Row]:
    """One row for each engine. Engines start one after the other, then take turns."""
    errors, status, running = {}, {}, {}
    try:
        for name in engines:
            errors[name], status[name] = _compare(name, net, size)
            if status[name] == "ok":
                running[name] = _Engine(name, net, batch, size, threads)
        for i in range(rounds + 1):
            for name, engine in running.items():
                try:
                    if status[name] == "ok":
                        engine.step() if i else engine.answer()
                except RuntimeError as reason:
                    status[name] = str(reason)
    finally:
        for engine in running.values():
            engine.close()
    return [
        Row(net, batch, threads, name, *running[name].medians(), errors[name], "ok")
        if status[name] == "ok"
        else Row(net, batch, threads, name, None, None, None, None, status[name])
        for name in engines
    ]


def lines(rows: list[Row]) -> Iterator[str]:
    """Lines of plain text: steps of one network, and ratios to the best of the other engines."""
    eager = next((r.memory for r in rows if r.engine == "eager" and r.memory), None)
    others = [r for r in rows if r.engine != "ours" and r.seconds and r.processor]
    for r in rows:
        name = f"{r.net:<6}batch {r.batch:<4} {r.threads} thr. {r.engine:<14}"
        if r.seconds is None or r.memory is None or r.processor is None:
            yield f"{name}{r.status}"
            continue
        line = f"{name}{r.seconds:7.2f} s ({r.processor:.2f} s of processors) {r.memory / 2**20:7.0f} MiB"
        line += f"  gradients {r.error:.1e}"
        if r.engine == "ours" and others and eager:
            best, least = min(o.seconds for o in others), min(o.processor for o in others)  # type: ignore[type-var]
            line += f"  {best / r.seconds:.2f}x the best other"  # type: ignore[operator]
            line += f" ({least / r.processor:.2f}x of processors), {r.memory / eager:.2f} of eager's memory"  # type: ignore[operator]
        yield line


if __name__ == "__main__":
    run = check if len(sys.argv) == 4 else serve
    run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
