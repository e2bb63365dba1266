"""What the self-test found on a GPU, kept for later processes: what failed there is not chosen again.

A verdict is of one GPU model, driver and build of the kernels; with another one of these the question is open again.
Where there is no verdict, kernels are trusted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from importlib import metadata
from pathlib import Path

import torch

from parnet_kernels.locks import Lock

#: What can be turned off: a backend, or the use of wgmma by the CUDA kernels, which others take the place of.
PARTS = ("cuda", "wgmma", "triton")
Verdict = dict[str, str]  # part → why it is off; parts that passed are absent

_PACKAGE = Path(__file__).parent
_lock = Lock()
_found: dict[int, Verdict] = {}  # of this process's own self-test, by device
_ignored = False


def path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "parnet_kernels" / "selftest.json"


def failure(part: str, index: int) -> str | None:
    """Why `part` is not to be used on cuda:index, or None."""
    if _ignored:
        return None
    verdict = _found.get(index)
    return (stored(index) if verdict is None else verdict).get(part)


def ignore() -> None:
    """For the process that makes the verdict."""
    global _ignored
    _ignored = True


@functools.cache
def stored(index: int) -> Verdict:
    """What the file says about cuda:index; a file that cannot be read is reported once and ignored."""
    try:
        entries = json.loads(path().read_text())
        verdict = entries.get(identity(index), {})
        return {part: str(verdict[part]) for part in PARTS if verdict.get(part)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"parnet_kernels: ignoring the self-test's verdicts in {path()}: {error}", stacklevel=2)
        return {}


def remember(index: int, verdict: Verdict) -> None:
    """Holds for this process at once, and for later ones if the file can be written."""
    with _lock:
        _found[index] = verdict
        try:
            try:
                entries = json.loads(path().read_text())
            except (FileNotFoundError, ValueError):
                entries = {}
            entries = entries if isinstance(entries, dict) else {}
            path().parent.mkdir(parents=True, exist_ok=True)
            temporary = path().with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({**entries, identity(index): verdict}, indent=1) + "\n")
            temporary.replace(path())
        except OSError as error:
            warnings.warn(f"parnet_kernels: the self-test's verdict is not kept: {error}", stacklevel=2)
        stored.cache_clear()


@functools.cache
def identity(index: int) -> str:
    """GPU model, driver, and the kernels by the contents of their files."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    kernels = [_PACKAGE / "_C_cuda.so", *sorted((_PACKAGE / "triton").glob("*.py"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in kernels if p.is_file())).hexdigest()[:16]
    return ", ".join((f"{torch.cuda.get_device_name(index)} ({capability})", driver(), versions(), f"kernels {digest}"))


def driver() -> str:
    """As the kernel module says; else the newest CUDA that it takes."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        newest = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
        return f"driver for {newest}" if torch.version.cuda else f"HIP {torch.version.hip}"


def versions() -> str:
    try:
        return f"torch {torch.__version__}, triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        return f"torch {torch.__version__}"
