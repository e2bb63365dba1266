"""Argument checks of the public operators, once for every backend and for the fake kernels.

Each error names the argument, what is required of it and what was got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parnet_kernels.call import SIGNATURES, Call
from parnet_kernels.reference import ACTIVATIONS

NARROW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _error(argument: str, requirement: str, got: object) -> ValueError:
    return ValueError(f"parnet_kernels: `{argument}` must {requirement}, got {got}")


def _is_dense(name: str, t: Tensor | None) -> Tensor:
    if t is None:
        raise _error(name, "be a tensor", None)
    if t.layout != torch.strided or t.is_nested:
        raise _error(name, "be a dense tensor", "a nested tensor" if t.is_nested else t.layout)
    return t


def is_map(name: str, t: Tensor) -> None:
    """Raises unless t is what an operator takes as x."""
    _is_dense(name, t)
    if t.dim() != 4:
        raise _error(name, "have 4 dimensions [N, C, H, W]", f"shape {list(t.shape)}")
    if t.dtype not in DTYPES:
        raise _error(name, "be a float64, float32, float16 or bfloat16 tensor", t.dtype)
    if 0 in t.shape[1:]:
        raise _error(name, "have C, H, W ≥ 1", f"shape {list(t.shape)}")


def _like(name: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    t = _is_dense(name, t)
    if t.shape != shape:
        raise _error(name, f"have shape {list(shape)} ({meaning})", list(t.shape))
    if t.dtype != x.dtype:
        raise _error(name, f"have the dtype of `x`, {x.dtype}", t.dtype)
    if t.device != x.device:
        raise _error(name, f"be on the device of `x`, {x.device}", t.device)


def _suits(x: Tensor, parameters: list[Tensor]) -> None:
    """Raises if x is what differs from all parameters, which agree."""
    dtypes, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
    if len(dtypes) == 1 and x.dtype not in dtypes:
        raise _error("x", f"have the dtype of the parameters, {dtypes.pop()}", x.dtype)
    if len(devices) == 1 and x.device not in devices:
        raise _error("x", f"be on the device of the parameters, {devices.pop()}", x.device)


def check_types(op: str, arguments: dict[str, Any]) -> None:
    """Raises if an argument is of a type that the dispatcher does not take, in words about that argument.

    Raises:
        TypeError: naming the argument, what is required of it and what was got.
    """
    signature = SIGNATURES[op]
    for name, value in arguments.items():
        got = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        if name in signature.tensors:
            if value is not None and not hasattr(type(value), "__torch_function__"):
                make = "torch.from_numpy" if got == "numpy.ndarray" else "torch.tensor"
                raise TypeError(f"parnet_kernels: `{name}` must be a tensor, got a {got}; `{make}` makes one")
        elif not isinstance(value, type(signature.options[name])):
            kind = type(signature.options[name]).__name__
            raise TypeError(f"parnet_kernels: `{name}` must be of type {kind}, got {value!r}")


def _convolution(x: Tensor, p: dict[str, Tensor | None]) -> int:
    """Checks the parameters that every operator has; returns K."""
    weight = _is_dense("weight", p["weight"])
    if weight.dim() != 4:
        raise _error("weight", "have 4 dimensions [K, C, 3, 3]", f"shape {list(weight.shape)}")
    k, c = weight.shape[0], x.shape[1]
    if k == 0:
        raise _error("weight", "have K ≥ 1 output channels", f"shape {list(weight.shape)}")
    if weight.shape[1] not in (c, 0) and weight.shape[1] == x.shape[3]:
        raise ValueError(
            f"parnet_kernels: `x` of shape {list(x.shape)} has {c} channels and looks channels-last [N, H, W, C], the "
            f"weights take {weight.shape[1]}; `x.permute(0, 3, 1, 2)` is [N, C, H, W]"
        )
    _like("weight", weight, x, (k, c, 3, 3), "[K, C, 3, 3]")
    _like("bias", p["bias"], x, (k,), "[K]")
    _like("gate_weight", p["gate_weight"], x, (k, c), "[K, C]")
    if p["gate_bias"] is not None:
        _like("gate_bias", p["gate_bias"], x, (k,), "[K]")
    return k


def _epilogue(x: Tensor, k: int, activation: str, out_scale: Tensor | None, out_shift: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise _error("activation", f"be one of {sorted(ACTIVATIONS)}", repr(activation))
    if out_scale is None and out_shift is None:
        return
    if out_scale is None:
        raise _error("out_scale", "be given together with `out_shift`", None)
    if out_shift is None:
        raise _error("out_shift", "be given together with `out_scale`", None)
    _like("out_scale", out_scale, x, (k,), "[K]")
    _like("out_shift", out_shift, x, (k,), "[K]")


def check(call: Call) -> None:
    """Raises unless the arguments fit each other.

    Raises:
        ValueError: naming the argument, what is required of it and what was got.
    """
    for name, t in zip(SIGNATURES[call.op].maps, call.maps, strict=True):
        is_map(name, t)
    x, p = call.x, call.parameters
    _suits(x, call.present)
    if len(call.maps) == 2:
        _like("y", call.maps[1], x, x.shape, "that of `x`")
    if call.stride not in (1, 2):
        raise _error("stride", "be 1 or 2", call.stride)
    k = _convolution(x, p)
    if "skip_scale" in p:
        if k != x.shape[1]:
            raise _error("weight", f"have K = C = {x.shape[1]}, the skip adds x", f"K = {k}")
        _like("skip_scale", p["skip_scale"], x, (k,), "[C]")
        _like("skip_shift", p["skip_shift"], x, (k,), "[C]")
    if len(call.maps) == 2 and k % 2:
        raise _error("weight", "have an even K, two groups", f"K = {k}")
    _epilogue(x, k, call.activation, p["out_scale"], p["out_shift"])


def training(
    maps: Sequence[Tensor],
    tensors: dict[str, Tensor],
    eps: Sequence[float],
    stride: int,
    groups: int,
    phi: str,
    shared: bool,
) -> None:
    """Of the training form; tensors: its parameters by name; shared: statistics are taken over several processes."""
    x = maps[0]
    for name, t in zip("xy", maps, strict=False):
        is_map(name, t)
        _like(name, t, x, tuple(x.shape), "that of `x`")
    channels = len(maps) * x.shape[1]
    if stride not in (1, 2):
        raise _error("stride", "be 1 or 2", stride)
    if groups not in (1, 2) or channels % groups:
        raise _error("groups", f"be 1, or 2 where x has an even number of channels, not {channels}", groups)
    weight = tensors["weight3"]
    _is_dense("weight3", weight)
    if weight.dim() != 4 or weight.shape[0] == 0:
        raise _error("weight3", "have 4 dimensions [K, C/groups, 3, 3], K ≥ 1", f"shape {list(weight.shape)}")
    k, c = weight.shape[0], channels // groups
    if k % groups:
        raise _error("weight3", "have an even K, two groups", f"K = {k}")
    if "gamma0" in tensors and k != x.shape[1]:
        raise _error("weight3", f"have K = C = {x.shape[1]}, the skip adds x", f"K = {k}")
    wide = "[K, C, …]" if len(maps) == 2 else "[K, C/groups, …]"
    shapes = {"weight3": (k, c, 3, 3), "weight1": (k, c, 1, 1), "gate_weight": (k, c)}
    norms = 0
    for name, t in tensors.items():
        of_map = name in ("gamma_x", "beta_x", "gamma_y", "beta_y")
        norms += name.startswith("gamma")
        shape = shapes.get(name, (x.shape[1],) if of_map else (k,))
        meaning = wide if name in shapes else "[C]" if of_map else "[K]"
        # Parameters of 16-bit maps may be float32: they are those of mixed precision.
        like = t if isinstance(t, Tensor) and t.dtype == torch.float32 and x.dtype in NARROW else x
        _like(name, t, like, shape, meaning)
        if t.device != x.device:
            raise _error(name, f"be on the device of `x`, {x.device}", t.device)
    if len(eps) != norms or min(eps) < 0:
        raise _error("eps", "have a value ≥ 0 for each BatchNorm", list(eps))
    if phi not in ACTIVATIONS:
        raise _error("activation", f"be one of {sorted(ACTIVATIONS)}", repr(phi))
    size = x.shape[0] * ((x.shape[2] - 1) // stride + 1) * ((x.shape[3] - 1) // stride + 1)
    if size < 2 and not shared:
        raise _error("x", "have more than one value a channel of the result, whose variance is taken", list(x.shape))


def is_channels_last(x: Tensor) -> bool:
    """Whether the result of an operator on x is channels_last: dense channels_last, and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
