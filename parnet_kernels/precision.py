"""How float32 convolutions multiply on the Triton backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("ieee", "tf32", "tf32x3")
_chosen: str | None = None  # process-wide, as torch.backends is: backward runs in the autograd engine's threads


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Within the block, float32 convolutions multiply in "ieee" float32, "tf32", or three tf32 products, "tf32x3".

    The last comes near float32. On AMD GPUs, which lack it, it means "ieee".

    Outside, torch.backends.cudnn.conv.fp32_precision decides between tf32 and ieee, as for PyTorch's own convolutions.

    Raises:
        ValueError: for another name.
    """
    global _chosen
    if name not in PRECISIONS:
        raise ValueError(f"parnet_kernels: precision must be one of {list(PRECISIONS)}, got {name!r}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def current_precision() -> str:
    """The precision of float32 products that applies now."""
    if _chosen is not None:
        return _chosen
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"
