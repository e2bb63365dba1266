"""Kernels of a fusion in training: two maps, normalised and joined; and back. Conventions: `train_fwd.py`.

Channel 2c + j of the joined map is that of map j. statistics [4, C]: those of x, of y.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from parnet_kernels.triton.tile import wide
from parnet_kernels.triton.train_bwd import through_norm
from parnet_kernels.triton.train_fwd import INTS, aligned, norm


@triton.jit(do_not_specialize=INTS)
def train_join_fwd_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    statistics_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_y_ptr,
    beta_y_ptr,
    eps_x,
    eps_y,
    pixels,
    span,
    C,
    pitch_x,
    pitch_y,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """u[2c + j] = BatchNorm_j(map_j)[c]."""
    C = aligned(C, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    pitch_y = aligned(pitch_y, ALIGN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    both = tl.program_id(1) * 2 * BC + tl.arange(0, 2 * BC)
    inside = c < C
    ax, bx, mx, _ = norm(statistics_ptr, gamma_x_ptr, beta_x_ptr, eps_x, 0, C, c, inside)
    ay, by, my, _ = norm(statistics_ptr, gamma_y_ptr, beta_y_ptr, eps_y, 1, C, c, inside)
    start = wide(tl.program_id(0), INT64) * span
    for p0 in range(0, span, BP):
        p = start + p0 + tl.arange(0, BP)
        there = (p0 + tl.arange(0, BP) < span) & (p < pixels)
        mask = there[:, None] & inside[None, :]
        x = tl.load(x_ptr + p[:, None] * pitch_x + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
        y = tl.load(y_ptr + p[:, None] * pitch_y + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x - mx[None, :]) * ax[None, :] + bx[None, :]
        y = (y - my[None, :]) * ay[None, :] + by[None, :]
        to = p[:, None] * (2 * C) + both[None, :]
        tl.store(out_ptr + to, tl.interleave(x, y), mask=there[:, None] & (both < 2 * C)[None, :])


@triton.jit(do_not_specialize=INTS)
def train_join_sums_bwd_kernel(
    d_ptr,  # of the joined map
    x_ptr,
    y_ptr,
    sums_ptr,  # [programs, 4, C]: d_γ and d_β of x, of y
    statistics_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_y_ptr,
    beta_y_ptr,
    eps_x,
    eps_y,
    pixels,
    span,
    C,
    pitch_x,
    pitch_y,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    C = aligned(C, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    pitch_y = aligned(pitch_y, ALIGN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    both = tl.program_id(1) * 2 * BC + tl.arange(0, 2 * BC)
    inside = c < C
    _, _, mx, ix = norm(statistics_ptr, gamma_x_ptr, beta_x_ptr, eps_x, 0, C, c, inside)
    _, _, my, iy = norm(statistics_ptr, gamma_y_ptr, beta_y_ptr, eps_y, 1, C, c, inside)
    beta_x = tl.zeros((BC,), tl.float32)
    beta_y = tl.zeros((BC,), tl.float32)
    gamma_x = tl.zeros((BC,), tl.float32)
    gamma_y = tl.zeros((BC,), tl.float32)
    start = wide(tl.program_id(0), INT64) * span
    for p0 in range(0, span, BP):
        p = start + p0 + tl.arange(0, BP)
        there = (p0 + tl.arange(0, BP) < span) & (p < pixels)
        mask = there[:, None] & inside[None, :]
        x = tl.load(x_ptr + p[:, None] * pitch_x + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
        y = tl.load(y_ptr + p[:, None] * pitch_y + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = p[:, None] * (2 * C) + both[None, :]
        d = tl.load(d_ptr + at, mask=there[:, None] & (both < 2 * C)[None, :], other=0.0).to(tl.float32)
        dx, dy = tl.split(tl.reshape(d, (BP, BC, 2)))
        beta_x += tl.sum(dx, 0)
        beta_y += tl.sum(dy, 0)
        gamma_x += tl.sum(dx * (x - mx[None, :]), 0)
        gamma_y += tl.sum(dy * (y - my[None, :]), 0)
    to = sums_ptr + tl.program_id(0) * 4 * C + c
    tl.store(to, gamma_x * ix, mask=inside)
    tl.store(to + C, beta_x, mask=inside)
    tl.store(to + 2 * C, gamma_y * iy, mask=inside)
    tl.store(to + 3 * C, beta_y, mask=inside)


@triton.jit(do_not_specialize=INTS)
def train_separate_bwd_kernel(
    d_ptr,
    x_ptr,
    y_ptr,
    d_x_ptr,
    d_y_ptr,
    totals_ptr,  # [4, C]: d_γ and d_β of x, of y
    statistics_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_y_ptr,
    beta_y_ptr,
    eps_x,
    eps_y,
    share,  # 1 / values of a channel
    pixels,
    span,
    C,
    pitch_x,
    pitch_y,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """The gradients of both maps from that of the joined one."""
    C = aligned(C, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    pitch_y = aligned(pitch_y, ALIGN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    both = tl.program_id(1) * 2 * BC + tl.arange(0, 2 * BC)
    inside = c < C
    ax, _, mx, ix = norm(statistics_ptr, gamma_x_ptr, beta_x_ptr, eps_x, 0, C, c, inside)
    ay, _, my, iy = norm(statistics_ptr, gamma_y_ptr, beta_y_ptr, eps_y, 1, C, c, inside)
    gamma_x = tl.load(totals_ptr + c, mask=inside, other=0.0)
    beta_x = tl.load(totals_ptr + C + c, mask=inside, other=0.0)
    gamma_y = tl.load(totals_ptr + 2 * C + c, mask=inside, other=0.0)
    beta_y = tl.load(totals_ptr + 3 * C + c, mask=inside, other=0.0)
    start = wide(tl.program_id(0), INT64) * span
    for p0 in range(0, span, BP):
        p = start + p0 + tl.arange(0, BP)
        there = (p0 + tl.arange(0, BP) < span) & (p < pixels)
        mask = there[:, None] & inside[None, :]
        x = tl.load(x_ptr + p[:, None] * pitch_x + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
        y = tl.load(y_ptr + p[:, None] * pitch_y + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = p[:, None] * (2 * C) + both[None, :]
        d = tl.load(d_ptr + at, mask=there[:, None] & (both < 2 * C)[None, :], other=0.0).to(tl.float32)
        dx, dy = tl.split(tl.reshape(d, (BP, BC, 2)))
        to = p[:, None] * C + c[None, :]
        tl.store(d_x_ptr + to, through_norm(dx, x - mx[None, :], gamma_x, beta_x, ax, ix, share), mask=mask)
        tl.store(d_y_ptr + to, through_norm(dy, y - my[None, :], gamma_y, beta_y, ay, iy, share), mask=mask)
