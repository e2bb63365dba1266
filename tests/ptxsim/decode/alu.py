"""Integer and floating-point arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import isa
from ..parser import parse_int
from .opcode import Opcode, float_modifiers, handles

if TYPE_CHECKING:
    from ..program import Program

PACKED_INTEGERS = ("u16x2", "s16x2")
SIMPLE = {
    "fma": "Fma",
    "div": "Div",
    "rem": "Rem",
    "cnot": "Cnot",
    "shl": "Shl",
    "shr": "Shr",
    "bfe": "Bfe",
    "bfi": "Bfi",
    "fns": "Fns",
    "popc": "Popc",
    "clz": "Clz",
    "brev": "Brev",
    "sad": "Sad",
    "ex2": "Ex2",
    "lg2": "Lg2",
    "rcp": "Rcp",
    "rsqrt": "Rsqrt",
    "sqrt": "Sqrt",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "copysign": "Copysign",
}


def emit_plain(program: Program, opcode: Opcode, op: str, **more) -> None:
    """One destination, all others sources, of one type."""
    type = opcode.type
    arguments = {}
    if type in isa.FLOAT_TYPES:
        arguments = float_modifiers(opcode)
    elif opcode.has("sat"):
        if type != "s32":
            opcode.fail(f".sat is not supported for .{type}")
        arguments = {"flags": ["Sat"]}
    dst, *src = (program.operand(arg, type) for arg in opcode.args)
    arguments.update(more)
    program.emit(op, [dst], src, type, **arguments)


@handles(*SIMPLE)
def simple(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["full", "noftz"])
    emit_plain(program, opcode, SIMPLE[opcode.name])


def packed_integer(program: Program, opcode: Opcode) -> bool:
    if opcode.type not in PACKED_INTEGERS:
        return False
    flags = ["Relu"] if opcode.type == "s16x2" and opcode.name != "add" and opcode.has("relu") else []
    dst, *src = (program.operand(arg) for arg in opcode.args)
    program.emit("PackedInt", [dst], src, opcode.type, aux=isa.ATOMICS[opcode.name], flags=flags)
    return True


def emit_carry(program: Program, opcode: Opcode, op: str, flags: list[str]) -> None:
    dst, *src = (program.operand(arg, opcode.type) for arg in opcode.args)
    if opcode.has("cc"):
        flags = [*flags, "CarryOut"]
    program.emit(op, [dst], [*src, program.carry_register()], opcode.type, flags=flags)


@handles("add", "sub")
def add_sub(program: Program, opcode: Opcode) -> None:
    subtract = opcode.name == "sub"
    if not subtract and packed_integer(program, opcode):
        return
    if "cc" in opcode.modifiers:
        emit_carry(program, opcode, "AddCarry", ["Subtract"] if subtract else [])
    else:
        emit_plain(program, opcode, "Sub" if subtract else "Add")


@handles("addc", "subc")
def add_sub_carry(program: Program, opcode: Opcode) -> None:
    emit_carry(program, opcode, "AddCarry", ["CarryIn", *(["Subtract"] if opcode.name == "subc" else [])])


@handles("mul")
def mul(program: Program, opcode: Opcode) -> None:
    emit_plain(program, opcode, opcode.choose({"wide": "MulWide", "hi": "MulHi", "lo": "Mul"}, "Mul"))


@handles("mul24", "mad24")
def mul24(program: Program, opcode: Opcode) -> None:
    flags = ["High"] if opcode.has("hi") else []
    opcode.ignore(["lo"])
    emit_plain(program, opcode, "Mul24" if opcode.name == "mul24" else "Mad24", flags=flags)


@handles("mad")
def mad(program: Program, opcode: Opcode) -> None:
    if "cc" in opcode.modifiers:
        flags = ["High"] if opcode.has("hi") else []
        opcode.ignore(["lo"])
        emit_carry(program, opcode, "MadCarry", flags)
    else:
        emit_plain(program, opcode, opcode.choose({"wide": "MadWide", "hi": "MadHi", "lo": "Mad"}, "Mad"))


@handles("madc")
def madc(program: Program, opcode: Opcode) -> None:
    flags = ["CarryIn", *(["High"] if opcode.has("hi") else [])]
    opcode.ignore(["lo"])
    emit_carry(program, opcode, "MadCarry", flags)


@handles("min", "max")
def min_max(program: Program, opcode: Opcode) -> None:
    if packed_integer(program, opcode):
        return
    name = opcode.name.capitalize()
    if opcode.type == "s32" and len(opcode.args) == 3 and opcode.has("relu"):
        emit_plain(program, opcode, name, flags=["Relu"])
        return
    emit_plain(program, opcode, name + "3" if len(opcode.args) == 4 else name)


@handles("abs", "neg")
def sign(program: Program, opcode: Opcode) -> None:
    emit_plain(program, opcode, opcode.name.capitalize(), imm=isa.SIGN_BITS.get(opcode.type, 0))


LOGIC = {"and": 0, "or": 1, "xor": 2, "not": 3}


@handles(*LOGIC)
def logic(program: Program, opcode: Opcode) -> None:
    if opcode.type == "pred":
        dst, *src = (program.operand(arg, "pred") for arg in opcode.args)
        program.emit("PredLogic", [dst], src, "pred", aux=LOGIC[opcode.name])
    else:
        emit_plain(program, opcode, opcode.name.capitalize())


@handles("shf")
def funnel_shift(program: Program, opcode: Opcode) -> None:
    op = opcode.require({"l": "FunnelLeft", "r": "FunnelRight"})
    emit_plain(program, opcode, op, flags=opcode.require({"wrap": ["Wrap"], "clamp": []}))


@handles("bmsk", "szext")
def mask_or_extend(program: Program, opcode: Opcode) -> None:
    emit_plain(program, opcode, opcode.name.capitalize(), flags=opcode.require({"wrap": ["Wrap"], "clamp": []}))


@handles("bfind")
def bfind(program: Program, opcode: Opcode) -> None:
    emit_plain(program, opcode, "Bfind", flags=["ShiftAmount"] if opcode.has("shiftamt") else [])


@handles("lop3")
def lop3(program: Program, opcode: Opcode) -> None:
    if "|" in opcode.args[0] or len(opcode.args) != 5:
        opcode.fail("lop3 with a predicate is not supported")
    dst, *src = (program.operand(arg) for arg in opcode.args[:4])
    program.emit("Lop3", [dst], src, imm=parse_int(opcode.args[4]))


@handles("prmt")
def prmt(program: Program, opcode: Opcode) -> None:
    mode = opcode.choose({"f4e": 1, "b4e": 2, "rc8": 3, "ecl": 4, "ecr": 5, "rc16": 6}, 0)
    dst, *src = (program.operand(arg) for arg in opcode.args)
    program.emit("Prmt", [dst], src, aux=mode)


@handles("dp4a", "dp2a")
def dot_product(program: Program, opcode: Opcode) -> None:
    flags = ["High"] if opcode.has("hi") else []
    opcode.ignore(["lo"])
    dst, *src = (program.operand(arg) for arg in opcode.args)
    program.emit(opcode.name.capitalize(), [dst], src, opcode.types[0], opcode.types[-1], flags=flags)
