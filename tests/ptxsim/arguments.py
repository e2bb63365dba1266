"""Python arguments to kernel parameters."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from .errors import PtxError
from .memory import DeviceMemory, Uninit, is_array, is_torch
from .parser import Variable
from .program import Program

FORMATS = {
    "u8": "B",
    "s8": "b",
    "b8": "B",
    "u16": "H",
    "s16": "h",
    "b16": "H",
    "u32": "I",
    "s32": "i",
    "b32": "I",
    "u64": "Q",
    "s64": "q",
    "b64": "Q",
    "f16": "e",
    "f32": "f",
    "f64": "d",
}


def _describe(index: int, param: Variable) -> str:
    return f"argument {index} ({param.name}, .{param.type}{'' if param.size <= 8 else f'[{param.size}]'})"


def _is_struct(param: Variable) -> bool:
    return param.type == "b8" and param.size > 1


def split_arrays(program: Program, args: list) -> dict[int, Any]:
    """The arguments that are buffers (the others are values), by position."""
    params = program.entry.params
    if len(args) != len(params):
        wanted = ", ".join(f"{p.name}:{p.type}" for p in params)
        raise PtxError(f"{program.entry.name} takes {len(params)} arguments ({wanted}), got {len(args)}")
    buffers = {}
    for i, arg in enumerate(args):
        plain = arg.array if isinstance(arg, Uninit) else arg
        if isinstance(arg, Uninit) and not is_array(plain):
            raise PtxError(f"{_describe(i, params[i])}: Uninit takes an array, got {type(plain).__name__}")
        if not is_array(plain):
            continue
        by_value = not is_torch(plain) and _is_struct(params[i])
        scalar = plain.ndim == 0 and params[i].size != 8
        if not by_value and not scalar:
            if params[i].size != 8:
                raise PtxError(f"{_describe(i, params[i])}: got an array, which is a pointer of 8 bytes")
            buffers[i] = plain
    return buffers


def pack(program: Program, args: list, buffers: dict[int, Any], memory: DeviceMemory) -> np.ndarray:
    """The bytes of the parameters."""
    packed = np.zeros(max(program.param_bytes, 1), np.uint8)
    for i, param in enumerate(program.entry.params):
        arg = args[i].array if isinstance(args[i], Uninit) else args[i]
        raw = struct.pack("<Q", memory.address(buffers[i])) if i in buffers else value_bytes(i, param, arg)
        offset = program.param_offset[param.name]
        packed[offset : offset + param.size] = np.frombuffer(raw, np.uint8)
    return packed


def value_bytes(index: int, param: Variable, arg: Any) -> bytes:
    """The bytes of a number, of a struct (bytes or an array of them), or of None (zeros)."""
    what = _describe(index, param)
    if arg is None:
        return bytes(param.size)
    if isinstance(arg, bytes | bytearray) or (isinstance(arg, np.ndarray) and arg.ndim):
        raw = bytes(arg) if isinstance(arg, bytes | bytearray) else arg.tobytes()
        if len(raw) != param.size:
            raise PtxError(f"{what}: {len(raw)} bytes given, {param.size} needed")
        return raw
    if hasattr(arg, "item"):
        arg = arg.item()
    if (
        not isinstance(arg, bool | int | float)
        or param.type not in FORMATS
        or param.size != struct.calcsize(FORMATS[param.type])
    ):
        raise PtxError(f"{what}: cannot pass a {type(arg).__name__}")
    kind = param.type
    if isinstance(arg, float) and kind in ("b16", "b32", "b64"):
        kind = "f" + kind[1:]
    if kind[0] == "f":
        return struct.pack("<" + FORMATS[kind], arg)
    if isinstance(arg, float):
        raise PtxError(f"{what}: cannot pass a float ({arg})")
    bits = 8 * param.size
    if not -(1 << (bits - 1)) <= arg < 1 << bits:
        raise PtxError(f"{what}: {arg} does not fit")
    return (arg & ((1 << bits) - 1)).to_bytes(param.size, "little")
