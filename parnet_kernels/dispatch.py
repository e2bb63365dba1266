"""Registration of the public operators with PyTorch's dispatcher.

A call of torch.ops.parnet.<op> passes, top down: autocast (casts floating arguments), autograd (`gradients.py`), then
the kernel, which checks the arguments (`checks.py`) and runs the backend that `selection.py` chooses; a call like an
earlier one on the CPU skips both (`cpu.again`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parnet_kernels import checks, gradients
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu import backend as cpu
from parnet_kernels.selection import Reference, choose, forced_backend

Arguments = tuple[list[Tensor | None], dict[str, Any]]  # positional tensors, keyword options


def _has_tangent(tensors: list[Tensor]) -> bool:
    level = getattr(forward_ad, "_current_level", 0)  # −1: none is open, which is faster to know
    return level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _Operator:
    """What the dispatcher runs for one public operator, at each of its levels."""

    def __init__(self, name: str, positional: int, options: dict[str, Any]) -> None:
        self.name = name
        self.positional = positional
        self.options = options
        self.op = getattr(torch.ops.parnet, name).default

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The dispatcher leaves out arguments that equal their defaults; puts them back."""
        return [*args, *[None] * (self.positional - len(args))], {**self.options, **kwargs}

    def kernel(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors, options = self.bind(args, kwargs)
        asked = forced_backend()
        if (result := cpu.again(asked, self.name, tensors, options)) is not None:
            return result
        getattr(checks, self.name)(*tensors, **options)
        backend = choose(self.name, args[0])
        result = backend.run(self.name, tensors, options)
        if result is None:
            return Reference.run(self.name, tensors, options)
        if backend is cpu:
            cpu.remember(asked, self.name, tensors, options)
        return result

    def fake(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors, options = self.bind(args, kwargs)
        getattr(checks, self.name)(*tensors, **options)
        x, stride = args[0], options.get("stride", 1)
        weight = args[2] if self.name == "fusion_se" else args[1]
        size = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)

    def autograd(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors, options = self.bind(args, kwargs)
        out = [options.pop("out_scale"), options.pop("out_shift")]
        given = [t for t in tensors + out if t is not None]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if wanted or _has_tangent(given):  # a tangent: raises, there is no jvp
            return _Differentiable.apply(self, options, *tensors, *out)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args, **kwargs)

    def autocast(self, device: str) -> Callable[..., Tensor]:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast(value: Any) -> Any:
            wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(torch.get_autocast_dtype(device)) if wide else value

        def kernel(*args: Any, **kwargs: Any) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(key):
                return self.op(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

        return kernel


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: _Operator, options: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        ctx.operator, ctx.options = operator, options
        ctx.save_for_backward(*tensors)
        *positional, out_scale, out_shift = tensors
        # Chosen here, since use_backend does not reach the threads of the autograd engine.
        x: Any = tensors[0]
        checks.is_map("x", x)
        ctx.own = getattr(choose(operator.name, x), "backward", None)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.op(*positional, **options, out_scale=out_scale, out_shift=out_shift)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors: tuple[Any, ...] = ctx.saved_tensors
        wide, need = tensors, ctx.needs_input_grad[2:]
        if ctx.own is not None and not torch.is_grad_enabled():
            *positional, out_scale, out_shift = tensors
            options = {**ctx.options, "out_scale": out_scale, "out_shift": out_shift}
            return (None, None, *ctx.own(ctx.operator.name, gradient[0], positional, options, need))
        if gradient[0].dtype in (torch.float16, torch.bfloat16):
            wide = tuple(None if t is None else t.float() for t in tensors)
        found = getattr(gradients, ctx.operator.name)(gradient[0].to(wide[0].dtype), *wide, **ctx.options, need=need)
        narrowed = [
            d.to(t.dtype) if n and d is not None and t is not None else None
            for d, t, n in zip(found, tensors, need, strict=True)
        ]
        return (None, None, *narrowed)


_OUT: dict[str, Any] = {"activation": "silu", "out_scale": None, "out_shift": None}
OPERATORS = {
    "repvgg_sse": _Operator("repvgg_sse", 7, _OUT),
    "downsample_se": _Operator("downsample_se", 5, {"stride": 2, **_OUT}),
    "fusion_se": _Operator("fusion_se", 6, {"stride": 2, **_OUT}),
}

_library = torch.library.Library("parnet", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    _library.impl(_name, _operator.kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _operator.autograd, "Autograd")
    _library.impl(_name, _operator.autocast("cpu"), "AutocastCPU")
    _library.impl(_name, _operator.autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"parnet::{_name}", _operator.fake, lib=_library)
