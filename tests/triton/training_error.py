"""How far a training step on the kernels may be from float64."""

from __future__ import annotations

import torch
from oracle import error
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, relu: bool = False) -> None:
    """found, expected: result, statistics, gradients."""
    bound = TOLERANCE[dtype]
    if relu and dtype != torch.float32:  # rounding of the maps changes signs, a share of all in proportion to it
        bound = 2 * bound**0.5
    scale = max(e.norm().item() for e in expected[2:])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        # A gradient that is zero but for rounding is compared with what it is a difference of.
        off = (f.double().cpu() - e).norm().item()
        assert off <= bound * e.norm().item() or off <= bound * 1e-2 * scale, f"{i}: {error(f.cpu(), e):.1e}"
