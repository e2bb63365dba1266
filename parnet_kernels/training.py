"""The training form of the blocks: forward and backward with batch statistics, written once for every set of kernels.

Notation: Y3 = conv3x3(x), Y1 = conv1x1(x) (of x pooled 2×2 for stride 2); of the BatchNorm of each, and of x where the
block has a skip: mean μ, 1/√(variance + eps) = i, a = γ·i. s = σ(gate), g = ∂L/∂y, d_ = ∂L/∂_; t = the value before φ.
Both kinds of block are one elementwise map with coefficients for each image and channel, [N, K]:

    t = c3·Y3 + c1·Y1 (+ c0·x) + b
    with a skip: c3 = a3, c1 = a1, c0 = a0·s, b = b3 + b1 + b0·s        where BatchNorm(x) = a0·x + b0
    otherwise:   c3 = 2s·a3, c1 = 2s·a1, b = 2s·(b3 + b1)

Backward needs the sums of d_t and of d_t times each centred map, one reducing pass. Then the gradient of each map is

    d_map = c·d_t + q·map + r, c of the forward pass, r for each image and channel, q for each channel

since a BatchNorm's is a·(d − mean(d) − (map − μ)·i·mean(d·(map − μ)·i)): one writing pass, around the gradients of the
two convolutions. What is kept from forward to backward: x, Y3, Y1 (but see `makes_y1_again`), and vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import training_sync
from parnet_kernels.gradients import through
from parnet_kernels.reference import ACTIVATIONS, deinterleave, interleave


class Block(NamedTuple):
    """The parameters of a block and its settings. weight3 [K, C/groups, 3, 3], weight1 [K, C/groups, 1, 1]; gamma, beta
    [K]; gate_weight [K, C/groups]; gamma0 and beta0, of the BatchNorm of x: with a skip only, where K = C.
    """

    weight3: Tensor
    weight1: Tensor
    gamma3: Tensor
    beta3: Tensor
    gamma1: Tensor
    beta1: Tensor
    gamma0: Tensor | None
    beta0: Tensor | None
    gate_weight: Tensor
    eps: Sequence[float]  # of the BatchNorms of Y3, Y1 (and x)
    stride: int
    groups: int
    activation: str
    group: str = ""  # of processes over which statistics are taken; none


class Moments(NamedTuple):
    mean: Tensor  # [C]
    variance: Tensor  # [C], of the batch, biased


class Result(NamedTuple):
    y: Tensor
    statistics: Tensor  # [4 or 6, K]: mean and biased variance of Y3, of Y1 (and of x)
    y3: Tensor
    y1: Tensor  # of no images where `makes_y1_again`
    vectors: Tensor  # [N, C + K]: the means of each image of x, and its gate
    values: Tensor  # float64: how many values a channel of Y3 and Y1 has, of all processes; empty without a group


#: Input channels up to which Y1 of a stride-2 block is made again for backward: 35 of 820 MiB of a step of ParNet-S at
#: batch 8, for less than 1 % of its time.
FEW_CHANNELS = 64


def as_pixels(x: Tensor) -> Tensor:
    """x in channels_last memory, where it is not there or in channels of such a map."""
    n, c, h, w = x.shape
    strides = x.stride()
    pixel = strides[3] if w > 1 else strides[2] if h > 1 else strides[0] if n > 1 else c
    dense = (
        (c == 1 or strides[1] == 1)
        and pixel >= c
        and (h == 1 or strides[2] == w * pixel)
        and (n == 1 or strides[0] == h * w * pixel)
    )
    return x if dense else x.contiguous(memory_format=torch.channels_last)


def makes_y1_again(stride: int, weight1: Tensor) -> bool:
    return stride == 2 and weight1.shape[1] <= FEW_CHANNELS


class Kernels(Protocol):
    """What the algebra is made of. Maps are [N, C, H, W]; per image and channel: [N, C]."""

    def moments(self, x: Tensor) -> tuple[Tensor, Moments]: ...
    def image_means(self, x: Tensor) -> Tensor: ...
    def convolve(self, x: Tensor, weight: Tensor, stride: int, groups: int) -> tuple[Tensor, Moments]: ...
    def pool(self, x: Tensor) -> Tensor: ...
    def combine(self, maps: list[Tensor], scales: Tensor, shift: Tensor, activation: str) -> Tensor: ...
    def reduce(
        self, g: Tensor, maps: list[Tensor], scales: Tensor, shift: Tensor, means: Tensor, activation: str
    ) -> Tensor: ...
    def spread(
        self,
        g: Tensor,
        maps: list[Tensor],
        scales: Tensor,
        shift: Tensor,
        q: Tensor,
        r: Tensor,
        outputs: int,
        activation: str,
    ) -> list[Tensor]: ...
    def join(self, maps: Sequence[Tensor], scales: list[Tensor], shifts: list[Tensor]) -> Tensor: ...
    def join_sums(self, d: Tensor, maps: Sequence[Tensor], means: list[Tensor]) -> list[Tensor]: ...
    def separate(
        self, d: Tensor, maps: Sequence[Tensor], lines: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Tensor]: ...
    def unpool(self, d: Tensor, shift: Tensor, size: torch.Size) -> Tensor: ...
    def point_input_gradient(self, d: Tensor, weight: Tensor, groups: int) -> Tensor: ...
    def add_input_gradient(self, d_x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> None: ...
    def weight_gradient(self, x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor: ...


class Plain:
    """The kernels in plain PyTorch, for every dtype and device."""

    def moments(self, x: Tensor) -> tuple[Tensor, Moments]:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return self.image_means(x), Moments(mean, variance)

    def image_means(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def convolve(self, x: Tensor, weight: Tensor, stride: int, groups: int) -> tuple[Tensor, Moments]:
        y = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups)
        y = y.contiguous(memory_format=torch.channels_last)
        return y, self.moments(y)[1]

    def pool(self, x: Tensor) -> Tensor:
        return pool(x)

    def combine(self, maps: list[Tensor], scales: Tensor, shift: Tensor, activation: str) -> Tensor:
        return ACTIVATIONS[activation](_before(maps, scales, shift))

    def reduce(
        self, g: Tensor, maps: list[Tensor], scales: Tensor, shift: Tensor, means: Tensor, activation: str
    ) -> Tensor:
        """Of each image and channel: the sum of d_t, and of d_t·(map − mean) for each map."""
        d_t = through(g, _before(maps, scales, shift), activation)
        centred = [map - mean[:, None, None] for map, mean in zip(maps, means, strict=True)]
        return torch.stack([d_t.sum((2, 3)), *((d_t * map).sum((2, 3)) for map in centred)])

    def spread(
        self,
        g: Tensor,
        maps: list[Tensor],
        scales: Tensor,
        shift: Tensor,
        q: Tensor,
        r: Tensor,
        outputs: int,
        activation: str,
    ) -> list[Tensor]:
        """scale·d_t + q·map + r for each of the first maps."""
        d_t = through(g, _before(maps, scales, shift), activation)
        return [
            (_wide(scales[i]) * d_t + _wide(q[i]) * maps[i] + _wide(r[i])).contiguous(memory_format=torch.channels_last)
            for i in range(outputs)
        ]

    def join(self, maps: Sequence[Tensor], scales: list[Tensor], shifts: list[Tensor]) -> Tensor:
        """Channel 2c + j is scale·map + shift of map j; scale and shift [C]."""
        made = [_wide(a) * map + _wide(b) for map, a, b in zip(maps, scales, shifts, strict=True)]
        return interleave(*made).contiguous(memory_format=torch.channels_last)

    def join_sums(self, d: Tensor, maps: Sequence[Tensor], means: list[Tensor]) -> list[Tensor]:
        """For each map, of each image and channel: the sum of its part of d, and of that times (map − mean)."""
        found = []
        for part, map, mean in zip(deinterleave(d), maps, means, strict=True):
            found += [part.sum((2, 3)), (part * (map - _wide(mean))).sum((2, 3))]
        return found

    def separate(self, d: Tensor, maps: Sequence[Tensor], lines: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """p·(its part of d) + q·map + r for each map; p, q, r [C]."""
        return [
            (_wide(p) * part + _wide(q) * map + _wide(r)).contiguous(memory_format=torch.channels_last)
            for part, map, (p, q, r) in zip(deinterleave(d), maps, lines, strict=True)
        ]

    def unpool(self, d: Tensor, shift: Tensor, size: torch.Size) -> Tensor:
        """The gradient of `pool`, whose result has the gradient d, plus a shift for each image and channel."""
        spread = (d / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : size[2], : size[3]]
        return spread + _wide(shift)

    def point_input_gradient(self, d: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Of a 1×1 convolution."""
        return F.conv_transpose2d(d, weight, groups=groups)

    def add_input_gradient(self, d_x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> None:
        d_x += _convolution_backward(d, d_x, weight, stride, groups, 0)

    def weight_gradient(self, x: Tensor, d: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        return _convolution_backward(d, x, weight, stride, groups, 1)


def _convolution_backward(d: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, of: int) -> Tensor:
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        d,
        x,
        weight,
        None,
        [stride] * 2,
        [weight.shape[2] // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        groups,
        [of == 0, of == 1, False],
    )
    return found[of]


def pool(x: Tensor) -> Tensor:
    """2×2 average pooling of x, padded with zeros at the right and bottom to an even size.

    Odd sizes are thereby defined as in the folded network: the windows are taps of the 3×3 kernel.
    """
    return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)


def _wide(vector: Tensor) -> Tensor:
    return vector[..., None, None]


def _filled(values: Tensor, size: Sequence[int]) -> Tensor:
    """A channels_last map of one value for each image and channel."""
    return _wide(values).expand(*values.shape, *size).contiguous(memory_format=torch.channels_last)


def _before(maps: list[Tensor], scales: Tensor, shift: Tensor) -> Tensor:
    t = _wide(shift)
    for map, scale in zip(maps, scales, strict=True):
        t = t + _wide(scale) * map
    return t


class _Coefficients(NamedTuple):
    """One row a map: of Y3, Y1 (and x)."""

    factors: Tensor  # f [m, N, K], what the gate makes of each BatchNorm: 1, 1, s with a skip, otherwise 2s, 2s
    scales: Tensor  # a·f [m, N, K]: c3, c1 (, c0)
    shift: Tensor  # b [N, K]
    a: Tensor  # γ·i [m, K]
    betas: Tensor  # [m, K]
    inverse: Tensor  # i [m, K]
    mu: Tensor  # [m, K]
    gate: Tensor  # s, or 2s without a skip: [N, K]
    squeezed: Tensor  # what the gate sees, [N, C]


def _coefficients(block: Block, statistics: Tensor, means: Tensor, gate: Tensor | None = None) -> _Coefficients:
    """gate: where it is known."""
    gammas, betas = [block.gamma3, block.gamma1], [block.beta3, block.beta1]
    if block.gamma0 is not None and block.beta0 is not None:
        gammas, betas = [*gammas, block.gamma0], [*betas, block.beta0]
    skip, offsets = len(gammas) == 3, torch.stack(betas)
    mu, variance = statistics[0::2], statistics[1::2]
    inverse = (variance + statistics.new_tensor(block.eps)[:, None]).rsqrt_()
    a = torch.stack(gammas).mul_(inverse)
    squeezed = a[2] * (means - mu[2]) + offsets[2] if skip else means
    s = gate
    if s is None:
        s = _matrix(squeezed, block.gate_weight, block.groups).sigmoid()
        s = s if skip else 2 * s
    if skip:
        factors = s.new_ones(3, *s.shape)
        factors[2] = s
    else:
        factors = s.expand(2, *s.shape)
    shift = ((offsets - a * mu)[:, None] * factors).sum(0)
    return _Coefficients(factors, a[:, None] * factors, shift, a, offsets, inverse, mu, s, squeezed)


def _matrix(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """weight · x for each group: x [N, C], weight [K, C/groups] → [N, K]."""
    if groups == 1:
        return x @ weight.T
    return torch.einsum("ngc,gkc->ngk", x.unflatten(1, (groups, -1)), weight.unflatten(0, (groups, -1))).flatten(1)


def forward(kernels: Kernels, x: Tensor, block: Block, means: Tensor | None = None) -> Result:
    """x: [N, C, H, W] with at least two values a channel. means: of its images, where they are known."""
    skip = block.gamma0 is not None
    found = []
    if skip:
        means, of_x = kernels.moments(x)
        found = [of_x]
    elif means is None:
        means = kernels.image_means(x)
    y3, of_y3 = kernels.convolve(x, block.weight3, block.stride, block.groups)
    y1, of_y1 = kernels.convolve(_pooled(kernels, x, block.stride), block.weight1, 1, block.groups)
    statistics = torch.stack([v for m in (of_y3, of_y1, *found) for v in m])
    statistics, values = training_sync.moments(statistics, y3.numel() // y3.shape[1], block.group)
    c = _coefficients(block, statistics, means)
    y = kernels.combine([y3, y1, x] if skip else [y3, y1], c.scales, c.shift, block.activation)
    if makes_y1_again(block.stride, block.weight1):
        y1 = y1.new_empty((0, *y1.shape[1:]))
    return Result(y, statistics, y3, y1, torch.cat([means, c.gate], 1), values)


def _pooled(kernels: Kernels, x: Tensor, stride: int) -> Tensor:
    return kernels.pool(x) if stride == 2 else x


def backward(
    kernels: Kernels, g: Tensor, x: Tensor, result: Sequence[Tensor], block: Block, need: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and of the tensors of `block`, in their order; `need` spares those of x, weight3, weight1.

    result: of `Result`, without y.
    """
    statistics, y3, y1, of_images, values = result
    means, gate = of_images.split([x.shape[1], y3.shape[1]], 1)
    c = _coefficients(block, statistics, means, gate)
    skip = len(c.a) == 3
    if not y1.numel():
        y1, _ = kernels.convolve(_pooled(kernels, x, block.stride), block.weight1, 1, block.groups)
    maps = [y3, y1, x] if skip else [y3, y1]
    sums = kernels.reduce(g, maps, c.scales, c.shift, c.mu, block.activation)
    d_sum, d_centred = sums[0], sums[1:]
    area = x.shape[2] * x.shape[3]
    d_factors = c.a[:, None] * d_centred + c.betas[:, None] * d_sum  # each BatchNorm times d_t, summed
    d_s = d_factors[2] * (1 - c.gate) if skip else d_factors.sum(0) * (1 - c.gate / 2)
    logits = (d_s * c.gate).unflatten(1, (block.groups, -1))
    d_gate = torch.einsum("ngk,ngc->gkc", logits, c.squeezed.unflatten(1, (block.groups, -1))).flatten(0, 1)
    weights = block.gate_weight.unflatten(0, (block.groups, -1))
    offset = torch.einsum("ngk,gkc->ngc", logits, weights).flatten(1) / area  # d_squeezed, for each pixel

    # Of each BatchNorm: the gradient of its result is f·d_t and, of that of x, plus the offset.
    d_gammas, d_betas = (c.factors * d_centred).sum(1), (c.factors * d_sum).sum(1)
    if skip:
        d_gammas[2].add_((offset * (means - c.mu[2])).sum(0), alpha=area)
        d_betas[2].add_(offset.sum(0), alpha=area)
    d_norms = torch.stack([d_gammas.mul_(c.inverse), d_betas])
    count = training_sync.counted(values, y3.numel() // y3.shape[1])
    every = training_sync.total(d_norms, block.group) / count
    q = -c.a * c.inverse * every[0]
    r = (-c.a * every[1] - q * c.mu)[:, None].expand(c.scales.shape)
    if skip:
        r = r.contiguous()
        r[2].addcmul_(c.a[2], offset)

    need_x, need_weight3, need_weight1 = need[:3]
    outputs = len(maps) if need_x else 2
    d_y3, d_y1, *rest = kernels.spread(g, maps, c.scales, c.shift, q, r, outputs, block.activation)
    d_weight3 = d_weight1 = d_x = None
    if need_weight1:
        pooled = _pooled(kernels, x, block.stride)
        d_weight1 = kernels.weight_gradient(pooled, d_y1, block.weight1, 1, block.groups)
        del pooled
    if need_x:
        if block.stride == 2:
            d_pooled = kernels.point_input_gradient(d_y1, block.weight1, block.groups)
            d_x = kernels.unpool(d_pooled, offset, x.shape)
            del d_pooled
        else:
            d_x = rest[0] if skip else _filled(offset.to(x.dtype), x.shape[2:])
            kernels.add_input_gradient(d_x, d_y1, block.weight1, 1, block.groups)
        del d_y1
        kernels.add_input_gradient(d_x, d_y3, block.weight3, block.stride, block.groups)
    if need_weight3:
        d_weight3 = kernels.weight_gradient(x, d_y3, block.weight3, block.stride, block.groups)
    vectors = [v for i in range(len(maps)) for v in (d_gammas[i], d_betas[i])]
    return [d_x, d_weight3, d_weight1, *vectors, *[None] * (6 - len(vectors)), d_gate]


def plain(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(y, statistics) as in `Result`, composed of PyTorch's operators: differentiable any number of times."""
    norms: list[Any] = [(block.gamma3, block.beta3), (block.gamma1, block.beta1), (block.gamma0, block.beta0)]
    y3 = F.conv2d(x, block.weight3, None, block.stride, 1, groups=block.groups)
    y1 = F.conv2d(pool(x) if block.stride == 2 else x, block.weight1, groups=block.groups)
    skip = block.gamma0 is not None
    maps, found, normed = [y3, y1, x] if skip else [y3, y1], [], []
    for map, (gamma, beta), eps in zip(maps, norms, block.eps, strict=False):
        variance, mean = training_sync.var_mean(map, block.group)
        found += [mean, variance]
        normed.append(_wide(gamma) * (map - _wide(mean)) * _wide((variance + eps).rsqrt()) + _wide(beta))
    seen = normed[2] if skip else x
    s = _wide(_matrix(seen.mean((2, 3)), block.gate_weight, block.groups).sigmoid())
    t = normed[0] + normed[1]
    t = t + normed[2] * s if skip else t * (2 * s)
    return ACTIVATIONS[block.activation](t), torch.stack(found)
