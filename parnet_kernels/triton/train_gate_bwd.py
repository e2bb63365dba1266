"""The vectors of backward in training: BatchNorms, the gate's weight, and what passes through the gate, in one launch.

Products are small: [images, K] and [K, C]. Conventions: `train_fwd.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from parnet_kernels.triton.tile import wide
from parnet_kernels.triton.train_fwd import INTS, norm


@triton.jit
def sum_of(sums_ptr, which, n, k, mask, images, slots, K, BI: tl.constexpr, BK: tl.constexpr, INT64: tl.constexpr):
    """[BI, BK]: of the images n and channels k, over the slots."""
    total = tl.zeros((BI, BK), tl.float32)
    for slot in range(slots):
        at = (wide(n, INT64) * slots + slot)[:, None] * K + k[None, :]
        total += tl.load(sums_ptr + which * wide(images, INT64) * slots * K + at, mask=mask, other=0.0)
    return total


@triton.jit
def logits_of(
    sums_ptr, n, k, mask, s, a3, a1, a0, b, b0, images, slots, K,
    SKIP: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """[BI, BK]: the gradients of what the gate's σ is taken of."""
    d = sum_of(sums_ptr, 0, n, k, mask, images, slots, K, BI, BK, INT64)
    if SKIP:
        d = a0[None, :] * sum_of(sums_ptr, 3, n, k, mask, images, slots, K, BI, BK, INT64) + b0[None, :] * d
        d *= s * (1 - s)
    else:
        d = b[None, :] * d + a3[None, :] * sum_of(sums_ptr, 1, n, k, mask, images, slots, K, BI, BK, INT64)
        d += a1[None, :] * sum_of(sums_ptr, 2, n, k, mask, images, slots, K, BI, BK, INT64)
        d *= s * (1 - s / 2)
    return tl.where(mask, d, 0.0)


@triton.jit
def norm_totals(
    sums_ptr, totals_ptr, d_gamma3_ptr, d_beta3_ptr, d_gamma1_ptr, d_beta1_ptr, vectors_ptr, k, inside, i3, i1, i0,
    images, slots, K, C_x, SKIP: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The gradients of BatchNorms of BK channels: sums over the images."""
    total = tl.zeros((BK,), tl.float32)
    total_3 = tl.zeros((BK,), tl.float32)
    total_1 = tl.zeros((BK,), tl.float32)
    gated = tl.zeros((BK,), tl.float32)
    total_0 = tl.zeros((BK,), tl.float32)
    for first in range(0, images, BI):
        n = first + tl.arange(0, BI)
        mask = (n < images)[:, None] & inside[None, :]
        s = tl.load(vectors_ptr + wide(n, INT64)[:, None] * (C_x + K) + (C_x + k)[None, :], mask=mask, other=0.0)
        d = sum_of(sums_ptr, 0, n, k, mask, images, slots, K, BI, BK, INT64)
        d3 = sum_of(sums_ptr, 1, n, k, mask, images, slots, K, BI, BK, INT64)
        d1 = sum_of(sums_ptr, 2, n, k, mask, images, slots, K, BI, BK, INT64)
        if SKIP:
            gated += tl.sum(s * d, 0)
            total_0 += tl.sum(s * sum_of(sums_ptr, 3, n, k, mask, images, slots, K, BI, BK, INT64), 0)
        else:
            d *= s
            d3 *= s
            d1 *= s
        total += tl.sum(d, 0)
        total_3 += tl.sum(d3, 0)
        total_1 += tl.sum(d1, 0)
    tl.store(totals_ptr + k, total_3 * i3, mask=inside)
    tl.store(totals_ptr + K + k, total, mask=inside)
    tl.store(totals_ptr + 2 * K + k, total_1 * i1, mask=inside)
    tl.store(totals_ptr + 3 * K + k, total, mask=inside)
    tl.store(d_gamma3_ptr + k, total_3 * i3, mask=inside)
    tl.store(d_beta3_ptr + k, total, mask=inside)
    tl.store(d_gamma1_ptr + k, total_1 * i1, mask=inside)
    tl.store(d_beta1_ptr + k, total, mask=inside)
    if SKIP:
        tl.store(totals_ptr + 4 * K + k, total_0 * i0, mask=inside)
        tl.store(totals_ptr + 5 * K + k, gated, mask=inside)


@triton.jit
def gate_weight_tile(
    sums_ptr, weight_ptr, d_weight_ptr, through_ptr, statistics_ptr, vectors_ptr, gamma0_ptr, beta0_ptr, eps0,
    k, inside, t, group, k_block, k_blocks, a3, a1, a0, b, b0, images, slots, K, C_x, GROUPS: tl.constexpr,
    SKIP: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The gradient of [BK, BC] of the gate's weight; and what these channels send through the gate to the BatchNorm of
    x: Σ of d_squeezed·pixels is Σ_k weight·Σ_n d_logits, so no image is needed for it.
    """
    width = C_x // GROUPS
    c = group * width + t
    about = tl.zeros((BC,), tl.float32)
    if SKIP:
        ac, bc, about, ic = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, c, t < width)
    d_weight = tl.zeros((BK, BC), tl.float32)
    d_logits = tl.zeros((BK,), tl.float32)
    for first in range(0, images, BI):
        n = first + tl.arange(0, BI)
        row = wide(n, INT64)[:, None] * (C_x + K)
        of_k = (n < images)[:, None] & inside[None, :]
        s = tl.load(vectors_ptr + row + (C_x + k)[None, :], mask=of_k, other=0.0)
        d = logits_of(sums_ptr, n, k, of_k, s, a3, a1, a0, b, b0, images, slots, K, SKIP, BI, BK, INT64)
        of_c = (n < images)[:, None] & (t < width)[None, :]
        seen = tl.load(vectors_ptr + row + c[None, :], mask=of_c, other=0.0)
        seen = tl.where(of_c, seen - about[None, :], 0.0)
        d_weight = tl.dot(tl.trans(d), seen, d_weight, input_precision="ieee")
        d_logits += tl.sum(d, 0)
    mask = inside[:, None] & (t < width)[None, :]
    at = k[:, None] * width + t[None, :]
    if SKIP:
        w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        base = through_ptr + k_block * C_x + c
        tl.store(base, tl.sum(w * d_weight, 0) * ic, mask=t < width)
        tl.store(base + k_blocks * C_x, tl.sum(w * d_logits[:, None], 0), mask=t < width)
        d_weight = ac[None, :] * d_weight + bc[None, :] * d_logits[:, None]
    tl.store(d_weight_ptr + at, d_weight, mask=mask)


@triton.jit
def mean_gradients(
    sums_ptr, weight_ptr, offset_ptr, statistics_ptr, vectors_ptr, gamma3_ptr, beta3_ptr, gamma1_ptr, beta1_ptr,
    gamma0_ptr, beta0_ptr, eps3, eps1, eps0, n, t, group, images, slots, of_x, K, C_x, GROUPS: tl.constexpr,
    SKIP: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """d_squeezed of BI images and BC channels, for each pixel."""
    width = C_x // GROUPS
    of_group = K // GROUPS
    offset = tl.zeros((BI, BC), tl.float32)
    for first in range(0, of_group, BK):
        inside = first + tl.arange(0, BK) < of_group
        k = group * of_group + first + tl.arange(0, BK)
        a3, b3, _, _ = norm(statistics_ptr, gamma3_ptr, beta3_ptr, eps3, 0, K, k, inside)
        a1, b1, _, _ = norm(statistics_ptr, gamma1_ptr, beta1_ptr, eps1, 1, K, k, inside)
        a0, b0 = a3, a3
        if SKIP:
            a0, b0, _, _ = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, k, inside)
        mask = (n < images)[:, None] & inside[None, :]
        s = tl.load(vectors_ptr + wide(n, INT64)[:, None] * (C_x + K) + (C_x + k)[None, :], mask=mask, other=0.0)
        d = logits_of(sums_ptr, n, k, mask, s, a3, a1, a0, b3 + b1, b0, images, slots, K, SKIP, BI, BK, INT64)
        of_w = inside[:, None] & (t < width)[None, :]
        w = tl.load(weight_ptr + k[:, None] * width + t[None, :], mask=of_w, other=0.0).to(tl.float32)
        offset = tl.dot(d, w, offset, input_precision="ieee")
    at = wide(n, INT64)[:, None] * C_x + (group * width + t)[None, :]
    tl.store(offset_ptr + at, offset / of_x, mask=(n < images)[:, None] & (t < width)[None, :])


@triton.jit(do_not_specialize=INTS)
def train_gate_bwd_kernel(
    sums_ptr,
    weight_ptr,
    d_weight_ptr,  # of the gate, [K, C_x / groups]
    offset_ptr,  # [N, C_x]: gradient of what the gate sees, for each pixel
    totals_ptr,  # [2·maps, K]: d_γ and d_β; those of x without what comes through the gate, which is
    through_ptr,  # [2, blocks of K, C_x]
    d_gamma3_ptr,
    d_beta3_ptr,
    d_gamma1_ptr,
    d_beta1_ptr,
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
    slots,
    of_x,
    K,
    C_x,
    k_blocks,  # of one group
    c_blocks,
    GROUPS: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """All vectors of backward. A program is of one of three kinds, in this order: for each BK channels; for each of
    those and BC channels of x; for each BI images and BC channels of x.
    """
    SKIP: tl.constexpr = gamma0_ptr is not None
    of_group = K // GROUPS
    group = tl.program_id(1)
    program = tl.program_id(0)
    tile = program - k_blocks
    k_block = tl.where(tile < 0, program, tile // c_blocks)
    t = tile % c_blocks * BC + tl.arange(0, BC)
    inside = k_block * BK + tl.arange(0, BK) < of_group
    k = group * of_group + k_block * BK + tl.arange(0, BK)
    a3, b3, _, i3 = norm(statistics_ptr, gamma3_ptr, beta3_ptr, eps3, 0, K, k, inside)
    a1, b1, _, i1 = norm(statistics_ptr, gamma1_ptr, beta1_ptr, eps1, 1, K, k, inside)
    a0, b0, i0 = a3, a3, a3
    if SKIP:
        a0, b0, _, i0 = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, k, inside)
    if tile < 0:
        norm_totals(
            sums_ptr, totals_ptr, d_gamma3_ptr, d_beta3_ptr, d_gamma1_ptr, d_beta1_ptr, vectors_ptr, k, inside,
            i3, i1, i0, images, slots, K, C_x, SKIP, BI, BK, INT64,
        )  # fmt: skip
    elif k_block < k_blocks:
        gate_weight_tile(
            sums_ptr, weight_ptr, d_weight_ptr, through_ptr, statistics_ptr, vectors_ptr, gamma0_ptr, beta0_ptr, eps0,
            k, inside, t, group, k_block, k_blocks, a3, a1, a0, b3 + b1, b0, images, slots, K, C_x, GROUPS, SKIP, BI,
            BK, BC, INT64,
        )  # fmt: skip
    else:
        n = (k_block - k_blocks) * BI + tl.arange(0, BI)
        mean_gradients(
            sums_ptr, weight_ptr, offset_ptr, statistics_ptr, vectors_ptr, gamma3_ptr, beta3_ptr, gamma1_ptr,
            beta1_ptr, gamma0_ptr, beta0_ptr, eps3, eps1, eps0, n, t, group, images, slots, of_x, K, C_x, GROUPS,
            SKIP, BI, BK, BC, INT64,
        )  # fmt: skip
