"""The public operators: documentation, and their registration with PyTorch's dispatcher.

A call of torch.ops.parnet.<op> passes, top down: autocast (casts floating arguments), autograd (`gradients.py`), then
the kernel, which checks the arguments (`checks.py`) and runs the first backend of `BACKENDS` that can take them; a call
like an earlier one on the CPU skips both (`cpu.again`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parnet_kernels import checks, cpu, cuda, gradients, reference, triton
from parnet_kernels.checks import is_channels_last
from parnet_kernels.environment import BACKEND

# ------------------------------------------------------------------ public functions


def repvgg_sse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip_scale: Tensor,
    skip_shift: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    """RepVGG block with skip-squeeze-excitation, folded (paper section 3.1).

    z = skip_scale·x + skip_shift
    y = φ(conv3x3(x; padding 1) + bias + z·σ(gate_weight·mean_hw(z) + gate_bias)), then out_scale·y + out_shift

    Args:
        x: [N, C, H, W], any strides; float64, float32, float16 or bfloat16 (16-bit is computed in float32).
        weight: [C, C, 3, 3]. bias, skip_scale, skip_shift: [C]. gate_weight: [C, C]. gate_bias: [C] or None.
        activation: φ, "silu" or "relu".
        out_scale, out_shift: [C], both or neither: an affine map after φ (a consumer's BatchNorm).

    Returns:
        [N, C, H, W], channels_last if x is, else contiguous.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    return torch.ops.parnet.repvgg_sse.default(
        x,
        weight,
        bias,
        skip_scale,
        skip_shift,
        gate_weight,
        gate_bias,
        activation=activation,
        out_scale=out_scale,
        out_shift=out_shift,
    )


def downsample_se(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    stride: int = 2,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    """Downsampling block, folded (paper section 3.2): no skip, the gate multiplies the convolution.

    y = φ(2σ(gate_weight·mean_hw(x) + gate_bias)·(conv3x3(x; padding 1, stride) + bias)), then out_scale·y + out_shift

    Args:
        x: [N, C, H, W]. weight: [K, C, 3, 3]. bias: [K]. gate_weight: [K, C]. gate_bias: [K] or None.
        stride: 1 or 2. activation, out_scale, out_shift ([K]): as in `repvgg_sse`.

    Returns:
        [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last if x is, else contiguous.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return torch.ops.parnet.downsample_se.default(
        x,
        weight,
        bias,
        gate_weight,
        gate_bias,
        stride=stride,
        activation=activation,
        out_scale=out_scale,
        out_shift=out_shift,
    )


def fusion_se(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    stride: int = 2,
    activation: str = "silu",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    """Fusion block, folded (paper section 3.2): two inputs, two groups, channels shuffled; without concat or shuffle.

    u = interleave(x, y), channel 2c + j from x (j = 0) or y (j = 1); everything below in two groups of channels
    v = φ(2σ(gate_weight·mean_hw(u) + gate_bias)·(conv3x3(u; padding 1, stride) + bias))
    result channel 2i + k = out_scale·v[channel k·K/2 + i] + out_shift

    Args:
        x, y: [N, C, H, W], of one shape. weight: [K, C, 3, 3], K even. bias: [K]. gate_weight: [K, C].
        gate_bias: [K] or None. stride: 1 or 2. activation: as in `repvgg_sse`.
        out_scale, out_shift: [K], in the order of the result's channels.

    Returns:
        [N, K, ⌈H/stride⌉, ⌈W/stride⌉], channels_last if x is, else contiguous.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return torch.ops.parnet.fusion_se.default(
        x,
        y,
        weight,
        bias,
        gate_weight,
        gate_bias,
        stride=stride,
        activation=activation,
        out_scale=out_scale,
        out_shift=out_shift,
    )


# ------------------------------------------------------------------ backends


class _Reference:
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
BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": _Reference}

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


def _choose(op: str, x: Tensor) -> Any:
    forced = _forced.get()
    if forced is None:
        return next(b for b in BACKENDS.values() if b.why_not(op, x) is None)
    if forced not in BACKENDS:
        raise ValueError(f"parnet_kernels: PARNET_BACKEND must be one of {list(BACKENDS)}, got {forced!r}")
    reason = BACKENDS[forced].why_not(op, x)
    if reason is not None:
        raise RuntimeError(f"parnet_kernels: backend {forced!r} cannot run {op}: {reason}")
    return BACKENDS[forced]


# ------------------------------------------------------------------ registration

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
        asked = _forced.get()
        if (result := cpu.again(asked, self.name, tensors, options)) is not None:
            return result
        getattr(checks, self.name)(*tensors, **options)
        backend = _choose(self.name, args[0])
        result = backend.run(self.name, tensors, options)
        if result is None:
            return _Reference.run(self.name, tensors, options)
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
        ctx.own = getattr(_choose(operator.name, x), "backward", None)
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
