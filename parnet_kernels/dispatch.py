"""Registration of the public operators with PyTorch's dispatcher.

A call of torch.ops.parnet.<op> passes, top down: the levels of torch.func, autocast (casts floating arguments),
autograd (`gradients.py`), then the kernel, which checks the arguments (`checks.py`) and runs the backend that
`selection.py` chooses; a call like an earlier one of the same backend skips both (`again`, see `selection.BACKENDS`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from parnet_kernels import checks, gradients
from parnet_kernels.call import OPERATORS, SIGNATURES, Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.selection import AGAIN, Reference, choose, forced_backend

Arguments = tuple[list[Tensor | None], dict[str, Any]]  # positional tensors, keyword options


def _has_tangent(tensors: list[Tensor]) -> bool:
    level = getattr(forward_ad, "_current_level", 0)  # −1: none is open, which is faster to know
    return level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


_BATCHED = torch._C._dispatch_key_parse("Batched")


def _is_batched(t: Tensor) -> bool:
    """By torch.func, or by `is_grads_batched` and `vectorize`, which have a vmap of their own."""
    return torch._C._dispatch_keys(t).has(_BATCHED) or functorch.is_functorch_wrapped_tensor(t)


class _Operator:
    """What the dispatcher runs for one public operator, at each of its levels."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.positional, self.options = SIGNATURES[name].positional, SIGNATURES[name].options
        self.op = getattr(torch.ops.parnet, name).default

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The dispatcher leaves out arguments that equal their defaults; puts them back."""
        return [*args, *[None] * (self.positional - len(args))], {**self.options, **kwargs}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return Call.of(self.name, *self.bind(args, kwargs))

    def kernel(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors, options = self.bind(args, kwargs)
        asked = forced_backend()
        for again in AGAIN:
            if (result := again(asked, self.name, tensors, options)) is not None:
                return result
        call = Call.of(self.name, tensors, options)
        checks.check(call)
        backend = choose(call)
        result = backend.run(call)
        if result is None:
            return Reference.run(call)
        if hasattr(backend, "remember"):
            backend.remember(asked, self.name, tensors, options)
        return result

    def fake(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.call(args, kwargs)
        checks.check(call)
        x = call.x
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return torch.empty(call.result_shape, dtype=x.dtype, device=x.device, memory_format=layout)

    def autograd(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if _has_tangent(given):
            return self.decomposed(self.call(args, kwargs))
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            call = self.call(args, kwargs)
            return _Differentiable.node(self.name, call.stride, call.activation, *call.tensors.values())
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args, **kwargs)

    def traced(self, mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """For `torch.onnx.export(…, dynamo=True)`, also of a program exported before: decomposed; for all other tracers
        one operator. Not through PyTorch's table of decompositions: with CI set in the environment, torch.compile
        refuses an operator that has an entry there.
        """
        if not torch.onnx.is_in_onnx_export():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return self.decomposed(self.call(args, kwargs or {}))

    def decomposed(self, call: Call) -> Tensor:
        """By PyTorch's operators, which forward-mode differentiation, every transform of torch.func and ONNX know."""
        checks.check(call)
        return Reference.run(call) if functorch.peek_interpreter_stack() is None else Reference.compute(call)

    def batched(self, *args: Any, **kwargs: Any) -> Tensor:
        """One level of torch.vmap. Images do not depend on each other, so where only maps are batched, they become one
        batch of images, and one call; else (an ensemble of weights) decomposed.
        """
        call, level = self.call(args, kwargs), functorch.maybe_current_level()
        assert level is not None

        def unwrapped(t: Tensor) -> tuple[Tensor, int | None]:
            return functorch._unwrap_batched(t, level)

        if any(unwrapped(p)[1] is not None for p in call.present):
            return self.decomposed(call)
        maps = [*map(unwrapped, call.maps)]
        size = next(m.shape[d] for m, d in maps if d is not None)
        whole = [m.expand(size, *m.shape) if d is None else m.movedim(d, 0) for m, d in maps]
        parameters = {name: None if p is None else unwrapped(p)[0] for name, p in call.parameters.items()}
        below = dataclasses.replace(call, maps=tuple(m.flatten(0, 1) for m in whole), parameters=parameters)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            y = self.op(**below.arguments)
        return functorch._add_batch_dim(y.unflatten(0, whole[0].shape[:2]), 0, level)

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
    @classmethod
    def node(cls, *args: Any) -> Tensor:
        """`apply`, also at a level of torch.func: the dispatcher has unwrapped the arguments for that level, where
        `apply` would begin with the levels again.
        """
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, op: str, stride: int, activation: str, *tensors: Tensor | None) -> Tensor:
        ctx.settings = op, stride, activation
        ctx.save_for_backward(*tensors)
        call = Call.of_tensors(op, tensors, stride, activation)
        # Chosen here, since use_backend does not reach the threads of the autograd engine.
        checks.is_map("x", call.x)
        ctx.own = getattr(choose(call), "backward", None)
        # `apply` turns differentiation off, for this level; the next levels of torch.func have their own.
        levels = functorch.peek_interpreter_stack() is not None
        modes = torch.set_grad_enabled(levels), forward_ad._set_fwd_grad_enabled(levels)
        with torch._C._AutoDispatchBelowAutograd(), modes[0], modes[1]:
            return getattr(torch.ops.parnet, op).default(**call.arguments)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        op, stride, activation = ctx.settings
        call, names = Call.of_tensors(op, ctx.saved_tensors, stride, activation), SIGNATURES[op].tensors
        need = {name for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True) if needed}
        # The formulas are operators of PyTorch's: differentiable, and known to every transform.
        plain = ctx.own is None or torch.is_grad_enabled() or _is_batched(gradient[0])
        found = (gradients.of if plain else ctx.own)(call, gradient[0], need)
        return (None, None, None, *map(found.get, names))


_library = torch.library.Library("parnet", "FRAGMENT")
for _operator in map(_Operator, OPERATORS):
    _name = _operator.name
    for _key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):  # nested: for the checks' error
        _library.impl(_name, _operator.kernel, _key)
    _library.impl(_name, _operator.autograd, "Autograd")
    _library.impl(_name, _operator.batched, "FuncTorchBatched")
    _library.impl(_name, _operator.autocast("cpu"), "AutocastCPU")
    _library.impl(_name, _operator.autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"parnet::{_name}", _operator.fake, lib=_library)
    torch.library.register_torch_dispatch(f"parnet::{_name}", ProxyTorchDispatchMode, _operator.traced, lib=_library)
