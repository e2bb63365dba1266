"""Arguments for the operators, shared by the tests of every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERATORS = ("repvgg_sse", "downsample_se", "fusion_se")


def arguments(
    op: str,
    n: int = 2,
    c: int = 4,
    k: int = 6,
    size: tuple[int, int] = (5, 7),
    *,
    dtype: torch.dtype = torch.float32,
    stride: int = 2,
    activation: str = "silu",
    gate_bias: bool = True,
    affine: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """(positional arguments, keyword arguments) of `op`, well scaled; `k` is ignored by repvgg_sse (K = C)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    if op == "repvgg_sse":
        k = c
    maps = [normal(n, c, *size) for _ in range(2 if op == "fusion_se" else 1)]
    parameters: list[Tensor | None] = [normal(k, c, 3, 3, scale=(9 * c) ** -0.5), normal(k, scale=0.3)]
    if op == "repvgg_sse":
        parameters += [normal(c, scale=0.3, mean=1.0), normal(c, scale=0.3)]
    parameters += [normal(k, c, scale=c**-0.5), normal(k, scale=0.3) if gate_bias else None]
    options: dict[str, Any] = {"activation": activation}
    if op != "repvgg_sse":
        options["stride"] = stride
    if affine:
        options |= {"out_scale": normal(k, scale=0.3, mean=1.0), "out_shift": normal(k, scale=0.3)}
    return [*maps, *parameters], options


def to(dtype: torch.dtype, args: list[Tensor | None], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The same arguments in another dtype."""
    return (
        [None if t is None else t.to(dtype) for t in args],
        {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in options.items()},
    )
