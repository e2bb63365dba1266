"""What the numbers were taken on: processor, versions, and the measured ceilings of arithmetic and memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

_X86_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
ISA_FLAGS = (*_X86_FLAGS, "asimd", "asimddp", "i8mm", "bf16", "sve")
SOURCE = Path(__file__).with_name("ceilings.cpp")
HIDER = Path(__file__).with_name("without_avx512.c")


@dataclass(frozen=True)
class Ceilings:
    """Of a number of threads: the FMA peak in GFLOP/s and the rate of reading memory in GB/s."""

    gflops: float
    gbytes: float


@dataclass
class Machine:
    cpu: str
    isa: list[str]
    cores: int
    cache_mb: float  # the last level
    memory_gb: float
    system: str
    date: str
    commit: str
    load: float  # of the minute before the run
    versions: dict[str, str] = field(default_factory=dict)
    ceilings: dict[int, Ceilings] = field(default_factory=dict)
    not_measured: str = ""  # why there are no ceilings

    @property
    def busy(self) -> bool:
        return self.load > 0.25 * self.cores

    @property
    def cold_bytes(self) -> int:
        """Weights that a layer cycles through so that they are cold: more than the last level of cache has, but the
        workers must all have room for their forms of them, which may be seven times as large.
        """
        return max(56 << 20, int(min(1.75 * self.cache_mb * 2**20, self.memory_gb * 2**30 / 256)))

    @property
    def place(self) -> str:
        """Where it ran, for a caption."""
        return self.cpu

    def line(self) -> str:
        isa = "+".join(self.isa) or "portable"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} cores, {isa}, {self.cache_mb:.0f} MB cache, {self.memory_gb:.0f} GB memory; "
            f"{self.system}; {versions}; {self.date}, commit {self.commit}, load {self.load:.1f} at the start"
        )

    def ceilings_line(self) -> str:
        if self.not_measured:
            return f"FMA peak and memory bandwidth: not measured ({self.not_measured})"
        parts = [
            f"{n} thread{'s' if n > 1 else ''} {c.gflops:.0f} GFLOP/s, {c.gbytes:.1f} GB/s"
            for n, c in self.ceilings.items()
        ]
        return "FMA peak and memory bandwidth, measured: " + "; ".join(parts)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else ""


def physical_cores() -> int:
    """Those this process may use; a core's hyperthreads count once."""
    siblings = {
        _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in _usable()
    }
    return len(siblings)


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cache_bytes() -> int:
    """Of the last level; 32 MB where the system does not tell."""
    sizes = [
        int(number) << {"K": 10, "M": 20, "G": 30}[unit]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        for number, unit in re.findall(r"(\d+)([KMG])", path.read_text())
    ]
    return max(sizes, default=32 << 20)


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def describe(hidden: bool = False) -> Machine:
    """hidden: within `avx512_hidden`."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_found(r"^(?:flags|Features)\s*:(.*)$", cpuinfo).split())
    cpu = _found(r"^model name\s*:(.*)$", cpuinfo) or platform.processor() or platform.machine()
    isa = [flag for flag in ISA_FLAGS if flag in flags]
    if hidden:
        cpu += " (AVX-512 hidden)"
        isa = [flag for flag in isa if not flag.startswith(("avx512", "amx"))]
    memory = _found(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return Machine(
        cpu=cpu,
        isa=isa,
        cores=physical_cores(),
        cache_mb=cache_bytes() / 2**20,
        memory_gb=int(memory or 0) / 2**20,
        system=f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        load=os.getloadavg()[0],
        versions={"torch": importlib.metadata.version("torch")},
    )


class CannotHideError(RuntimeError):
    """Why this machine, or its system, lets nobody hide an instruction set."""


@contextmanager
def avx512_hidden() -> Iterator[None]:
    """The processes that this one starts meanwhile see a processor without AVX-512, see `HIDER`.

    Raises:
        CannotHideError: with the reason, where that is not possible.
    """
    compiler = next((c for c in ("gcc", "clang", "cc") if shutil.which(c)), None)
    if compiler is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotHideError("AVX-512 can be hidden on x86-64 Linux with a C compiler only")
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder:
        library = f"{folder}/without_avx512.so"
        command = [compiler, "-shared", "-fPIC", "-O2", str(HIDER), "-o", library]
        for step, environment in ((command, {}), ([sys.executable, "-c", ""], {"LD_PRELOAD": library})):
            done = subprocess.run(step, capture_output=True, text=True, env={**os.environ, **environment})
            if done.returncode:
                raise CannotHideError(f"AVX-512 cannot be hidden: {done.stderr.strip()[:200]}")
        before = os.environ.get("LD_PRELOAD")
        os.environ["LD_PRELOAD"] = f"{library}:{before}" if before else library
        try:
            yield
        finally:
            del os.environ["LD_PRELOAD"]
            if before:
                os.environ["LD_PRELOAD"] = before


def measure_ceilings(machine: Machine, thread_counts: list[int]) -> None:
    """Compiles and runs `ceilings.cpp`; without a compiler, notes why not."""
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        machine.not_measured = "no C++ compiler"
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-std=gnu++17", "-pthread"]
        try:
            subprocess.run([compiler, *options, SOURCE, "-o", program], check=True, capture_output=True, text=True)
            for threads in thread_counts:
                told = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True, timeout=60)
                gflops, gbytes = map(float, told.stdout.split())
                machine.ceilings[threads] = Ceilings(gflops, gbytes)
        except (subprocess.SubprocessError, ValueError) as error:
            machine.not_measured = f"{compiler}: {str(error)[:200]}"
            machine.ceilings.clear()
