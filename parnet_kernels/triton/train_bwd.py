"""Backward kernels of the training form: one reducing pass, one writing pass, and the last sum.

Between the first two stands `train_gate_bwd.py`, between the last two the library's gradients of the convolutions.
Conventions: `train_fwd.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from parnet_kernels.triton.tile import wide
from parnet_kernels.triton.train_fwd import INTS, aligned, before, norm, shuffled, through


@triton.jit(do_not_specialize=INTS)
def train_reduce_bwd_kernel(
    g_ptr,
    y3_ptr,
    y1_ptr,
    x_ptr,
    sums_ptr,  # [3 or 4, N, slots, K]: of d_t, and of d_t times each centred map
    statistics_ptr,
    vectors_ptr,
    gamma3_ptr,
    beta3_ptr,
    gamma1_ptr,
    beta1_ptr,
    gamma0_ptr,
    beta0_ptr,
    eps3,
    eps1,
    eps0,
    images,
    block,
    slots,
    area,
    span,
    K,
    C_x,
    pitch_3,
    pitch_1,
    pitch_x,
    pitch_g,
    ALIGN: tl.constexpr,
    SHUFFLE: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    SKIP: tl.constexpr = x_ptr is not None
    row = tl.program_id(0)
    K = aligned(K, ALIGN)
    pitch_3 = aligned(pitch_3, ALIGN)
    pitch_1 = aligned(pitch_1, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    pitch_g = aligned(pitch_g, ALIGN)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = k < K
    a3, b3, mu3, _ = norm(statistics_ptr, gamma3_ptr, beta3_ptr, eps3, 0, K, k, inside)
    a1, b1, mu1, _ = norm(statistics_ptr, gamma1_ptr, beta1_ptr, eps1, 1, K, k, inside)
    a0, b0, mu0 = a3, a3, a3
    if SKIP:
        a0, b0, mu0, _ = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, k, inside)
    slot = row % slots
    start = slot * span
    first = row // slots * block
    for n in range(first, tl.minimum(first + block, images)):
        s = tl.load(vectors_ptr + wide(n, INT64) * (C_x + K) + C_x + k, mask=inside, other=0.0)
        sum_d = tl.zeros((BC,), tl.float32)
        sum_3 = tl.zeros((BC,), tl.float32)
        sum_1 = tl.zeros((BC,), tl.float32)
        sum_0 = tl.zeros((BC,), tl.float32)
        for p0 in range(start, tl.minimum(start + span, area), BP):
            p = p0 + tl.arange(0, BP)
            mask = (p < tl.minimum(start + span, area))[:, None] & inside[None, :]
            at = (wide(n, INT64) * area + p)[:, None]
            y3 = tl.load(y3_ptr + at * pitch_3 + k[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
            y1 = tl.load(y1_ptr + at * pitch_1 + k[None, :], mask=mask, other=0.0).to(tl.float32)
            x = y1
            if SKIP:
                x = tl.load(x_ptr + at * pitch_x + k[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at * pitch_g + shuffled(k, K, SHUFFLE)[None, :], mask=mask, other=0.0).to(tl.float32)
            d = through(g, before(y3, y1, x, s, a3, a1, a0, b3 + b1, b0, mu3, mu1, mu0, SKIP), RELU)
            d = tl.where(mask, d, 0.0)
            sum_d += tl.sum(d, 0)
            sum_3 += tl.sum(d * (y3 - mu3[None, :]), 0)
            sum_1 += tl.sum(d * (y1 - mu1[None, :]), 0)
            if SKIP:
                sum_0 += tl.sum(d * (x - mu0[None, :]), 0)
        at = (wide(n, INT64) * slots + slot) * K + k
        size = wide(images, INT64) * slots * K
        tl.store(sums_ptr + at, sum_d, mask=inside)
        tl.store(sums_ptr + size + at, sum_3, mask=inside)
        tl.store(sums_ptr + 2 * size + at, sum_1, mask=inside)
        if SKIP:
            tl.store(sums_ptr + 3 * size + at, sum_0, mask=inside)


@triton.jit
def through_norm(d, off, total_gamma, total_beta, a, inverse, share):
    """The gradient of a BatchNorm's map from that of its result, [BP, BC]. off: the map, centred; share: 1 / count."""
    return a[None, :] * (d - share * (total_beta[None, :] + off * (inverse * total_gamma)[None, :]))


@triton.jit(do_not_specialize=INTS)
def train_spread_bwd_kernel(
    g_ptr,
    y3_ptr,
    y1_ptr,
    x_ptr,
    d_y3_ptr,
    d_y1_ptr,
    d_x_ptr,  # of the skip; None where it is not asked for
    totals_ptr,
    through_ptr,
    offset_ptr,
    d_gamma0_ptr,
    d_beta0_ptr,
    statistics_ptr,
    vectors_ptr,
    gamma3_ptr,
    beta3_ptr,
    gamma1_ptr,
    beta1_ptr,
    gamma0_ptr,
    beta0_ptr,
    eps3,
    eps1,
    eps0,
    share,  # 1 / values of a channel
    images,
    block,
    slots,
    area,
    span,
    K,
    C_x,
    pitch_3,
    pitch_1,
    pitch_x,
    pitch_g,
    parts,  # of through_ptr
    ALIGN: tl.constexpr,
    SHUFFLE: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """The gradients of Y3, of Y1, and of x through the skip."""
    SKIP: tl.constexpr = x_ptr is not None
    row = tl.program_id(0)
    K = aligned(K, ALIGN)
    pitch_3 = aligned(pitch_3, ALIGN)
    pitch_1 = aligned(pitch_1, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    pitch_g = aligned(pitch_g, ALIGN)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = k < K
    a3, b3, mu3, i3 = norm(statistics_ptr, gamma3_ptr, beta3_ptr, eps3, 0, K, k, inside)
    a1, b1, mu1, i1 = norm(statistics_ptr, gamma1_ptr, beta1_ptr, eps1, 1, K, k, inside)
    gamma3 = tl.load(totals_ptr + k, mask=inside, other=0.0)
    beta3 = tl.load(totals_ptr + K + k, mask=inside, other=0.0)
    gamma1 = tl.load(totals_ptr + 2 * K + k, mask=inside, other=0.0)
    beta1 = tl.load(totals_ptr + 3 * K + k, mask=inside, other=0.0)
    a0, b0, mu0 = a3, a3, a3
    if SKIP:
        a0, b0, mu0, i0 = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, k, inside)
        gamma0 = tl.load(totals_ptr + 4 * K + k, mask=inside, other=0.0)
        beta0 = tl.load(totals_ptr + 5 * K + k, mask=inside, other=0.0)
        for part in range(parts):
            gamma0 += tl.load(through_ptr + part * K + k, mask=inside, other=0.0)
            beta0 += tl.load(through_ptr + (parts + part) * K + k, mask=inside, other=0.0)
        if d_gamma0_ptr is not None:
            tl.store(d_gamma0_ptr + k, gamma0, mask=inside & (row == 0))
            tl.store(d_beta0_ptr + k, beta0, mask=inside & (row == 0))
    start = row % slots * span
    first = row // slots * block
    for n in range(first, tl.minimum(first + block, images)):
        s = tl.load(vectors_ptr + wide(n, INT64) * (C_x + K) + C_x + k, mask=inside, other=0.0)
        factor = s
        offset = s
        if SKIP:
            factor = tl.full((BC,), 1.0, tl.float32)
            offset = tl.load(offset_ptr + wide(n, INT64) * K + k, mask=inside, other=0.0)
        for p0 in range(start, tl.minimum(start + span, area), BP):
            p = p0 + tl.arange(0, BP)
            mask = (p < tl.minimum(start + span, area))[:, None] & inside[None, :]
            at = (wide(n, INT64) * area + p)[:, None]
            y3 = tl.load(y3_ptr + at * pitch_3 + k[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
            y1 = tl.load(y1_ptr + at * pitch_1 + k[None, :], mask=mask, other=0.0).to(tl.float32)
            x = y1
            if SKIP:
                x = tl.load(x_ptr + at * pitch_x + k[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at * pitch_g + shuffled(k, K, SHUFFLE)[None, :], mask=mask, other=0.0).to(tl.float32)
            d = through(g, before(y3, y1, x, s, a3, a1, a0, b3 + b1, b0, mu3, mu1, mu0, SKIP), RELU)
            to = at * K + k[None, :]
            gated = factor[None, :] * d
            tl.store(d_y3_ptr + to, through_norm(gated, y3 - mu3[None, :], gamma3, beta3, a3, i3, share), mask=mask)
            tl.store(d_y1_ptr + to, through_norm(gated, y1 - mu1[None, :], gamma1, beta1, a1, i1, share), mask=mask)
            if d_x_ptr is not None:
                gated = s[None, :] * d + offset[None, :]
                tl.store(d_x_ptr + to, through_norm(gated, x - mu0[None, :], gamma0, beta0, a0, i0, share), mask=mask)


@triton.jit(do_not_specialize=INTS)
def train_add_bwd_kernel(
    d_x_ptr,  # of the skip, to which all is added; None: the result is written over d_3
    d_3_ptr,
    d_1_ptr,  # of x, or of x pooled 2×2
    offset_ptr,  # [N, C_x], or None where d_x has it
    images,
    block,
    slots,
    area,
    span,
    C_x,
    W,
    pitch_3,
    pitch_1,
    POOLED: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """The gradient of x: the sum of those through the convolutions, the skip and the gate."""
    row = tl.program_id(0)
    C_x = aligned(C_x, ALIGN)
    pitch_3 = aligned(pitch_3, ALIGN)
    pitch_1 = aligned(pitch_1, ALIGN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C_x
    start = row % slots * span
    first = row // slots * block
    for n in range(first, tl.minimum(first + block, images)):
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + wide(n, INT64) * C_x + c, mask=inside, other=0.0)
        for p0 in range(start, tl.minimum(start + span, area), BP):
            p = p0 + tl.arange(0, BP)
            mask = (p < tl.minimum(start + span, area))[:, None] & inside[None, :]
            at = (wide(n, INT64) * area + p)[:, None]
            at_3 = at * pitch_3 + c[None, :]
            d = tl.load(d_3_ptr + at_3, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
            if POOLED:
                half = (W + 1) // 2
                small = wide(n, INT64) * ((area // W + 1) // 2 * half) + p // W // 2 * half + p % W // 2
                d += 0.25 * tl.load(d_1_ptr + small[:, None] * pitch_1 + c[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
            else:
                d += tl.load(d_1_ptr + at * pitch_1 + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if offset_ptr is not None:
                d += offset[None, :]
            if d_x_ptr is not None:
                to = at * C_x + c[None, :]
                tl.store(d_x_ptr + to, d + tl.load(d_x_ptr + to, mask=mask, other=0.0).to(tl.float32), mask=mask)
            else:
                tl.store(d_3_ptr + at_3, d, mask=mask)
