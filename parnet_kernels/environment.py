"""Every environment variable of the package, in one place. Read once, at import (at build for the last three).

| variable | meaning |
|---|---|
| PARNET_BACKEND | run operators on this backend or raise: cuda, triton, cpu, reference; default: the first that can |
| PARNET_CPU_ISA | lower the instruction set of the CPU kernels: portable16, portable, avx2, avx512 (or avx512_intel) |
| PARNET_CPU_POISON | 1: the CPU kernels fill their scratch memory with NaN before each run, to find reads of it |
| PARNET_WGMMA | 0: the CUDA kernels multiply by mma.sync on Hopper too |
| PARNET_CUDA | building: 0 leaves the CUDA library out, 1 fails without nvcc, auto (default) builds it where nvcc is |
| PARNET_CUDA_ARCHS | building: architectures such as "80 90 90a"; all; native (default): this machine's GPUs, else 80 |
| MAX_JOBS | building: number of compilations at a time |
"""

import os

BACKEND: str | None = os.environ.get("PARNET_BACKEND") or None
WGMMA: bool = os.environ.get("PARNET_WGMMA") != "0"
