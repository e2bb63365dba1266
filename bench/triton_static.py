"""What can be said of the Triton kernels without a GPU: `python -m bench.triton_static [--simulate]`.

Per tile of every table, from offline compilation: registers, spills, shared memory, matrix instructions; from these
the *modelled* occupancy. With --simulate, *counted* by the PTX simulator on sm_80: bytes requested against compulsory
bytes of ParNet-M's layers, batch 1. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]

PRECISIONS = {"half": "ieee", "tf32": "tf32", "exact": "ieee", "tf32x3": "tf32x3"}
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_"


@dataclass(frozen=True)
class Processor:
    """Limits of one streaming multiprocessor (compute unit), from the vendors' occupancy tables."""

    registers: int
    threads: int
    shared: int  # bytes, of which a program's share is its own and `reserved`
    reserved: int
    programs: int
    granule: int  # registers are allotted in multiples of this for each thread


PROCESSORS = {
    "sm_80": Processor(65536, 2048, 164 << 10, 1024, 32, 8),
    "sm_90": Processor(65536, 2048, 228 << 10, 1024, 32, 8),
    "sm_100": Processor(65536, 2048, 228 << 10, 1024, 32, 8),
    "gfx942": Processor(4 * 64 * 512, 2048, 64 << 10, 0, 32, 8),
}


def programs_a_processor(target: str, registers: int, shared: int, threads: int) -> int:
    """Modelled: how many programs of a kernel fit at once."""
    p = PROCESSORS[target]
    rounded = -(-registers // p.granule) * p.granule
    return min(p.registers // (rounded * threads), p.threads // threads, p.shared // (shared + p.reserved), p.programs)


def matrix_share(compiled: Any, target: str) -> float | None:
    """Share of matrix instructions among the machine instructions of the longest loop; None for AMD."""
    if target.startswith("gfx"):
        return None
    from tests.triton.offline import tool

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line.strip()))}
    best: list[str] = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            body = [x for x in lines[labels[jump[1]] : i + 1] if x.strip().startswith("/*")]
            if sum(bool(re.search(r"\b[HU]?[HGQ]?MMA", x)) for x in body) and (not best or len(body) < len(best)):
                best = body
    count = sum(bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)\b", x)) for x in best)
    return count / len(best) if best else None


def tiles() -> Iterator[dict[str, Any]]:
    """One row a kernel of every tile of every table."""
    from parnet_kernels.triton import policy
    from tests.triton import test_offline
    from tests.triton.offline import resources

    for arch, table in policy.TABLES.items():
        for (kind, mode), rules in table.items():
            for tile in dict.fromkeys(rule.tile for rule in rules):
                for one in test_offline.launches_with(tile, kind, mode, PRECISIONS[mode], ("repvgg_sse",)):
                    compiled = one.compile(arch)
                    used = resources(compiled, arch)
                    code = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
                    programs = programs_a_processor(arch, used.registers, used.shared, used.threads)
                    share = matrix_share(compiled, arch)
                    yield {
                        "architecture": arch,
                        "products": mode,
                        "kernel": one.kernel.__name__ + (" (input gradient)" if one.arguments.get("FLIP") else ""),
                        "tile": f"{tile.bm}x{tile.bn}x{tile.bk}",
                        "warps": tile.warps,
                        "stages": tile.stages,
                        "registers (counted)": used.registers,
                        "spilled bytes (counted)": used.spilled,
                        "shared KB (counted)": round(used.shared / 1024, 1),
                        "programs an SM (modelled)": programs,
                        "occupancy % (modelled)": round(100 * programs * used.threads / PROCESSORS[arch].threads),
                        "matrix instructions (counted)": ", ".join(sorted(set(re.findall(MATRIX, code)))) or "none",
                        "% of loop (counted)": "" if share is None else round(100 * share),
                    }


LAYERS = {
    "streams.0": ("repvgg_sse", 128, 128, 56, 1),
    "streams.1": ("repvgg_sse", 256, 256, 28, 1),
    "streams.2": ("repvgg_sse", 512, 512, 14, 1),
    "inits.1": ("downsample_se", 128, 256, 56, 2),
    "inits.2": ("downsample_se", 256, 512, 28, 2),
    "downsamples_2.1": ("fusion_se", 256, 512, 28, 2),
}


def traffic() -> Iterator[dict[str, Any]]:
    """One row a layer of ParNet-M at 224², batch 1, float16: what the simulator counts on sm_80. Checks results too."""
    from parnet_kernels import reference
    from parnet_kernels.triton import layers
    from tests.cases import arguments, to
    from tests.triton.simulated import simulate

    for name, (op, c, k, size, stride) in LAYERS.items():
        positional, options = arguments(op, 1, c, k, (size, size), dtype=torch.float16, stride=stride)
        wide, wide_options = to(torch.float64, positional, options)
        expected = getattr(reference, op)(*wide, **wide_options)
        inputs = 2 if op == "fusion_se" else 1
        x = [t.contiguous(memory_format=torch.channels_last) for t in positional[:inputs]]
        weight, bias, *rest = positional[inputs:]
        skip = rest[:2] if op == "repvgg_sse" else [None, None]
        layer = layers.Layer(
            weight.contiguous(memory_format=torch.channels_last), bias, rest[-2], rest[-1], *skip, **options
        )
        maps, _ = simulate(lambda x=x: layers.maps_of(*x))
        out, results = simulate(lambda layer=layer, maps=maps: layers.forward(layer, maps, "ieee"))
        error = (out.data.permute(0, 3, 1, 2).double() - expected).norm() / expected.norm()
        if error > 1e-3:
            raise RuntimeError(f"{name}: wrong result, relative error {error:.1e}")
        compulsory = 2 * (sum(t.numel() for t in x) + weight.numel() + rest[-2].numel() + out.data.numel())
        steps = {key: r for key, r in results.items() if key != "pack_weight_kernel"}  # done once, at deployment
        loads = [r.global_load for r in steps.values()]
        loaded, sectors = (sum(load[key] for load in loads) for key in ("bytes", "sectors"))
        lines = sum(r.unique_lines for r in steps.values())
        yield {
            "layer": f"{name} {op} {size}x{size} {c}->{k}",
            "launches": len(steps),
            "requested MB (counted)": round(
                sum(r.global_load["bytes"] + r.global_store["bytes"] for r in steps.values()) / 1e6, 2
            ),
            "compulsory MB": round(compulsory / 1e6, 2),
            "128-byte lines / compulsory (counted)": round(128 * lines / compulsory, 3),
            "load sectors used % (counted)": round(min(100.0, 100 * loaded / (32 * sectors))),
            "relative error": f"{error.item():.1e}",
        }


def show(rows: list[dict[str, Any]], path: Path) -> None:
    """Prints a Markdown table and writes the same as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(v) for v in row.values()) + " |")
    print(f"\nwritten to {path}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="also count memory traffic in the PTX simulator")
    parser.add_argument("--only-simulate", action="store_true", help="leave the tiles out")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder of the CSV files")
    chosen = parser.parse_args()
    if not chosen.only_simulate:
        show(list(tiles()), chosen.out / "triton_tiles.csv")
    if chosen.simulate or chosen.only_simulate:
        show(list(traffic()), chosen.out / "triton_traffic.csv")


if __name__ == "__main__":
    main()
