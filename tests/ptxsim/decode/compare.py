"""Comparison, selection, moves between registers, and address spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import isa
from ..parser import TYPE_SIZE, split_top
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program


def _comparison(opcode: Opcode) -> dict:
    return {
        "compare": opcode.require(isa.COMPARISONS),
        "bool_op": opcode.choose(isa.BOOL_OPERATORS, 0),
        "flags": ["Ftz"] if opcode.has("ftz") else [],
    }


@handles("setp")
def setp(program: Program, opcode: Opcode) -> None:
    type, args = opcode.type, opcode.args
    dst = [program.operand(arg, "pred") for arg in args[0].split("|")]
    src = [program.operand(arg, type) for arg in args[1:3]] + [program.operand(arg, "pred") for arg in args[3:]]
    op = "SetpPacked" if type in ("f16x2", "bf16x2") else "Setp"
    program.emit(op, dst, src, type, **_comparison(opcode))


@handles("set")
def set_(program: Program, opcode: Opcode) -> None:
    result, compared = opcode.types[0], opcode.types[-1]
    src = [program.operand(arg, compared) for arg in opcode.args[1:3]]
    src += [program.operand(arg, "pred") for arg in opcode.args[3:]]
    program.emit("Set", [program.operand(opcode.args[0])], src, result, compared, **_comparison(opcode))


@handles("selp")
def selp(program: Program, opcode: Opcode) -> None:
    dst, a, b = (program.operand(arg, opcode.type) for arg in opcode.args[:3])
    program.emit("Selp", [dst], [a, b, program.operand(opcode.args[3], "pred")], opcode.type)


@handles("slct")
def slct(program: Program, opcode: Opcode) -> None:
    type, selector = opcode.types[0], opcode.types[-1]
    dst, a, b = (program.operand(arg, type) for arg in opcode.args[:3])
    flags = ["Ftz"] if opcode.has("ftz") else []
    program.emit("Slct", [dst], [a, b, program.operand(opcode.args[3], selector)], type, selector, flags=flags)


TESTS = {n: i for i, n in enumerate(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))}


@handles("testp")
def testp(program: Program, opcode: Opcode) -> None:
    dst = program.operand(opcode.args[0], "pred")
    program.emit("Testp", [dst], [program.operand(opcode.args[1], opcode.type)], opcode.type, aux=opcode.require(TESTS))


def vector_destination(program: Program, name: str, size: int) -> int:
    return program.operand(name, "b64" if size == 8 else "b32")


@handles("mov")
def mov(program: Program, opcode: Opcode) -> None:
    type, (to, source) = opcode.type, opcode.args
    size = TYPE_SIZE[type]
    if source in isa.CLOCKS:
        program.emit("Clock", [program.operand(to, type)], [], type)
    elif to.startswith("{"):
        names = split_top(to[1:-1])
        dst = [vector_destination(program, name, size // len(names)) for name in names]
        program.emit("Unpack", dst, [program.operand(source, type)], type, aux=8 * size // len(names))
    elif source.startswith("{"):
        elements = program.vector(source)
        program.emit("Pack", [program.operand(to, type)], elements, type, aux=8 * size // len(elements))
    else:
        dst, src = program.operand(to, type), program.operand(source, type)
        wide = int(size == 8)
        mixed = type not in ("pred", "b128") and ((dst & 1) != wide or (src >= 0 and (src & 1) != wide))
        program.emit("Mov", [dst], [src], type, aux=int(mixed))


@handles("cvta")
def cvta(program: Program, opcode: Opcode) -> None:
    space = opcode.choose(isa.SPACES, isa.GLOBAL)
    window = {isa.SHARED: program.shared_window, isa.LOCAL: program.local_window}.get(space, 0)
    if opcode.has("to"):
        window = -window
    dst, src = (program.operand(arg, opcode.type) for arg in opcode.args)
    program.emit("AddImmediate", [dst], [src], opcode.type, imm=window)


@handles("isspacep")
def isspacep(program: Program, opcode: Opcode) -> None:
    dst = program.operand(opcode.args[0], "pred")
    flags = ["Cluster"] if opcode.has("shared::cluster") else []
    space = opcode.require(isa.SPACES)
    program.emit("Isspacep", [dst], [program.operand(opcode.args[1], "b64")], flags=flags, aux=space)


@handles("mapa")
def mapa(program: Program, opcode: Opcode) -> None:
    flags = ["Cluster"] if opcode.has("shared::cluster") else []  # without: generic addresses
    dst, address = (program.operand(arg, opcode.type) for arg in opcode.args[:2])
    program.emit("Mapa", [dst], [address, program.operand(opcode.args[2])], opcode.type, flags=flags)


@handles("getctarank")
def getctarank(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["shared::cluster"])
    dst, address = program.operand(opcode.args[0]), program.operand(opcode.args[1], opcode.type)
    program.emit("CtaRank", [dst], [address])


@handles("createpolicy")
def createpolicy(program: Program, opcode: Opcode) -> None:
    opcode.ignore({*isa.CACHE_HINTS, "fractional", "range", "cvt", "L2", "global"})
    program.emit("Mov", [program.operand(opcode.args[0], "b64")], [program.immediate(0)], "b64")
