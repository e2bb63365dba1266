"""What is run, with which time box; on a GPU, or as far as it goes without one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_check.facts import BENCHMARK, ROOT, Facts, find_spec

PYTHON = sys.executable
BENCH = [PYTHON, "-m", "bench", "gpu"]  # its arguments for a GPU follow
NO_DEVICE = "needs a CUDA device"  # what it says without one

SELFTEST = """
import sys
from parnet_kernels.app.selftest import selftest
rows = selftest(seconds=60)
for r in rows:
    print("passed" if r.passed else "FAILED", r.backend, r.what, f"{r.error:.1e} of {r.allowed:.0e}", r.message)
sys.exit(0 if rows and all(r.passed for r in rows) else 1)
"""
#: The same rows by way of the processes that the self-test starts, of the reference itself.
SELFTEST_CPU = """
import sys
from parnet_kernels.app.selftest import run_group
command = [sys.executable, "-m", "parnet_kernels.app.selftest", "reference", "cpu"]
rows = run_group("reference", command, 60)
for r in rows:
    print("passed" if r.passed else "FAILED", r.backend, r.what, f"{r.error:.1e} of {r.allowed:.0e}", r.message)
sys.exit(0 if rows and all(r.passed for r in rows) else 1)
"""
#: Of a launch: bytes of DRAM and L2, use of the tensor pipe, why warps wait.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats")
METRICS = "dram__bytes.sum,lts__t_bytes.sum,sm__inst_executed_pipe_tensor.sum"


@dataclass(frozen=True)
class Step:
    """seconds: its box; what a step leaves of it is the next one's. skipped: why it is not run at all. accepts: exit
    status that means well, and a text of which the output then has one (a rehearsal's end of the road).
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    needs: str = ""  # a step that must not have failed
    accepts: tuple[int, str] = (0, "")


def _bench(folder: Path, *arguments: str) -> list[str]:
    return [*BENCH, "--variants", "s,m", *arguments, "--out", str(folder)]


def _networks(folder: Path) -> list[str]:
    engines = "eager-cl,compile-max,tensorrt,ours-triton,ours"
    formats = ["--batch", "1", "--dtypes", "fp16", "--modes", "warm,cold,graph", "--rounds", "2", "--minutes", "1"]
    return _bench(folder / "networks", "--suite", "net", *formats, "--engines", engines)


def _training(folder: Path) -> list[str]:
    formats = ["--batch", "32", "--dtypes", "fp16", "--modes", "warm", "--rounds", "1", "--minutes", "0.4"]
    arguments = ["--suite", "train", "--variants", "s", *formats, "--engines", "eager-cl,compile,ours-triton"]
    return [*BENCH, *arguments, "--out", str(folder / "training")]


def _convolutions(folder: Path) -> list[str]:
    formats = ["--variants", "s", "--batch", "64", "--dtypes", "fp16", "--rounds", "2", "--minutes", "0.1"]
    return [PYTHON, "-m", "bench", "convolutions", *formats, "--out", str(folder / "convolutions")]


def _levels(folder: Path) -> list[str]:
    return _bench(folder / "levels", "--suite", "levels", "--batch", "1", "--dtypes", "fp16")


def _network(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "bench.gpu_check.network", *arguments]


def on_gpu(facts: Facts, folder: Path) -> list[Step]:
    major, minor = facts.card[1]
    cores = len(os.sched_getaffinity(0))
    architectures = "90 90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    build = {"PARNET_CUDA": "1", "PARNET_CUDA_ARCHS": architectures, "MAX_JOBS": str(cores)}
    if facts.nvcc:
        build["CUDA_HOME"] = str(Path(facts.nvcc).parents[1])
    workers = ["-n", str(min(8, cores))] if "xdist" in facts.tools else []
    tests = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", *workers, "tests"]
    benchmark = missing(BENCHMARK)
    sections = [word for section in SECTIONS for word in ("--section", section)]
    ncu = [facts.tools.get("ncu", "ncu"), "--clock-control", "none", "--metrics", METRICS, *sections]
    ncu += ["--profile-from-start", "off", "--export", str(folder / "profile"), "--print-summary", "none"]
    sanitizer = [facts.tools.get("compute-sanitizer", "compute-sanitizer"), "--error-exitcode", "9"]
    no = {name: "" if name in facts.tools else f"{name} is not installed" for name in ("ncu", "compute-sanitizer")}
    no_pytest = "" if "pytest" in facts.tools else "pytest is not installed"
    no_build = (
        "" if facts.nvcc and "ninja" in facts.tools else "no nvcc or ninja: the library is as it was built before"
    )
    return [
        Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 140, build, no_build),
        Step("self-test", [PYTHON, "-c", SELFTEST], 90, needs="build"),
        Step("levels", _levels(folder), 25, {}, benchmark, "build"),
        Step("networks", _networks(folder), 80, {}, benchmark, "build"),
        Step("training step", _training(folder), 35, {}, benchmark, "build"),
        Step("convolutions", _convolutions(folder), 15, {}, benchmark, "build"),
        Step("tests", tests, 100, {}, no_pytest, "build"),
        Step("profile", [*ncu, *_network("s", "--profiled")], 25, {}, no["ncu"], "build"),
        *(
            Step(tool, [*sanitizer, "--tool", tool, *_network("tiny")], 15, {}, no["compute-sanitizer"], "build")
            for tool in ("memcheck", "racecheck")
        ),
    ]


def rehearsed(facts: Facts, folder: Path) -> list[Step]:
    """The same steps: one file compiled, the self-test's processes, the benchmark up to where it wants a device, a
    test's body in the PTX simulator, the model in the place of the profiler, the simulator in the sanitizer's.
    """
    no_nvcc = "" if facts.nvcc else "no nvcc"
    no_pytest = "" if "pytest" in facts.tools else "pytest is not installed"
    flags = ["-std=c++20", "-arch=sm_90", "-DPARNET_HOPPER", "-c", "csrc/cuda/launch.cu", "-o", os.devnull]
    test = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=simulator", "tests/cuda/test_layers.py"]
    checked = [*test, "-k", "test_layouts and f16 and sliced"]
    stops = (1, NO_DEVICE)
    benchmark = missing(BENCHMARK)
    make: dict[str, Callable[[Path], list[str]]] = {
        "levels": _levels,
        "networks": _networks,
        "training step": _training,
        "convolutions": _convolutions,
    }
    return [
        Step("build", [facts.nvcc or "nvcc", *flags], 140, {}, no_nvcc),
        Step("self-test", [PYTHON, "-c", SELFTEST_CPU], 90),
        *(Step(name, command(folder), 35, {}, benchmark, accepts=stops) for name, command in make.items()),
        Step("tests", [*test, "-k", "test_relu_without_options and downsample"], 100, {}, no_nvcc or no_pytest),
        Step("profile", [PYTHON, "-m", "bench.cuda_levels", "--variant", "s", "--gpu", "H100"], 25, {}, benchmark),
        Step("memcheck", checked, 30, {}, no_nvcc or no_pytest),
    ]


def missing(modules: tuple[str, ...]) -> str:
    absent = [name for name in modules if not find_spec(name)]
    return f"no Python module {', '.join(absent)}" if absent else ""


def environment(facts: Facts, rehearse: bool) -> dict[str, str]:
    """For every step: the checkout's package, one GPU, caches as they are."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    found.pop("PARNET_BACKEND", None)
    if not rehearse and facts.gpu is not None:
        visible = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[facts.gpu] if visible != [""] else str(facts.gpu)
    return found
