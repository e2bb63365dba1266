"""Measures, in about a tenth of a second, the constants of the cost model: of the slowest rank and the slowest link."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import ops
from parnet_kernels.distributed.cost import Device, Link
from parnet_kernels.distributed.peers import Peers

CHANNELS, SIDE = 128, 28  # of the layer that is timed
COPIED = 32 << 20  # bytes
SENT = 1 << 20  # bytes
ROUNDS = 5


def probe(peers: Peers, device: torch.device, dtype: torch.dtype) -> tuple[Device, Link]:
    """Of all ranks together: each gets the same numbers.

    Raises:
        Broken: a rank broke off or did not answer.
    """
    own = device_costs(device, dtype)
    if peers.world == 1:
        return own, Link(0.0, float("inf"))
    buffer = torch.zeros(SENT, dtype=torch.uint8, device=device)

    def deadline() -> float:
        return time.monotonic() + peers.timeout

    if peers.rank == 0:
        devices, links = [own], []
        for rank in peers.others:
            heard = peers.heard(peers.listen(rank, "the probe"), deadline())
            devices.append(Device(**heard["device"]))

            def exchange(data: Tensor, rank: int = rank) -> None:
                peers.send(rank, data, "the probe").wait(deadline())
                peers.receive(rank, data, "the probe").wait(deadline())

            short, long = (_median(lambda data=data: exchange(data)) / 2 for data in (buffer[:1], buffer))  # type: ignore[misc]
            links.append(Link(short, SENT / max(long - short, 1e-9)))
        units = max(d.units for d in devices)
        slowest = Device(
            min(d.flops for d in devices), min(d.bandwidth for d in devices), max(d.launch for d in devices), units
        )
        link = Link(max(each.latency for each in links), min(each.bandwidth for each in links))
        message: dict[str, Any] = {"device": vars(slowest), "link": vars(link)}
        for posted in [peers.tell(rank, message, "the probe") for rank in peers.others]:
            posted.wait(deadline())
        return slowest, link
    peers.tell(0, {"device": vars(own)}, "the probe").wait(deadline())
    for data in (buffer[:1], buffer):
        for _ in range(ROUNDS):
            peers.receive(0, data, "the probe").wait(deadline())
            peers.send(0, data, "the probe").wait(deadline())
    heard = peers.heard(peers.listen(0, "the probe"), deadline())
    return Device(**heard["device"]), Link(**heard["link"])


@torch.no_grad()
def device_costs(device: torch.device, dtype: torch.dtype) -> Device:
    """Of one device, by a layer, a copy and the smallest layer."""
    c = CHANNELS

    def layer(side: int, channels: int) -> Callable[[], object]:
        shapes = ((1, channels, side, side), (channels, channels, 3, 3), *[(channels,)] * 3, (channels, channels))
        tensors = [torch.full(shape, 0.01, dtype=dtype, device=device) for shape in shapes]
        return lambda: ops.repvgg_sse(*tensors)

    def synchronized(run: Callable[[], object]) -> Callable[[], object]:
        if device.type != "cuda":
            return run

        def run_to_end() -> None:
            run()
            torch.cuda.synchronize(device)

        return run_to_end

    copied = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    launch = _median(synchronized(layer(1, 8)))
    convolution = max(_median(synchronized(layer(SIDE, c))) - launch, 1e-7)
    copying = max(_median(synchronized(copied.clone)), 1e-7)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Device(2 * 9 * c * c * SIDE * SIDE / convolution, 2 * COPIED / copying, launch, units)


def _median(run: Callable[[], object]) -> float:
    """Seconds; the first run makes what is made once."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
