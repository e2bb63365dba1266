"""Loading a PTX module and launching its kernels."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import isa
from .arguments import pack, split_arrays
from .errors import PtxError, PtxFault, PtxSanitizerError
from .memory import (
    CONSTANT,
    GUARD,
    PARAM_BASE,
    PARAM_ID,
    PARAMETER,
    READ_WRITE,
    SYMBOL_BASE,
    SYMBOL_ID,
    AllocationTable,
    DeviceMemory,
    Uninit,
    renew,
)
from .native import core
from .parser import Variable, parse_module
from .program import Program, align_up
from .report import REPORT_KINDS, Report, Result, buffer_rows, count_instructions, l2_row, parse_ptxas

Dim = int | Sequence[int]
SHOWN_REPORTS = 5  # of each kind, in an exception's text
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)


def three_dimensions(dim: Dim) -> tuple[int, int, int]:
    values = (dim,) if isinstance(dim, int) else tuple(int(x) for x in dim)
    if not 1 <= len(values) <= 3:
        raise PtxError(f"a grid or block has 1 to 3 dimensions, got {dim}")
    return tuple(values + (1,) * (3 - len(values)))  # type: ignore[return-value]


class PtxModule:
    """A PTX module, ready to be launched.

    PTX is checked here; a kernel's instructions when it is first used. Raises PtxError with the line.
    """

    def __init__(self, ptx: str):
        self.text = ptx
        self.source = ptx.split("\n")
        self.module = parse_module(ptx)
        self.kernels = [name for name, function in self.module.functions.items() if function.is_entry]
        target = re.search(r"sm_(\d+)", self.module.target)
        self.sm = int(target[1]) if target else 90
        self.memory = DeviceMemory()
        self._programs: dict[str, Program] = {}
        self._lock = threading.Lock()  # a program's machine runs one launch at a time, and without the GIL
        self._place_variables()

    def _place_variables(self) -> None:
        self.symbols: dict[str, int] = {}
        self._variables: dict[str, tuple[Variable, np.ndarray, np.ndarray]] = {}
        base = SYMBOL_BASE
        for variable in self.module.variables:
            if variable.space not in ("global", "const") or variable.extern:
                continue
            base = align_up(base, max(variable.align, 256))
            self.symbols[variable.name] = base
            data = np.zeros(max(variable.size, 1), np.uint8)
            data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            self._variables[variable.name] = (variable, data, np.zeros(data.size, np.uint8))
            base += data.size + GUARD
        for variable, data, _ in self._variables.values():
            for offset, symbol, addend in variable.addresses:
                if symbol not in self.symbols:
                    raise PtxError(f"line {variable.line}: {variable.name} is initialised with unknown {symbol}")
                address = self.symbols[symbol] + addend
                data[offset : offset + 8] = np.frombuffer(address.to_bytes(8, "little"), np.uint8)

    def symbol(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        """A view of a .global or .const variable, which can be written."""
        if name not in self._variables:
            raise PtxError(f"no variable named {name}; have {list(self._variables)}")
        return self._variables[name][1].view(dtype)

    def register(self, array: Any) -> int:
        """Gives an array, or Uninit(array), a lasting device address (for arrays of pointers), and returns it."""
        return self.memory.register(array)

    def program(self, kernel: str) -> Program:
        if kernel not in self._programs:
            self._programs[kernel] = Program(self.module, kernel, self.symbols, PARAM_BASE)
        return self._programs[kernel]

    def launch(
        self,
        kernel: str,
        grid: Dim = 1,
        block: Dim = 1,
        args: Sequence[Any] = (),
        shared_bytes: int = 0,
        *,
        check: str = "raise",
        races: bool | str = True,
        cluster: Dim | None = None,
        seed: int = 0,
        block_order: str | Sequence[int] | None = None,
        resident: int = 1,
        max_instructions: int = 20_000_000_000,
        max_threads: int = 1 << 26,
        approx_error: float = 0.0,
        l2_bytes: int | None = None,
        round_trips: bool = False,
        ptxas: str | None = None,
        dependent: bool = False,
        architecture: int | None = None,
        memory: DeviceMemory | None = None,
        l2: Any = None,
    ) -> Result:
        """Runs a kernel; arrays are changed in place.

        args: numpy arrays and CPU tensors are pointers, each to a buffer of its own with guards around it (views that
            overlap share one); numbers take the type of the parameter; bytes fill structs; None is a null pointer.
            Uninit(x): reading x before the kernel has written it is reported.
        shared_bytes: dynamic shared memory.
        check: "raise" a PtxSanitizerError at the end if there are reports, or "collect" them in the result. Faults
            always raise PtxFault.
        races: False turns race checks off; "strict" also reports writers that store the value that is there already.
        seed: nonzero interleaves warps, delays bulk copies and orders blocks pseudo-randomly.
        cluster: blocks of a thread block cluster, by dimension; a kernel with .reqnctapercluster says so itself.
        block_order: "ascending", "descending", "shuffled" (by the seed) or the block numbers themselves; by default
            ascending without a seed and shuffled with one. With clusters, the order of these.
        resident: blocks (clusters) that take turns; raised by itself when blocks wait for each other.
        max_instructions, max_threads: what counts as too long; the latter is checked before anything runs.
        approx_error: 1.0 lets .approx instructions be off by up to their documented error, deterministically.
        l2_bytes: models an L2 cache of this size (`Result.l2`).
        round_trips: counts accesses of global memory that wait for each other (`Result.round_trips`).
        ptxas: output of `ptxas -v`, to be quoted in the result.
        dependent: a programmatic dependent launch: what earlier launches of the session wrote is pending until
            griddepcontrol.wait, before which nothing may be written either.
        architecture: of the GPU, 10 * major + minor; default: the image's. It limits shared memory; what the kernel
            was compiled for stays the image's.
        memory, l2: those of a Session.
        """
        program = self.program(kernel)
        grid, block = self._check_shape(program, grid, block, max_threads)
        cluster = self._check_cluster(program, grid, cluster)
        if check not in ("raise", "collect") or races not in (True, False, "strict"):
            raise PtxError(f"check is 'raise' or 'collect' and races True, False or 'strict', not {check!r}, {races!r}")
        args = list(args)
        buffers = split_arrays(program, args)
        memory = memory or self.memory.copy()
        ranges = memory.ranges(list(buffers.items()))
        for i, array in buffers.items():
            if isinstance(args[i], Uninit):
                memory.mark_uninitialised(array)
        memory.begin_launch(dependent)
        params = pack(program, args, buffers, memory)
        table = AllocationTable(bool(races))
        for r in ranges:
            table.add_range(r)
        for name, (variable, data, shadow) in self._variables.items():
            renew(shadow, dependent)
            kind = CONSTANT if variable.space == "const" else READ_WRITE
            table.add_array(self.symbols[name], data, shadow, kind, SYMBOL_ID)
        if program.param_bytes:
            table.add_array(PARAM_BASE, params, np.zeros(params.size, np.uint8), PARAMETER, PARAM_ID)
        shared = self._check_shared(program, shared_bytes, architecture)
        l2 = l2 or (core().L2Model(l2_bytes) if l2_bytes else None)
        if l2 is not None:
            l2.reset_counters()
        start = time.perf_counter()
        machine = program.machine
        clusters = int(np.prod(grid, dtype=object)) // int(np.prod(cluster or 1))
        order = _block_order(block_order, clusters, seed)
        with self._lock:
            fault = machine.run(
                grid,
                block,
                cluster,
                shared,
                table.table(),
                bool(races),
                races == "strict",
                max_instructions,
                seed & 0xFFFFFFFF,
                resident,
                order,
                approx_error,
                l2,
                round_trips,
                dependent,
            )
            counters, output = machine.counters, machine.output
            totals = (machine.blocks_done, machine.barriers, machine.instructions)
            trips = (machine.trips_before, machine.trips_after)
            reports = self._reports(machine)
        seconds = time.perf_counter() - start
        if fault is not None:
            raise self._fault(kernel, fault, reports)
        result = Result(
            kernel=kernel,
            grid=grid,
            block=block,
            shared_bytes=shared,
            seconds=seconds,
            reports=reports,
            output=output.decode(errors="replace"),
            blocks=totals[0],
            barriers=totals[1],
            warp_instructions=totals[2],
            buffers=buffer_rows(ranges),
            ptxas=parse_ptxas(ptxas, kernel),
            l2=l2_row(l2) if l2 is not None else None,
            round_trips=trips if round_trips else None,
        )
        count_instructions(result, program, counters, self.source)
        if reports and check == "raise":
            raise PtxSanitizerError(_describe_reports(kernel, result), result)
        return result

    def _check_shape(self, program: Program, grid: Dim, block: Dim, max_threads: int) -> tuple:
        kernel, directives = program.entry.name, program.entry.directives
        grid3, block3 = three_dimensions(grid), three_dimensions(block)
        threads = block3[0] * block3[1] * block3[2]
        within = all(1 <= n <= most for n, most in zip(grid3 + block3, MAX_GRID + MAX_BLOCK, strict=True))
        if not within or threads > 1024:
            raise PtxError(f"{kernel}: bad launch shape grid={grid3} block={block3}")
        required = directives.get("reqntid")
        if required and three_dimensions(required) != block3:
            raise PtxError(f"{kernel} requires block {required}, launched with {block3}")
        most = directives.get("maxntid")
        if most and threads > int(np.prod(most)):
            raise PtxError(f"{kernel} allows at most {most} threads, launched with {block3}")
        total = threads * grid3[0] * grid3[1] * grid3[2]
        if total > max_threads:
            raise PtxError(
                f"{kernel}: {total} threads (grid {grid3}, block {block3}) are too many to simulate in reasonable "
                f"time; launch a smaller problem, or raise max_threads (now {max_threads})"
            )
        return grid3, block3

    def _check_cluster(self, program: Program, grid: tuple, asked: Dim | None) -> tuple[int, int, int] | None:
        """The blocks of a cluster by dimension; None: the launch is without clusters."""
        kernel, directives = program.entry.name, program.entry.directives
        required = directives.get("reqnctapercluster")
        wanted = required if asked is None else asked
        cluster = None if wanted is None else three_dimensions(wanted)
        if required and cluster != three_dimensions(required):
            raise PtxError(f"{kernel} requires clusters of {required} blocks, launched with {cluster}")
        if cluster is None:
            if "explicitcluster" in directives:
                raise PtxError(f"{kernel} is to be launched with clusters; say cluster=")
            return None
        blocks = int(np.prod(cluster, dtype=object))
        most = min(core().MAX_CLUSTER_BLOCKS, *directives.get("maxclusterrank", ()), 1 << 30)
        if min(cluster) < 1 or blocks > most:
            raise PtxError(f"{kernel}: clusters of {cluster} blocks, which must be 1 to {most}")
        if self.sm < 90:
            raise PtxError(f"{kernel}: clusters need sm_90, this is sm_{self.sm}")
        if any(n % k for n, k in zip(grid, cluster, strict=True)):
            raise PtxError(f"{kernel}: grid {grid} is not a multiple of the cluster {cluster}")
        return cluster

    def _check_shared(self, program: Program, dynamic: int, architecture: int | None) -> int:
        sm = architecture or self.sm
        exact = self.module.target.split(",")[0].rstrip().endswith("a")
        if sm < self.sm or (exact and sm != self.sm):
            raise PtxError(f"{program.entry.name}: an image for {self.module.target} does not run on sm_{sm}")
        if dynamic < 0:
            raise PtxError(f"{program.entry.name}: shared_bytes is {dynamic}")
        total, limit = program.shared_bytes(dynamic), isa.SHARED_LIMIT.get(sm, 227) * 1024
        if total > limit:
            raise PtxError(f"{program.entry.name}: {total} bytes of shared memory, sm_{sm} allows {limit} a block")
        return total

    def _reports(self, machine: Any) -> list[Report]:
        return [Report(*row, source=self.source[row[1] - 1].strip()[:100]) for row in machine.reports()]

    def _fault(self, kernel: str, text: str, reports: list[Report]) -> PtxFault:
        match = re.search(r"PTX line (\d+)", text)
        line = int(match[1]) if match else 0
        where = f": `{self.source[line - 1].strip()}`" if line else ""
        return PtxFault(f"{kernel}: {text}{where}", line, reports)


def _block_order(order: str | Sequence[int] | None, blocks: int, seed: int) -> list[int]:
    """The blocks in the order they start; empty for ascending."""
    order = order or ("shuffled" if seed else "ascending")
    if order == "ascending":
        return []
    numbers = list(range(blocks))
    if order == "descending":
        return numbers[::-1]
    if order == "shuffled":
        random.Random(seed).shuffle(numbers)
        return numbers
    if isinstance(order, str) or sorted(order) != numbers:
        raise PtxError(f"block_order is 'ascending', 'descending', 'shuffled' or a permutation, not {order!r}")
    return list(order)


def _describe_reports(kernel: str, result: Result) -> str:
    shown = [str(r) for kind in REPORT_KINDS for r in result.by_kind(kind)[:SHOWN_REPORTS]]
    title = f"{kernel}: {len(result.reports)} sanitiser report(s), up to {SHOWN_REPORTS} of each kind:"
    return "\n".join([title, *shown])
