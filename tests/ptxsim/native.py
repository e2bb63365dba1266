"""Builds the native core on first use and loads it.

The shared object lies in a per-user cache, under a name made of the sources, the flags, the compiler and the Python
ABI, so it is built once for each state of these. Builders wait for each other; what is in place is always complete.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from .errors import Unavailable

SOURCES = Path(__file__).parent / "csrc"
# AVX2, FMA and F16C are used by name; contraction and -ffast-math would change results.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-march=x86-64-v3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
NEEDED_CPU_FLAGS = {"avx2", "fma", "f16c", "bmi2"}


def cache_directory() -> Path:
    """`$PTXSIM_CACHE`, else a directory in the user's cache; it exists afterwards."""
    chosen = os.environ.get("PTXSIM_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = [Path(chosen)] if chosen else [base / "parnet-kernels" / "ptxsim"]
    if not chosen:
        candidates.append(Path(tempfile.gettempdir()) / f"parnet-kernels-ptxsim-{os.getuid()}")
    for path in candidates:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK):
                return path
        except OSError:
            continue
    raise Unavailable(f"no writable cache directory for the PTX simulator (tried {', '.join(map(str, candidates))})")


def _check_cpu() -> None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        raise Unavailable("the PTX simulator needs Linux on x86-64") from None
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    if missing := sorted(NEEDED_CPU_FLAGS - flags):
        raise Unavailable(f"the PTX simulator's native core needs a CPU with {', '.join(missing)}")


def _compiler() -> tuple[list[str], list[str]]:
    """The compiler's command, and where its headers are."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[-1]) is None:
        raise Unavailable(f"no C++ compiler ({' '.join(compiler)}) to build the PTX simulator's native core")
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed; the PTX simulator's native core needs it") from None
    return compiler, [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _key(compiler: list[str], includes: list[str]) -> str:
    version = subprocess.run([compiler[-1], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    parts = [*FLAGS, compiler[-1], *includes, version, sysconfig.get_config_var("SOABI") or "", sys.version]
    digest.update("\0".join(parts).encode())
    for path in sorted(SOURCES.glob("*.[ch]pp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: list[str], includes: list[str], name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:

        def compile_one(source: Path) -> str:
            out = f"{directory}/{source.stem}.o"
            more = [f"-DPTXSIM_MODULE={name}", "-O1"] if source.stem == "bindings" else []
            run = subprocess.run(
                [*compiler, *includes, *FLAGS, *more, "-c", str(source), "-o", out], capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"building the PTX simulator failed:\n{run.stderr[-4000:]}")
            return out

        # The slowest first
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: (path.stem != "bindings", -path.stat().st_size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = f"{directory}/{name}.so"
        subprocess.run([*compiler, "-shared", *objects, "-o", linked], check=True)
        os.replace(linked, target)


@functools.cache
def core() -> ModuleType:
    """The native module. Raises Unavailable if it cannot be built here."""
    _check_cpu()
    compiler, includes = _compiler()
    key = _key(compiler, includes)
    name = f"ptxsim_core_{key}"
    cache = cache_directory()
    target = cache / f"{name}.so"
    if not target.exists():
        with open(cache / "build.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():  # another process may have built it meanwhile
                _build(compiler, includes, name, target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
