"""BatchNorm statistics over the ranks of a process group, on every device, a CPU included.

Groups are named, so that they pass through operators and compiled graphs; "" is none. What each rank has may differ in
size. Everything is exchanged in float64 and added in the order of ranks: all ranks get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def group_of(bn: nn.Module) -> str:
    """The name of the group over which this module, in training, takes its statistics; "" without one."""
    if not isinstance(bn, SyncBatchNorm2d) or not dist.is_available() or not dist.is_initialized():
        return ""
    name: str = dist.group.WORLD.group_name if bn.group is None else bn.group  # type: ignore[union-attr]
    return name if dist.get_world_size(_resolve(name)) > 1 else ""


def _resolve(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _gather(values: Tensor, group: str) -> Tensor:
    """[ranks, …], of all ranks."""
    found = _resolve(group)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(found))]
    dist.all_gather(parts, values.contiguous(), group=found)
    return torch.stack(parts)


def moments(statistics: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """Those of all ranks, and their float64 count; without a group the same, and an empty one (`counted`).

    statistics: [2·m, K], means, biased variances of `count` values.
    """
    if not group:
        return statistics, statistics.new_empty(0, dtype=torch.float64)
    mine = statistics.double().flatten()
    every = _gather(torch.cat([mine, mine.new_full((1,), count)]), group)
    n, each = every[:, -1, None, None], every[:, :-1].unflatten(1, statistics.shape)
    total = n[:, 0, 0].sum()
    if total < 2:
        raise ValueError("parnet_kernels: a SyncBatchNorm needs more than one value a channel, all processes together")
    mean = (n * each[:, 0::2]).sum(0) / total
    variance = (n * (each[:, 1::2] + (each[:, 0::2] - mean).square())).sum(0) / total
    return torch.stack([mean, variance], 1).flatten(0, 1).to(statistics.dtype), total


def counted(values: Tensor, count: int) -> Tensor | int:
    """How many values there are: what `moments` returned, or this rank's count, which costs a GPU no launch."""
    return values.reshape(()) if values.numel() else count


def total(values: Tensor, group: str) -> Tensor:
    """The sum over ranks."""
    return _gather(values.double(), group).sum(0).to(values.dtype) if group else values


class _Total(torch.autograd.Function):
    """Differentiable: the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        ctx.group = group
        return total(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradients[0], ctx.group), None


def var_mean(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each channel of x, differentiable any number of times."""
    if not group:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return variance, mean
    count = total(torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device), group)
    mean = _Total.apply(x.sum((0, 2, 3)), group) / count
    return _Total.apply((x - mean[:, None, None]).square().sum((0, 2, 3)), group) / count, mean


def update(norms: Sequence[Any], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """The running statistics of each BatchNorm, as the module itself updates them; variances: unbiased.

    Those of one momentum are updated together: on a GPU that is two launches.
    """
    together: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    counters = [n.num_batches_tracked for n in norms if _tracks(n) and n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    for bn, mean, variance in zip(norms, means, variances, strict=True):
        if _tracks(bn):
            assert bn.momentum is not None or bn.num_batches_tracked is not None
            pairs = (bn.running_mean, mean), (bn.running_var, variance)
            if bn.momentum is None:
                for running, value in pairs:
                    value = value.to(running.dtype)
                    running.lerp_(value, (1 / bn.num_batches_tracked).to(running.dtype))
            else:
                together.setdefault(bn.momentum, []).extend((r, v.to(r.dtype)) for r, v in pairs)
    for momentum, every in together.items():
        torch._foreach_lerp_([r for r, _ in every], [v for _, v in every], momentum)


def _tracks(bn: Any) -> bool:
    return bn.track_running_stats and bn.running_mean is not None and bn.running_var is not None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of all ranks, on any device: `nn.SyncBatchNorm`, and
    `DistributedDataParallel` with it, refuse CPUs. The state dict is that of `nn.BatchNorm2d`.

    group: the name of a process group; by default all ranks. Without other ranks it is `nn.BatchNorm2d`.
    """

    group: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        group = group_of(self) if self.training else ""
        if not group:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance, mean = var_mean(wide, group)
        with torch.no_grad():
            count = total(torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device), group)
            update([self], [mean], [variance * (count / (count - 1))])
        y = (wide - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


def convert(model: nn.Module, group: str | None = None) -> nn.Module:
    """The model, with each of its `nn.BatchNorm2d` (and `nn.SyncBatchNorm`) made a `SyncBatchNorm2d`, in place."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d):
            module.__class__ = SyncBatchNorm2d
            module.group = group  # type: ignore[assignment]
    return model
