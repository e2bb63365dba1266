"""cvt"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import isa
from .opcode import Opcode, float_modifiers, handles

if TYPE_CHECKING:
    from ..program import Program

FP8_PAIRS = ("e4m3x2", "e5m2x2")
TO_INTEGER = {name + "i": number for name, number in isa.ROUNDINGS.items() if name != "rna"}


@handles("cvt")
def cvt(program: Program, opcode: Opcode) -> None:
    if len(opcode.types) != 2:
        opcode.fail(f"unknown instruction form '{opcode.text}'")
    to, source = opcode.types
    args = opcode.args
    modifiers = float_modifiers(opcode)
    rounding = opcode.choose(TO_INTEGER, None)
    if rounding is not None:
        modifiers["rounding"] = rounding
        modifiers["flags"] = [*modifiers["flags"], "RoundToInt"]
    src = [program.operand(arg, source) for arg in args[1:]]
    op = "Cvt"
    if to in ("f16x2", "bf16x2") and source == "f32":
        op = "CvtPack2"
    elif to in FP8_PAIRS or source in FP8_PAIRS:
        op = "CvtFp8"
    elif to == "tf32":
        op = "CvtTf32"
    if len(src) != (2 if op == "CvtPack2" or (op == "CvtFp8" and source == "f32") else 1):
        opcode.fail(f"unknown instruction form '{opcode.text}' with {len(args)} operands")
    program.emit(op, [program.operand(args[0], to)], src, to, source, **modifiers)
