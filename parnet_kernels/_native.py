"""Loads the compiled libraries; without them, or beside those of another version, defines the operators' schemas so
that the reference backend works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from parnet_kernels.cuda.program import layout

_PACKAGE = Path(__file__).parent
_UNBUILT = {
    "_C.so": "no C++ compiler at installation, or a source checkout without `make setup`",
    "_C_cuda.so": "no nvcc at installation, or PARNET_CUDA=0 there",
}
_SCHEMA = re.compile(r'^PARNET_SCHEMA\("(.*)"\)$', re.MULTILINE)


def _load(library: str) -> str | None:
    """Loads one shared object; returns None, or the reason why it could not be loaded."""
    path = _PACKAGE / library
    if not path.exists():
        return f"{library} was not built ({_UNBUILT[library]})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{library} did not load: {error}"
    return None


def _schemas() -> dict[str, str]:
    """Of each operator, by its name."""
    found = _SCHEMA.findall((_PACKAGE / "schemas.inc").read_text())
    return {schema.split("(", 1)[0]: schema.replace('\\"', '"') for schema in found}


def _why_stale(schemas: dict[str, str]) -> str | None:
    """Why the loaded CPU library cannot be this Python code's: after an update without a build."""
    for name, schema in schemas.items():
        operator = getattr(torch.ops.parnet, name, None)
        if operator is None or operator.default._schema != torch._C.parse_schema(f"parnet::{schema}"):
            return _another("_C.so", f"operator {name}")
    return None


def _why_cuda_stale(schemas: dict[str, str]) -> str | None:
    """Why the loaded CUDA library cannot be this Python code's. It implements operators and reads structures: with
    others than it was compiled with, it would take one argument for another.
    """
    try:
        told = {*_cuda_lines()[1:]}
    except RuntimeError:  # it implements no operator that would tell
        told = set()
    known = {schema for name, schema in schemas.items() if name.startswith("_cuda_")}
    known |= {f"{name} {value}" for name, value in layout().items()}
    theirs = {line for line in told if "(" not in line or line.startswith("_cuda_")}
    for line in sorted(known ^ theirs):
        name = re.split(r"[( ]", line)[0]
        return _another("_C_cuda.so", f"operator {name}" if "(" in line else name)
    return None


def _another(library: str, what: str) -> str:
    return f"{library} is of another version, its {what} is missing or another: build or install it again"


def _cuda_lines() -> list[str]:
    return bytes(torch.ops.parnet._cuda_info.default()).decode().splitlines()


def _define(schemas: dict[str, str]) -> torch.library.Library:
    definitions = torch.library.Library("parnet", "FRAGMENT")
    for name, schema in schemas.items():
        if not hasattr(torch.ops.parnet, name):
            definitions.define(schema)
    return definitions


#: Why the CPU library is not there, or None.
cpu_error: str | None = _load("_C.so") or _why_stale(_schemas())
_definitions = _define(_schemas()) if cpu_error else None
#: Why the CUDA library is not there, or None. It needs the schemas of the CPU library.
cuda_error: str | None = "needs _C.so" if cpu_error else _load("_C_cuda.so") or _why_cuda_stale(_schemas())


def cpu_info() -> dict[str, Any]:
    """What the CPU library was compiled for, what this processor has of it, and what runs ("isa", "lanes", …)."""
    found: dict[str, Any] = json.loads(bytes(torch.ops.parnet._cpu_info.default()))
    return found


def cuda_architectures() -> list[str]:
    """What the CUDA library was compiled for, such as "90a"; for the last one also as PTX."""
    return _cuda_lines()[0].split()
