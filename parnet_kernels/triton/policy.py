"""Tile choice, in one place: a table per architecture × kind of product × layer shape, and the split of the reduction.

The tables are modelled, not measured: occupancy and shared memory from offline compilation, bytes from the simulator
(bench/triton_static.py). `tuning.autotune` measures and writes a table to the user's cache directory, which then comes
first. No entry spills registers; those of sm_80 fit 99 KB of shared memory, so that they also serve sm_86, 89 and 120.
Exact float32 has tables of its own for FMA ("exact") and three tf32 products, which want other numbers of registers.
Rejected: 128×128×32 on sm_80 (registers allow one program an SM, as with 128×128×64, whose loop is longer); a split of
64×64 tiles at 28×28×256, batch 1 (the workspace outweighs the map); 128×256 on sm_100 (a fusion's backward spills
1.3 KB, with 16 warps 0.3 KB).
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Of a product: 16-bit operands; one tf32 product; exact float32 by FMA; nearly exact by three tf32 products.
MODES = ("half", "tf32", "exact", "tf32x3")
KINDS = ("conv", "weight")
FINISH_BM = 16  # rows of a tile of the kernel that adds the parts of a split: bandwidth-bound, wants many programs
_SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Tile:
    """bm × bn results a program, bk of the reduction a step.

    registers: the most a thread may have; 0 leaves it to the assembler, which spills a few of some kernels to fit one
    program more on a multiprocessor, and does not where a limit is given (NVIDIA only).
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """As Triton's launch takes them."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Rule:
    """`tile` serves products of at least `rows` × `columns`; the first rule that fits is taken."""

    rows: int
    columns: int
    tile: Tile


@dataclass(frozen=True)
class Plan:
    tile: Tile
    splits: int
    precision: str  # of tl.dot
    finish_bm: int = FINISH_BM

    def chunk(self, channels: int) -> int:
        """Channels a step: the largest power of two that divides them, at most tile.bk."""
        return min(self.tile.bk, channels & -channels)


def _rules(*rules: tuple[int, int, tuple[int, ...]]) -> tuple[Rule, ...]:
    return tuple(Rule(rows, columns, Tile(*tile)) for rows, columns, tile in rules)


# (rows, columns) at least → (bm, bn, bk, warps, stages[, registers]). Rows of "conv" are result pixels, columns output
# channels; of "weight", output and input channels. Registers are limited where the assembler spills without.
_EXACT_CONV = _rules((8192, 64, (64, 64, 16, 4, 3)), (0, 32, (32, 32, 32, 4, 3)), (0, 0, (32, 16, 32, 4, 3)))
_EXACT_WEIGHT = _rules((64, 64, (64, 64, 16, 4, 3)), (0, 0, (32, 32, 16, 4, 3)))
TABLES: dict[str, dict[tuple[str, str], tuple[Rule, ...]]] = {
    "sm_80": {
        ("conv", "half"): _rules(
            (12544, 96, (128, 128, 64, 8, 3)),
            (3136, 48, (128, 64, 64, 4, 3, 200)),
            (0, 48, (64, 64, 64, 4, 3)),
            (4096, 24, (128, 32, 32, 4, 4)),
            (0, 0, (64, 16, 32, 4, 4)),
        ),
        ("conv", "tf32"): _rules(
            (12544, 96, (128, 64, 32, 4, 3)), (0, 48, (64, 64, 32, 4, 3)), (0, 0, (64, 16, 32, 4, 4, 128))
        ),
        ("conv", "exact"): _rules(
            (8192, 64, (64, 64, 16, 8, 3, 128)), (0, 32, (32, 32, 32, 4, 3, 168)), (0, 0, (32, 16, 32, 4, 3, 128))
        ),
        ("conv", "tf32x3"): _rules(
            (8192, 64, (64, 64, 16, 4, 3, 255)), (0, 32, (32, 32, 32, 4, 3, 168)), (0, 0, (32, 16, 32, 4, 3, 128))
        ),
        ("weight", "half"): _rules(
            (96, 96, (128, 128, 32, 8, 4, 168)), (48, 48, (64, 64, 32, 4, 4)), (0, 0, (32, 32, 64, 4, 3))
        ),
        ("weight", "tf32"): _rules((48, 48, (64, 64, 32, 4, 3)), (0, 0, (32, 32, 32, 4, 3))),
        ("weight", "exact"): _EXACT_WEIGHT,
        ("weight", "tf32x3"): _EXACT_WEIGHT,
    },
    "sm_90": {
        ("conv", "half"): _rules(
            (33792, 192, (128, 256, 64, 8, 3)),
            (12544, 96, (128, 128, 64, 8, 4)),
            (3136, 48, (128, 64, 64, 4, 4)),
            (0, 48, (64, 64, 64, 4, 4)),
            (4096, 24, (128, 32, 64, 4, 4)),
            (0, 0, (64, 16, 32, 4, 4)),
        ),
        ("conv", "tf32"): _rules(
            (12544, 96, (128, 128, 32, 8, 4)), (0, 48, (64, 64, 32, 4, 4)), (0, 0, (64, 16, 32, 4, 4))
        ),
        ("conv", "exact"): _EXACT_CONV,
        ("conv", "tf32x3"): _EXACT_CONV,
        ("weight", "half"): _rules(
            (96, 96, (128, 128, 64, 8, 4)), (48, 48, (64, 64, 64, 4, 4)), (0, 0, (64, 32, 64, 4, 4))
        ),
        ("weight", "tf32"): _rules((48, 48, (64, 64, 32, 4, 4)), (0, 0, (64, 32, 32, 4, 4))),
        ("weight", "exact"): _EXACT_WEIGHT,
        ("weight", "tf32x3"): _EXACT_WEIGHT,
    },
    "sm_100": {
        ("conv", "half"): _rules(
            (12544, 96, (128, 128, 64, 4, 4)),
            (0, 48, (128, 64, 64, 4, 4)),
            (0, 0, (64, 16, 32, 4, 4)),
        ),
        ("conv", "tf32"): _rules(
            (12544, 96, (128, 128, 32, 4, 4)), (0, 48, (128, 64, 32, 4, 4)), (0, 0, (64, 16, 32, 4, 4))
        ),
        ("conv", "exact"): _EXACT_CONV,
        ("conv", "tf32x3"): _EXACT_CONV,
        ("weight", "half"): _rules(
            (96, 96, (128, 128, 64, 4, 4)), (48, 48, (64, 64, 64, 4, 4)), (0, 0, (64, 32, 64, 4, 4))
        ),
        ("weight", "tf32"): _rules((48, 48, (64, 64, 32, 4, 4)), (0, 0, (64, 32, 32, 4, 4))),
        ("weight", "exact"): _EXACT_WEIGHT,
        ("weight", "tf32x3"): _EXACT_WEIGHT,
    },
    "gfx942": {
        ("conv", "half"): _rules(
            (24320, 96, (128, 128, 32, 4, 2)), (0, 48, (64, 64, 64, 4, 2)), (0, 0, (64, 16, 32, 4, 2))
        ),
        ("conv", "tf32"): _rules(
            (24320, 48, (128, 64, 32, 4, 2)), (0, 48, (64, 64, 32, 4, 2)), (0, 0, (64, 16, 32, 4, 2))
        ),
        ("conv", "exact"): _rules((0, 48, (64, 64, 16, 4, 2)), (0, 0, (64, 16, 16, 4, 2))),
        ("conv", "tf32x3"): (),  # not on these devices: see `precision.float32_precision`
        ("weight", "half"): _rules((96, 96, (128, 128, 32, 4, 2)), (0, 0, (64, 64, 32, 4, 2))),
        ("weight", "tf32"): _rules((0, 0, (64, 64, 32, 4, 2))),
        ("weight", "exact"): _rules((0, 0, (64, 64, 16, 4, 2))),
        ("weight", "tf32x3"): (),
    },
}


def architecture(device: torch.device) -> str:
    """The table that serves the device: the newest not newer than it; gfx942's for AMD; sm_80's for the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def fenced(arch: str) -> bool:
    """Whether products may read what `cp.async` has written. Those of sm_90 and sm_100 (wgmma, tcgen05) read shared
    memory through the async proxy: the PTX ISA requires a `fence.proxy.async` before, which Triton sets since 3.7.1.
    Older ones set it behind other stores only, which a loop in one stage has.
    """
    if arch not in ("sm_90", "sm_100"):
        return True
    import triton

    return TorchVersion(triton.__version__) >= "3.7.1"


def precisions(device: torch.device) -> tuple[str, ...]:
    """Of float32 products, those that the compiler has for the device. Of AMD's, gfx942 alone multiplies in tf32."""
    if device.type != "cuda" or not torch.version.hip:
        return ("ieee", "tf32", "tf32x3")
    name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return ("ieee", "tf32") if name == "gfx942" else ("ieee",)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units), which the split of the reduction tries to fill."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _SMS["sm_80"]


def mode_of(dtype: torch.dtype, precision: str) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return precision if precision in ("tf32", "tf32x3") else "exact"


def _first_fit(rules: tuple[Rule, ...], rows: int, columns: int) -> Tile:
    return next(r.tile for r in rules if rows >= r.rows and columns >= r.columns)


def tile_for(device: torch.device, kind: str, mode: str, rows: int, columns: int) -> Tile:
    """The tile for a product of rows × columns: the user's table if it has the shape, else the first rule that fits."""
    key, arch, tile = shape_key(kind, mode, rows, columns), architecture(device), None
    if _trial is not None:
        _trial.asked[key] = (kind, mode)
        tile = _trial.tiles.get(key)
    tile = tile or user_table(model(device)).get(key) or _first_fit(TABLES[arch][kind, mode], rows, columns)
    return tile if fenced(arch) else replace(tile, stages=1)


def split(tiles: int, steps: int, sms: int) -> int:
    """Parts of the reduction: only where three parts fit at once, since a split writes and reads its results once
    more.
    """
    if tiles * 3 > sms:
        return 1
    return max(1, min(8, sms // tiles, steps // 8))


def plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    rows: int,
    columns: int,
    channels: int,
    taps: int,
    classes: int,
) -> Plan:
    """For a convolution of `rows` pixels (of one class) × `columns` channels, reduced over taps × channels."""
    tile = tile_for(device, "conv", mode_of(dtype, precision), rows, columns)
    tiles = -(-rows // tile.bm) * -(-columns // tile.bn) * classes
    return Plan(tile, split(tiles, taps * channels // tile.bk, processors(device)), precision)


def weight_plan(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int, columns: int, products: int, pixels: int
) -> Plan:
    """For `products` (taps × inputs × groups) products of rows × columns channels, reduced over `pixels`.

    Pixels are split until every processor has two programs; each part keeps at least 8 steps.
    """
    tile = tile_for(device, "weight", mode_of(dtype, precision), rows, columns)
    tiles = -(-rows // tile.bm) * -(-columns // tile.bn) * products
    parts = min(2 * processors(device) // tiles, pixels // (8 * tile.bk), 64)
    return Plan(tile, max(1, parts), precision)


# ------------------------------------------------------------------ the user's table


@dataclass
class Trial:
    """What autotuning sees and sets: the shape keys asked for, and the tiles to answer with."""

    asked: dict[str, tuple[str, str]] = field(default_factory=dict)
    tiles: dict[str, Tile] = field(default_factory=dict)


_trial: Trial | None = None


@contextmanager
def trial() -> Iterator[Trial]:
    """Within the block, `tile_for` records what it is asked and answers from the trial first."""
    global _trial
    _trial = Trial()
    try:
        yield _trial
    finally:
        _trial = None


def shape_key(kind: str, mode: str, rows: int, columns: int) -> str:
    """Rows count by powers of two, so that a table serves neighbouring batch sizes."""
    return f"{kind}/{mode}/{rows.bit_length()}/{columns}"


@functools.cache
def model(device: torch.device) -> str:
    """What measured tiles are good for: an A100's are not an RTX 4090's, though one table of the above serves both."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(model: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "parnet_kernels" / f"triton-{model}.json"


@functools.cache
def user_table(model: str) -> dict[str, Tile]:
    """What `autotune` wrote, or nothing. A file that cannot be read is reported once and ignored."""
    path = table_path(model)
    try:
        return {key: Tile(**tile) for key, tile in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"parnet_kernels: ignoring the tile table {path}: {error}", stacklevel=2)
        return {}


def write_user_table(model: str, entries: dict[str, Tile]) -> Path:
    """Adds entries to the user's table; the file is replaced as a whole, so that a reader never sees half of it."""
    path = table_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**user_table(model), **entries}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({key: asdict(tile) for key, tile in sorted(merged.items())}, indent=1) + "\n")
    temporary.replace(path)
    user_table.cache_clear()
    return path
