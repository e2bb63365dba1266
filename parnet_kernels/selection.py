"""The one choice of a backend for a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import reference, triton
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu import backend as cpu
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.environment import BACKEND


class Reference:
    """`reference.py` as a backend: takes everything; 16-bit arguments are computed in float32."""

    @staticmethod
    def why_not(op: str, x: Tensor) -> str | None:
        return None

    @staticmethod
    def run(op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> Tensor:
        x = tensors[0]
        assert x is not None
        if x.dtype in (torch.float16, torch.bfloat16):
            tensors = [None if t is None else t.float() for t in tensors]
            options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
        y = getattr(reference, op)(*tensors, **options).to(x.dtype)
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return y.contiguous(memory_format=layout)


#: In order of preference. Each has `why_not(op, x)`, the reason why it cannot run op on x or None, and `run`, whose
#: result None means: not with these values, take the reference. It may have `backward(op, g, tensors, options, need)`:
#: gradients of tensors, out_scale, out_shift, once differentiable.
BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": Reference}

_forced: ContextVar[str | None] = ContextVar("parnet_backend", default=BACKEND)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, run every operator on the backend `name` or raise with the reason why it cannot.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"parnet_kernels: backend must be one of {list(BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or PARNET_BACKEND, or None."""
    return _forced.get()


def explain(op: str, x: Tensor) -> dict[str, str | None]:
    """For each backend, in order of preference, why it cannot run `op` on `x`; None where it can."""
    return {name: backend.why_not(op, x) for name, backend in BACKENDS.items()}


def choose(op: str, x: Tensor) -> Any:
    forced = _forced.get()
    if forced is None:
        return next(b for b in BACKENDS.values() if b.why_not(op, x) is None)
    if forced not in BACKENDS:
        raise ValueError(f"parnet_kernels: PARNET_BACKEND must be one of {list(BACKENDS)}, got {forced!r}")
    reason = BACKENDS[forced].why_not(op, x)
    if reason is not None:
        raise RuntimeError(f"parnet_kernels: backend {forced!r} cannot run {op}: {reason}")
    return BACKENDS[forced]
