"""Constants of devices and links for the cost model, where nothing can be measured: `parnet plan`.

Peaks of the cards are those of their data sheets (dense, float16 with float32 sums; the RTX 3090 in float32 as the
paper used it). What is reached is assumed: half of the arithmetic, four fifths of the bandwidth, 3 µs a launch of a
CUDA graph, 8 µs a launch from eager PyTorch. The CPU socket is 32 times one thread of docs/benchmarks.md, at 70 %.
Links: four fifths of the data sheets' bandwidth of one direction; latencies are typical ones of a peer copy with its
events, or of a message of NCCL.
"""

from __future__ import annotations

from typing import NamedTuple

from parnet_kernels.distributed.cost import Device, Link


class Machine(NamedTuple):
    device: Device
    itemsize: int  # bytes of a value
    what: str


def _card(teraflops: float, gigabytes: float, units: int, launch: float = 3e-6, eager: bool = False) -> Device:
    return Device(0.5e12 * teraflops, 0.8e9 * gigabytes, launch, units, eager)


DEVICES = {
    "a100": Machine(_card(312, 2039, 108), 2, "A100 SXM 80 GB, float16"),
    "h100": Machine(_card(989, 3350, 132), 2, "H100 SXM, float16"),
    "l4": Machine(_card(121, 300, 58), 2, "L4, float16"),
    "rtx3090": Machine(_card(35.6, 936, 82), 4, "RTX 3090, float32"),
    "rtx3090-eager": Machine(_card(35.6, 936, 82, 8e-6, True), 4, "RTX 3090, float32, eager PyTorch as in the paper"),
    "cpu": Machine(Device(32 * 0.7 * 0.62e12, 200e9, 20e-6), 4, "CPU socket of 32 AVX-512 cores, float32"),
}
LINKS = {
    "nvlink3": Link(5e-6, 0.8 * 300e9),
    "nvlink4": Link(5e-6, 0.8 * 450e9),
    "pcie4": Link(10e-6, 0.8 * 32e9),
    "pcie5": Link(10e-6, 0.8 * 64e9),
    "nccl-pcie4": Link(40e-6, 0.8 * 32e9),
    "loopback": Link(200e-6, 2e9),
    "ethernet10": Link(60e-6, 0.8 * 1.25e9),
}
