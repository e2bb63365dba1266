"""The one choice of a backend for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import reference
from parnet_kernels.call import Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu import backend as cpu
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.environment import BACKEND
from parnet_kernels.triton import backend as triton


class Reference:
    """`reference.py` as a backend: takes everything; 16-bit arguments are computed in float32."""

    @staticmethod
    def why_not(op: str, x: Tensor) -> str | None:
        return None

    @staticmethod
    def compute(call: Call) -> Tensor:
        """The result, in any layout."""
        y: Tensor = getattr(reference, call.op)(**call.widened().arguments)
        return y.to(call.x.dtype)

    @classmethod
    def run(cls, call: Call) -> Tensor:
        layout = torch.channels_last if is_channels_last(call.x) else torch.contiguous_format
        return cls.compute(call).contiguous(memory_format=layout)


#: In order of preference. Each has `why_not(op, x)`, the reason why it cannot run op on x or None, and `run(call)`,
#: whose result None means: not with these values, take the reference. It may have
#: `backward(call, g, need)`: the gradients of the tensors named in need, by name, once differentiable;
#: `better_elsewhere(call)`: the reason why a later kernel backend that can run the call should, or None;
#: `again(asked, op, tensors, options)`: the result of a call like an earlier one, known to fit, or None; and
#: `remember(asked, op, tensors, options)`, which is told of each call that it has run. Both are given the arguments as
#: the operator was, and the backend that was asked for; `clear_cache()` forgets them, and all packed weights.
BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": Reference}
#: `again` of the backends that have it.
AGAIN: list[Callable[..., Tensor | None]] = [b.again for b in BACKENDS.values() if hasattr(b, "again")]

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


def choose(call: Call) -> Any:
    """The backend that runs the call: the one asked for, else the first that can."""
    forced, op, x = _forced.get(), call.op, call.x
    if forced is None:
        able = (b for b in BACKENDS.values() if b.why_not(op, x) is None)
        first = next(able)
        if hasattr(first, "better_elsewhere") and first.better_elsewhere(call) is not None:
            return next((b for b in able if b is not Reference), first)
        return first
    if forced not in BACKENDS:
        raise ValueError(f"parnet_kernels: PARNET_BACKEND must be one of {list(BACKENDS)}, got {forced!r}")
    reason = BACKENDS[forced].why_not(op, x)
    if reason is not None:
        raise RuntimeError(f"parnet_kernels: backend {forced!r} cannot run {op}: {reason}")
    return BACKENDS[forced]


def clear_cache() -> None:
    """Forgets all packed weights of the public operators; the next call of each packs again. Needed only after single
    values of a weight were changed behind autograd's version counter (through `.data`, NumPy or another process).
    """
    for backend in BACKENDS.values():
        if hasattr(backend, "clear_cache"):
            backend.clear_cache()
