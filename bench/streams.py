"""Streams side by side on the CPUs of this machine, against one process: `python -m bench.streams`.

Thread groups: rank 0's and rank 1's part of the work in two threads of one process, each with half of the threads,
without any messages. Ranks: StreamParallel over gloo; `--namespaces` puts each in a network namespace of its own, the
links with a delay (needs root and iproute2). Ways take turns; medians in ms.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from parnet_kernels import DeployedParNet, ParNet
from parnet_kernels.distributed import StreamParallel
from parnet_kernels.distributed.cost import Model
from parnet_kernels.distributed.pieces import Packet, Pieces

app = typer.Typer(add_completion=False)
PREFIX = "parnet"


def _network(variant: str) -> DeployedParNet:
    torch.manual_seed(0)
    return ParNet(variant).eval().deploy()


def _median(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def thread_groups(
    network: DeployedParNet, x: torch.Tensor, division: tuple[tuple[int, ...], ...]
) -> Callable[[], None]:
    """A call with a thread for each group of streams; all begin with the image."""
    model = Model(network.config, x.shape)
    pieces = [Pieces(network) for _ in division]
    wire = pieces[0].wire(x)

    def call() -> None:
        ends: dict[str, Packet] = {}

        def run(group: int) -> None:
            own = division[group]
            torch.set_num_threads(1)
            wanted = {model.cut.ends[s]: model.size[model.cut.ends[s]] for s in own}
            pieces[group].wire(x)
            ends.update(pieces[group].run(wire, {"image": x}, model.chain(own, None), wanted))

        with torch.inference_mode():
            threads = [threading.Thread(target=run, args=(group,)) for group in range(1, len(division))]
            for thread in threads:
                thread.start()
            run(0)
            for thread in threads:
                thread.join()
            torch.set_num_threads(len(division))
            pieces[0].finish(wire, ends, model.cut.fusion, x, "logits")

    return call


@app.command()
def one(variant: str = "s", size: int = 224, batch: int = 1, rounds: int = 21) -> None:
    """One process: today's schedule on one and two threads, and two thread groups."""
    network, x = _network(variant), torch.randn(batch, 3, size, size)
    groups = {
        division: thread_groups(network, x, division) for division in (((0, 1), (2,)), ((0, 2), (1,)), ((0,), (1, 2)))
    }
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "schedule, 1 thread": (1, lambda: network(x)),
        "schedule, 2 threads": (2, lambda: network(x)),
        **{f"thread groups {division}": (2, call) for division, call in groups.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, (threads, call) in ways.items():
                torch.set_num_threads(threads)
                ms = _median(call, 1)
                if turn > 1:
                    times[name].append(ms)
    for name, each in times.items():
        typer.echo(f"{name}\t{statistics.median(each):.2f}")


@app.command()
def rank(number: int, world: int, store: str, variant: str, size: int, batch: int, rounds: int, trunk: str) -> None:
    """One rank of `ranks`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=number, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    network, x = _network(variant), torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with StreamParallel(network, trunk=trunk, result="first", timeout=60) as parallel, torch.inference_mode():
        for _ in range(3):
            y = parallel(x)
        times: list[float] = []
        alone: list[float] = []
        for _ in range(rounds):
            dist.barrier()  # none begins while rank 0 is alone
            times.append(_median(lambda: parallel(x), 1))
            if number == 0:
                alone.append(_median(lambda: network(x), 1))
        if number == 0:
            assert y is not None
            assert torch.equal(y, network(x))
            link = parallel.costs[1]
            typer.echo(f"{parallel.placement(x.shape).describe()}")
            typer.echo(f"link {1e6 * link.latency:.0f} µs, {link.bandwidth / 1e9:.2f} GB/s")
            both = f"{statistics.median(times):.2f}\tone process, 1 thread\t{statistics.median(alone):.2f}"
            typer.echo(f"{world} ranks, trunk {trunk}\t{both}")
    dist.destroy_process_group()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _make_namespaces(world: int, delay: str) -> None:
    """Namespaces on one bridge, each link with `delay` on the way out of it."""
    _ip("link", "add", f"{PREFIX}b", "type", "bridge")
    _ip("link", "set", f"{PREFIX}b", "up")
    for n in range(world):
        name = f"{PREFIX}{n}"
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"{name}h", "master", f"{PREFIX}b", "up")
        _ip("-n", name, "addr", "add", f"10.199.0.{n + 1}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", delay)


def _remove_namespaces(world: int) -> None:
    for n in range(world):
        subprocess.run(["ip", "netns", "del", f"{PREFIX}{n}"], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", f"{PREFIX}b"], check=False, capture_output=True)


@app.command()
def ranks(
    world: int = 2,
    variant: str = "s",
    size: int = 224,
    batch: int = 1,
    rounds: int = 21,
    trunk: str = "auto",
    namespaces: Annotated[bool, typer.Option("--namespaces", help="A network namespace a rank.")] = False,
    delay: str = "1ms",
) -> None:
    """Ranks over gloo on this machine, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        prefixes: list[list[str]] = [[] for _ in range(world)]
        try:
            if namespaces:
                try:
                    _make_namespaces(world, delay)
                except (OSError, subprocess.CalledProcessError) as error:
                    told = getattr(error, "stderr", None) or error
                    typer.echo(f"no network namespaces here: {str(told).strip()}")
                    raise typer.Exit(0) from error
                prefixes = [["ip", "netns", "exec", f"{PREFIX}{n}"] for n in range(world)]
            arguments = [str(world), f"file://{Path(folder)}/store", variant, str(size), str(batch), str(rounds), trunk]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0" if namespaces else "lo"}
            processes = [
                subprocess.Popen(
                    [*prefix, sys.executable, "-m", "bench.streams", "rank", str(n), *arguments], env=environment
                )
                for n, prefix in enumerate(prefixes)
            ]
            try:
                codes = [process.wait(300) for process in processes]
            finally:
                for process in processes:
                    process.kill()
        finally:
            if namespaces:
                _remove_namespaces(world)
        if any(codes):
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
