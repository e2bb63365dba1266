"""The backend protocol on Triton: `run`, and `backward` with an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parnet_kernels.checks import is_channels_last
from parnet_kernels.precision import current_precision


def _inputs(op: str) -> int:
    return 2 if op == "fusion_se" else 1


def _in_layout_of(x: Tensor | None, nhwc: Tensor) -> Tensor:
    """nhwc [N, H, W, C] as [N, C, H, W], channels_last if x is, else contiguous."""
    nchw = nhwc.permute(0, 3, 1, 2)
    return nchw if x is not None and is_channels_last(x) else nchw.contiguous()


def _layer(op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    from parnet_kernels.triton.layers import Layer, maps_of

    def dense(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() > 1 else t.contiguous()

    x, rest = tensors[: _inputs(op)], [dense(t) for t in tensors[_inputs(op) :]]
    skip_scale = skip_shift = None
    if op == "repvgg_sse":
        weight, bias, skip_scale, skip_shift, gate_weight, gate_bias = rest
    else:
        weight, bias, gate_weight, gate_bias = rest
    assert weight is not None
    assert bias is not None
    assert gate_weight is not None
    options = {name: dense(v) if isinstance(v, Tensor) else v for name, v in options.items()}
    layer = Layer(weight, bias, gate_weight, gate_bias, skip_scale, skip_shift, **options)
    return layer, maps_of(*(t for t in x if t is not None))


def run(op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> Tensor:
    """The backend protocol of `ops.py`: positional tensors and keyword options of an operator → its result."""
    from parnet_kernels.triton.layers import forward

    x = tensors[0]
    assert x is not None
    if x.shape[0] == 0:
        weight = tensors[_inputs(op)]
        assert weight is not None
        h, w = (-(-n // options.get("stride", 1)) for n in x.shape[2:])
        return x.new_empty(0, weight.shape[0], h, w)
    layer, maps = _layer(op, tensors, options)
    out = forward(layer, maps, current_precision(), dense=True, with_sums=False)
    return _in_layout_of(x, out.data)


def triton_backward(
    op: str,
    g: Tensor,
    tensors: list[Tensor | None],
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    stride: int,
    activation: str,
    need: list[bool],
) -> list[Tensor]:
    """The kernel of `parnet::triton_backward`: the needed gradients, in order, each of its tensor's dtype."""
    from parnet_kernels.triton.layers import backward

    every = [*tensors, out_scale, out_shift]
    if g.shape[0] == 0:
        return [torch.zeros_like(t) for t, n in zip(every, need, strict=True) if n and t is not None]
    inputs = _inputs(op)
    options = {"activation": activation, "out_scale": out_scale, "out_shift": out_shift}
    layer, maps = _layer(op, tensors, options if op == "repvgg_sse" else {"stride": stride, **options})
    if g.stride(1) != 1:
        g = g.contiguous(memory_format=torch.channels_last)
    d_maps, d_weight, small = backward(
        layer, maps, g.permute(0, 2, 3, 1), current_precision(), tuple(need[:inputs]), need[inputs]
    )
    d_inputs = [None if d is None else _in_layout_of(x, d) for x, d in zip(tensors, d_maps, strict=False)]
    skip = [small.skip_scale, small.skip_shift] if op == "repvgg_sse" else []
    vectors = [small.gate_bias, small.out_scale, small.out_shift]
    found = [*d_inputs, d_weight, small.bias, *skip, small.gate_weight, *vectors]
    return [
        d.to(t.dtype, copy=d.dim() == 1)  # vectors are rows of one buffer; results of an operator must not share memory
        for d, t, n in zip(found, every, need, strict=True)
        if n and d is not None and t is not None
    ]


def _fake(
    op: str,
    g: Tensor,
    tensors: list[Tensor | None],
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    stride: int,
    activation: str,
    need: list[bool],
) -> list[Tensor]:
    def like(position: int, t: Tensor) -> Tensor:
        if position >= _inputs(op):
            return torch.empty_like(t)
        layout = torch.channels_last if is_channels_last(t) else torch.contiguous_format
        return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=layout)

    every = zip([*tensors, out_scale, out_shift], need, strict=True)
    return [like(position, t) for position, (t, n) in enumerate(every) if n and t is not None]


def backward(
    op: str, g: Tensor, tensors: list[Tensor | None], options: dict[str, Any], need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The backend protocol of `ops.py`: gradients of tensors, out_scale, out_shift; None where not needed or not
    given.
    """
    out_scale, out_shift = options["out_scale"], options["out_shift"]
    given = [n and t is not None for n, t in zip(need, [*tensors, out_scale, out_shift], strict=True)]
    found = iter(
        torch.ops.parnet.triton_backward(
            op, g, tensors, out_scale, out_shift, options.get("stride", 1), options["activation"], given
        )
    )
    return tuple(next(found) if n else None for n in given)


# An operator of its own, so that a compiled backward calls it as one node. Not differentiable: `ops.py` takes the
# differentiable gradients where a gradient is itself differentiated.
_library = torch.library.Library("parnet", "FRAGMENT")
_library.define(
    "triton_backward(str op, Tensor g, Tensor?[] tensors, Tensor? out_scale, Tensor? out_shift, "
    "int stride, str activation, bool[] need) -> Tensor[]"
)
_library.impl("triton_backward", triton_backward, "CompositeExplicitAutograd")
torch.library.register_fake("parnet::triton_backward", _fake, lib=_library)
