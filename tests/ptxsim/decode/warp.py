"""Communication within a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import isa
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program

EVERYBODY = "0xffffffff"


def with_predicate(program: Program, text: str) -> list[int]:
    """`d` or `d|p`"""
    value, *predicate = text.split("|")
    return [program.operand(value)] + [program.operand(name, "pred") for name in predicate]


@handles("shfl")
def shfl(program: Program, opcode: Opcode) -> None:
    args = opcode.args if opcode.has("sync") else [*opcode.args, EVERYBODY]
    mode = opcode.require({"up": 0, "down": 1, "bfly": 2, "idx": 3})
    program.emit("Shfl", with_predicate(program, args[0]), [program.operand(arg) for arg in args[1:]], aux=mode)


@handles("vote")
def vote(program: Program, opcode: Opcode) -> None:
    args = opcode.args if opcode.has("sync") else [*opcode.args, EVERYBODY]
    kind = opcode.require({"all": 0, "any": 1, "uni": 2, "ballot": 3})
    dst = program.operand(args[0], "b32" if kind == 3 else "pred")
    program.emit("Vote", [dst], [program.operand(args[1], "pred"), program.operand(args[2])], aux=kind)


@handles("match")
def match(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["sync"])
    src = [program.operand(opcode.args[1], opcode.type), program.operand(opcode.args[2])]
    kind = opcode.require({"any": 0, "all": 1})
    program.emit("Match", with_predicate(program, opcode.args[0]), src, opcode.type, aux=kind)


@handles("redux")
def redux(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["sync"])
    dst, *src = (program.operand(arg) for arg in opcode.args)
    program.emit("Redux", [dst], src, opcode.type, aux=opcode.require(isa.ATOMICS))


@handles("elect")
def elect(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["sync"])
    program.emit("Elect", with_predicate(program, opcode.args[0]), [program.operand(opcode.args[1])])


@handles("activemask")
def activemask(program: Program, opcode: Opcode) -> None:
    program.emit("Activemask", [program.operand(opcode.args[0])])
