"""Measures, in about a tenth of a second, the constants of the cost model: the slowest device and the slowest link."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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

            def exchange(size: int, rank: int = rank) -> None:
                peers.send(rank, buffer[:size], "the probe").wait(deadline())
                peers.receive(rank, buffer[:size], "the probe").wait(deadline())

            links.append(_link(exchange))
        slowest, link = _slowest(devices, links)
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


def probe_devices(devices: Sequence[torch.device], dtype: torch.dtype) -> tuple[Device, Link]:
    """Of devices that one process uses, and of copies between the first and each other one."""
    first, links = devices[0], []
    buffer = torch.zeros(SENT, dtype=torch.uint8, device=first)
    for other in devices[1:]:
        there = torch.zeros(SENT, dtype=torch.uint8, device=other)

        def exchange(size: int, there: Tensor = there) -> None:
            there[:size].copy_(buffer[:size])
            buffer[:size].copy_(there[:size])
            _wait_for(first)

        links.append(_link(exchange))
    return _slowest([device_costs(device, dtype) for device in devices], links or [Link(0.0, float("inf"))])


def _link(exchange: Callable[[int], object]) -> Link:
    """exchange: sends so many bytes there and back."""
    short, long = (_median(lambda size=size: exchange(size)) / 2 for size in (1, SENT))  # type: ignore[misc]
    return Link(short, SENT / max(long - short, 1e-9))


def _slowest(devices: Sequence[Device], links: Sequence[Link]) -> tuple[Device, Link]:
    device = Device(
        min(d.flops for d in devices),
        min(d.bandwidth for d in devices),
        max(d.launch for d in devices),
        max(d.units for d in devices),
    )
    return device, Link(max(link.latency for link in links), min(link.bandwidth for link in links))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def device_costs(device: torch.device, dtype: torch.dtype) -> Device:
    """Of one device, by a layer, a copy and the smallest layer."""
    c = CHANNELS

    def layer(side: int, channels: int) -> Callable[[], object]:
        shapes = ((1, channels, side, side), (channels, channels, 3, 3), *[(channels,)] * 3, (channels, channels))
        tensors = [torch.full(shape, 0.01, dtype=dtype, device=device) for shape in shapes]
        return lambda: ops.repvgg_sse(*tensors)

    def synchronized(run: Callable[[], object]) -> Callable[[], object]:
        def run_to_end() -> None:
            run()
            _wait_for(device)

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
