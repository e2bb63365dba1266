"""A block of the model through its training operator: whether it can, and the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from parnet_kernels import training_ops
from parnet_kernels.unchanged import HOOKS

Forwards = Mapping[type[nn.Module], Callable[..., Any]]
_STOCK: Forwards = {cls: cls.forward for cls in (nn.Conv2d, nn.BatchNorm2d, nn.Sequential)}


def why_not(block: Any, x: Tensor, forwards: Forwards) -> str | None:
    """The reason why the block runs as modules, one by one; or None. forwards: its own classes and their methods."""
    if not block.training:
        return "it is in eval mode"
    if not torch.compiler.is_compiling() and (type(x) is not Tensor or _is_transformed(x)):
        return "x is not a plain tensor, or under a transform of torch.func"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if x.dim() != 4 or x.numel() == 0:
        return f"x has shape {list(x.shape)}"
    return training_ops.why_not(x) or _why_not_modules(block, x, {**_STOCK, **forwards})


def _is_transformed(x: Tensor) -> bool:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _why_not_modules(block: Any, x: Tensor, forwards: Forwards) -> str | None:
    g = nn.modules.module
    if g._global_forward_hooks or g._global_forward_pre_hooks or g._global_backward_hooks:
        return "there are global module hooks"
    for name, m in block.named_modules():
        if m is block:
            continue
        if forwards.get(type(m)) is not type(m).forward:
            return f"{name} is a {type(m).__name__}, or was patched"
        if "forward" in m.__dict__ or any(getattr(m, hooks) for hooks in HOOKS):
            return f"{name} has hooks or its own `forward`"
    dense, point, gate, norm = _parts(block)
    c, k, stride = x.shape[1], dense.conv.weight.shape[0], block.stride
    if norm is not None and block.groups != 1:
        return "it has a skip and groups"
    if c != dense.conv.weight.shape[1] * block.groups:
        return f"x has {c} channels"
    for conv, kernel, step in ((dense.conv, 3, stride), (point.conv, 1, 1), (gate, 1, 1)):
        found = conv.bias, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        expected = None, (kernel,) * 2, (step,) * 2, (kernel // 2,) * 2, (1, 1), block.groups, "zeros"
        if found != expected:
            return "a convolution has other settings"
    size = x.shape[0] * ((x.shape[2] - 1) // stride + 1) * ((x.shape[3] - 1) // stride + 1)
    for bn in (dense.bn, point.bn, *([] if norm is None else [norm])):
        if not bn.training or bn.weight is None or bn.bias is None or bn.num_features != (c if bn is norm else k):
            return "a BatchNorm is in eval mode, or has no weight"
        if size < 2 or (bn.track_running_stats and bn.running_mean is None):
            return "a BatchNorm has to raise"
    if any(p.dtype != x.dtype or p.device != x.device for p in block.parameters()):
        return f"a parameter is not {x.dtype} on {x.device}"
    return None


def _parts(block: Any) -> tuple[Any, Any, Any, Any]:
    point = block.rbr_1x1 if block.stride == 1 else block.rbr_1x1[1]
    return block.rbr_dense, point, block.se.cvsig.conv, block.rbr_identity


def run(block: Any, x: Tensor) -> Tensor:
    """The block's result before the shuffle of groups; updates the running statistics as nn.BatchNorm2d does."""
    dense, point, gate, norm = _parts(block)
    norms = [dense.bn, point.bn] if norm is None else [dense.bn, point.bn, norm]
    first = (x, dense.conv.weight, point.conv.weight, dense.bn.weight, dense.bn.bias, point.bn.weight, point.bn.bias)
    gate_weight, eps = gate.weight.flatten(1), [bn.eps for bn in norms]
    if norm is None:
        y, statistics, *_ = torch.ops.parnet.downsample_se_train(
            *first, gate_weight, eps=eps, stride=block.stride, groups=block.groups, activation=block.activation
        )
    else:
        y, statistics, *_ = torch.ops.parnet.repvgg_sse_train(
            *first, norm.weight, norm.bias, gate_weight, eps=eps, activation=block.activation
        )
    with torch.no_grad():
        for i, bn in enumerate(norms):
            _update(bn, statistics[2 * i], statistics[2 * i + 1], y.numel() // y.shape[1])
    return y


def _update(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    factor: Any = bn.momentum
    if factor is None:
        assert bn.num_batches_tracked is not None
        factor = (1 / bn.num_batches_tracked).to(mean.dtype)
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), factor)
    bn.running_var.lerp_(variance.to(bn.running_var.dtype) * (count / (count - 1)), factor)
