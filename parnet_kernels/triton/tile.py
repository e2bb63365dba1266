"""Device functions every convolution kernel shares: which pixels a tile holds, the main loop, gates, channel sums.

A tile is [BM pixels, BN output channels]. `accumulate` is the implicit GEMM: A [BM, BK] is gathered from the NHWC
map, one tap and BK channels at a time, B [BK, BN] from the packed weights (`pack.py`).
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

#: Arguments that follow from the number of images. Kernels are not compiled anew for those that are 1 or a multiple of
#: 16: no access gets wider by it.
OF_BATCH = ("images", "rows", "pixels", "splits")


@triton.jit
def tile_rows(tile, GH, GW, images, tiles_per_image, BM: tl.constexpr, PER_IMAGE: tl.constexpr):
    """(image, row, column, inside), each [BM]: the pixels of a tile on the grid [images, GH, GW].

    PER_IMAGE: a tile never crosses images (then `image` is a scalar); else pixels of all images are one row of tiles.
    """
    area = GH * GW
    if PER_IMAGE:
        image = tile // tiles_per_image
        pixel = (tile % tiles_per_image) * BM + tl.arange(0, BM)
        inside = pixel < area
    else:
        flat = tile * BM + tl.arange(0, BM)
        image = flat // area
        pixel = flat % area
        inside = image < images
    return image, pixel // GW, pixel % GW, inside


@triton.jit
def wide(index, INT64: tl.constexpr):
    """A stride (or index) in int64 if offsets need it; whatever is multiplied by it follows."""
    if INT64:
        index = tl.cast(index, tl.int64)
    return index


@triton.jit
def taps_inside(top, left, inside, size, STEP: tl.constexpr, ACROSS: tl.constexpr):
    """[BM] bit masks: bit ACROSS·r + s is set where tap (r, s), at (top + STEP·r, left + STEP·s), lies in the map.

    Computed once a tile: the main loop then shifts and tests one bit.
    """
    columns = tl.zeros_like(left)
    bits = tl.zeros_like(left)
    for s in tl.static_range(ACROSS):
        w = left + STEP * s
        columns |= ((w >= 0) & (w < size[1])).to(tl.int32) << s
    for r in tl.static_range(ACROSS):
        h = top + STEP * r
        bits |= tl.where((h >= 0) & (h < size[0]), columns, 0) << (ACROSS * r)
    return tl.where(inside, bits, 0)


@triton.jit
def tile_columns(tile_n, edge, K, BN: tl.constexpr, SPLIT_COLUMNS: tl.constexpr):
    """(first column, past the last) of a tile's columns. SPLIT_COLUMNS: no tile holds columns on both sides of
    `edge`.
    """
    first = tile_n * BN
    past = K
    if SPLIT_COLUMNS:
        below = (edge + BN - 1) // BN
        first = tl.where(tile_n < below, first, edge + (tile_n - below) * BN)
        past = tl.where(tile_n < below, edge, K)
    return first, past


@triton.jit
def accumulate(
    acc,  # [BM, BN] float32
    x_ptr,
    y_ptr,
    w_ptr,
    image,  # [BM] or scalar; pixel grid coordinates i, j, inside: [BM]
    i,
    j,
    inside,
    columns,  # [BN] columns of the packed weight
    start,
    stop,  # iterations: (channel chunk, input, tap), tap fastest, so that neighbouring taps meet in the cache
    border,  # see SIDE
    parity,
    size,  # (H, W) of the maps
    x_strides,  # (image, row, column)
    w_strides,  # (column of the product, tap, input, channel)
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    INPUTS: tl.constexpr,
    FLIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIDE: tl.constexpr,
    BORDER: tl.constexpr,  # what divides the border's channel in either input: so wide are masked accesses
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):
    """acc and iterations [start, stop) of the 3×3 convolution as an implicit GEMM.

    FLIP turns the weights by 180° (input gradient, stride 1). TRANSPOSED is the input gradient of stride 2 for result
    pixels (2i + parity[0], 2j + parity[1]): even rows meet one row of taps, odd rows two. SIDE "below" or "above":
    of the interleaved channels 2c + input only those below `border`, or the others, are read; the rest count as zeros,
    which a zero weight would not make of an infinity. "": all are read.
    """
    if TRANSPOSED:
        across = 1 + parity[1]
        taps = (1 + parity[0]) * across
        top = i + parity[0]
        left = j + parity[1]
        inside_taps = taps_inside(top, left, inside, size, -1, 2)  # [BM]
    else:
        across = 3
        taps = 9
        top = i * STRIDE - 1
        left = j * STRIDE - 1
        inside_taps = taps_inside(top, left, inside, size, 1, 3)
    # Widened before anything is multiplied by them.
    x_row = wide(x_strides[1], INT64)
    x_column = wide(x_strides[2], INT64)
    w_tap = wide(w_strides[1], INT64)
    w_input = wide(w_strides[2], INT64)
    w_channel = wide(w_strides[3], INT64)
    k = tl.arange(0, BK)
    pixel = image * wide(x_strides[0], INT64) + top * x_row + left * x_column
    a_offsets = pixel[:, None] + k[None, :]  # [BM, BK]
    b_offsets = columns[None, :] * wide(w_strides[0], INT64) + k[:, None] * w_channel  # [BK, BN]
    for step in range(start, stop):
        tap = step % taps
        chunk = step // taps
        r = tap // across
        s = tap % across
        a_base = x_ptr
        b_base = w_ptr
        source = chunk % INPUTS
        if INPUTS == 2:
            a_base = tl.where(source == 0, x_ptr, y_ptr)
            b_base += source * w_input
            chunk = chunk // 2
        if TRANSPOSED:
            a_base -= r * x_row + s * x_column
            b_base += (3 * (1 - parity[0] + 2 * r) + 1 - parity[1] + 2 * s) * w_tap
            mask = (inside_taps >> (2 * r + s)) & 1
        else:
            a_base += r * x_row + s * x_column
            b_base += (8 - tap if FLIP else tap) * w_tap
            mask = (inside_taps >> tap) & 1
        c = chunk * BK
        mask = (mask != 0)[:, None]
        if SIDE != "":
            past = (border - source + 1) // 2 // BORDER * BORDER
            own = c + k < past if SIDE == "below" else c + k >= past
            mask = mask & own[None, :]
        a = tl.load(a_base + c + a_offsets, mask=mask, other=0.0)  # [BM, BK]
        b = tl.load(b_base + c * w_channel + b_offsets)  # [BK, BN]
        if PRECISION == "widen":
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def convolve(
    x_ptr,
    y_ptr,
    w_ptr,
    workspace_ptr,  # [splits, rows, width] float32
    rows_of_tile,  # (image, i, j, inside, row of the workspace)
    columns_of_tile,  # of `tile_columns`
    split,
    splits,
    parity,
    size,
    x_strides,
    w_strides,
    w_group,  # (stride of the packed weight's group, first channel of group 1, columns of a group, its channels)
    steps,  # chunks × inputs of one group
    edge,
    workspace,  # (rows, width)
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    FLIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    BORDER: tl.constexpr,
    STAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):
    """[BM, BN] float32: the convolution of one tile, columns in the order of the result's channels.

    STAGE "whole" computes it, "part" computes split `split` of it, "finish" adds the parts in the workspace in order.
    Two GROUPS: even columns are group 0, odd columns group 1 (the channel shuffle); BORDER, not zero: a chunk holds
    channels of both. SPLIT_COLUMNS: columns below `edge` take the first half of the reduction only, the others the
    second half (input gradient of a grouped convolution).
    """
    image, i, j, inside, row = rows_of_tile
    first, past = columns_of_tile
    if STAGE == "finish":
        n = first + tl.arange(0, BN)
        offsets = wide(row, INT64)[:, None] * workspace[1] + n[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        mask = workspace_mask(inside, n, past, SPLIT_COLUMNS)
        for part in range(splits):
            base = workspace_ptr + wide(part, INT64) * workspace[0] * workspace[1]
            acc += tl.load(base + offsets, mask=mask, other=0.0)
    else:
        GROUP_BN: tl.constexpr = BN // GROUPS
        columns = (first // GROUPS + tl.arange(0, GROUP_BN)) % w_group[2]  # past the end: any column, not stored
        taps = (1 + parity[0]) * (1 + parity[1]) if TRANSPOSED else 9
        low = 0
        high = steps
        if SPLIT_COLUMNS:
            low = tl.where(first < edge, 0, steps // 2)
            high = tl.where(first < edge, steps // 2, steps)
        start = low * taps + (high - low) * taps * split // splits
        stop = low * taps + (high - low) * taps * (split + 1) // splits
        inner = stop  # past the last iteration whose channels are all group 0's
        if BORDER > 0:
            inner = tl.minimum(stop, w_group[3] // 2 // BK * (INPUTS * 9))
        acc = accumulate(
            tl.zeros((BM, GROUP_BN), tl.float32), x_ptr, y_ptr, w_ptr, image, i, j, inside, columns, start, inner, 0,
            parity, size, x_strides, w_strides, BK, STRIDE, INPUTS, FLIP, TRANSPOSED, "", BORDER, PRECISION, INT64,
        )  # fmt: skip
        if BORDER > 0:
            acc = accumulate(
                acc, x_ptr, y_ptr, w_ptr, image, i, j, inside, columns, tl.maximum(start, inner), stop, w_group[3],
                parity, size, x_strides, w_strides, BK, STRIDE, INPUTS, FLIP, TRANSPOSED, "below", BORDER, PRECISION,
                INT64,
            )  # fmt: skip
        if GROUPS == 2:
            x_ptr += w_group[1]
            y_ptr += w_group[1]
            w_ptr += wide(w_group[0], INT64)
            odd = tl.zeros((BM, GROUP_BN), tl.float32)
            if BORDER > 0:
                inner = tl.cdiv((w_group[3] + 1) // 2 - w_group[1], BK) * (INPUTS * 9)
                inner = tl.maximum(start, tl.minimum(stop, inner))  # the first whose channels are all group 1's
                odd = accumulate(
                    odd, x_ptr, y_ptr, w_ptr, image, i, j, inside, columns, start, inner, w_group[3] - 2 * w_group[1],
                    parity, size, x_strides, w_strides, BK, STRIDE, INPUTS, FLIP, TRANSPOSED, "above", BORDER,
                    PRECISION, INT64,
                )  # fmt: skip
                start = inner
            odd = accumulate(
                odd, x_ptr, y_ptr, w_ptr, image, i, j, inside, columns, start, stop, 0,
                parity, size, x_strides, w_strides, BK, STRIDE, INPUTS, FLIP, TRANSPOSED, "", BORDER, PRECISION, INT64,
            )  # fmt: skip
            acc = tl.interleave(acc, odd)
    return acc


@triton.jit
def workspace_mask(inside, n, past, SPLIT_COLUMNS: tl.constexpr):
    """What a tile writes to the workspace and reads of it. SPLIT_COLUMNS: its columns past `past` are another's."""
    mask = inside[:, None]
    if SPLIT_COLUMNS:
        mask = mask & (n < past)[None, :]
    return mask


@triton.jit
def column_part(acc, part: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN / PARTS] columns of acc, from part·BN/PARTS on: an epilogue works on parts, or its terms would spill."""
    if PARTS > 1:
        low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        if part < PARTS // 2:
            acc = column_part(low, part, PARTS // 2, BM, BN // 2)
        else:
            acc = column_part(high, part - PARTS // 2, PARTS // 2, BM, BN // 2)
    return acc


@triton.jit
def images_of(tile, area, images, BM: tl.constexpr):
    """First and last image that a tile across images touches."""
    return tile * BM // area, tl.minimum((tile * BM + BM - 1) // area, images - 1)


@triton.jit
def gate_one(t, skip, conv_gate_ptr, skip_gate_ptr, skip_bias_ptr, image, columns, pitch, K):
    """conv_gate·t + skip_gate·skip + skip_bias with the gates of one image; a None pointer leaves its term out."""
    at = image * pitch + columns
    if conv_gate_ptr is not None:
        t = t * tl.load(conv_gate_ptr + at, mask=columns < K, other=0.0)[None, :]
    if skip_gate_ptr is not None:
        t = t + skip * tl.load(skip_gate_ptr + at, mask=columns < K, other=0.0)[None, :]
    if skip_bias_ptr is not None:
        t = t + tl.load(skip_bias_ptr + at, mask=columns < K, other=0.0)[None, :]
    return t


@triton.jit
def gate_tile(
    t,  # [BM, BN]
    skip,  # [BM, BN] or None
    conv_gate_ptr,  # each [images, pitch] float32 or None
    skip_gate_ptr,
    skip_bias_ptr,
    tile,
    image,
    columns,
    area,
    images,
    pitch,
    K,
    BM: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """`gate_one` on every row. Across images, one image after the other: gates gathered by element would spill."""
    if PER_IMAGE:
        t = gate_one(t, skip, conv_gate_ptr, skip_gate_ptr, skip_bias_ptr, image, columns, pitch, K)
    else:
        first, last = images_of(tile, area, images, BM)
        for n in range(first, last + 1):
            gated = gate_one(t, skip, conv_gate_ptr, skip_gate_ptr, skip_bias_ptr, n, columns, pitch, K)
            t = tl.where((image == n)[:, None], gated, t)
    return t


@triton.jit
def load_channel(ptr, columns, inside):
    """[1, BN] float32 of a per-channel vector, zero outside."""
    return tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def activation_of(t, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        t = t * tl.sigmoid(t)
    elif ACTIVATION == "relu":
        t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return t


@triton.jit
def store_sums(
    v,  # [BM, BN] float32, zero outside the map
    ptr,  # [images, slots, pitch] float32
    tile,
    image,
    columns,
    area,
    images,
    tiles_per_image,
    slots,
    pitch,
    BM: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """Per-channel sums of a tile, one slot per (image, tile): no atomics, so the consumer adds them in a fixed
    order.
    """
    if PER_IMAGE:
        target = image.to(tl.int64) * slots + tile % tiles_per_image
        tl.store(ptr + target * pitch + columns, tl.sum(v, 0), mask=columns < pitch)
    else:
        first, last = images_of(tile, area, images, BM)
        for n in range(first, last + 1):
            part = tl.sum(tl.where((image == n)[:, None], v, 0.0), 0)  # [BN]
            target = tl.cast(n, tl.int64) * slots + tile - n * area // BM
            tl.store(ptr + target * pitch + columns, part, mask=columns < pitch)
