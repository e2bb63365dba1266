"""ldmatrix, stmatrix, movmatrix, mma, wmma, wgmma."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .. import isa
from ..parser import parse_int
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program

INT8 = ("s8", "u8")
# k of mma.sync.m16n8 by the type of A
SHAPES = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
    "s8": (16, 32),
    "u8": (16, 32),
    "f64": (4, 8, 16),
}


def shape(opcode: Opcode) -> tuple[int, int, int]:
    for modifier in opcode.modifiers:
        if match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", modifier):
            opcode.ignore([modifier])
            return int(match[1]), int(match[2]), int(match[3])
    raise ValueError("no shape")


@handles("ldmatrix", "stmatrix")
def load_store_matrix(program: Program, opcode: Opcode) -> None:
    count = opcode.require({"x1": 1, "x2": 2, "x4": 4})
    if not opcode.has("m8n8") or opcode.type != "b16":
        opcode.fail(f"only {opcode.name}.m8n8 with .b16 is supported")
    opcode.ignore({"sync", "aligned", *isa.SPACES})
    flags = ["Transposed"] if opcode.has("trans") else []
    load = opcode.name == "ldmatrix"
    base, offset, _ = program.address(opcode.args[1 if load else 0])
    registers = program.vector(opcode.args[0 if load else 1])
    if len(registers) != count:
        opcode.fail("vector length mismatch")
    if load:
        program.emit("Ldmatrix", registers, [base], flags=flags, imm=offset, aux=count)
    else:
        program.emit("Stmatrix", [], [base, *registers], flags=flags, imm=offset, aux=count)


@handles("movmatrix")
def movmatrix(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["sync", "aligned", "m8n8", "trans"])
    program.emit("Movmatrix", [program.operand(opcode.args[0])], [program.operand(opcode.args[1])])


@handles("mma")
def mma(program: Program, opcode: Opcode) -> None:
    m, n, k = shape(opcode)
    d, a, b, c = opcode.types if len(opcode.types) == 4 else ("", "", "", "")
    int8_square = (m, n, k) == (8, 8, 16) and a in INT8
    tile = n == 8 and (m == 16 or (m == 8 and a == "f64" and k == 4)) and k in SHAPES.get(a, ())
    same = a == b or (a in INT8 and b in INT8) or (a in ("e4m3", "e5m2") and b in ("e4m3", "e5m2"))
    rows_and_columns = ("row" in opcode.modifiers and opcode.modifiers[-6:-4] == ["row", "col"]) or (
        "satfinite" in opcode.modifiers and opcode.modifiers[-7:-5] == ["row", "col"]
    )
    if not (tile or int8_square) or not same or d != c or not rows_and_columns:
        opcode.fail(f"unsupported mma shape or type '{opcode.text}'")
    opcode.ignore(["sync", "aligned", "row", "col"])
    flags = ["SatFinite"] if opcode.has("satfinite") else []
    dst = program.vector(opcode.args[0], d)
    src = program.vector(opcode.args[1], a) + program.vector(opcode.args[2], b) + program.vector(opcode.args[3], c)
    row = program.emit("Mma", dst, src, a, b, flags=flags, aux=k, imm=program.types[d], imm2=m)
    program.flops[row] = 2 * m * n * k


@handles("wmma")
def wmma(program: Program, opcode: Opcode) -> None:
    m, n, k = shape(opcode)
    opcode.ignore(["sync", "aligned"])
    if opcode.has("mma"):
        wmma_mma(program, opcode, m, n, k)
        return
    space = opcode.choose(isa.SPACES, isa.GENERIC)
    column_major = opcode.has("col")
    opcode.ignore(["row"])
    flags = ["Transposed"] if column_major else []
    args, type = opcode.args, opcode.type
    if opcode.has("load"):
        rows, columns = opcode.require({"a": (m, k), "b": (k, n), "c": (m, n)})
        base, offset, _ = program.address(args[1])
        stride = program.operand(args[2]) if len(args) > 2 else program.immediate(rows if column_major else columns)
        registers = program.vector(args[0])
        aux = rows | columns << 8
        program.emit("WmmaLoad", registers, [base, stride], type, flags=flags, space=space, imm=offset, aux=aux)
    elif opcode.has_all("store", "d"):
        base, offset, _ = program.address(args[0])
        stride = program.operand(args[2]) if len(args) > 2 else program.immediate(m if column_major else n)
        src = [base, *program.vector(args[1]), stride]
        program.emit("WmmaStore", [], src, type, flags=flags, space=space, imm=offset, aux=m | n << 8)


def wmma_mma(program: Program, opcode: Opcode, m: int, n: int, k: int) -> None:
    opcode.ignore(["row", "col"])
    types = opcode.types
    d, a, b, c = types if len(types) == 4 else (types[0], "f16", "f16", types[-1])
    if a in ("f64", "s4", "u4", "b1") or (a != b and not {a, b} <= set(INT8)):
        opcode.fail(f"unsupported wmma type '{opcode.text}'")
    dst, A, B, C = (program.vector(arg) for arg in opcode.args[:4])
    row = program.emit(
        "WmmaMma",
        dst,
        A + B + C,
        a,
        b,
        flags=["SatFinite"] if opcode.has("satfinite") else [],
        imm=program.types[d],
        imm2=program.types[c],
        aux=m | n << 8 | k << 16,
        vec=len(A),
        target=len(B),
    )
    program.flops[row] = 2 * m * n * k


@handles("wgmma")
def wgmma(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["sync", "aligned"])
    if opcode.has("fence"):
        program.emit("WgmmaFence")
    elif opcode.has("commit_group"):
        program.emit("WgmmaCommit")
    elif opcode.has("wait_group"):
        program.emit("WgmmaWait", imm=parse_int(opcode.args[0]))
    elif opcode.has("mma_async") and "sp" not in opcode.modifiers:
        wgmma_mma(program, opcode)
    else:
        opcode.fail(f"unsupported wgmma form '{opcode.text}'")


def wgmma_mma(program: Program, opcode: Opcode) -> None:
    _, n, k = shape(opcode)
    d_type, a_type, b_type = opcode.types
    args = opcode.args
    in_registers = args[1].startswith("{")
    scale_d = program.operand(args[3], "pred")
    immediates = [parse_int(arg) for arg in args[4:]]
    negate_a, negate_b = (immediates[0] < 0, immediates[1] < 0) if len(immediates) >= 2 else (False, False)
    transpose = immediates[2:]
    transpose_a = transpose[0] if transpose and not in_registers else 0
    transpose_b = transpose[-1] if transpose else 0
    options = k | in_registers << 8 | negate_a << 9 | negate_b << 10 | transpose_a << 11 | transpose_b << 12
    row = program.emit(
        "Wgmma",
        program.vector(args[0]),
        [*program.vector(args[1], "b64"), program.operand(args[2], "b64"), scale_d],
        a_type,
        b_type,
        flags=["SatFinite"] if opcode.has("satfinite") else [],
        imm=program.types[d_type],
        imm2=options,
        aux=n,
    )
    program.flops[row] = 2 * 16 * n * k  # a warp's share of the 64 rows


@handles("tcgen05")
def tcgen05(program: Program, opcode: Opcode) -> None:
    opcode.fail(f"unsupported instruction '{opcode.text}': tcgen05 (tensor memory of sm_100) is not simulated")
