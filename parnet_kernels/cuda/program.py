"""Programs for the CUDA kernels: launches recorded once for a shape, played by `torch.ops.parnet._cuda_play`.

A program is a sequence of records (csrc/cuda/program.h): kernel, grid, arguments, and which of the arguments' pointers
are byte offsets into which buffer. Playing one allocates nothing and decides nothing; the same bytes run on a GPU, in
the PTX simulator and through the host code alone. The structures mirror csrc/cuda/layer.h
and csrc/cuda/program.h: a library with other names, sizes or offsets is refused (parnet_kernels/_native.py).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_int64, c_uint64
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

FORMAT = 1  # of programs and packed tensors; csrc/cuda/layout.h says when it is raised
MAX_LAYERS = 4
DEPENDENT, COOPERATIVE, PAIRS = 1, 2, 4
SKIP, RELU, VECTOR_STORE, ROUND = 1, 2, 4, 8
ALIGNMENT = 256
_BUFFER_SHIFT = 48
_MATHS = ("f16", "bf16", "tf32", "f32")


class Kind(IntEnum):
    LEVEL, STEM, ENTER, CLASSIFIER, HOPPER = range(5)


class Pairing(IntEnum):
    """What two adjacent blocks (warpgroup tiles) do together: nothing, load each other's weights, add their splits."""

    ALONE, PIXELS, SPLITS = range(3)


class Record(ctypes.Structure):
    _fields_: ClassVar = [
        *((n, c_int32) for n in ("kernel", "grid", "shared", "flags")),
        *((n, c_int32) for n in ("argument_bytes", "relocations", "label_bytes", "record_bytes")),
    ]


class Relocation(ctypes.Structure):
    _fields_: ClassVar = [("at", c_int32), ("buffer", c_int32), ("offset", c_int64)]


class Output(ctypes.Structure):
    _fields_: ClassVar = [
        ("y", c_uint64),
        ("sums", c_uint64),
        ("vectors", c_uint64),
        *((n, c_int32) for n in ("pitch", "width", "group_step", "channel_step", "out_h", "out_w")),
        *((n, c_int32) for n in ("tiles_down", "tiles_across", "flags")),
        ("inverse_area", c_float),
    ]


class Input(ctypes.Structure):
    _fields_: ClassVar = [("x", c_uint64), ("sums", c_uint64), ("pitch", c_int32), ("sum_tiles", c_int32)]


class LayerCall(ctypes.Structure):
    _fields_: ClassVar = [
        ("inputs", Input * 2),
        ("out", Output),
        *((n, c_uint64) for n in ("weight", "gate_weight", "chunk_table", "chunk_masks")),
        *((n, c_uint64) for n in ("partial", "partial_logits", "arrivals")),
        *((n, c_int32) for n in ("first_block", "blocks", "tile", "pairing", "h", "w", "stride", "groups")),
        *((n, c_int32) for n in ("column_tiles", "chunks", "splits", "tile_rows", "tile_cols")),
        *((n, c_int32) for n in ("cells", "cell_pitch", "images")),
    ]


class LevelCall(ctypes.Structure):
    _fields_: ClassVar = [("layers", c_int32), ("reserved", c_int32), ("layer", LayerCall * MAX_LAYERS)]


class Strided(ctypes.Structure):
    _fields_: ClassVar = [("data", c_uint64), ("stride", c_int64 * 4), *((n, c_int32) for n in "nchw")]


class StemCall(ctypes.Structure):
    _fields_: ClassVar = [
        ("image", Strided),
        ("out", Output),
        *((n, c_uint64) for n in ("weight", "gate_weight", "image_sums", "barrier")),
        *((n, c_int32) for n in ("stride", "column_tiles", "chunks", "reserved")),
    ]


class EnterCall(ctypes.Structure):
    _fields_: ClassVar = [
        ("input", Strided),
        ("out", c_uint64),
        ("sums", c_uint64),
        *((n, c_int32) for n in ("pitch", "tiles", "round", "reserved")),
    ]


class ClassifierCall(ctypes.Structure):
    _fields_: ClassVar = [
        *((n, c_uint64) for n in ("sums", "weight", "bias", "y")),
        *((n, c_int32) for n in ("n", "sum_tiles", "pitch", "features", "classes")),
        ("inverse_area", c_float),
    ]


STRUCTURES = (Record, Relocation, Output, Input, LayerCall, LevelCall, Strided, StemCall, EnterCall, ClassifierCall)


def layout() -> dict[str, int]:
    """Sizes of structures, offsets of their fields and values of constants, as csrc/cuda/layout.h names them."""
    found = {"kFormat": FORMAT, "kMaxLayers": MAX_LAYERS}
    for structure in STRUCTURES:
        found[structure.__name__] = ctypes.sizeof(structure)
        for name, *_ in structure._fields_:
            found[f"{structure.__name__}.{name}"] = getattr(structure, name).offset
    found |= {"kDependent": DEPENDENT, "kCooperative": COOPERATIVE, "kPairs": PAIRS}
    found |= {"kSkip": SKIP, "kReLU": RELU, "kVectorStore": VECTOR_STORE, "kRound": ROUND}
    return found | {"kAlone": Pairing.ALONE, "kPixels": Pairing.PIXELS, "kSplits": Pairing.SPLITS}


def play(buffers: list[Tensor], program: Tensor) -> None:
    """Launches a program on the current stream of the buffers' device."""
    torch.ops.parnet._cuda_play(buffers, program)


def math_of(dtype: torch.dtype, precision: str) -> str:
    """The arithmetic for maps of `dtype`; `precision` of float32 is "tf32" or exact."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "f32"
    return {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def address(buffer: int, offset: int = 0) -> int:
    """What a pointer field holds until it is played: byte `offset` of buffer `buffer`. Zero is a null pointer."""
    return (buffer + 1) << _BUFFER_SHIFT | offset


def _pointers(kind: Any, base: int = 0) -> Iterator[int]:
    """Offsets of all pointer fields of a structure type."""
    if kind is c_uint64:
        yield base
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, base + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, child in kind._fields_:
            yield from _pointers(child, base + getattr(kind, name).offset)


class Arena:
    """Offsets in one workspace for blocks that live for a range of steps; first fit, largest alignment 256 bytes.

    The first `zeroed` bytes are counters: zero before the first launch, and left zero by every launch.
    """

    def __init__(self) -> None:
        self.zeroed = 0
        self._blocks: list[tuple[int, int, int, int]] = []  # first step, last step, offset, bytes

    def counters(self, count: int) -> int:
        """Offset of `count` 32-bit counters, alive for the whole program."""
        at = self.zeroed
        self.zeroed += -(-4 * count // 32) * 32
        return at

    def allocate(self, size: int, first: int, last: int) -> int:
        """Offset, from the end of the counters, of a block alive from step `first` to `last`."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        taken = sorted((o, o + b) for f, t, o, b in self._blocks if f <= last and first <= t)
        offset = 0
        for start, end in taken:
            if start - offset >= size:
                break
            offset = max(offset, end)
        self._blocks.append((first, last, offset, size))
        return offset

    @property
    def size(self) -> int:
        return max((offset + size for _, _, offset, size in self._blocks), default=0)


@dataclass
class Program:
    """Recorded launches. Buffers are numbered in the order of `_cuda_play`'s list; the workspace is one of them."""

    math: str
    labels: list[str] = field(default_factory=list)
    _records: list[bytes] = field(default_factory=list)

    def launch(self, kind: Kind, grid: int, shared: int, call: Any, label: str, flags: int = 0) -> None:
        if not 0 < grid < 2**31:
            raise ValueError(f"parnet_kernels: {label}: a grid of {grid} blocks")
        arguments = bytes(call)
        pointers = [(at, *struct.unpack_from("<Q", arguments, at)) for at in _pointers(type(call))]
        pointers = [(at, value) for at, value in pointers if value]
        text = label.encode()
        body = arguments + bytes(-len(arguments) % 8)
        for at, value in pointers:
            body += bytes(Relocation(at, (value >> _BUFFER_SHIFT) - 1, value & ((1 << _BUFFER_SHIFT) - 1)))
        body += text + bytes(-len(text) % 8)
        kernel = int(kind) * len(_MATHS) + _MATHS.index(self.math)
        sizes = len(arguments), len(pointers), len(text), ctypes.sizeof(Record) + len(body)
        self._records.append(bytes(Record(kernel, grid, shared, flags, *sizes)) + body)
        self.labels.append(label)

    def tensor(self) -> Tensor:
        """The program as `_cuda_play` takes it."""
        return torch.frombuffer(bytearray(b"".join(self._records)), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._records)


def strided(shape: Sequence[int], stride: Sequence[int], data: int) -> Strided:
    """A user's map [N, C, H, W] at address `data`."""
    return Strided(data, (c_int64 * 4)(*stride), *shape)
