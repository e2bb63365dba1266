"""Registration of the training form's operators: autocast, autograd, choice of the kernels, shapes.

`training.py` is the algebra. The backward pass of a backward pass goes through the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import checks, training
from parnet_kernels.cpu import training as cpu
from parnet_kernels.selection import BACKENDS, forced_backend
from parnet_kernels.training import Block

_WITH_SKIP = Block._fields[:9]
_PARAMETERS = {
    "repvgg_sse_train": _WITH_SKIP,
    "downsample_se_train": tuple(name for name in _WITH_SKIP if name not in ("gamma0", "beta0")),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "repvgg_sse_train": {"stride": 1, "groups": 1, "activation": "silu"},
    "downsample_se_train": {"stride": 2, "groups": 1, "activation": "silu"},
}
_NARROW = (torch.float16, torch.bfloat16)  # are computed in float32


def why_not(x: Tensor) -> str | None:
    """The reason why the training form of x goes through plain PyTorch, not through kernels; or None."""
    # A compiled step chooses when it runs: `_is_native`.
    asked = None if torch.compiler.is_compiling() else forced_backend()
    return f"backend {asked!r} is asked for" if asked not in (None, "cpu") else cpu.why_not(x)


def _is_native(op: str, x: Tensor) -> bool:
    asked, reason = forced_backend(), why_not(x)
    if asked not in (None, *BACKENDS):
        raise ValueError(f"parnet_kernels: PARNET_BACKEND must be one of {list(BACKENDS)}, got {asked!r}")
    if reason and asked not in (None, "reference"):
        reason = reason if asked == "cpu" else "it has no kernels of the training form"
        raise RuntimeError(f"parnet_kernels: backend {asked!r} cannot run {op}: {reason}")
    return reason is None


def _block(parameters: Sequence[Any], eps: Sequence[float], stride: int, groups: int, activation: str) -> Block:
    of_x = [*parameters[6:8]] if len(parameters) == len(_WITH_SKIP) else [None, None]
    settings: list[Any] = [*parameters[:6], *of_x, parameters[-1], eps, stride, groups, activation]
    return Block(*settings)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.float() if t.dtype in _NARROW else t for t in tensors]


class _Operator:
    def __init__(self, name: str) -> None:
        self.name, self.names, self.defaults = name, _PARAMETERS[name], _DEFAULTS[name]
        self.op = getattr(torch.ops.parnet, name).default

    def _checked(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
        options = {**self.defaults, **options}
        named = dict(zip(self.names, tensors[1:], strict=True))
        checks.training(tensors[0], named, options["eps"], options["stride"], options["groups"], options["activation"])
        return options

    def kernel(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        options = self._checked(tensors, options)
        x, *parameters = _wide(tensors)
        kernels = cpu.CpuKernels() if _is_native(self.name, tensors[0]) else training.Plain()
        y, statistics, y3, y1, means = training.forward(kernels, x, _block(parameters, **options))
        dtype = tensors[0].dtype
        y, y3, y1 = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (y, y3, y1))
        return y, statistics, y3, y1, means

    def fake(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        stride, (x, weight) = self._checked(tensors, options)["stride"], tensors[:2]
        k = weight.shape[0]
        size = (x.shape[0], k, (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        maps = [x.new_empty(size).to(memory_format=torch.channels_last) for _ in range(3)]
        dtype = torch.float32 if x.dtype in _NARROW else x.dtype
        statistics = x.new_empty((6 if len(tensors) == 10 else 4, k), dtype=dtype)
        return maps[0], statistics, maps[1], maps[2], x.new_empty(x.shape[:2], dtype=dtype)

    def autograd(self, *tensors: Tensor, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Differentiable.apply(self, options, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*tensors, **options)

    def autocast(self, device: str) -> Callable[..., tuple[Tensor, ...]]:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(key):
                cast = [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
                return self.op(*cast, **options)

        return kernel


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: _Operator, options: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        checks.is_map("x", tensors[0])
        # Chosen here, since use_backend does not reach the threads of the autograd engine.
        ctx.options = {**operator.defaults, **options}
        ctx.native = _is_native(operator.name, tensors[0])
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = operator.op(*tensors, **options)
        ctx.save_for_backward(*tensors, *results[1:])
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, g, need = ctx.saved_tensors, gradients[0], ctx.needs_input_grad[2:]
        (x, *parameters), results = saved[:-4], saved[-4:]
        if torch.is_grad_enabled():
            wanted = [t for t, n in zip(saved, need, strict=False) if n]
            wide = _wide(saved[:-4])
            y, _ = training.plain(wide[0], _block(wide[1:], **ctx.options))
            found = list(torch.autograd.grad(y, wanted, g.to(y.dtype), create_graph=True))
            return (None, None, *(found.pop(0) if n else None for n in need))
        options = {**ctx.options, "need": list(need[:3]), "native": ctx.native}
        found = list(torch.ops.parnet._train_backward.default(g, x, list(results), parameters, **options))
        # Gradients of x and the convolutions' weights are made only where they are asked for.
        return (None, None, *(found.pop(0) if n or i > 2 else None for i, n in enumerate(need)))


def _backward(
    g: Tensor,
    x: Tensor,
    results: list[Tensor],
    parameters: list[Tensor],
    *,
    need: list[bool],
    native: bool,
    **options: Any,
) -> list[Tensor]:
    kernels = cpu.CpuKernels() if native else training.Plain()
    wide_x, *wide = _wide([x, *parameters])
    statistics, y3, y1, means = _wide(results)
    block = _block(wide, **options)
    found = training.backward(kernels, _wide([g])[0], wide_x, (statistics, y3, y1, means), block, need)
    return [
        (d.contiguous(memory_format=torch.channels_last) if i == 0 else d.contiguous()).to(x.dtype)
        for i, d in enumerate(found)
        if d is not None
    ]


def _fake_backward(
    g: Tensor, x: Tensor, results: list[Tensor], parameters: list[Tensor], *, need: list[bool], **options: Any
) -> list[Tensor]:
    maps = [x.new_empty(x.shape).to(memory_format=torch.channels_last)] if need[0] else []
    weights = [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, n in zip(parameters, need[1:], strict=False)
        if n
    ]
    return [*maps, *weights, *(p.new_empty(p.shape) for p in parameters[2:])]


OPERATORS = {name: _Operator(name) for name in _PARAMETERS}

_library = torch.library.Library("parnet", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    _library.impl(_name, _operator.kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _operator.autograd, "Autograd")
    _library.impl(_name, _operator.autocast("cpu"), "AutocastCPU")
    _library.impl(_name, _operator.autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"parnet::{_name}", _operator.fake, lib=_library)
_library.impl("_train_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("parnet::_train_backward", _fake_backward, lib=_library)
