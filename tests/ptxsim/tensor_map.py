"""A stand-in for CUtensorMap."""

from __future__ import annotations

import struct
from typing import Any, Protocol

from .errors import PtxError
from .memory import is_torch, span_of

MAGIC = 0x50414D5458545021  # as in bulk_copy.cpp
SWIZZLE_BYTES = {0: 256 * 16, 1: 32, 2: 64, 3: 128}


class HasRegister(Protocol):
    def register(self, array: Any) -> int: ...


def tensor_map(owner: HasRegister, array: Any, box: tuple[int, ...], swizzle: int = 0) -> bytes:
    """128 bytes that a kernel of `owner` (a PtxModule or a Session) takes where CUDA has a CUtensorMap.

    Tiled mode without interleave; what lies outside reads as zero. `box` is innermost last, like the array's shape;
    swizzle: 0 none, 1: 32, 2: 64, 3: 128 bytes. The limits of cuTensorMapEncodeTiled are checked.
    """
    shape = tuple(array.shape)
    size = array.element_size() if is_torch(array) else array.itemsize
    strides = [s * size for s in array.stride()] if is_torch(array) else list(array.strides)
    rank = len(shape)
    inner = box[-1] * size
    problem = (
        f"rank {rank}"
        if not 1 <= rank <= 5 or len(box) != rank
        else f"innermost stride {strides[-1]}, not {size}"
        if strides[-1] != size
        else f"strides {strides}: all but the innermost must be multiples of 16"
        if any(s % 16 for s in strides[:-1])
        else f"box {box}: sides are 1 to 256"
        if not all(1 <= b <= 256 for b in box)
        else f"{inner} bytes in a row of the box: a multiple of 16, at most the swizzle's {SWIZZLE_BYTES[swizzle]}"
        if inner % 16 or inner > SWIZZLE_BYTES[swizzle]
        else "base address is not a multiple of 16"
        if (span_of(array).start - span_of(array).root) % 16
        else ""
    )
    if problem:
        raise PtxError(f"tensor_map: {problem}")
    pad = [1] * (5 - rank)
    steps = [*strides[::-1][1:], 0, 0, 0, 0][:4]
    base = owner.register(array)
    raw = struct.pack(
        "<QQIIII5I5I4Q", MAGIC, base, size, rank, swizzle, 0, *shape[::-1], *pad, *box[::-1], *pad, *steps
    )
    return raw.ljust(128, b"\0")
