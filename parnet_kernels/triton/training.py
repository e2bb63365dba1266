"""The training form on GPUs: the library's convolutions (`convolutions.py`) with our kernels around them.

Forward: statistics of Y3, Y1 (and x) and sums of x's images; statistics joined, and the gate; y. Backward: the sums of
d_t and of d_t times each map; all vectors; the gradients of Y3, Y1 (and x through the skip); the library's gradients of
the convolutions; their sum. Seven launches of ours a block. Same results as `parnet_kernels/training.py`, whose
notation this is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import training_sync
from parnet_kernels.training import Block, Result, as_pixels, makes_y1_again
from parnet_kernels.training_fusion import Norms
from parnet_kernels.training_fusion import Result as FusionResult
from parnet_kernels.triton import convolutions, train_bwd, train_fusion, train_fwd, train_gate_bwd
from parnet_kernels.triton.launch import launch

BP, BC = 16, 64  # pixels and channels of a tile: 8 values of each map a thread, beside 16 coefficients of each channel
PROGRAMS = 1024  # of a pass that writes maps: some a multiprocessor, so that loads are on their way
REDUCING = 256  # of one that adds up, for each map: what they leave is read again
BI, BK, BR = 16, 32, 64  # images and channels of the gate's products; programs whose statistics are joined at a time
NARROW = 16  # channels below which the library adds up an image: a tile would be almost empty

_OPTIONS = {"num_warps": 4, "num_stages": 1}
_WIDE = {"num_warps": 8, "num_stages": 1}


class Cut(NamedTuple):
    """Who reads which pixels: a program takes `block` images, or one of `slots` parts, of `span` pixels, of one."""

    images: int
    area: int
    block: int
    slots: int
    span: int

    @property
    def rows(self) -> int:
        return -(-self.images // self.block) * self.slots

    @property
    def arguments(self) -> dict[str, int]:
        return {"images": self.images, "area": self.area, "block": self.block, "slots": self.slots, "span": self.span}


def cut(x: Tensor, tiles: int, programs: int) -> Cut:
    """Of x [N, C, H, W], so that there are about `programs` programs with `tiles` tiles of channels."""
    images, area = x.shape[0], x.shape[2] * x.shape[3]
    wanted = max(1, programs // tiles)
    slots = max(1, min(wanted // images, area // (4 * BP)))
    span = -(-area // (slots * 4 * BP)) * 4 * BP
    return Cut(images, area, -(-images // wanted), -(-area // span), span)


def _tiles(channels: int) -> int:
    return -(-channels // BC)


def pitch(x: Tensor) -> int:
    """Of pixels, of what `as_pixels` returns."""
    n, c, h, w = x.shape
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c


def _align(*numbers: int) -> int:
    return math.gcd(16, *numbers)


def _map(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    size = (x.shape[0], channels, *size)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _norms(block: Block) -> dict[str, Any]:
    eps = [*block.eps, 0.0]
    found: dict[str, Any] = {"eps3": eps[0], "eps1": eps[1], "eps0": eps[2]}
    for name in ("gamma3", "beta3", "gamma1", "beta1", "gamma0", "beta0"):
        vector = getattr(block, name)
        found[f"{name}_ptr"] = vector if vector is None else vector.contiguous()
    return found


# ------------------------------------------------------------------ statistics and the gate


class _Sums(NamedTuple):
    """What `train_moments_fwd_kernel` leaves: statistics of each program, and sums of each image of x."""

    rows: Tensor
    cut: Cut
    images: Tensor | None  # [N, slots, C] float32


def _moments(maps: Sequence[Tensor], x: Tensor | None) -> _Sums:
    """maps: one or two of one shape; x: the last map, of which each image is added up too, or None."""
    first, second, last = maps[0], maps[-1], maps[-1] if x is None else x
    tiles = [_tiles(first.shape[1]), _tiles(second.shape[1]) if len(maps) == 2 else 0]
    widths = [m.shape[1] for m in (*maps, *([] if x is None else [x]))]
    c = cut(first, tiles[0], REDUCING)
    of_x = last.shape[2] * last.shape[3]
    rows = torch.empty(2, c.rows, sum(widths), dtype=torch.float32, device=first.device)
    sums = None
    if x is not None:
        sums = torch.empty(x.shape[0], c.slots, x.shape[1], dtype=torch.float32, device=x.device)
    arguments = {
        "y3_ptr": first,
        "y1_ptr": second,
        "x_ptr": last,
        "rows_ptr": rows,
        "sums_ptr": sums,
        **c.arguments,
        "rows": c.rows,
        "of_x": of_x,
        "span_x": c.span if of_x == c.area else -(-of_x // c.slots),  # a skip's is joined as the others
        "K": first.shape[1],
        "C_x": last.shape[1],
        "columns": sum(widths),
        "pitch_3": pitch(first),
        "pitch_1": pitch(second),
        "pitch_x": pitch(last),
        "tiles_3": tiles[0],
        "tiles_1": tiles[1],
        "ALIGN": _align(first.shape[1], last.shape[1], pitch(first), pitch(second), pitch(last)),
        "BP": 4 * BP,
        "BC": BC,
    }
    grid = c.rows, sum(tiles) + (0 if x is None else _tiles(x.shape[1]))
    launch(train_fwd.train_moments_fwd_kernel, grid, arguments, _WIDE)
    return _Sums(rows, c, sums)


def _gate(
    sums: _Sums, maps: int, k: int, block: Block | None = None, x: Tensor | None = None, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(statistics [2·maps, K], vectors [N, C + K] of the block: means of x and gate, or empty without one).

    given: the statistics, where they are known.
    """
    device = sums.rows.device
    statistics = torch.empty(2 * maps, k, dtype=torch.float32, device=device)
    rows, c = sums.rows, sums.cut
    if given is not None:  # as if one program had seen one value, of this variance
        rows, c = given.view(maps, 2, k).transpose(0, 1).reshape(2, 1, maps * k).float(), Cut(1, 1, 1, 1, 1)
    n, width, groups = (0, k, 1) if block is None or x is None else (x.shape[0], x.shape[1], block.groups)
    vectors = torch.empty(n, width + k, dtype=torch.float32, device=device)
    of_block: dict[str, Any] = {"weight_ptr": None, "gamma_ptr": None, "beta_ptr": None, "eps": 0.0, "of_x": 1}
    if block is not None and x is not None:
        of_block = {
            "weight_ptr": block.gate_weight.contiguous(),
            "gamma_ptr": None if block.gamma0 is None else block.gamma0.contiguous(),
            "beta_ptr": None if block.beta0 is None else block.beta0.contiguous(),
            "eps": block.eps[2] if block.gamma0 is not None else 0.0,
            "of_x": x.shape[2] * x.shape[3],
        }
    arguments = {
        "rows_ptr": rows,
        "sums_ptr": sums.images if block is not None else None,
        **of_block,
        "statistics_ptr": statistics,
        "vectors_ptr": vectors,
        **c.arguments,
        "rows": c.rows,
        "n_images": n,
        "sum_slots": 1 if sums.images is None else sums.images.shape[1],
        "K": k,
        "C_x": width,
        "columns": rows.shape[2],
        "GROUPS": groups,
        "MAPS": maps,
        "BI": BI,
        "BK": BK,
        "BC": BK,
        "BR": BR,
    }
    grid = max(1, -(-n // BI)), -(-k // groups // BK), groups
    launch(train_fwd.train_gate_fwd_kernel, grid, arguments, _WIDE)
    return statistics, vectors


def _statistics(
    sums: _Sums, maps: int, k: int, count: int, block: Block, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics, vectors as of `_gate`, float64 count of values), over all processes of the block's group."""
    of_block = None if x is None else block
    if not block.group:
        return *_gate(sums, maps, k, of_block, x), sums.rows.new_empty(0, dtype=torch.float64)
    mine, _ = _gate(sums, maps, k)
    every, values = training_sync.moments(mine, count, block.group)
    return *_gate(sums, maps, k, of_block, x, given=every), values


# ------------------------------------------------------------------ a block


def _pooled(x: Tensor, stride: int) -> Tensor:
    """`training.pool`, one call."""
    return as_pixels(F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=4)) if stride == 2 else x


def _weights(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    return block.weight3.to(x.dtype), block.weight1.to(x.dtype)


def _elementwise(
    maps: Sequence[Tensor], statistics: Tensor, vectors: Tensor, block: Block, programs: int, shuffle: bool
) -> tuple[Cut, tuple[int, int], dict[str, Any]]:
    """How maps Y3, Y1 (and x) are read by a pass over all of them: cut, grid and arguments."""
    k = maps[0].shape[1]
    c = cut(maps[0], _tiles(k), programs)
    pitches = [pitch(m) for m in maps]
    arguments = {
        "y3_ptr": maps[0],
        "y1_ptr": maps[1],
        "x_ptr": maps[2] if len(maps) == 3 else None,
        "statistics_ptr": statistics,
        "vectors_ptr": vectors,
        **_norms(block),
        **c.arguments,
        "K": k,
        "C_x": vectors.shape[1] - k,
        "pitch_3": pitches[0],
        "pitch_1": pitches[1],
        "pitch_x": pitches[-1],
        "ALIGN": _align(k, *pitches),
        "SHUFFLE": shuffle,
        "RELU": block.activation == "relu",
        "BP": BP,
        "BC": BC,
    }
    return c, (c.rows, _tiles(k)), arguments


def forward(x: Tensor, block: Block, *, shuffle: bool = False) -> Result:
    """As `training.forward`. shuffle: the channels of y are those of a fusion's result."""
    x = as_pixels(x)
    weight3, weight1 = _weights(block, x)
    y3 = convolutions.forward(x, weight3, block.stride, block.groups)
    y1 = convolutions.forward(_pooled(x, block.stride), weight1, 1, block.groups)
    k = y3.shape[1]
    if x.shape[1] < NARROW and block.gamma0 is None:
        sums = _moments([y3, y1], None)._replace(images=x.sum((2, 3), dtype=torch.float32)[:, None])
    else:
        sums = _moments([y3, y1], x)
    maps = [y3, y1] if block.gamma0 is None else [y3, y1, x]
    statistics, vectors, values = _statistics(sums, len(maps), k, y3.numel() // k, block, x)
    y = _map(y3, k, y3.shape[2:])
    _, grid, arguments = _elementwise(maps, statistics, vectors, block, PROGRAMS, shuffle)
    launch(train_fwd.train_combine_fwd_kernel, grid, {**arguments, "out_ptr": y}, _OPTIONS)
    if makes_y1_again(block.stride, block.weight1):
        y1 = y1.new_empty((0, *y1.shape[1:]))
    return Result(y, statistics, y3, y1, vectors, values)


def backward(
    g: Tensor, x: Tensor, result: Sequence[Tensor], block: Block, need: Sequence[bool], *, shuffle: bool = False
) -> list[Tensor | None]:
    """As `training.backward`; result: of `Result`, without y."""
    statistics, y3, y1, vectors, values = result
    g, x, y3 = as_pixels(g), as_pixels(x), as_pixels(y3)
    weight3, weight1 = _weights(block, x)
    pooled = _pooled(x, block.stride)
    y1 = as_pixels(y1) if y1.numel() else convolutions.forward(pooled, weight1, 1, block.groups)
    skip, k, width = block.gamma0 is not None, y3.shape[1], x.shape[1]
    maps = [y3, y1, x] if skip else [y3, y1]

    def small(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    def of_map(programs: int) -> tuple[Cut, tuple[int, int], dict[str, Any]]:
        c, grid, arguments = _elementwise(maps, statistics, vectors, block, programs, shuffle)
        align = _align(arguments["ALIGN"], pitch(g))
        return c, grid, {**arguments, "g_ptr": g, "pitch_g": pitch(g), "ALIGN": align}

    c, grid, arguments = of_map(REDUCING)
    sums = small(4 if skip else 3, x.shape[0], c.slots, k)
    launch(train_bwd.train_reduce_bwd_kernel, grid, {**arguments, "sums_ptr": sums}, _OPTIONS)

    of_groups = block.groups
    k_blocks, c_blocks = -(-k // of_groups // BK), -(-width // of_groups // BK)
    totals, through, offset = small(2 * len(maps), k), small(2, k_blocks, width), small(x.shape[0], width)
    d_vectors = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in block[2:8] if v is not None]
    d_gate = torch.empty_like(block.gate_weight, memory_format=torch.contiguous_format)
    of_gate = {
        "sums_ptr": sums,
        "weight_ptr": block.gate_weight.contiguous(),
        "d_weight_ptr": d_gate,
        "offset_ptr": offset,
        "totals_ptr": totals,
        "through_ptr": through,
        **{f"d_{name}_ptr": d for name, d in zip(("gamma3", "beta3", "gamma1", "beta1"), d_vectors, strict=False)},
        "statistics_ptr": statistics,
        "vectors_ptr": vectors,
        **_norms(block),
        "images": x.shape[0],
        "slots": c.slots,
        "of_x": x.shape[2] * x.shape[3],
        "K": k,
        "C_x": width,
        "k_blocks": k_blocks,
        "c_blocks": c_blocks,
        "GROUPS": of_groups,
        "BI": BI,
        "BK": BK,
        "BC": BK,
    }
    programs = k_blocks + (k_blocks + -(-x.shape[0] // BI)) * c_blocks
    launch(train_gate_bwd.train_gate_bwd_kernel, (programs, of_groups), of_gate, _WIDE)

    need_x, need_weight3, need_weight1 = need[:3]
    share = k / y3.numel()
    if block.group:
        if skip:
            totals[4:] += through.sum(1)
            d_vectors[4].copy_(totals[4])
            d_vectors[5].copy_(totals[5])
        totals, share = training_sync.total(totals, block.group).double().div_(values).float(), 1.0
    d_y3, d_y1 = (_map(y3, k, y3.shape[2:]) for _ in range(2))
    d_x = _map(x, width, x.shape[2:]) if skip and need_x else None
    local = skip and not block.group
    _, grid, arguments = of_map(PROGRAMS)
    arguments |= {
        "d_y3_ptr": d_y3,
        "d_y1_ptr": d_y1,
        "d_x_ptr": d_x,
        "totals_ptr": totals,
        "through_ptr": through,
        "offset_ptr": offset,
        "d_gamma0_ptr": d_vectors[4] if local else None,
        "d_beta0_ptr": d_vectors[5] if local else None,
        "share": share,
        "parts": k_blocks if local else 0,
    }
    launch(train_bwd.train_spread_bwd_kernel, grid, arguments, _OPTIONS)

    d_1, d_weight1 = convolutions.gradients(d_y1, pooled, weight1, 1, block.groups, need_x, need_weight1)
    del pooled, d_y1
    d_3, d_weight3 = convolutions.gradients(d_y3, x, weight3, block.stride, block.groups, need_x, need_weight3)
    if d_3 is not None and d_1 is not None:
        d_x = _add(d_x, d_3, d_1, offset, block.stride)
    return [d_x, d_weight3, d_weight1, *d_vectors, *[None] * (6 - len(d_vectors)), d_gate]


def _add(d_x: Tensor | None, d_3: Tensor, d_1: Tensor, offset: Tensor, stride: int) -> Tensor:
    width = d_3.shape[1]
    c = cut(d_3, _tiles(width), PROGRAMS)
    arguments = {
        "d_x_ptr": d_x,
        "d_3_ptr": d_3,
        "d_1_ptr": d_1,
        "offset_ptr": offset if d_x is None else None,
        **c.arguments,
        "C_x": width,
        "W": d_3.shape[3],
        "pitch_3": pitch(d_3),
        "pitch_1": pitch(d_1),
        "POOLED": stride == 2,
        "ALIGN": _align(width, pitch(d_3), pitch(d_1)),
        "BP": BP,
        "BC": BC,
    }
    launch(train_bwd.train_add_bwd_kernel, (c.rows, _tiles(width)), arguments, _OPTIONS)
    return d_3 if d_x is None else d_x


# ------------------------------------------------------------------ a fusion


def _of_inputs(
    maps: Sequence[Tensor], statistics: Tensor, norms: Norms, programs: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of a pass over both inputs of a fusion."""
    n, c, h, w = maps[0].shape
    pixels, tiles = n * h * w, _tiles(c)
    span = -(-pixels * tiles // programs // BP) * BP or BP
    arguments = {
        "x_ptr": maps[0],
        "y_ptr": maps[1],
        "statistics_ptr": statistics,
        "gamma_x_ptr": norms.gammas[0].contiguous(),
        "beta_x_ptr": norms.betas[0].contiguous(),
        "gamma_y_ptr": norms.gammas[1].contiguous(),
        "beta_y_ptr": norms.betas[1].contiguous(),
        "eps_x": norms.eps[0],
        "eps_y": norms.eps[1],
        "pixels": pixels,
        "span": span,
        "C": c,
        "pitch_x": pitch(maps[0]),
        "pitch_y": pitch(maps[1]),
        "ALIGN": _align(c, pitch(maps[0]), pitch(maps[1])),
        "BP": BP,
        "BC": BC,
    }
    return (-(-pixels // span), tiles), arguments


def _join(maps: Sequence[Tensor], statistics: Tensor, norms: Norms) -> Tensor:
    u = _map(maps[0], 2 * maps[0].shape[1], maps[0].shape[2:])
    grid, arguments = _of_inputs(maps, statistics, norms, PROGRAMS)
    launch(train_fusion.train_join_fwd_kernel, grid, {**arguments, "out_ptr": u}, _OPTIONS)
    return u


def forward_fusion(maps: Sequence[Tensor], norms: Norms, block: Block) -> FusionResult:
    """As `training_fusion.forward`."""
    maps = [as_pixels(m) for m in maps]
    c = maps[0].shape[1]
    of_inputs, _, inputs = _statistics(_moments(maps, None), 2, c, maps[0].numel() // c, block, None)
    found = forward(_join(maps, of_inputs, norms), block, shuffle=True)
    counts = torch.stack([found.values, inputs]) if block.group else found.values
    return FusionResult(found.y, found.statistics, of_inputs, found.y3, found.y1, found.vectors, counts)


def backward_fusion(
    g: Tensor, maps: Sequence[Tensor], result: Sequence[Tensor], norms: Norms, block: Block, need: Sequence[bool]
) -> list[Tensor | None]:
    """As `training_fusion.backward`."""
    statistics, of_inputs, y3, y1, vectors, counts = result
    maps = [as_pixels(m) for m in maps]
    of_block = statistics, y3, y1, vectors, counts[:1]
    u = _join(maps, of_inputs, norms)
    d_u, *d_block = backward(g, u, of_block, block, need, shuffle=True)
    found, d_gate = [*d_block[:6]], d_block[-1]
    if d_u is None:
        return [None, None, *found, None, None, None, None, d_gate]
    c = maps[0].shape[1]
    grid, arguments = _of_inputs(maps, of_inputs, norms, REDUCING)
    rows = torch.empty(grid[0], 4, c, dtype=torch.float32, device=u.device)
    sums = {**arguments, "d_ptr": d_u, "sums_ptr": rows}
    launch(train_fusion.train_join_sums_bwd_kernel, grid, sums, _OPTIONS)
    totals = rows.sum(0)
    d_norms, share = [*totals.clone().unbind()], c / maps[0].numel()
    if block.group:
        totals, share = training_sync.total(totals, block.group).double().div_(counts[1:]).float(), 1.0
    grid, arguments = _of_inputs(maps, of_inputs, norms, PROGRAMS)
    d_maps = [_map(m, c, m.shape[2:]) for m in maps]
    last = {"d_ptr": d_u, "d_x_ptr": d_maps[0], "d_y_ptr": d_maps[1], "totals_ptr": totals, "share": share}
    launch(train_fusion.train_separate_bwd_kernel, grid, {**arguments, **last}, _OPTIONS)
    return [*d_maps, *found, *d_norms, d_gate]
