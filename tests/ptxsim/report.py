"""What a launch gives back: reports and counters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import READ, WRITTEN, Range, touched_lines

REPORT_KINDS = (
    "uninit-shared",
    "uninit-global",
    "race",
    "global-race",
    "async-hazard",
    "missing-proxy-fence",
    "barrier",
    "warp-sync",
    "before-wait",
    "stale-l1",
)


@dataclass
class Report:
    """One finding of the sanitiser: the first occurrence, and how many there were at this place."""

    kind: str
    line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    count: int
    message: str
    source: str

    def __str__(self) -> str:
        return (
            f"[{self.kind}] {self.message} | PTX line {self.line} `{self.source}`, block {self.block}, "
            f"thread {self.thread}, seen {self.count}x"
        )


@dataclass
class Result:
    """Counters of one launch. They are those of PTX, before ptxas: `mix` and SASS differ.

    mix, thread_mix: opcode -> instructions of warps, of threads
    global_load, global_store, global_atomic: requests, 32-byte sectors, bytes, sectors_per_request, efficiency
        (bytes / sector bytes)
    shared_load, shared_store, ldmatrix, bulk_copy, wgmma_operands: requests, bytes, wavefronts, ideal_wavefronts,
        bank_conflict (wavefronts / ideal); the last two are modelled
    mma_count, mma_flops: matrix instructions of warps and their floating-point operations
    buffers: for each pointer argument the distinct bytes and 128-byte lines read and written
    unique_read, unique_written: their sums (compulsory traffic)
    l2: the modelled cache, if one was asked for
    round_trips: if asked for, loads of global memory in a row, each needing what the one before brought: (before the
        first matrix instruction of a warp, after its last), the most of any warp
    lines: the same counters for each PTX instruction; `hot` sorts them
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    seconds: float
    reports: list[Report]
    output: str
    blocks: int
    barriers: int
    warp_instructions: int
    buffers: list[dict[str, int]]
    ptxas: dict[str, int]
    l2: dict[str, Any] | None
    round_trips: tuple[int, int] | None = None
    mix: dict[str, int] = field(default_factory=dict)
    thread_mix: dict[str, int] = field(default_factory=dict)
    mma_count: int = 0
    mma_flops: int = 0
    global_load: dict[str, Any] = field(default_factory=dict)
    global_store: dict[str, Any] = field(default_factory=dict)
    global_atomic: dict[str, Any] = field(default_factory=dict)
    shared_load: dict[str, Any] = field(default_factory=dict)
    shared_store: dict[str, Any] = field(default_factory=dict)
    ldmatrix: dict[str, Any] = field(default_factory=dict)
    bulk_copy: dict[str, Any] = field(default_factory=dict)
    wgmma_operands: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def unique_read(self) -> int:
        return sum(b["unique_read"] for b in self.buffers)

    @property
    def unique_written(self) -> int:
        return sum(b["unique_written"] for b in self.buffers)

    @property
    def unique_lines(self) -> int:
        return sum(b["lines"] for b in self.buffers)

    def by_kind(self, kind: str) -> list[Report]:
        return [r for r in self.reports if r.kind == kind]

    def hot(self, n: int = 20, key: str = "warps") -> list[dict[str, Any]]:
        """The n PTX instructions with the most of a counter."""
        return sorted(self.lines, key=lambda row: -row[key])[:n]

    def summary(self) -> str:
        def show(counters: dict[str, Any]) -> str:
            return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in counters.items())

        lines = [
            f"{self.kernel} grid={self.grid} block={self.block} shared={self.shared_bytes} time={self.seconds:.2f}s",
            f"  warp instructions {self.warp_instructions}, barriers {self.barriers}, mma {self.mma_count} "
            f"({self.mma_flops:.4g} FLOP)",
        ]
        lines += [f"  {name}: {show(getattr(self, name))}" for name in GROUPS if getattr(self, name)["requests"]]
        lines.append(
            f"  compulsory traffic: {self.unique_read} B read + {self.unique_written} B written "
            f"({self.unique_lines} lines of 128 B)"
        )
        if self.l2:
            lines.append(f"  L2 (modelled): {show(self.l2)}")
        lines.append("  top opcodes: " + ", ".join(f"{k} {v}" for k, v in list(self.mix.items())[:12]))
        return "\n".join(lines + [f"  {report}" for report in self.reports])


GLOBAL_GROUPS = {
    **dict.fromkeys(["Ld", "CpAsync", "WmmaLoad", "BulkLoad", "TensorLoad"], "global_load"),
    **dict.fromkeys(["St", "WmmaStore", "BulkStore", "TensorStore"], "global_store"),
    **dict.fromkeys(["Atom", "Red"], "global_atomic"),
}
SHARED_GROUPS = {
    **dict.fromkeys(["Ld", "WmmaLoad"], "shared_load"),
    **dict.fromkeys(["St", "CpAsync", "Atom", "Red", "Stmatrix", "WmmaStore"], "shared_store"),
    "Ldmatrix": "ldmatrix",
    **dict.fromkeys(["BulkLoad", "BulkStore", "TensorLoad", "TensorStore"], "bulk_copy"),
    "Wgmma": "wgmma_operands",
}
GROUPS = list(dict.fromkeys([*GLOBAL_GROUPS.values(), *SHARED_GROUPS.values()]))


def count_instructions(result: Result, program, counters: np.ndarray, source: list[str]) -> None:
    """Fills the counters of a result from those of the instructions."""
    names = {number: name for name, number in program.opcodes.items()}
    opcodes, lines = program.instructions["op"], program.instructions["line"]
    groups = {g: dict.fromkeys(("requests", "sectors", "bytes", "wavefronts", "ideal_wavefronts"), 0) for g in GROUPS}
    for i in map(int, np.nonzero(counters["executed"])[0]):
        row = {name: int(counters[name][i]) for name in counters.dtype.names}
        text, op, line = program.opcode_text[i], names[int(opcodes[i])], int(lines[i])
        result.mix[text] = result.mix.get(text, 0) + row["executed"]
        result.thread_mix[text] = result.thread_mix.get(text, 0) + row["lanes"]
        if i in program.flops:
            result.mma_count += row["executed"]
            result.mma_flops += row["executed"] * program.flops[i]
        _add_to_groups(groups, op, row)
        result.lines.append(_line_row(line, source[line - 1].strip(), row))
    result.mix = dict(sorted(result.mix.items(), key=lambda item: -item[1]))
    for name, group in groups.items():
        setattr(result, name, _finish_group(name, group))


def _add_to_groups(groups: dict, op: str, row: dict[str, int]) -> None:
    if op in GLOBAL_GROUPS and row["sectors"]:
        group = groups[GLOBAL_GROUPS[op]]
        for key in ("requests", "sectors", "bytes"):
            group[key] += row[key]
    if op in SHARED_GROUPS and row["ideal_wavefronts"]:
        group = groups[SHARED_GROUPS[op]]
        # A copy's requests are counted where it goes to global memory; a wgmma has none of its own.
        group["requests"] += row["executed"] if op in ("CpAsync", "Wgmma") else row["requests"]
        group["bytes"] += row["delivered"] or row["bytes"]
        for key in ("wavefronts", "ideal_wavefronts"):
            group[key] += row[key]


def _finish_group(name: str, group: dict[str, int]) -> dict[str, Any]:
    if name.startswith("global"):
        counters = {key: group[key] for key in ("requests", "sectors", "bytes")}
        counters["sectors_per_request"] = group["sectors"] / group["requests"] if group["requests"] else 0.0
        counters["efficiency"] = group["bytes"] / (32 * group["sectors"]) if group["sectors"] else 0.0
        return counters
    counters = {key: group[key] for key in ("requests", "bytes", "wavefronts", "ideal_wavefronts")}
    ideal = group["ideal_wavefronts"]
    counters["bank_conflict"] = group["wavefronts"] / ideal if ideal else 0.0
    return counters


def _line_row(line: int, text: str, row: dict[str, int]) -> dict[str, Any]:
    out: dict[str, Any] = {"line": line, "text": text, "warps": row["executed"], "threads": row["lanes"]}
    keys = ("requests", "sectors", "bytes", "wavefronts", "ideal_wavefronts", "delivered")
    out |= {key: row[key] for key in keys if key != "delivered" or row[key]}
    if row["sectors"] and row["requests"]:
        out["sectors_per_request"] = row["sectors"] / row["requests"]
    if row["ideal_wavefronts"]:
        out["bank_conflict"] = row["wavefronts"] / row["ideal_wavefronts"]
    return out


def buffer_rows(ranges: list[Range]) -> list[dict[str, int]]:
    rows = []
    for r in ranges:
        shadow = r.shadow
        rows.append(
            {
                "arg": r.id,
                "bytes": r.size,
                "unique_read": int(np.count_nonzero(shadow & READ)),
                "unique_written": int(np.count_nonzero(shadow & WRITTEN)),
                "lines": touched_lines(shadow, r.device, READ | WRITTEN),
            }
        )
    return sorted(rows, key=lambda row: row["arg"])


def l2_row(model) -> dict[str, Any]:
    """Counters of the modelled cache since it was last reset."""
    requested, fetched = model.lines_requested, model.lines_fetched
    return {
        "capacity": model.capacity,
        "requested_bytes": 128 * requested,
        "fetched_bytes": 128 * fetched,
        "written_back_bytes": 128 * model.lines_written_back,
        "dirty_bytes": 128 * model.dirty_lines,
        "hit_rate": model.hits / requested if requested else 0.0,
    }


PTXAS_FIELDS = {
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
}


def parse_ptxas(text: str | None, kernel: str) -> dict[str, int]:
    """Registers, spills and shared memory of a kernel from the output of `ptxas -v`."""
    if not text:
        return {}
    part = text.split(f"'{kernel}'", 1)[1] if f"'{kernel}'" in text else text
    found = {name: re.search(pattern, part) for name, pattern in PTXAS_FIELDS.items()}
    return {name: int(match[1]) for name, match in found.items() if match}
