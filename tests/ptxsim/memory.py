"""Device memory: where host arrays lie in the address space of kernels, and what is known of their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import PtxError
from .native import core

PARAM_BASE, SYMBOL_BASE, BUFFER_BASE = 0x7E0000000000, 0x7D0000000000, 0x7F0000000000
GUARD = 1 << 20  # bytes between buffers, so that what runs past one does not hit the next
ALIGNMENT = 512
UNINITIALISED, READ, WRITTEN, PENDING = 1, 2, 4, 8  # shadow bits, as in machine.hpp
SYMBOL_ID, PARAM_ID, REGISTERED_ID = -1, -3, -10  # AllocationDesc::id; registered buffer k has REGISTERED_ID - k
READ_WRITE, CONSTANT, PARAMETER = range(3)
LINE = 128


class Uninit:
    """Wraps an array whose present contents the kernel must not read."""

    def __init__(self, array: Any):
        self.array = array


def is_torch(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def is_array(x: Any) -> bool:
    return is_torch(x) or isinstance(x, np.ndarray)


@dataclass
class Span:
    """The bytes of an array, and those of the storage it is a view of."""

    start: int
    size: int
    root: int
    root_size: int
    writable: bool


def span_of(x: Any) -> Span:
    if is_torch(x):
        if x.device.type != "cpu":
            raise PtxError(f"the simulator takes CPU tensors, got one on {x.device}")
        storage = x.untyped_storage()
        elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        return Span(x.data_ptr(), elements * x.element_size(), storage.data_ptr(), storage.nbytes(), True)
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = np.lib.array_utils.byte_bounds(x)
    root_low, root_high = np.lib.array_utils.byte_bounds(root)
    size = high - low if x.size else 0
    return Span(low, size, root_low, root_high - root_low, bool(x.flags.writeable))


@dataclass
class Storage:
    host: int
    size: int
    device: int
    shadow: np.ndarray
    owner: Any  # keeps the host memory alive


@dataclass
class Range:
    """Bytes that a launch may touch."""

    start: int  # on the host
    size: int
    id: int
    writable: bool
    storage: Storage

    @property
    def shadow(self) -> np.ndarray:
        offset = self.start - self.storage.host
        return self.storage.shadow[offset : offset + self.size]

    @property
    def device(self) -> int:
        return self.storage.device + self.start - self.storage.host


class DeviceMemory:
    """Maps storages to device addresses. Arrays that are views of one storage keep their distance."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.registered: list[tuple[Span, Any]] = []
        self.next_base = BUFFER_BASE

    def copy(self) -> DeviceMemory:
        """The same buffers; what is placed in the copy is not placed here."""
        other = DeviceMemory()
        other.storages, other.registered = list(self.storages), list(self.registered)
        other.next_base = self.next_base
        return other

    def place(self, array: Any, span: Span) -> Storage:
        for storage in self.storages:
            if storage.host <= span.root and span.root + span.root_size <= storage.host + storage.size:
                return storage
        shadow = np.zeros(max(span.root_size, 1), np.uint8)
        storage = Storage(span.root, max(span.root_size, 1), self.next_base, shadow, array)
        self.storages.append(storage)
        self.next_base += -(-storage.size // ALIGNMENT) * ALIGNMENT + GUARD
        return storage

    def address(self, array: Any) -> int:
        span = span_of(array)
        storage = self.place(array, span)
        return storage.device + span.start - storage.host

    def register(self, array: Any) -> int:
        """Gives an array, or Uninit(array), a lasting device address and makes it accessible to every launch."""
        plain = array.array if isinstance(array, Uninit) else array
        if not is_array(plain):
            raise PtxError(f"cannot register a {type(plain).__name__}: only numpy arrays and CPU tensors")
        span = span_of(plain)
        address = self.address(plain)
        if isinstance(array, Uninit):
            self.mark_uninitialised(plain)
        if not any(known == span for known, _ in self.registered):
            self.registered.append((span, plain))
        return address

    def begin_launch(self, dependent: bool) -> None:
        """Forgets what the last launch touched; what it, and the launches that it depended on, wrote is pending for a
        dependent one.
        """
        for storage in self.storages:
            renew(storage.shadow, dependent)

    def mark_uninitialised(self, array: Any) -> None:
        span = span_of(array)
        storage = self.place(array, span)
        offset = span.start - storage.host
        storage.shadow[offset : offset + span.size] |= UNINITIALISED

    def ranges(self, arrays: list[tuple[int, Any]]) -> list[Range]:
        """What a launch with these arguments (number, array) may touch; overlapping arrays make one range."""
        entries = [(span_of(array), number, array) for number, array in arrays]
        entries += [(span, REGISTERED_ID - k, array) for k, (span, array) in enumerate(self.registered)]
        entries.sort(key=lambda entry: (entry[0].start, -entry[0].size))
        merged: list[Range] = []
        for span, number, array in entries:
            last = merged[-1] if merged else None
            storage = self.place(array, span)
            if last is not None and span.start < last.start + last.size and last.storage is storage:
                last.size = max(last.size, span.start + span.size - last.start)
                last.writable |= span.writable
                if number >= 0:
                    last.id = min(last.id, number) if last.id >= 0 else number
            elif span.size:
                merged.append(Range(span.start, span.size, number, span.writable, storage))
        return merged


def renew(shadow: np.ndarray, dependent: bool) -> None:
    if dependent:
        np.bitwise_or(shadow, PENDING, out=shadow, where=(shadow & WRITTEN) != 0)
    shadow &= UNINITIALISED | (PENDING if dependent else 0)


@dataclass
class AllocationTable:
    """The rows that the native core gets, and the arrays behind them."""

    races: bool
    rows: list[tuple] = field(default_factory=list)
    keep: list[np.ndarray] = field(default_factory=list)

    def _race_arrays(self, size: int) -> tuple[int, int]:
        # np.zeros takes pages only where they are touched.
        records = (size // 16 + 2) * core().READ_RECORD_BYTES
        arrays = (np.zeros(size, np.uint32), np.zeros(records, np.uint8))
        self.keep += arrays
        return arrays[0].ctypes.data, arrays[1].ctypes.data

    def _add(self, device: int, size: int, host: int, shadow: np.ndarray, kind: int, id: int) -> None:
        self.keep.append(shadow)
        writes, readers = self._race_arrays(size) if self.races and kind == READ_WRITE else (0, 0)
        self.rows.append((device, size, host, shadow.ctypes.data, writes, readers, kind, id))

    def add_range(self, r: Range) -> None:
        self._add(r.device, r.size, r.start, r.shadow, READ_WRITE if r.writable else CONSTANT, r.id)

    def add_array(self, device: int, data: np.ndarray, shadow: np.ndarray, kind: int, id: int) -> None:
        """Module variables and parameters"""
        self.keep.append(data)
        self._add(device, data.size, data.ctypes.data, shadow, kind, id)

    def table(self) -> np.ndarray:
        return np.array(sorted(self.rows), core().ALLOCATION)


def touched_lines(shadow: np.ndarray, device: int, bits: int) -> int:
    """How many 128-byte lines have a byte with one of these shadow bits."""
    lead = device % LINE
    touched = np.zeros(-(-(lead + shadow.size) // LINE) * LINE, bool)
    touched[lead : lead + shadow.size] = shadow & bits
    return int(touched.reshape(-1, LINE).any(axis=1).sum())
