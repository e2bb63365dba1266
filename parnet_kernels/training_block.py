"""A block of the model through its training operator: whether it can, and the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from parnet_kernels import training_ops, training_sync
from parnet_kernels.unchanged import HOOKS

Forwards = Mapping[type[nn.Module], Callable[..., Any]]
_STOCK: Forwards = {
    cls: cls.forward for cls in (nn.Conv2d, nn.BatchNorm2d, training_sync.SyncBatchNorm2d, nn.Sequential)
}


def why_not(block: Any, x: Tensor, forwards: Forwards) -> str | None:
    """The reason why the block runs as modules, one by one; or None. forwards: its own classes and their methods."""
    return _why_not_call(block, (x,)) or _why_not_modules(block, None, (x,), forwards)


def why_not_fusion(block: Any, norm: Any, maps: Sequence[Tensor], forwards: Forwards) -> str | None:
    """`why_not` for a fusion of two maps: `norm` holds their BatchNorms, b1 and b2; `block` has two groups."""
    return _why_not_call(block, maps) or _why_not_modules(block, norm, maps, forwards)


def _why_not_call(block: Any, maps: Sequence[Tensor]) -> str | None:
    if not block.training:
        return "it is in eval mode"
    if not torch.compiler.is_compiling() and any(type(x) is not Tensor or _is_transformed(x) for x in maps):
        return "x is not a plain tensor, or under a transform of torch.func"
    x = maps[0]
    if x.dim() != 4 or x.numel() == 0 or any(other.shape != x.shape for other in maps):
        return f"x has shape {list(x.shape)}"
    return next(filter(None, map(training_ops.why_not, maps)), None)


def _is_transformed(x: Tensor) -> bool:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _why_not_modules(block: Any, norm: Any, maps: Sequence[Tensor], forwards: Forwards) -> str | None:
    g = nn.modules.module
    if g._global_forward_hooks or g._global_forward_pre_hooks or g._global_backward_hooks:
        return "there are global module hooks"
    # A single block is called as a module, so that its own hooks run; in a fusion nothing is.
    named = [*block.named_modules()][1:] if norm is None else [*block.named_modules(), *norm.named_modules()]
    known = {**_STOCK, **forwards}
    for name, m in named:
        if known.get(type(m)) is not type(m).forward:
            return f"{name or 'it'} is a {type(m).__name__}, or was patched"
        own = m.__dict__
        if "forward" in own or any(own.get(hooks) for hooks in HOOKS):
            return f"{name or 'it'} has hooks or its own `forward`"
    dense, point, gate, identity = parts = _parts(block)
    x, k, stride = maps[0], dense.conv.weight.shape[0], block.stride
    c = x.shape[1] * len(maps)
    if identity is not None and block.groups != 1:
        return "it has a skip and groups"
    if c != dense.conv.weight.shape[1] * block.groups:
        return f"x has {x.shape[1]} channels"
    for conv, kernel, step in ((dense.conv, 3, stride), (point.conv, 1, 1), (gate, 1, 1)):
        found = conv.bias, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        expected = None, (kernel,) * 2, (step,) * 2, (kernel // 2,) * 2, (1, 1), block.groups, "zeros"
        if found != expected:
            return "a convolution has other settings"
    groups = set()
    for bn in (norms := _norms(parts, norm)):
        of_map = bn is identity or (norm is not None and bn in (norm.b1, norm.b2))
        if not bn.training or bn.weight is None or bn.bias is None:
            return "a BatchNorm is in eval mode, or has no weight"
        if bn.num_features != (x.shape[1] if of_map else k):
            return f"a BatchNorm has {bn.num_features} channels"
        if bn.track_running_stats and bn.running_mean is None:
            return "a BatchNorm has to raise"
        groups.add(training_sync.group_of(bn))
    size = x.shape[0] * ((x.shape[2] - 1) // stride + 1) * ((x.shape[3] - 1) // stride + 1)
    if size < 2 and (len(groups) > 1 or not training_sync.group_of(norms[0])):
        return "a BatchNorm has to raise"
    if len(groups) > 1:
        return "its BatchNorms take their statistics over different processes"
    parameters = [*block.parameters(), *([] if norm is None else norm.parameters())]
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype  # autocast makes x that of it
    if any(p.dtype != dtype or p.device != x.device for p in parameters):
        return f"a parameter is not {dtype} on {x.device}"
    return None


def _parts(block: Any) -> tuple[Any, Any, Any, Any]:
    point = block.rbr_1x1 if block.stride == 1 else block.rbr_1x1[1]
    return block.rbr_dense, point, block.se.cvsig.conv, block.rbr_identity


def _norms(parts: tuple[Any, ...], norm: Any) -> list[Any]:
    dense, point, _, identity = parts
    of_inputs = [] if norm is None else [norm.b1, norm.b2]
    return [dense.bn, point.bn, *([] if identity is None else [identity]), *of_inputs]


def _arguments(block: Any, norm: Any) -> tuple[list[Any], list[Tensor], dict[str, Any]]:
    """The BatchNorms, parameters and options of the block's operator."""
    dense, point, gate, _ = parts = _parts(block)
    norms = _norms(parts, norm)
    vectors = [vector for bn in norms for vector in (bn.weight, bn.bias)]
    options = {"eps": [bn.eps for bn in norms], "activation": block.activation}
    options["group"] = training_sync.group_of(norms[0])
    return norms, [dense.conv.weight, point.conv.weight, *vectors, gate.weight.flatten(1)], options


def run(block: Any, x: Tensor) -> Tensor:
    """The block's result before the shuffle of groups; updates the running statistics as nn.BatchNorm2d does."""
    norms, parameters, options = _arguments(block, None)
    if len(norms) == 2:
        options = {**options, "stride": block.stride, "groups": block.groups}
        y, statistics, *_, count = torch.ops.parnet.downsample_se_train(x, *parameters, **options)
    else:
        y, statistics, *_, count = torch.ops.parnet.repvgg_sse_train(x, *parameters, **options)
    _update(norms, statistics, training_sync.counted(count, y.numel() // y.shape[1]))
    return y


def run_fusion(block: Any, norm: Any, maps: Sequence[Tensor]) -> Tensor:
    """The fusion's result; updates the running statistics."""
    norms, parameters, options = _arguments(block, norm)
    found = torch.ops.parnet.fusion_se_train(*maps, *parameters, stride=block.stride, **options)
    y, statistics, of_inputs, *_, counts = found
    _update(norms[:2], statistics, training_sync.counted(counts[:1], y.numel() // y.shape[1]))
    _update(norms[2:], of_inputs, training_sync.counted(counts[1:], maps[0].numel() // maps[0].shape[1]))
    return y


def _update(norms: Sequence[Any], statistics: Tensor, count: Tensor | int) -> None:
    with torch.no_grad():
        unbiased = statistics[1::2] * (count / (count - 1))
        training_sync.update(norms, statistics[0::2].unbind(), unbiased.unbind())
