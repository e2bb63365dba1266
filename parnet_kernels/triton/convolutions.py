"""The convolutions of a training step: the library's or ours, one policy that says which and why.

All maps are channels_last. Ours are the implicit GEMMs of `conv_fwd` and `conv_bwd`, 3×3 in one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels.precision import current_precision
from parnet_kernels.training import as_pixels
from parnet_kernels.triton import conv_bwd, conv_fwd, layers, policy
from parnet_kernels.triton.convolution_table import LIBRARY, OWN, measured
from parnet_kernels.triton.pack import Map, Slices, pack_map, pack_weight

#: What is made: the result, the gradient of its input, that of its weight.
FORWARD, OF_INPUT, OF_WEIGHT = ROLES = ("forward", "input gradient", "weight gradient")


class Choice(NamedTuple):
    which: str  # LIBRARY or OWN
    why: str


_forced: str | None = None  # process-wide: backward runs in the autograd engine's threads


@contextmanager
def forced(which: str) -> Iterator[None]:
    """Within the block, take this one wherever it can run."""
    global _forced
    if which not in (LIBRARY, OWN):
        raise ValueError(f"parnet_kernels: `which` must be {LIBRARY!r} or {OWN!r}, got {which!r}")
    before, _forced = _forced, which
    try:
        yield
    finally:
        _forced = before


def key(role: str, x: Tensor, weight: Tensor, stride: int) -> str:
    """Of the measured table. Pixels count by powers of two, so that it serves neighbouring batch sizes; float32 counts
    by its products, as PyTorch is set.
    """
    pixels = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    numbers = str(x.dtype)[6:] + (f" {current_precision()}" if x.dtype == torch.float32 else "")
    return f"{role}/{numbers}/{pixels.bit_length()}/{weight.shape[1]}x{weight.shape[0]}/{stride}"


def choose(role: str, x: Tensor, weight: Tensor, stride: int, groups: int) -> Choice:
    """The convolution for a role of a layer, and why.

    By arithmetic, ours take 3.8 ms where the library takes 2.0 (192 channels, 28 × 28, batch 256, A100, forward and
    backward, elementwise passes included), and come near it on L4 and RTX 4090: index arithmetic fills the issue slots,
    and tiles of 128 columns are 75 % full. Nothing was timed on a GPU; a table of measurements
    (`convolution_table`) goes before this.
    """
    if weight.shape[2] != 3 or groups != 1:
        return Choice(LIBRARY, "ours are 3×3 in one group")
    if _forced is not None:
        return Choice(_forced, "asked for")
    if which := measured(policy.model(x.device)).get(key(role, x, weight, stride)):
        return Choice(which, "measured on this model of GPU")
    return Choice(LIBRARY, "by arithmetic, at the batches of training")


def forward(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """conv(x; weight, padding that keeps the size) [N, K, OH, OW]."""
    if choose(FORWARD, x, weight, stride, groups).which == OWN:
        c = _convolution(x, weight, stride)
        out = torch.empty(c.images, *c.size, c.k, dtype=x.dtype, device=x.device)
        conv_fwd.convolution(c, conv_fwd.Epilogue(), layers.plan_of(c, current_precision()), out)
        return out.permute(0, 3, 1, 2)
    return as_pixels(F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups))


def gradients(
    d: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of the weight, from that of the result."""
    if not (need_x or need_weight):
        return None, None
    wanted = (OF_INPUT, need_x), (OF_WEIGHT, need_weight)
    own = [need and choose(role, x, weight, stride, groups).which == OWN for role, need in wanted]
    masks = [need_x and not own[0], need_weight and not own[1]]
    d_x, d_weight = _own_gradients(d, x, weight, stride, *own) if any(own) else (None, None)
    if any(masks):
        padding = [weight.shape[2] // 2] * 2
        settings = [stride] * 2, padding, [1, 1], False, [0, 0], groups, [*masks, False]
        found = torch.ops.aten.convolution_backward(d, x, weight, None, *settings)
        d_x, d_weight = as_pixels(found[0]) if masks[0] else d_x, found[1] if masks[1] else d_weight
    return d_x, d_weight


def _convolution(x: Tensor, weight: Tensor, stride: int) -> conv_fwd.Convolution:
    map = pack_map(x, with_sums=False)
    slices = Slices.of(map.channels, 1, map.data.shape[3])
    size = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
    return conv_fwd.Convolution((map,), pack_weight(weight, 1, slices), slices, size, weight.shape[0], stride)


def _own_gradients(
    d: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    d_x = d_weight = None
    c, d_map = _convolution(x, weight, stride), pack_map(d, with_sums=False)
    if need_x:
        back = conv_fwd.Convolution(
            (Map(d_map.data, d.shape[1]),),
            c.weight,
            c.slices,
            (x.shape[2], x.shape[3]),
            x.shape[1],
            stride,
            backward=True,
        )
        out = torch.empty(x.shape[0], *x.shape[2:], x.shape[1], dtype=x.dtype, device=x.device)
        conv_fwd.convolution(back, conv_fwd.Epilogue(), layers.plan_of(back, current_precision()), out)
        d_x = out.permute(0, 3, 1, 2)
    if need_weight:
        plan = layers.weight_plan_of(c, x.dtype, current_precision())
        d_weight = conv_bwd.weight_gradient(c, d_map.data, plan, weight)
    return d_x, d_weight
