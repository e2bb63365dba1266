"""The packages: complete, of torch's stable ABI alone, one wheel for every Python, with and without CUDA."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import packages
import pytest
import torch

import parnet_kernels

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(Path(parnet_kernels.__file__).parent.glob("*.so"))
checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


@checkout
def test_source_distribution_has_every_file(tmp_path: Path) -> None:
    made = packages.source_distribution(tmp_path)
    assert made.stat().st_size < 4 << 20


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_need_the_stable_abi_only(library: Path) -> None:
    packages.audit(library)


def test_audit_finds_what_is_not_stable(tmp_path: Path) -> None:
    """A call of at::Tensor's methods, which other releases of torch need not have."""
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text("namespace at { int get_num_threads(); }\nint f() { return at::get_num_threads(); }\n")
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(SystemExit, match=r"not of torch's stable ABI.*get_num_threads"):
        packages.audit(library)


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")
def test_the_stream_is_found() -> None:
    """What csrc/cuda/bind.cpp looks up; needs no GPU."""
    import ctypes

    assert ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD).aoti_torch_get_current_cuda_stream


@pytest.mark.slow
@pytest.mark.timeout(3600)
@checkout
@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="needs the `dist` extra")
def test_packages(tmp_path: Path) -> None:
    command = [sys.executable, packages.__file__, "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name.split("-")[2:4] for path in tmp_path.rglob("*.whl")] == [["py3", "none"]]


@pytest.mark.slow
@checkout
def test_asked_for_cuda_without_nvcc(tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path]
    asked = {"PARNET_CUDA": "1", "PATH": path, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=source, env=os.environ | asked, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PARNET_CUDA=1, but no nvcc" in done.stderr
