"""What the ranks of the tests do. Each function: (rank, world, folder, argument) → what the test looks at."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig
from parnet_kernels.config import cifar_config
from parnet_kernels.distributed import Device, DistributedError, Link, StreamParallel, agreement
from parnet_kernels.selection import use_backend

COSTS = Device(1e11, 1e10, 1e-5), Link(1e-4, 1e9)
CONFIGS = {
    "imagenet": ParNetConfig((4, 6, 8, 8), (3, 2, 2), num_classes=5),
    "odd widths, relu": ParNetConfig((3, 12, 92, 130), (3, 2, 2), num_classes=7, activation="relu"),
    "four streams, no classifier": ParNetConfig((4, 12, 24, 16, 10), (3, 2, 2, 3), num_classes=0),
    "cifar": cifar_config(8),
    "last stream without blocks": ParNetConfig((4, 6, 8, 8), (2, 2, 1), num_classes=5),
    "streams without blocks": ParNetConfig((4, 6, 8, 8), (1, 1, 1), num_classes=5),
    "many classes": ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3000),
}
IMAGES = [(1, 32, 32), (3, 33, 65), (1, 1, 1), (0, 40, 40), (2, 7, 90)]


def network(config: ParNetConfig, seed: int = 0) -> DeployedParNet:
    torch.manual_seed(seed)
    model = ParNet(config).eval()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for t, low, high in ((bn.running_mean, -0.2, 0.2), (bn.running_var, 0.5, 1.5), (bn.bias, -0.2, 0.2)):
            nn.init.uniform_(t, low, high)
    return model.deploy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]  # NaN equals itself
    alike = a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    return alike and torch.equal(a.view(integer), b.view(integer))


def error_of(call: Any) -> tuple[str, float]:
    """The error of a call, and the seconds until it came."""
    start = time.monotonic()
    try:
        call()
    except (DistributedError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", time.monotonic() - start


def images(config: ParNetConfig, seed: int = 0, n: int = 1, h: int = 32, w: int = 32) -> Tensor:
    return torch.randn(n, config.in_chans, h, w, generator=torch.Generator().manual_seed(seed))


def together(rank: int, world: int, folder: Path, argument: str) -> dict[str, Any]:
    """The scenarios that leave the ranks as they were."""
    every = (equal_bits, other_ways, bad_input, failing, not_made)
    return {scenario.__name__: scenario(rank, world, folder, argument) for scenario in every}


def equal_bits(rank: int, world: int, folder: Path, argument: str) -> list[str]:
    """What is not as the network gives it in one process."""
    wrong = []
    ways: list[dict[str, Any]] = [{}, {"trunk": "recompute"}, {"trunk": "send"}, {"source": 0, "result": "first"}]
    for name, config in CONFIGS.items():
        for i, options in enumerate(ways):
            dtype = torch.bfloat16 if (i + len(name)) % 2 else torch.float32
            net = network(config).to(dtype)
            with StreamParallel(net, costs=COSTS, timeout=60, **options) as parallel:
                for j, (n, h, w) in enumerate(IMAGES if name in ("imagenet", "cifar") else IMAGES[i : i + 2]):
                    x = images(config, j, n, h, w).to(dtype)
                    if (i + j) % 2:
                        x = x.contiguous(memory_format=torch.channels_last)
                    given = x if rank == 0 or "source" not in options else None
                    for call, expected in ((parallel, net), (parallel.forward_features, net.forward_features)):
                        y = call(given)
                        without = rank and options.get("result") == "first"
                        if not (y is None if without else same_bits(y, expected(x))):
                            wrong.append(f"{name}, {options}, {dtype}, {[*x.shape]}, {call}")
    return wrong


def other_ways(rank: int, world: int, folder: Path, argument: str) -> list[str]:
    """float64, the reference backend, weights that are not finite or change, prescribed streams, measured costs."""
    wrong = []
    config = CONFIGS["imagenet"]
    x = images(config, 1, 2, 50, 41)

    def check(name: str, net: DeployedParNet, x: Tensor = x, **options: Any) -> None:
        options = {"costs": COSTS, "timeout": 60} | options
        with StreamParallel(net, **options) as parallel:
            if not same_bits(parallel(x), net(x)):
                wrong.append(name)
            with torch.no_grad():
                net.head_bias.add_(1)
                net.layers["streams_2_0"].weight.mul_(0.5)
            if not same_bits(parallel(x), net(x)):
                wrong.append(f"{name}, changed")

    for trunk in ("recompute", "send"):
        check("float64", network(config).double(), x.double(), trunk=trunk)
        with use_backend("reference"):
            check("reference", network(config), trunk=trunk)
        infinite = network(config)
        infinite.layers["streams_1_0"].bias[0] = 1e38
        infinite.head_bias[0] = torch.inf
        check("not finite", infinite, trunk=trunk)
        check("sliced", network(config), torch.randn(4, 5, 60, 90)[::2, 1:4, 3:, ::2].clone()[:, :, 1:], trunk=trunk)
    streams = [[2], [0, 1]] if world == 2 else [[1], [2], [0]]
    check("prescribed", network(config), streams=streams)
    check("measured", network(config), costs=None)
    check("storage", network(config).prepare("taps"))
    return wrong


def bad_input(rank: int, world: int, folder: Path, argument: str) -> dict[str, tuple[str, float]]:
    config = CONFIGS["imagenet"]
    net, x = network(config), images(config)
    last = rank == world - 1
    found = {}
    for trunk in ("recompute", "send"):
        with StreamParallel(net, costs=COSTS, timeout=20, trunk=trunk) as parallel:

            def call(name: str, x: Any, trunk: str = trunk, parallel: StreamParallel = parallel) -> None:
                found[f"{name}, {trunk}"] = error_of(lambda: parallel(x))

            call("none", None if last else x)
            call("none on rank 0", x if rank else None)
            call("another size", images(config, h=48) if last else x)
            call("another batch on rank 0", x if rank else images(config, n=2))
            call("other pixels", images(config, 5) if last else x)
            call("another layout", x.contiguous(memory_format=torch.channels_last) if last else x)
            call("another dtype", x.double() if last else x)
            call("not an image", x[0] if last else x)
            call("not a tensor", [1, 2] if last else x)
            call("needs a gradient", x.clone().requires_grad_() if last else x)
            with torch.autocast("cpu", enabled=last):
                call("autocast", x)
            found[f"another result, {trunk}"] = error_of(lambda p=parallel: p.forward_features(x) if last else p(x))
            handle = net.layers["streams_0_0"].register_forward_hook(print) if last else None
            call("hooks", x)
            if handle:
                handle.remove()
            if last:
                net.head_weight.requires_grad_()
            call("gradients", x)
            with torch.no_grad():
                call("right without gradients", x)
            net.head_weight.requires_grad_(False)
            with torch.no_grad():
                net.head_weight[0, 0] += 1e-3 * last
            call("other weights", x)
            with torch.no_grad():
                net.head_weight.copy_(network(config).head_weight)
            call("right", x)
    return found


def not_made(rank: int, world: int, folder: Path, argument: str) -> dict[str, tuple[str, float]]:
    """A StreamParallel that cannot be."""
    config = CONFIGS["imagenet"]
    last = rank == world - 1
    found = {}

    def make(name: str, net: Any = None, **options: Any) -> None:
        net = network(config) if net is None else net
        found[name] = error_of(lambda: StreamParallel(net, **{"costs": COSTS, "timeout": 20} | options).close())

    two = ParNetConfig((4, 6, 8), (2, 2), num_classes=5)
    if world > 2:
        make("too many ranks", network(two))
    make("a stream twice", streams=[[0], [1, 1, 2]] if world == 2 else [[0], [1], [1]])
    make("a rank without streams", streams=[[0, 1, 2], []] if world == 2 else [[0, 1, 2], [], []])
    make("trunk", trunk="never")
    make("result", result="second")
    make("source", source=1)
    make("timeout", timeout=0)
    make("not a network", net=nn.Linear(2, 2))
    make("other weights", network(config, seed=int(last)))
    make("another configuration", network(CONFIGS["many classes"] if last else config))
    make("another dtype", network(config).to(torch.bfloat16 if last else torch.float32))
    make("other options", trunk="send" if last else "auto")
    with use_backend("reference" if last else "cpu"):
        make("another backend")
    hooked = network(config)
    if last:
        hooked.layers["streams_0_0"].register_forward_hook(print)
    make("hooks", hooked)
    version = agreement.__version__
    agreement.__version__ = "0.0" if last else version
    make("another version")
    agreement.__version__ = version
    if last:
        time.sleep(4)
    make("late", timeout=2)
    return found


def lost(rank: int, world: int, folder: Path, argument: str) -> dict[str, Any]:
    """A rank dies, stops or is late in its second call; what the others see, and that they go on without it.

    argument: "RANK how".
    """
    victim, how = int(argument.split()[0]), argument.split()[1]
    config = CONFIGS["imagenet"]
    net, x = network(config), images(config)
    trunk = argument.split()[2]
    parallel = StreamParallel(net, costs=COSTS, timeout=3, trunk=trunk)
    found: dict[str, Any] = {"first": same_bits(parallel(x), net(x))}
    if rank == victim:
        (folder / f"ready{rank}").touch()
        if how == "late":
            _wait_for(folder, [f"seen{r}" for r in range(world) if r != rank])
        else:
            time.sleep(1000)  # until it is killed or stopped
    found["lost"] = error_of(lambda: parallel(x))
    found["again"] = error_of(lambda: parallel(x))
    if how == "late":
        (folder / f"seen{rank}").touch()
        _wait_for(folder, [f"seen{r}" for r in range(world)])
        found["reconnected"] = error_of(parallel.reconnect)
        for _ in range(3):
            found["after"] = found.get("after", True) and same_bits(parallel(x), net(x))
        return found
    parallel.close()
    dist.destroy_process_group()
    left = [r for r in range(world) if r != victim]
    method = f"file://{folder}/store-after"
    dist.init_process_group("gloo", init_method=method, rank=left.index(rank), world_size=len(left))
    with StreamParallel(net, costs=COSTS, timeout=20) as parallel:
        found["after"] = same_bits(parallel(x), net(x))
    return found


def _wait_for(folder: Path, marks: list[str]) -> None:
    while not all((folder / mark).exists() for mark in marks):
        time.sleep(0.02)


def failing(rank: int, world: int, folder: Path, argument: str) -> dict[str, Any]:
    """An error inside the computation of one rank."""
    config = CONFIGS["imagenet"]
    net, x = network(config), images(config)
    found: dict[str, Any] = {}
    for trunk in ("recompute", "send"):
        with StreamParallel(net, costs=COSTS, timeout=20, trunk=trunk) as parallel:
            for who in range(world):
                if rank == who:

                    def fail(*_: object) -> None:
                        raise MemoryError("no memory left")

                    original, parallel._pieces.run = parallel._pieces.run, fail  # type: ignore[method-assign]
                found[f"rank {who}, {trunk}"] = error_of(lambda p=parallel: p(x))
                if rank == who:
                    parallel._pieces.run = original  # type: ignore[method-assign]
                found[f"right after {who}, {trunk}"] = same_bits(parallel(x), net(x))
    return found
