"""Loads, stores, atomics and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import isa
from ..parser import TYPE_SIZE, split_top
from .compare import vector_destination
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program

VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def access_space(opcode: Opcode, symbol_space: str | None) -> int:
    """The space of an access; generic where only the address tells."""
    space = opcode.choose(isa.SPACES, isa.GENERIC)
    opcode.ignore(isa.SPACES)
    if symbol_space == "local" and space in (isa.PARAM, isa.LOCAL):
        return isa.GENERIC  # such addresses carry the window: parameters of calls lie in local memory
    if space == isa.GENERIC and symbol_space == "shared":
        return isa.SHARED
    return space


def access_flags(opcode: Opcode, atomic: bool = False) -> list[str]:
    """Whether other blocks' shared memory is meant, too; strength, semantics and scope.

    Atomics are strong and of GPU scope unless they say otherwise.
    """
    reach = ["Cluster"] if opcode.has("shared::cluster") else []
    volatile = opcode.has("volatile", "mmio")
    strong = opcode.has("relaxed", "acquire", "release", "acq_rel", "sc") or volatile or atomic
    if not strong:
        return reach
    flags = [*reach, "Strong"]
    flags += ["Acquire"] if opcode.has("acquire", "acq_rel") else []
    flags += ["Release"] if opcode.has("release", "acq_rel") else []
    narrow = opcode.has("cta", "cluster")
    opcode.ignore(isa.SCOPES)
    return flags if narrow else [*flags, "GpuScope"]


@handles("ld", "ldu")
def ld(program: Program, opcode: Opcode) -> None:
    cached = [] if opcode.has("cg", "cv") else ["NonCoherent"] if opcode.has("nc") else ["ThroughL1"]
    opcode.drop_cache_hints()
    base, offset, symbol_space = program.address(opcode.args[1])
    count, type = opcode.choose(VECTORS, 1), opcode.type
    names = split_top(opcode.args[0][1:-1]) if opcode.args[0].startswith("{") else None
    if names:
        dst = [vector_destination(program, name, TYPE_SIZE[type]) for name in names]
    else:
        dst = [program.operand(opcode.args[0], type)]
    if len(dst) != count:
        opcode.fail("vector length mismatch")
    flags, space = [*access_flags(opcode), *cached], access_space(opcode, symbol_space)
    program.emit("Ld", dst, [base], type, flags=flags, space=space, imm=offset, vec=count)


@handles("st")
def st(program: Program, opcode: Opcode) -> None:
    opcode.drop_cache_hints()
    base, offset, symbol_space = program.address(opcode.args[0])
    count, type = opcode.choose(VECTORS, 1), opcode.type
    values = program.vector(opcode.args[1], type)
    if len(values) != count:
        opcode.fail("vector length mismatch")
    flags, space = access_flags(opcode), access_space(opcode, symbol_space)
    program.emit("St", [], [base, *values], type, flags=flags, space=space, imm=offset, vec=count)


@handles("atom", "red")
def atom(program: Program, opcode: Opcode) -> None:
    opcode.drop_cache_hints()
    if "async" in opcode.modifiers:
        opcode.fail(f"unknown instruction form '{opcode.text}' (red.async)")
    opcode.ignore(["noftz"])
    type, args = opcode.type, opcode.args
    dst = program.vector(args[0], type) if opcode.name == "atom" else []
    args = args[1:] if opcode.name == "atom" else args
    base, offset, symbol_space = program.address(args[0])
    kind = opcode.require(isa.ATOMICS)
    count = opcode.choose(VECTORS, 1)
    src = program.vector(args[1], type)
    if kind == isa.ATOMICS["cas"]:
        src += program.vector(args[2], type)
    flags, space = access_flags(opcode, atomic=True), access_space(opcode, symbol_space)
    op = opcode.name.capitalize()
    program.emit(op, dst, [base, *src], type, flags=flags, space=space, imm=offset, vec=count, aux=kind)


@handles("membar", "fence")
def fence(program: Program, opcode: Opcode) -> None:
    if opcode.has("proxy"):
        opcode.ignore(opcode.modifiers)  # alias, async, async.global, async.shared::cta, tensormap, ...
        program.emit("ProxyFence" if any(m.startswith("async") for m in opcode.modifiers) else "Nop")
        return
    if opcode.has("mbarrier_init"):
        opcode.ignore(opcode.modifiers)
        program.emit("Fence", flags=["MbarrierInit"])
        return
    wide = opcode.has("gl", "gpu", "sys")
    flags = ["GpuScope", "ClusterScope"] if wide else ["ClusterScope"] if opcode.has("cluster") else []
    opcode.ignore(["cta", "acq_rel", "sc", "acquire", "release", "sync_restrict"])
    opcode.ignore(isa.SPACES)
    program.emit("Fence", flags=flags)


@handles("prefetch", "prefetchu", "discard", "applypriority")
def hint(program: Program, opcode: Opcode) -> None:
    opcode.ignore(opcode.modifiers)
    program.emit("Nop")
