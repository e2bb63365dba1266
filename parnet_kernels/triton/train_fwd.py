"""Forward kernels of the training form, around the library's convolutions: statistics, gate, one elementwise pass.

The algebra and its notation are in `parnet_kernels/training.py`. Maps are rows of channels: pixel p of image n begins
at (n·area + p)·pitch. A program reads `block` images, or one of `slots` parts of one image, for BC channels; what it
adds up goes to its own place, and whoever needs the total adds the places in their order: the same bits every time.
Widths are told apart only by ALIGN, the power of two that divides them, so kernels serve all layers of a network.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from parnet_kernels.triton.tile import wide

#: Integers that no kernel is compiled anew for.
INTS = (
    "images", "block", "slots", "span", "area", "of_x", "span_x", "C", "K", "columns", "C_x", "pitch_3",
    "pitch_1", "pitch_x", "pitch_g", "pitch_y", "pixels", "rows", "n_images", "sum_slots", "tiles_3",
    "tiles_1", "k_blocks", "c_blocks", "parts", "W",
)  # fmt: skip


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """Tells the compiler that ALIGN divides it."""
    return value // ALIGN * ALIGN


@triton.jit
def shuffled(k, K, SHUFFLE: tl.constexpr):
    """The channel of a fusion's result that shows channel k of its two groups."""
    if SHUFFLE:
        k = k % (K // 2) * 2 + k // (K // 2)
    return k


@triton.jit
def norm(statistics_ptr, gamma_ptr, beta_ptr, eps, m, K, k, inside):
    """(a, β, μ, i) of BatchNorm m, each [B] float32. statistics [2·m, K]: mean and biased variance."""
    mu = tl.load(statistics_ptr + 2 * m * K + k, mask=inside, other=0.0)
    variance = tl.load(statistics_ptr + (2 * m + 1) * K + k, mask=inside, other=1.0)
    gamma = tl.load(gamma_ptr + k, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + k, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(variance + eps)
    return gamma * inverse, beta, mu, inverse


@triton.jit(do_not_specialize=INTS)
def train_moments_fwd_kernel(
    y3_ptr,  # up to three maps of `columns`, of K, K and C_x channels
    y1_ptr,
    x_ptr,
    rows_ptr,  # [2, programs, columns]: mean, and sum of squared distances from it
    sums_ptr,  # [N, slots, C_x]: of each image of x
    images,
    block,
    slots,
    rows,
    area,
    span,
    of_x,  # its pixels, and those of a slot
    span_x,
    K,
    C_x,
    columns,
    pitch_3,
    pitch_1,
    pitch_x,
    tiles_3,  # tiles of channels
    tiles_1,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.program_id(1)
    slot = row % slots
    K = aligned(K, ALIGN)
    C_x = aligned(C_x, ALIGN)
    is_3 = tile < tiles_3
    is_x = tile >= tiles_3 + tiles_1
    ptr = tl.where(is_3, y3_ptr, tl.where(is_x, x_ptr, y1_ptr))
    pitch = aligned(tl.where(is_3, pitch_3, tl.where(is_x, pitch_x, pitch_1)), ALIGN)
    pixels = tl.where(is_x, of_x, area)
    step = tl.where(is_x, span_x, span)
    c = (tile - tl.where(is_3, 0, tl.where(is_x, tiles_3 + tiles_1, tiles_3))) * BC + tl.arange(0, BC)
    inside = c < tl.where(is_x, C_x, K)
    column = tl.where(is_3, 0, tl.where(is_x, columns - C_x, K)) + c
    start = slot * step
    stop = tl.minimum(start + step, pixels)
    first = row // slots * block
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    count = 0.0
    for n in range(first, tl.minimum(first + block, images)):
        image = tl.zeros((BC,), tl.float32)
        for p0 in range(start, stop, BP):
            p = p0 + tl.arange(0, BP)
            mask = (p < stop)[:, None] & inside[None, :]
            at = wide(n, INT64) * pixels + p
            v = tl.load(ptr + at[:, None] * pitch + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
            here = tl.minimum(stop - p0, BP).to(tl.float32)
            total = tl.sum(v, 0)
            off = tl.where(mask, v - (total / here)[None, :], 0.0)
            # Chan's way to join two sets: sums of large squares would cancel.
            distance = total / here - mean
            share = here / (count + here)
            mean += distance * share
            squares += tl.sum(off * off, 0) + distance * distance * (count * share)
            count += here
            image += total
        if sums_ptr is not None:
            at = (wide(n, INT64) * slots + slot) * C_x + c
            tl.store(sums_ptr + at, image, mask=inside & is_x)
    tl.store(rows_ptr + row * columns + column, mean, mask=inside)
    tl.store(rows_ptr + (rows + row) * columns + column, squares, mask=inside)


@triton.jit
def moments_of(
    rows_ptr, column, inside, columns, rows, images, block, slots, area, span, BR: tl.constexpr, BC: tl.constexpr
):
    """(mean, biased variance), each [BC], from what the programs of `train_moments_fwd_kernel` left."""
    about = tl.load(rows_ptr + column, mask=inside, other=0.0)
    total = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        pixels = tl.maximum(tl.minimum(span, area - row % slots * span), 0)
        count = (tl.maximum(tl.minimum(block, images - row // slots * block), 0) * pixels).to(tl.float32)  # [BR]
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * columns + column[None, :]
        off = tl.load(rows_ptr + at, mask=mask, other=0.0) - about[None, :]
        off = tl.where(mask, off, 0.0)
        total += tl.sum(count[:, None] * off, 0)
        squares += tl.sum(tl.load(rows_ptr + rows * columns + at, mask=mask, other=0.0) + count[:, None] * off * off, 0)
    count = images.to(tl.float32) * area
    off = total / count
    return about + off, tl.maximum(squares / count - off * off, 0.0)


@triton.jit(do_not_specialize=INTS)
def train_gate_fwd_kernel(
    rows_ptr,
    sums_ptr,  # None: the statistics only
    weight_ptr,  # [K, C_x / groups]
    gamma_ptr,  # of the BatchNorm of x, or None
    beta_ptr,
    statistics_ptr,  # [2·MAPS, K]
    vectors_ptr,  # [N, C_x + K]: means of x, gate
    eps,
    block,  # of the rows: they can be of other images than those that have a gate
    slots,
    rows,
    images,
    area,
    span,
    n_images,
    sum_slots,
    of_x,
    K,
    C_x,
    columns,
    GROUPS: tl.constexpr,
    MAPS: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    INT64: tl.constexpr,
):
    of_group = K // GROUPS
    group = tl.program_id(2)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside_k = k < of_group
    k += group * of_group
    if tl.program_id(0) == 0:
        for m in tl.static_range(MAPS):
            mean, variance = moments_of(
                rows_ptr, m * K + k, inside_k, columns, rows, images, block, slots, area, span, BR, BK
            )
            tl.store(statistics_ptr + 2 * m * K + k, mean, mask=inside_k)
            tl.store(statistics_ptr + (2 * m + 1) * K + k, variance, mask=inside_k)
    if sums_ptr is not None:
        n = tl.program_id(0) * BI + tl.arange(0, BI)
        of_image = wide(n, INT64) * (C_x + K)
        width = C_x // GROUPS
        logits = tl.zeros((BI, BK), tl.float32)
        for first in range(0, width, BC):
            t = first + tl.arange(0, BC)
            c = group * width + t
            mask = (n < n_images)[:, None] & (t < width)[None, :]
            seen = tl.zeros((BI, BC), tl.float32)
            for slot in range(sum_slots):
                at = (wide(n, INT64) * sum_slots + slot)[:, None] * C_x + c[None, :]
                seen += tl.load(sums_ptr + at, mask=mask, other=0.0)
            seen = seen / of_x
            if tl.program_id(1) == 0:
                tl.store(vectors_ptr + of_image[:, None] + c[None, :], seen, mask=mask)
            if gamma_ptr is not None:
                mean, variance = moments_of(
                    rows_ptr, 2 * K + c, t < width, columns, rows, images, block, slots, area, span, BR, BC
                )
                gamma = tl.load(gamma_ptr + c, mask=t < width, other=0.0).to(tl.float32)
                beta = tl.load(beta_ptr + c, mask=t < width, other=0.0).to(tl.float32)
                seen = (seen - mean[None, :]) * (gamma / tl.sqrt(variance + eps))[None, :] + beta[None, :]
            w_mask = inside_k[:, None] & (t < width)[None, :]
            w = tl.load(weight_ptr + k[:, None] * width + t[None, :], mask=w_mask, other=0.0).to(tl.float32)  # [BK, BC]
            seen = tl.where(mask, seen, 0.0)
            logits = tl.dot(seen, tl.trans(w), logits, input_precision="ieee")
        s = tl.sigmoid(logits)
        if gamma_ptr is None:
            s = 2 * s
        mask = (n < n_images)[:, None] & inside_k[None, :]
        tl.store(vectors_ptr + of_image[:, None] + (C_x + k)[None, :], s, mask=mask)


@triton.jit
def before(y3, y1, x, s, a3, a1, a0, b, b0, mu3, mu1, mu0, SKIP: tl.constexpr):
    """t: [BP, BC]. s [BC]: the gate of the image; b = β3 + β1."""
    t = a3[None, :] * (y3 - mu3[None, :]) + a1[None, :] * (y1 - mu1[None, :]) + b[None, :]
    if SKIP:
        t += s[None, :] * (a0[None, :] * (x - mu0[None, :]) + b0[None, :])
    else:
        t *= s[None, :]
    return t


@triton.jit
def through(g, t, RELU: tl.constexpr):
    """The gradient of t from that of φ(t). ReLU's is zero where t ≤ 0, whatever g is: 0 · ∞ would be NaN."""
    if RELU:
        d = tl.where(t <= 0, 0.0, g)
    else:
        s = tl.sigmoid(t)
        d = g * (s * (1 + t * (1 - s)))
    return d


@triton.jit(do_not_specialize=INTS)
def train_combine_fwd_kernel(
    y3_ptr,
    y1_ptr,
    x_ptr,  # None without a skip, as gamma0 and beta0
    out_ptr,
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
    ALIGN: tl.constexpr,
    SHUFFLE: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    INT64: tl.constexpr,
):
    """y = φ(t), in one pass."""
    SKIP: tl.constexpr = x_ptr is not None
    row = tl.program_id(0)
    K = aligned(K, ALIGN)
    pitch_3 = aligned(pitch_3, ALIGN)
    pitch_1 = aligned(pitch_1, ALIGN)
    pitch_x = aligned(pitch_x, ALIGN)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = k < K
    a3, b3, mu3, _ = norm(statistics_ptr, gamma3_ptr, beta3_ptr, eps3, 0, K, k, inside)
    a1, b1, mu1, _ = norm(statistics_ptr, gamma1_ptr, beta1_ptr, eps1, 1, K, k, inside)
    a0, b0, mu0 = a3, a3, a3
    if SKIP:
        a0, b0, mu0, _ = norm(statistics_ptr, gamma0_ptr, beta0_ptr, eps0, 2, K, k, inside)
    start = row % slots * span
    first = row // slots * block
    for n in range(first, tl.minimum(first + block, images)):
        s = tl.load(vectors_ptr + wide(n, INT64) * (C_x + K) + C_x + k, mask=inside, other=0.0)
        for p0 in range(start, tl.minimum(start + span, area), BP):
            p = p0 + tl.arange(0, BP)
            mask = (p < tl.minimum(start + span, area))[:, None] & inside[None, :]
            at = (wide(n, INT64) * area + p)[:, None]
            y3 = tl.load(y3_ptr + at * pitch_3 + k[None, :], mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
            y1 = tl.load(y1_ptr + at * pitch_1 + k[None, :], mask=mask, other=0.0).to(tl.float32)
            x = y1
            if SKIP:
                x = tl.load(x_ptr + at * pitch_x + k[None, :], mask=mask, other=0.0).to(tl.float32)
            t = before(y3, y1, x, s, a3, a1, a0, b3 + b1, b0, mu3, mu1, mu0, SKIP)
            y = tl.where(t < 0, 0.0, t) if RELU else t * tl.sigmoid(t)
            tl.store(out_ptr + at * K + shuffled(k, K, SHUFFLE)[None, :], y, mask=mask)
