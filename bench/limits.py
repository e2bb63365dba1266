"""How fast a workload could be: its arithmetic, direct and with Winograd's algorithm, and the weights it must read.

The direct limit is max(2·MACs / FMA peak, weight bytes / bandwidth), summed over the layers of a network. The Winograd
limit has fewer multiplications: 64 for 36 outputs of a 3×3 stride-1 filter instead of 324, and 81 for 16 instead of 144
with stride 2 (polyphase), transforms not counted. Hence an effective rate, direct FLOPs over time, may exceed the FMA
peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine import Ceilings
from bench.workloads import Workload


@dataclass(frozen=True)
class Cost:
    macs: int
    winograd_macs: int
    weight_bytes: int

    def seconds(self, ceilings: Ceilings, winograd: bool) -> float:
        macs = self.winograd_macs if winograd else self.macs
        return max(2e-9 * macs / ceilings.gflops, 1e-9 * self.weight_bytes / ceilings.gbytes)


def multiplications(outputs: int, stride: int) -> int:
    """Along one axis: F(6,3), then what fits the rest; if strided, F(4,2) and a pointwise tap."""
    tile = {1: lambda m: m + 2, 2: lambda m: (m + 1) + m}[stride]
    largest = {1: 6, 2: 4}[stride]
    full, rest = divmod(outputs, largest)
    return full * tile(largest) + (tile(rest) if rest else 0)


def costs(workload: Workload) -> list[Cost]:
    """One for each layer, and one for the classifier."""
    found = []
    for spec in workload.graph_layers:
        size = workload.shapes[spec.name][1]
        channels = spec.in_channels * spec.out_channels  # of a fusion: two inputs, two groups
        if spec.kind == "pointwise":
            macs = fewer = size**2
            weights = 1
        else:
            macs = 9 * size**2 + 1  # and the gate
            stem = spec.inputs == ("image",)  # so few channels that its transforms would cost more than they save
            fewer = macs if stem else multiplications(size, spec.stride) ** 2 + 1
            weights = 9 + 1
        batch = workload.batch * channels
        found.append(Cost(batch * macs, batch * fewer, 4 * channels * weights))
    if workload.layer is None and workload.config.num_classes:
        size = workload.config.planes[-1] * workload.config.num_classes
        found.append(Cost(workload.batch * size, workload.batch * size, 4 * size))
    return found


def gflop(workload: Workload) -> float:
    """Direct arithmetic, in 10⁹ operations."""
    return 2e-9 * sum(cost.macs for cost in costs(workload))


def limit_seconds(workload: Workload, ceilings: Ceilings, winograd: bool) -> float:
    return sum(cost.seconds(ceilings, winograd) for cost in costs(workload))
