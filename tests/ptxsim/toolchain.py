"""nvcc, ptxas and Triton: from kernel sources to PTX, cached by content."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PtxError, Unavailable
from .native import cache_directory


def find_tool(name: str) -> str:
    """A CUDA tool: on the PATH, under CUDA_HOME, from the pip packages, or (ptxas) from Triton."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            places += [*Path(root).glob("cu*/bin"), Path(root) / "backends" / "nvidia" / "bin"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    found = shutil.which(name, path=path)
    if found is None:
        raise Unavailable(f"no {name} on this machine")
    return found


def why_no_nvcc() -> str | None:
    try:
        find_tool("nvcc")
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout


def compile_cuda(source: str | Path, arch: str = "compute_80", flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file, at -O3. Raises Unavailable without nvcc, PtxError with nvcc's text if it does not compile.

    The cache knows the preprocessed text, so included headers count.
    """
    nvcc = find_tool("nvcc")
    command = [nvcc, f"-arch={arch}", "-O3", *flags, str(source)]
    text = subprocess.run([*command, "-E"], capture_output=True, text=True, check=False)
    if text.returncode:
        raise PtxError(f"nvcc failed on {source}:\n{text.stderr[-4000:]}")
    key = hashlib.sha256("\0".join([*command, _version(nvcc), text.stdout]).encode()).hexdigest()[:24]
    target = cache_directory() / "ptx" / f"{key}.ptx"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            out = Path(directory) / "kernel.ptx"
            run = subprocess.run([*command, "-ptx", "-o", str(out)], capture_output=True, text=True, check=False)
            if run.returncode:
                raise PtxError(f"nvcc failed on {source}:\n{run.stderr[-4000:]}")
            os.replace(out, target)
    return target.read_text()


def ptxas_info(ptx: str, arch: str | None = None) -> str:
    """Output of `ptxas -v` (registers, spills, shared memory); hand it to launch(ptxas=...)."""
    arch = arch or re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        run = subprocess.run(
            [find_tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", f"{directory}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        raise PtxError(run.stderr)
    return run.stderr


@dataclass
class TritonKernel:
    """Compiled Triton: what a launch needs beside grid and arguments."""

    ptx: str
    name: str
    shared_bytes: int
    threads: int


def compile_triton(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict | None = None,
    arch: int = 80,
    **options: Any,
) -> TritonKernel:
    """Compiles a @triton.jit function for an NVIDIA architecture, without a GPU."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        raise Unavailable("Triton is not installed") from None
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes or {})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = compiled.metadata
    return TritonKernel(compiled.asm["ptx"], metadata.name, metadata.shared, metadata.num_warps * 32)
