"""The Triton backend of the public operators: `run`, and `backward` with an operator of its own."""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import verdict
from parnet_kernels.call import SIGNATURES, Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.precision import current_precision

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation must not break the other backends
        return f"triton cannot be imported: {error}"
    return None


@functools.cache
def _interpreted() -> bool:
    from parnet_kernels.triton import launch

    return launch.INTERPRETED


@functools.cache
def _device_missing(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"needs compute capability 8.0, cuda:{index} has {torch.cuda.get_device_capability(index)}"
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no driver, or one that Triton cannot use
        return f"Triton finds no driver: {error}"
    return None


def why_not(op: str, x: Tensor) -> str | None:
    """Why the backend cannot run `op` on x, or None."""
    if x.dtype not in _DTYPES:
        return f"computes float16, bfloat16 and float32, x is {x.dtype}"
    if x.device.type not in ("cuda", "cpu"):
        return f"needs a CUDA device, x is on {x.device}"
    if reason := _triton_missing():
        return reason
    if x.device.type == "cpu":
        return None if _interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1), x is on cpu"
    if not torch.cuda.is_available():
        return "no CUDA driver"
    index = x.device.index or 0
    return _device_missing(index) or verdict.failure("triton", index)


def _in_layout_of(x: Tensor | None, nhwc: Tensor) -> Tensor:
    """nhwc [N, H, W, C] as [N, C, H, W], channels_last if x is, else contiguous."""
    nchw = nhwc.permute(0, 3, 1, 2)
    return nchw if x is not None and is_channels_last(x) else nchw.contiguous()


def _layer(call: Call) -> tuple[Any, tuple[Any, ...]]:
    from parnet_kernels.triton.layers import Layer, maps_of

    def dense(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() > 1 else t.contiguous()

    parameters: dict[str, Any] = {name: dense(t) for name, t in call.parameters.items()}
    return Layer(**parameters, stride=call.stride, activation=call.activation), maps_of(*call.maps)


def run(call: Call) -> Tensor:
    """One call of a public operator."""
    from parnet_kernels.triton.layers import forward

    if call.x.shape[0] == 0:
        return call.x.new_empty(call.result_shape)
    layer, maps = _layer(call)
    out = forward(layer, maps, current_precision(), dense=True, with_sums=False)
    return _in_layout_of(call.x, out.data)


def triton_backward(
    op: str, g: Tensor, tensors: list[Tensor | None], stride: int, activation: str, need: list[bool]
) -> list[Tensor]:
    """The kernel of `parnet::triton_backward`: tensors and need are in the order of the operator's signature; the
    needed gradients, in order, each of its tensor's dtype.
    """
    from parnet_kernels.triton.layers import backward

    if g.shape[0] == 0:
        return [torch.zeros_like(t) for t, n in zip(tensors, need, strict=True) if n and t is not None]
    call, maps_count = Call.of_tensors(op, tensors, stride, activation), len(SIGNATURES[op].maps)
    layer, maps = _layer(call)
    if g.stride(1) != 1:
        g = g.contiguous(memory_format=torch.channels_last)
    d_maps, d_weight, small = backward(
        layer, maps, g.permute(0, 2, 3, 1), current_precision(), tuple(need[:maps_count]), need[maps_count]
    )
    d_inputs = [None if d is None else _in_layout_of(x, d) for x, d in zip(call.maps, d_maps, strict=True)]
    d_parameters = [d_weight if name == "weight" else getattr(small, name) for name in call.parameters]
    return [
        d.to(t.dtype, copy=d.dim() == 1)  # vectors are rows of one buffer; results of an operator must not share memory
        for d, t, n in zip([*d_inputs, *d_parameters], tensors, need, strict=True)
        if n and d is not None and t is not None
    ]


def _fake(
    op: str, g: Tensor, tensors: list[Tensor | None], stride: int, activation: str, need: list[bool]
) -> list[Tensor]:
    def like(position: int, t: Tensor) -> Tensor:
        if position >= len(SIGNATURES[op].maps):
            return torch.empty_like(t)
        layout = torch.channels_last if is_channels_last(t) else torch.contiguous_format
        return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=layout)

    every = zip(tensors, need, strict=True)
    return [like(position, t) for position, (t, n) in enumerate(every) if n and t is not None]


def backward(call: Call, g: Tensor, need: Set[str]) -> dict[str, Tensor]:
    """The gradients of the tensors named in `need`."""
    tensors = call.tensors
    needed = [name in need and t is not None for name, t in tensors.items()]
    found = torch.ops.parnet.triton_backward(call.op, g, [*tensors.values()], call.stride, call.activation, needed)
    return dict(zip((name for name, n in zip(tensors, needed, strict=True) if n), found, strict=True))


# An operator of its own, so that a compiled backward calls it as one node. Not differentiable: `dispatch.py` takes the
# differentiable gradients where a gradient is itself differentiated.
_library = torch.library.Library("parnet", "FRAGMENT")
_library.define(
    "triton_backward(str op, Tensor g, Tensor?[] tensors, int stride, str activation, bool[] need) -> Tensor[]"
)
_library.impl("triton_backward", triton_backward, "CompositeExplicitAutograd")
torch.library.register_fake("parnet::triton_backward", _fake, lib=_library)
