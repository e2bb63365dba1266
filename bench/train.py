"""Training steps on the CPU: this package's operators against PyTorch's modules, for `python -m bench train`.

Each engine is a process of its own; steps are interleaved, one of each engine a round. Before any time is taken, the
gradients of a small batch are compared with float64. Memory is the peak of the resident set above what the process had
before it made the model.
"""

from __future__ import annotations

import json
import os
import resource
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


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(engine: str, net: str, batch: int, size: int, threads: int) -> None:
    """The process: a line in asks for a step, a line out gives its seconds and the peak memory."""
    torch.set_num_threads(threads)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print
    error = gradient_error(engine, net, 64 if size > 64 else size)
    torch._dynamo.reset()
    before = _resident()
    step, (x, target) = Step(engine, make(net)), images(net, batch, size)
    step(x, target)
    print(json.dumps({"error": error}), file=answer, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step(x, target)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(json.dumps({"seconds": seconds, "memory": peak}), file=answer, flush=True)


class _Engine:
    def __init__(self, name: str, *where: Any) -> None:
        command = [sys.executable, "-m", "bench.train", name, *map(str, where)]
        self.name, self.seconds, self.memory, self.error = name, [], 0.0, 0.0  # type: ignore[var-annotated]
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
        found = self.answer()
        self.seconds.append(found["seconds"])
        self.memory = found["memory"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def cell(net: str, batch: int, size: int, threads: int, engines: list[str], rounds: int) -> list[Row]:
    """One row for each engine. Engines start one after the other, then take turns."""
    running: list[_Engine] = []
    status = dict.fromkeys(engines, "ok")
    try:
        for name in engines:
            engine = _Engine(name, net, batch, size, threads)
            try:
                engine.error = engine.answer()["error"]
                if not engine.error <= MAX_ERROR:
                    status[name] = f"wrong gradients: {engine.error:.1e}"
            except RuntimeError as error:
                status[name] = str(error)
            running.append(engine)
        for _ in range(rounds):
            for engine in running:
                if status[engine.name] == "ok":
                    engine.step()
    finally:
        for engine in running:
            engine.close()
    return [
        Row(net, batch, threads, e.name, statistics.median(e.seconds), e.memory, e.error, "ok")
        if status[e.name] == "ok"
        else Row(net, batch, threads, e.name, None, None, None, status[e.name])
        for e in running
    ]


def lines(rows: list[Row]) -> Iterator[str]:
    """Lines of plain text: steps of one network, and ratios to the best of the other engines."""
    eager = next((r.memory for r in rows if r.engine == "eager" and r.memory), None)
    best = min((r.seconds for r in rows if r.engine != "ours" and r.seconds is not None), default=None)
    for r in rows:
        name = f"{r.net:<6}batch {r.batch:<4} {r.threads} thr. {r.engine:<14}"
        if r.seconds is None or r.memory is None:
            yield f"{name}{r.status}"
            continue
        line = f"{name}{r.seconds:7.2f} s {r.memory / 2**20:7.0f} MiB  gradients {r.error:.1e}"
        if r.engine == "ours" and best and eager:
            line += f"  {best / r.seconds:.2f}x the best other, {r.memory / eager:.2f} of eager's memory"
        yield line


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
