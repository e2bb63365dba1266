"""Tables of the PTX ISA that the decoder needs. Opcode and modifier numbers are the native core's."""

from __future__ import annotations

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs")
_COMPARISONS += ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMPARISONS = {name: i for i, name in enumerate(_COMPARISONS)}
BOOL_OPERATORS = {"and": 1, "or": 2, "xor": 3}
ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4}
SPACES = {
    "global": 1,
    "shared": 2,
    "shared::cta": 2,
    "shared::cluster": 2,
    "local": 3,
    "const": 4,
    "param": 5,
    "param::entry": 5,
    "param::func": 5,
}
GENERIC, GLOBAL, SHARED, LOCAL, CONST, PARAM = range(6)
ATOMICS = {name: i for i, name in enumerate(["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])}
FLOAT_TYPES = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}
SIGN_BITS = {
    "f32": 1 << 31,
    "f64": 1 << 63,
    "f16": 0x8000,
    "bf16": 0x8000,
    "f16x2": 0x80008000,
    "bf16x2": 0x80008000,
}

# Numbers: special_register() in block_scheduler.cpp
SPECIAL_REGISTERS = {
    "%laneid": 12,
    "%warpid": 13,
    "%nwarpid": 14,
    "%smid": 15,
    "%nsmid": 16,
    "%gridid": 17,
    "%lanemask_eq": 18,
    "%lanemask_lt": 19,
    "%lanemask_le": 20,
    "%lanemask_gt": 21,
    "%lanemask_ge": 22,
    "%dynamic_smem_size": 23,
    "%total_smem_size": 23,
    "%aggr_smem_size": 23,
    "%cluster_ctarank": 24,
    "%cluster_nctarank": 25,
    "%is_explicit_cluster": 26,
}
for _i, _axis in enumerate("xyz"):
    SPECIAL_REGISTERS |= {
        f"%tid.{_axis}": _i,
        f"%ntid.{_axis}": 3 + _i,
        f"%ctaid.{_axis}": 6 + _i,
        f"%nctaid.{_axis}": 9 + _i,
        f"%clusterid.{_axis}": 27 + _i,
        f"%nclusterid.{_axis}": 30 + _i,
        f"%cluster_ctaid.{_axis}": 33 + _i,
        f"%cluster_nctaid.{_axis}": 36 + _i,
    }
CLOCKS = {"%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi"}

# Hints that change nothing here. An L2::cache_hint comes with an operand, which the decoder drops.
CACHE_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"}
CACHE_HINTS |= {
    f"{level}::{policy}"
    for level in ("L1", "L2")
    for policy in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
}
SCOPES = {"cta", "cluster", "gpu", "sys"}

# Kibibytes of shared memory a block may use
SHARED_LIMIT = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 88: 99, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
SHARED_LIMIT |= {120: 99, 121: 99}
