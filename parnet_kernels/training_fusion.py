"""The training form of a fusion: BatchNorms of two maps, their channels in turns, a block of two groups, the shuffle.

    u[2c + j] = BatchNorm_j(map_j)[c],  v = block(u) (training.py, without a skip),  result[2i + k] = v[k·K/2 + i]

Forward makes u in one pass from the maps and their statistics. Backward makes it again, so that x, y, Y3, Y1 and
vectors are all that is kept; then one reducing pass (sums of ∂u and of ∂u times each centred map) and one writing pass
give the gradients of both maps. Notation as in training.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parnet_kernels import training, training_sync
from parnet_kernels.reference import interleave, per_channel, shuffle
from parnet_kernels.training import Block, Kernels


class Norms(NamedTuple):
    """Of the BatchNorms of the two inputs: γ and β [C], eps."""

    gammas: list[Tensor]
    betas: list[Tensor]
    eps: Sequence[float]


class Result(NamedTuple):
    y: Tensor
    statistics: Tensor  # [4, K], as in training.Result
    of_inputs: Tensor  # [4, C]: mean and biased variance of x, of y
    y3: Tensor
    y1: Tensor
    vectors: Tensor  # [N, 2·C + K], as in training.Result, of u
    counts: Tensor  # float64 [2]: values a channel of Y3 and Y1; of x and y; of all processes. Empty without a group


class _Affine(NamedTuple):
    a: list[Tensor]
    b: list[Tensor]
    inverse: list[Tensor]
    mu: list[Tensor]


def _affine(norms: Norms, statistics: Tensor) -> _Affine:
    mu, variance = [*statistics[0::2].unbind()], statistics[1::2].unbind()
    inverse = [(v + e).rsqrt() for v, e in zip(variance, norms.eps, strict=True)]
    a = [gamma * i for gamma, i in zip(norms.gammas, inverse, strict=True)]
    return _Affine(a, [beta - s * m for beta, s, m in zip(norms.betas, a, mu, strict=True)], inverse, mu)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _shuffled(v: Tensor) -> Tensor:
    """`reference.shuffle` for channels_last maps: one copy."""
    return _last(v).unflatten(3, (2, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def _unshuffled(y: Tensor) -> Tensor:
    return _last(y).unflatten(3, (-1, 2)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def forward(kernels: Kernels, maps: Sequence[Tensor], norms: Norms, block: Block) -> Result:
    """maps: x and y [N, C, H, W]; block: of 2·C channels in two groups."""
    (means_x, of_x), (means_y, of_y) = (kernels.moments(map) for map in maps)
    count = maps[0].numel() // maps[0].shape[1]
    of_inputs, inputs = training_sync.moments(torch.stack([*of_x, *of_y]), count, block.group)
    n = _affine(norms, of_inputs)
    u = kernels.join(maps, n.a, n.b)
    means = torch.stack([n.a[0] * means_x + n.b[0], n.a[1] * means_y + n.b[1]], 2).flatten(1)
    found = training.forward(kernels, u, block, means)
    counts = torch.stack([found.values, inputs]) if block.group else inputs
    return Result(_shuffled(found.y), found.statistics, of_inputs, found.y3, found.y1, found.vectors, counts)


def backward(
    kernels: Kernels,
    g: Tensor,
    maps: Sequence[Tensor],
    result: Sequence[Tensor],
    norms: Norms,
    block: Block,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, y, the tensors of `block` without the gate's weight, γ and β of x, of y; and of that weight.

    `need` spares those of the maps with their BatchNorms, of weight3 and weight1. result: of `Result`, without y.
    """
    statistics, of_inputs, y3, y1, vectors, counts = result
    n = _affine(norms, of_inputs)
    u = kernels.join(maps, n.a, n.b)
    of_block = statistics, y3, y1, vectors, counts[:1]
    d_u, *d_block = training.backward(kernels, _unshuffled(g), u, of_block, block, need)
    of_block_tensors = [*d_block[:6]]
    d_gate = d_block[-1]
    if d_u is None:
        return [None, None, *of_block_tensors, None, None, None, None, d_gate]
    sums = [s.sum(0) for s in kernels.join_sums(d_u, maps, n.mu)]
    d_norms = [sums[1] * n.inverse[0], sums[0], sums[3] * n.inverse[1], sums[2]]
    count = training_sync.counted(counts[1:], maps[0].numel() // maps[0].shape[1])
    every, lines = training_sync.total(torch.stack(d_norms), block.group), []
    for a, inverse, mu, d_gamma, d_beta in zip(n.a, n.inverse, n.mu, every[0::2], every[1::2], strict=True):
        q = -a * inverse * d_gamma / count
        lines.append((a, q, -a * d_beta / count - q * mu))
    return [*kernels.separate(d_u, maps, lines), *of_block_tensors, *d_norms, d_gate]


def plain(maps: Sequence[Tensor], norms: Norms, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(y, statistics, of_inputs) as in `Result`, composed of PyTorch's operators."""
    found, normed = [], []
    for map, gamma, beta, eps in zip(maps, norms.gammas, norms.betas, norms.eps, strict=True):
        variance, mean = training_sync.var_mean(map, block.group)
        found += [mean, variance]
        scale = gamma * (variance + eps).rsqrt()
        normed.append(per_channel(scale) * (map - per_channel(mean)) + per_channel(beta))
    v, statistics = training.plain(interleave(*normed), block)
    return shuffle(v), statistics, torch.stack(found)
