"""One pass of a network through the CUDA kernels, for a profiler or a sanitizer to look at.

    python -m bench.gpu_check.network tiny|s [--profiled]

--profiled: the pass after a warm one lies between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import sys

import torch

from parnet_kernels.config import VARIANTS, ParNetConfig

TINY = ParNetConfig((12, 22, 34, 50), (3, 3, 3), num_classes=10)


def run(name: str, profiled: bool) -> None:
    from parnet_kernels import ops
    from parnet_kernels.deployed import DeployedParNet

    network = DeployedParNet(TINY if name == "tiny" else VARIANTS[name]).half().cuda()
    x = torch.randn(1, 3, *((32, 32) if name == "tiny" else (224, 224)), device="cuda").half()
    with torch.inference_mode(), ops.use_backend("cuda"):
        network(x)
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        network(x)
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    run(sys.argv[1], "--profiled" in sys.argv)
