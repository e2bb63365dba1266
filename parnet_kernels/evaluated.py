"""What the modules of the training form compute in evaluation, as tensors in float64: what is folded.

Weights may be made at each forward, by a parametrization or a hook (pruning, weight norm, spectral norm): they are made
here as the next forward in evaluation would make them, and the module stays as it is. What cannot be folded is an error
that names the module: a wrong network would be worse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from parnet_kernels.reparam import Affine, affine_of
from parnet_kernels.training_sync import SyncBatchNorm2d

#: Forward pre-hooks that make a weight of others, and do nothing else.
WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


class FoldError(ValueError):
    """A model in training form that has no exact folded form; the message names the module."""


def refuse(where: str, reason: str) -> NoReturn:
    raise FoldError(f"parnet_kernels: `{where}` {reason}, so the model cannot be deployed")


def refuse_hooks(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises if a module within a model has hooks, or a forward of its own, that the folded form would not run."""
    for name, m in modules:
        if not name:
            continue
        if "forward" in m.__dict__:
            refuse(name, "has another `forward`")
        hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
        for hook in hooks:
            if not isinstance(hook, WEIGHT_HOOKS):
                refuse(name, f"has a hook, {getattr(hook, '__qualname__', type(hook).__name__)} (remove it first)")


def _is(m: object, kind: type[nn.Module], where: str) -> None:
    """Raises unless m computes what a `kind` does."""
    if not isinstance(m, kind):
        refuse(where, f"is a {type(m).__name__}, not a {kind.__name__}")
    own = [
        name for name in ("forward", "_conv_forward") if getattr(type(m), name, None) is not getattr(kind, name, None)
    ]
    if own and type(m) not in (nn.SyncBatchNorm, SyncBatchNorm2d):  # which are BatchNorm in evaluation
        refuse(where, f"is a {type(m).__name__} with a `{own[0]}` of its own")


_M = TypeVar("_M", bound=nn.Module)


def _current(m: _M) -> _M:
    """A copy of m with the weights that its next forward in evaluation would use."""
    twin = type(m).__new__(type(m))  # not copy.copy, which parametrized modules refuse
    twin.__dict__.update(m.__dict__)
    twin.__dict__.update({name: dict(m.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")})
    if "parametrizations" in twin._modules:  # spectral norm changes its vectors when it is asked while training
        twin._modules["parametrizations"] = copy.deepcopy(m._modules["parametrizations"]).eval()  # type: ignore[union-attr]
    twin.training = False
    for hook in m._forward_pre_hooks.values():
        hook(twin, ())
    return twin


def convolution(m: nn.Module, where: str, *, kernel: int, stride: int = 1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Weight [K, C/groups, kernel, kernel] and bias [K] of a Conv2d with padding kernel // 2."""
    _is(m, nn.Conv2d, where)
    assert isinstance(m, nn.Conv2d)
    expected = ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups, "zeros")
    found = (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    if found != expected:
        refuse(where, f"is another convolution than the configuration says, {m}")
    m = _current(m)
    weight = m.weight.double()
    return weight, weight.new_zeros(len(weight)) if m.bias is None else m.bias.double()


def norm(m: nn.Module, where: str, like: Tensor) -> Affine:
    """The affine map of a BatchNorm in evaluation, or of an Identity, for the channels of like [C]."""
    if type(m) is nn.Identity:
        return Affine(torch.ones_like(like), torch.zeros_like(like))
    _is(m, _BatchNorm, where)
    assert isinstance(m, _BatchNorm)
    if m.num_features != len(like):
        refuse(where, f"has {m.num_features} channels, not {len(like)}")
    if m.running_mean is None or m.running_var is None:
        refuse(where, "has no running statistics: it normalises with those of each batch")
    return affine_of(_current(m))


def linear(m: nn.Module, where: str, features: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weight [K, C] and bias [K] of a Linear with `features` (C, K)."""
    _is(m, nn.Linear, where)
    assert isinstance(m, nn.Linear)
    if (m.in_features, m.out_features) != features:
        refuse(where, f"maps {m.in_features} to {m.out_features} features, the configuration says {features}")
    m = _current(m)
    weight = m.weight.double()
    return weight, weight.new_zeros(len(weight)) if m.bias is None else m.bias.double()
