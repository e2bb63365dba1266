"""cp.async, mbarrier, and bulk and tensor copies."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .. import isa
from ..parser import parse_int, split_top
from .opcode import Opcode, handles

if TYPE_CHECKING:
    from ..program import Program

PREDICATE = 2


@handles("cp")
def cp(program: Program, opcode: Opcode) -> None:
    if not opcode.has("async"):
        opcode.fail(f"unknown instruction '{opcode.text}'")
    if opcode.has("bulk"):
        bulk(program, opcode)
    elif opcode.has("commit_group"):
        program.emit("CpAsyncCommit")
    elif opcode.has("wait_group"):
        program.emit("CpAsyncWait", imm=parse_int(opcode.args[0]))
    elif opcode.has("wait_all"):
        program.emit("CpAsyncWait", flags=["WaitAll"])
    elif opcode.has_all("mbarrier", "arrive"):
        base, offset, _ = program.address(opcode.args[0])
        opcode.ignore(isa.SPACES)
        program.emit("CpAsyncMbarrier", [], [base], flags=["NoIncrement"] if opcode.has("noinc") else [], imm=offset)
    else:
        copy(program, opcode)


def copy(program: Program, opcode: Opcode) -> None:
    bypass_l1 = "cg" in opcode.modifiers
    opcode.drop_cache_hints()
    opcode.ignore(isa.SPACES)
    to, to_offset, _ = program.address(opcode.args[0])
    source, source_offset, _ = program.address(opcode.args[1])
    size = parse_int(opcode.args[2])
    if size not in ((16,) if bypass_l1 else (4, 8, 16)):
        opcode.fail(f"cp.async of {size} bytes")
    src, flags = [to, source], [] if bypass_l1 else ["ThroughL1"]
    if len(opcode.args) > 3:
        extra = program.operand(opcode.args[3])
        flags += ["IgnoreSource" if extra >= 0 and extra & PREDICATE else "HasSize"]
        src.append(extra)
    program.emit("CpAsync", [], src, flags=flags, imm=to_offset, imm2=source_offset, aux=size)


def bulk(program: Program, opcode: Opcode) -> None:
    if opcode.has("commit_group"):
        program.emit("BulkCommit")
        return
    if opcode.has("wait_group"):
        flags = ["ReadOnly"] if opcode.has("read") else []
        program.emit("BulkWait", flags=flags, imm=parse_int(opcode.args[0]))
        return
    for refused in ("im2col", "im2col::w", "tile::gather4", "tile::scatter4"):
        if refused in opcode.modifiers:
            opcode.fail(f"unsupported bulk copy form .{refused}")
    opcode.drop_cache_hints()
    if opcode.has("prefetch"):
        opcode.ignore(opcode.modifiers)
        program.emit("Nop")
        return
    spaces = [m for m in opcode.modifiers if m in isa.SPACES]
    load = isa.SPACES[spaces[0]] == isa.SHARED if spaces else False
    within = spaces == ["shared::cluster", "shared::cta"]
    if not within and sorted(isa.SPACES[space] for space in spaces) != [isa.GLOBAL, isa.SHARED]:
        opcode.fail("unsupported bulk copy form: only between global and shared memory, or within a cluster")
    if load and "mbarrier::complete_tx::bytes" not in opcode.modifiers:
        opcode.fail("unsupported bulk copy form: a copy to shared memory reports to an mbarrier")
    flags = ["FromShared"] if within else []
    flags += ["Multicast"] if load and not within and opcode.has("multicast::cluster") else []
    opcode.ignore({*isa.SPACES, "tile", "bulk_group", "mbarrier::complete_tx::bytes"})
    if opcode.has("tensor"):
        tensor_copy(program, opcode, load, flags)
        return
    to, to_offset, _ = program.address(opcode.args[0])
    source, source_offset, _ = program.address(opcode.args[1])
    src = [to, source, program.operand(opcode.args[2])]
    if load:
        bar, bar_offset, _ = program.address(opcode.args[3])
        src += [bar, *block_mask(program, opcode, flags, 4)]
        program.emit("BulkLoad", [], src, flags=flags, imm=to_offset, imm2=source_offset, aux=bar_offset)
    else:
        program.emit("BulkStore", [], src, imm=to_offset, imm2=source_offset)


def block_mask(program: Program, opcode: Opcode, flags: list[str], position: int) -> list[int]:
    """The operand of a multicast that says which blocks of the cluster get the data."""
    return [program.operand(opcode.args[position], "b16")] if "Multicast" in flags else []


def tensor_copy(program: Program, opcode: Opcode, load: bool, flags: list[str]) -> None:
    rank = opcode.require({f"{n}d": n for n in range(1, 6)})
    map_text = opcode.args[1 if load else 0].strip()
    match = re.fullmatch(r"\[(.*)\]", map_text)
    if not match:
        opcode.fail(f"expected [tensor map, {{coordinates}}], got {map_text!r}")
    map_operand, coordinates = split_top(match[1])
    tensor, coordinate = program.operand(map_operand, "b64"), program.vector(coordinates)
    if len(coordinate) != rank:
        opcode.fail(f"{len(coordinate)} coordinates for a tensor of rank {rank}")
    if load:
        to, offset, _ = program.address(opcode.args[0])
        bar, bar_offset, _ = program.address(opcode.args[2])
        src = [to, tensor, bar, *coordinate, *block_mask(program, opcode, flags, 3)]
        program.emit("TensorLoad", [], src, flags=flags, aux=rank, imm=offset, imm2=bar_offset)
    else:
        source, offset, _ = program.address(opcode.args[1])
        program.emit("TensorStore", [], [tensor, source, *coordinate], aux=rank, imm=offset)


@handles("mbarrier")
def mbarrier(program: Program, opcode: Opcode) -> None:
    flags = ["Cluster"] if "shared::cluster" in opcode.modifiers else []
    flags += ["ClusterScope"] if "cluster" in opcode.modifiers else []
    flags += ["Relaxed"] if "relaxed" in opcode.modifiers else []
    space = opcode.choose(isa.SPACES, isa.GENERIC)
    opcode.ignore({*isa.SCOPES, "release", "acquire", "relaxed"})
    args = opcode.args
    if opcode.has("pending_count"):
        program.emit("MbarrierPending", [program.operand(args[0])], [program.operand(args[1], "b64")])
    elif opcode.has("init"):
        base, offset, _ = program.address(args[0])
        program.emit("MbarrierInit", [], [base, program.operand(args[1])], space=space, imm=offset)
    elif opcode.has("inval"):
        base, offset, _ = program.address(args[0])
        program.emit("MbarrierInval", [], [base], space=space, imm=offset)
    elif opcode.has("arrive", "arrive_drop"):
        arrive(program, opcode, flags, space)
    elif opcode.has("expect_tx", "complete_tx"):
        base, offset, _ = program.address(args[0])
        flags += ["Subtract"] if "complete_tx" in opcode.modifiers else []
        program.emit("MbarrierTx", [], [base, program.operand(args[1])], flags=flags, space=space, imm=offset)
    elif opcode.has("test_wait", "try_wait"):
        base, offset, _ = program.address(args[1])
        parity = opcode.has("parity")
        state = program.operand(args[2], "b32" if parity else "b64")
        dst = [program.operand(args[0], "pred")]
        flags += ["Parity"] if parity else []
        program.emit("MbarrierWait", dst, [base, state], flags=flags, space=space, imm=offset)
    else:
        opcode.fail(f"unknown instruction '{opcode.text}'")


def arrive(program: Program, opcode: Opcode, flags: list[str], space: int) -> None:
    args = opcode.args
    dst = []
    if not args[0].startswith("["):
        dst = [program.operand(args[0], "b64")] if args[0].strip() != "_" else []
        args = args[1:]
    if dst and "shared::cluster" in opcode.modifiers:
        opcode.fail("an arrival at another block's mbarrier returns no state: its destination is _")
    base, offset, _ = program.address(args[0])
    flags += ["HasOperand"] if len(args) > 1 else []
    flags += ["ExpectTx"] if opcode.has("expect_tx") else []
    flags += ["Drop"] if "arrive_drop" in opcode.modifiers else []
    opcode.ignore(["noComplete"])
    src = [base, *map(program.operand, args[1:])]
    program.emit("MbarrierArrive", dst, src, "b64", flags=flags, space=space, imm=offset)
