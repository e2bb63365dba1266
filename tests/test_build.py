"""The wheel: one for every Python, with and without CUDA. Slow: compiles the CPU library from nothing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_wheel_without_cuda(tmp_path: Path) -> None:
    done = build(tmp_path, PARNET_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "no CUDA library (PARNET_CUDA=0)" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("_C.so", "schemas.inc", "py.typed", "ops.py", "triton/tile.py"):
        assert f"parnet_kernels/{name}" in names
    assert "parnet_kernels/_C_cuda.so" not in names


@pytest.mark.slow
def test_asked_for_cuda_without_nvcc(tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    done = build(tmp_path, PARNET_CUDA="1", PATH=path, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "PARNET_CUDA=1, but no nvcc" in done.stderr
