"""Branches, calls and barriers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .. import isa
from ..parser import split_top
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program


@handles("bra")
def bra(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["uni"])
    program.emit("Bra")
    program.branch_to(opcode.args[0])


@handles("brx")
def brx(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["idx", "uni"])
    for scope in program.statement.scope.chain():
        labels = scope.branch_tables.get(opcode.args[1])
        if labels:
            program.emit("Brx", [], [program.operand(opcode.args[0])] + [0] * len(labels), aux=len(labels))
            program.branch_table(labels)
            return
    opcode.fail(f"no branch targets {opcode.args[1]}")


LEAVE = {"ret": "Ret", "exit": "Exit", "trap": "Trap", "brkpt": "Trap", "nanosleep": "Nanosleep"}


@handles(*LEAVE)
def leave(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["uni"])
    program.emit(LEAVE[opcode.name])


@handles("nop", "pmevent", "setmaxnreg", "griddepcontrol")
def nothing(program: Program, opcode: Opcode) -> None:
    waits = opcode.name == "griddepcontrol" and opcode.has("wait")
    opcode.ignore(opcode.modifiers)
    program.emit("Nop", aux=int(waits))


@handles("bar", "barrier")
def barrier(program: Program, opcode: Opcode) -> None:
    if opcode.has("warp"):
        opcode.ignore(["sync"])
        program.emit("BarWarp", [], [program.operand(opcode.args[0])])
        return
    opcode.ignore(["cta", "sync", "aligned"])
    if opcode.has("cluster"):
        flags = ["Aligned"] if "aligned" in opcode.modifiers else []
        if opcode.has("wait"):
            opcode.ignore(["acquire"])
            program.emit("ClusterWait", flags=flags)
        else:
            opcode.require({"arrive": 0})
            flags += ["Relaxed"] if opcode.has("relaxed") else []
            opcode.ignore(["release"])
            program.emit("ClusterArrive", flags=flags)
        return
    flags = ["ArriveOnly"] if opcode.has("arrive") else []
    args = opcode.args
    if opcode.has("red"):
        kind = opcode.require({"popc": 1, "and": 2, "or": 3})
        dst = program.operand(args[0], "b32" if kind == 1 else "pred")
        src = [program.operand(arg) for arg in args[1:-1]] + [program.operand(args[-1], "pred")]
        flags += ["HasCount"] if len(args) > 3 else []
        program.emit("Bar", [dst], src, flags=flags, aux=kind)
    else:
        flags += ["HasCount"] if len(args) > 1 else []
        program.emit("Bar", [], [program.operand(arg) for arg in args], flags=flags)


# ---- calls ---------------------------------------------------------------------------------------------------
# Parameters lie in the caller's and the callee's part of local memory and are copied; there is no recursion.


def load_local(program: Program, register: int, offset: int, type: str) -> None:
    program.emit("Ld", [register], [program.immediate(offset)], type, space=isa.LOCAL, vec=1)


def copy_local(program: Program, to: int, source: int, size: int) -> None:
    done = 0
    while done < size:
        aligned = (k for k in (8, 4, 2, 1) if done + k <= size and (to + done) % k == 0 and (source + done) % k == 0)
        step = next(aligned)
        register = program.new_register("b64" if step == 8 else "b32")
        load_local(program, register, source + done, f"b{8 * step}")
        address = program.immediate(to + done)
        program.emit("St", [], [address, register], f"b{8 * step}", space=isa.LOCAL, vec=1)
        done += step


_CALL = re.compile(r"call(?:\.uni)?\s*(?:\(([^)]*)\)\s*,)?\s*([\w$%]+)\s*(?:,\s*\(([^)]*)\))?")


@handles("call")
def call(program: Program, opcode: Opcode) -> None:
    opcode.ignore(["uni"])
    match = _CALL.match(program.statement.text)
    if not match:
        opcode.fail("cannot parse the call")
    results, args = split_top(match[1] or ""), split_top(match[3] or "")
    name = program.module.aliases.get(match[2], match[2])
    function = program.module.functions.get(name)

    def offset(variable: str) -> int:
        symbol = program.symbol(variable)
        if symbol is None:
            opcode.fail(f"unknown parameter {variable!r}")
        return symbol[1]

    if function is None:
        opcode.fail(f"indirect or unknown call target {match[2]!r}")
    if not function.has_body:
        external_call(program, opcode, name, [offset(arg) for arg in args])
        return
    for param, arg in zip(function.params, args, strict=True):
        copy_local(program, program.local_offset(param), offset(arg), param.size)
    program.call(name)
    for param, result in zip(function.returns, results, strict=True):
        copy_local(program, offset(result), program.local_offset(param), param.size)


def external_call(program: Program, opcode: Opcode, name: str, offsets: list[int]) -> None:
    known = {"vprintf": ("Vprintf", 2), "__assertfail": ("AssertFail", 1)}
    if name not in known:
        opcode.fail(f"call of external function {name!r}")
    op, count = known[name]
    registers = [program.new_register("b64") for _ in range(count)]
    for register, offset in zip(registers, offsets[:count], strict=True):
        load_local(program, register, offset, "b64")
    program.emit(op, [], registers)
