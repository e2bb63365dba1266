"""Registration of the training form's operators: autocast, autograd, choice of the kernels, shapes.

`training.py` and `training_fusion.py` are the algebra. A second backward pass goes through the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import checks, training, training_fusion
from parnet_kernels.cpu import training as cpu
from parnet_kernels.selection import BACKENDS, forced_backend
from parnet_kernels.training import Block
from parnet_kernels.training_fusion import Norms
from parnet_kernels.triton import backend as triton

_WITH_SKIP = Block._fields[:9]
_PARAMETERS = {
    "repvgg_sse_train": _WITH_SKIP,
    "downsample_se_train": (*_WITH_SKIP[:6], "gate_weight"),
    "fusion_se_train": (*_WITH_SKIP[:6], "gamma_x", "beta_x", "gamma_y", "beta_y", "gate_weight"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "repvgg_sse_train": {"stride": 1, "groups": 1, "activation": "silu", "group": ""},
    "downsample_se_train": {"stride": 2, "groups": 1, "activation": "silu", "group": ""},
    "fusion_se_train": {"stride": 2, "groups": 2, "activation": "silu", "group": ""},
}


#: Sets of kernels, in order of preference; each says why it cannot run on x, or None. PLAIN takes everything.
KERNELS: dict[str, Callable[[Tensor], str | None]] = {
    "triton": lambda x: triton.why_not("repvgg_sse_train", x),
    "cpu": cpu.why_not,
}
PLAIN = "plain"


def reasons(x: Tensor) -> dict[str, str | None]:
    """For each set of kernels of the training form, why it cannot run on x; None where it can."""
    return {name: why(x) for name, why in KERNELS.items()}


def why_not(x: Tensor) -> str | None:
    """The reason why the training form of x goes through plain PyTorch, not through kernels; or None."""
    on_cpu = x.device.type == "cpu"
    if torch.compiler.is_compiling():  # a compiled step chooses when it runs: `_chosen`
        return cpu.why_not(x) if on_cpu or x.dtype not in cpu.DTYPES else None
    asked = forced_backend()
    if asked is not None:
        return KERNELS[asked](x) if asked in KERNELS else f"backend {asked!r} is asked for"
    found = reasons(x)
    return None if None in found.values() else found["cpu" if on_cpu else "triton"]


def _chosen(op: str, x: Tensor) -> str:
    """The kernels that run op on x."""
    asked = forced_backend()
    if asked not in (None, *BACKENDS):
        raise ValueError(f"parnet_kernels: PARNET_BACKEND must be one of {list(BACKENDS)}, got {asked!r}")
    if asked == "reference" or x.numel() == 0:
        return PLAIN
    if asked is None:
        return next((name for name, why in KERNELS.items() if why(x) is None), PLAIN)
    reason = KERNELS[asked](x) if asked in KERNELS else "it has no kernels of the training form"
    if reason:
        raise RuntimeError(f"parnet_kernels: backend {asked!r} cannot run {op}: {reason}")
    return asked


def _block(parameters: Sequence[Any], eps: Sequence[float], stride: int, groups: int, *settings: str) -> Block:
    of_x = [*parameters[6:8]] if len(parameters) == len(_WITH_SKIP) else [None, None]
    every: list[Any] = [*parameters[:6], *of_x, parameters[-1], eps, stride, groups, *settings]
    return Block(*every)


def _fusion(parameters: Sequence[Any], eps: Sequence[float], *settings: Any) -> tuple[Norms, Block]:
    """eps: of the block's BatchNorms, then of the inputs'."""
    norms = Norms([*parameters[6:10:2]], [*parameters[7:10:2]], eps[2:])
    return norms, _block((*parameters[:6], parameters[-1]), eps[:2], *settings)


def _settings(eps: Sequence[float], stride: int, groups: int, activation: str, group: str) -> tuple[Any, ...]:
    return eps, stride, groups, activation, group


# Of one operator, whichever: maps is x, or x and y; its results are those of `training` or `training_fusion`.


def _forward(kernels: str, maps: Sequence[Tensor], parameters: Sequence[Tensor], settings: Any) -> tuple[Tensor, ...]:
    if kernels == "triton":
        from parnet_kernels.triton import training as gpu

        if len(maps) == 2:
            return gpu.forward_fusion(maps, *_fusion(parameters, *settings))
        return gpu.forward(maps[0], _block(parameters, *settings))
    own, maps, parameters = _for_kernels(kernels), _readable(kernels, maps), _wide(parameters)
    if len(maps) == 2:
        return training_fusion.forward(own, maps, *_fusion(parameters, *settings))
    return training.forward(own, maps[0], _block(parameters, *settings))


def _gradients(
    kernels: str,
    g: Tensor,
    maps: Sequence[Tensor],
    results: Sequence[Tensor],
    parameters: Sequence[Tensor],
    settings: Any,
    need: list[bool],
) -> list[Tensor | None]:
    """Those of the maps and of the parameters, where they are needed."""
    if kernels == "triton":
        from parnet_kernels.triton import training as gpu

        if len(maps) == 2:
            return gpu.backward_fusion(g, maps, results, *_fusion(parameters, *settings), need)
        found = gpu.backward(g, maps[0], results, _block(parameters, *settings), need)
    else:
        own, parameters = _for_kernels(kernels), _wide(parameters)
        g, *given = _readable(kernels, [g, *maps, *results])
        maps, results = given[: len(maps)], given[len(maps) :]
        if len(maps) == 2:
            return training_fusion.backward(own, g, maps, results, *_fusion(parameters, *settings), need)
        found = training.backward(own, g, maps[0], results, _block(parameters, *settings), need)
    if len(parameters) != len(_WITH_SKIP):
        del found[7:9]
    return found


def _plain(maps: Sequence[Tensor], parameters: Sequence[Tensor], settings: Any) -> Tensor:
    if len(maps) == 2:
        return training_fusion.plain(maps, *_fusion(parameters, *settings))[0]
    return training.plain(maps[0], _block(parameters, *settings))[0]


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.float() if t.dtype in checks.NARROW else t for t in tensors]


def _for_kernels(kernels: str) -> training.Kernels:
    return cpu.CpuKernels() if kernels == "cpu" else training.Plain()


def _readable(kernels: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Maps and vectors as the kernels take them: those of the CPU read 16-bit maps as they are, in channels_last."""
    if kernels == PLAIN:
        return _wide(tensors)
    return [training.as_pixels(t) if t.dim() == 4 else t for t in tensors]


class _Operator:
    def __init__(self, name: str) -> None:
        self.name, self.names, self.defaults = name, _PARAMETERS[name], _DEFAULTS[name]
        self.op = getattr(torch.ops.parnet, name).default
        self.maps = 2 if name == "fusion_se_train" else 1

    def _checked(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
        options = {**self.defaults, **options}
        named = dict(zip(self.names, tensors[self.maps :], strict=True))
        maps, (stride, groups, phi) = tensors[: self.maps], (options[n] for n in ("stride", "groups", "activation"))
        checks.training(maps, named, options["eps"], stride, groups, phi, bool(options["group"]))
        return options

    def kernel(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        options = self._checked(tensors, options)
        maps, parameters, dtype = tensors[: self.maps], tensors[self.maps :], tensors[0].dtype
        found = _forward(_chosen(self.name, maps[0]), maps, parameters, _settings(**options))
        return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found)

    def fake(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        stride, x = self._checked(tensors, options)["stride"], tensors[0]
        k, c = tensors[self.maps].shape[0], x.shape[1]
        size = (x.shape[0], k, (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        again = training.makes_y1_again(stride, tensors[self.maps + 1])
        sizes = size, size, (0 if again else size[0], *size[1:])
        maps = [x.new_empty(s).to(memory_format=torch.channels_last) for s in sizes]
        dtype = torch.float32 if x.dtype in checks.NARROW else x.dtype
        statistics = [x.new_empty((6 if self.names == _WITH_SKIP else 4, k), dtype=dtype)]
        if self.maps == 2:
            statistics.append(x.new_empty((4, c), dtype=dtype))
        vectors = x.new_empty((x.shape[0], self.maps * c + k), dtype=dtype)
        counts = (2,) if self.maps == 2 else ()
        values = x.new_empty(counts if options.get("group") else (0,), dtype=torch.float64)
        return maps[0], *statistics, maps[1], maps[2], vectors, values

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
                wide = [t if t.dtype == torch.float64 else t.float() for t in tensors]
                cast = [t.to(dtype) if t.dtype == torch.float32 else t for t in wide[: self.maps]]
                return self.op(*cast, *wide[self.maps :], **options)

        return kernel


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: _Operator, options: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        for name, map in zip("xy"[: operator.maps], tensors, strict=False):
            checks.is_map(name, map)
        # Chosen here, since use_backend does not reach the threads of the autograd engine.
        ctx.options, ctx.maps, ctx.tensors = {**operator.defaults, **options}, operator.maps, len(tensors)
        ctx.kernels = _chosen(operator.name, tensors[0])
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = operator.op(*tensors, **options)
        ctx.save_for_backward(*tensors, *results[1:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # zeros for each of them would be as large as the maps
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, g, need = ctx.saved_tensors, gradients[0], ctx.needs_input_grad[2:]
        if g is None:
            return (None, None, *(None for _ in need))
        tensors, results, count = saved[: ctx.tensors], saved[ctx.tensors :], ctx.maps
        if torch.is_grad_enabled():
            wanted = [t for t, n in zip(tensors, need, strict=True) if n]
            wide = _wide(tensors)
            y = _plain(wide[:count], wide[count:], _settings(**ctx.options))
            found = list(torch.autograd.grad(y, wanted, g.to(y.dtype), create_graph=True))
            return (None, None, *(found.pop(0) if n else None for n in need))
        # Gradients of maps (of a fusion: and of their BatchNorms) and of the convolutions' weights are made only where
        # they are asked for.
        of_maps = need[:1] if count == 1 else (*need[:2], *need[8:12])
        made = [any(of_maps), *need[count : count + 2]]
        options = {**ctx.options, "need": made, "kernels": ctx.kernels}
        maps, parameters = list(tensors[:count]), list(tensors[count:])
        found = torch.ops.parnet._train_backward.default(g, maps, list(results), parameters, **options)
        there = iter(found)
        return (None, None, *(next(there) if m else None for m in _made(parameters, made, count)))


def _made(parameters: Sequence[Tensor], need: Sequence[bool], maps: int) -> list[bool]:
    """Which gradients `_train_backward` makes, in the order of the operator's tensors."""
    rest = [True] * 4 if maps == 1 else [True] * 4 + [need[0]] * 4
    return [*[need[0]] * maps, *need[1:], *rest, *[True] * (len(parameters) - 2 - len(rest))]


def _backward(
    g: Tensor,
    maps: list[Tensor],
    results: list[Tensor],
    parameters: list[Tensor],
    *,
    need: list[bool],
    kernels: str,
    **options: Any,
) -> list[Tensor]:
    found = _gradients(kernels, g, maps, results, parameters, _settings(**options), need)
    last = _layouts(maps, parameters)
    return [
        d.to(t.dtype).contiguous(memory_format=layout)
        for d, t, layout in zip(found, [*maps, *parameters], last, strict=True)
        if d is not None
    ]


def _layouts(maps: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[torch.memory_format]:
    """Of the gradients: channels_last for maps and for weights that are."""
    last = [torch.channels_last if checks.is_channels_last(t) else torch.contiguous_format for t in parameters]
    return [torch.channels_last] * len(maps) + last


def _fake_backward(
    g: Tensor, maps: list[Tensor], results: list[Tensor], parameters: list[Tensor], *, need: list[bool], **options: Any
) -> list[Tensor]:
    tensors, made = [*maps, *parameters], _made(parameters, need, len(maps))
    last = _layouts(maps, parameters)
    return [
        t.new_empty(t.shape).to(memory_format=layout) for t, m, layout in zip(tensors, made, last, strict=True) if m
    ]


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
