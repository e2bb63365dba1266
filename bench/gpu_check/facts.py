"""What there is to check with, and what is missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
FREE = 2 << 30  # bytes that a build, caches and logs may take
OLDEST = (8, 0)
NEEDED = ("numpy", "safetensors", "setuptools", "PIL")  # besides torch, by the package and its build
BENCHMARK = ("rich", "typer")

_ASK = """
import json
import torch
told = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": [], "error": ""}
try:
    torch.cuda.init()
    told["gpus"] = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
    ]
except Exception as error:
    told["error"] = str(error).strip().splitlines()[0]
print(json.dumps(told))
"""


@dataclass
class Facts:
    torch: str = ""
    cuda: str = ""  # torch's; empty: a build without CUDA
    gpus: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    error: str = ""  # of torch, when it looks for a GPU
    nvcc: str = ""
    library: bool = False  # the CUDA library was built before
    gpu: int | None = None  # which one, by --gpu
    missing: list[str] = field(default_factory=list)  # Python modules
    tools: dict[str, str] = field(default_factory=dict)  # ninja, pytest, xdist, ncu, compute-sanitizer: where they are

    @property
    def card(self) -> tuple[str, tuple[int, int]]:
        return self.gpus[self.gpu or 0]


def ask_torch(seconds: float = 120) -> dict[str, object]:
    """In a process of its own: a driver that hangs must not hang the check."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not answer within {seconds:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["torch ended without a word"])[-1]}
    found = json.loads(done.stdout.splitlines()[-1])
    return found if isinstance(found, dict) else {}


def find_nvcc() -> str:
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if "CUDA_HOME" in os.environ else []
    places += [Path(p) for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p]
    places += [Path(p) / "nvidia" / "cu13" / "bin" / "nvcc" for p in sys.path]
    return str(next(filter(Path.is_file, places), ""))


def gather(gpu: int | None) -> Facts:
    told = ask_torch()
    names = ("ncu", "compute-sanitizer")
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    nvcc = find_nvcc()
    beside = os.pathsep.join([beside, str(Path(nvcc).parent)]) if nvcc else beside
    tools = {name: found for name in ("ninja", *names) if (found := shutil.which(name, path=beside))}
    tools |= {name: "module" for name in ("pytest", "xdist") if find_spec(name)}
    gpus = told.get("gpus") or []
    assert isinstance(gpus, list)
    return Facts(
        str(told.get("torch") or ""),
        str(told.get("cuda") or ""),
        [(str(name), (int(major), int(minor))) for name, (major, minor) in gpus],
        str(told.get("error") or ""),
        nvcc,
        (ROOT / "parnet_kernels" / "_C_cuda.so").is_file(),
        gpu,
        [name for name in NEEDED if not find_spec(name)],
        tools,
    )


def why_no_room(folder: Path) -> str:
    """Why nothing can be written to `folder`, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"the disk of {folder} is full" if full else f"{folder} cannot be written ({error.strerror})"
    free = shutil.disk_usage(folder).free
    return f"{folder} has {free / 2**30:.1f} GB free, {FREE / 2**30:.0f} are needed" if free < FREE else ""


def why_not(facts: Facts, folder: Path, rehearse: bool) -> str:
    """What keeps the whole check from running, or an empty string."""
    for place in (folder, ROOT / "build", ROOT / "parnet_kernels"):
        if reason := why_no_room(place):
            return reason
    if not facts.torch:
        return f"no torch in {sys.executable}: {facts.error}"
    if facts.missing:
        return f"no Python module {', '.join(facts.missing)}"
    if rehearse:
        return ""
    if facts.error or not facts.gpus:
        return f"no GPU: {facts.error or 'torch finds none'}"
    if facts.gpu is None and len(facts.gpus) > 1:
        return f"{len(facts.gpus)} GPUs: choose one with --gpu 0 to {len(facts.gpus) - 1}"
    if not 0 <= (facts.gpu or 0) < len(facts.gpus):
        return f"no GPU {facts.gpu}, there are {len(facts.gpus)}"
    name, capability = facts.card
    if capability < OLDEST:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    if not facts.nvcc and not facts.library:
        return "no nvcc, under CUDA_HOME, on PATH or in /usr/local/cuda"
    if not facts.library and "ninja" not in facts.tools:
        return "no ninja to build with"
    return ""
