"""Importing never fails for lack of a compiled library or an optional package, and is fast."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import parnet_kernels

PACKAGE = Path(parnet_kernels.__file__).parent


def run(code: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_compiled_libraries(tmp_path: Path) -> None:
    """Only the reference backend is left, and it says so."""
    shutil.copytree(PACKAGE, tmp_path / "parnet_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    out = run(
        "import torch, parnet_kernels as p; from parnet_kernels import ops; from parnet_kernels.app import cli; "
        f"assert p.__file__.startswith({str(tmp_path)!r}); "
        "print(ops.explain('repvgg_sse', torch.zeros(1, 2, 3, 3))['cpu']); "
        "print(p.ParNet(p.ParNetConfig((4, 4, 4), (2, 2))).deploy()(torch.zeros(1, 3, 32, 32)).shape); "
        "print(cli.installation()['cpu']); "
        "print(torch.ops.parnet.fusion_se.default._schema)",
        tmp_path,
    )
    reason, shape, info, schema = out.strip().splitlines()
    assert reason == info
    assert "_C.so was not built" in reason
    assert shape == "torch.Size([1, 1000])"
    import torch

    assert schema == str(torch.ops.parnet.fusion_se.default._schema)


def test_with_a_broken_library(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "parnet_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "parnet_kernels" / "_C.so").write_text("not a library")
    assert "_C.so did not load" in run("from parnet_kernels import _native; print(_native.cpu_error)", tmp_path)


def test_with_a_library_of_another_version(tmp_path: Path) -> None:
    """Python code newer than the library, as after an update without a build."""
    shutil.copytree(PACKAGE, tmp_path / "parnet_kernels", ignore=shutil.ignore_patterns("_C_cuda.so", "__pycache__"))
    with (tmp_path / "parnet_kernels" / "schemas.inc").open("a") as schemas:
        schemas.write('PARNET_SCHEMA("newer(Tensor x) -> Tensor")\n')
    out = run(
        "import torch, parnet_kernels as p; from parnet_kernels import _native; print(_native.cpu_error); "
        "print(p.ParNet(p.ParNetConfig((4, 4, 4), (2, 2))).deploy()(torch.zeros(1, 3, 32, 32)).shape); "
        "print(torch.ops.parnet.newer)",
        tmp_path,
    )
    assert "_C.so is of another version, its operator newer is missing" in out
    assert "torch.Size([1, 1000])" in out
    assert "parnet.newer" in out


def test_without_optional_packages(tmp_path: Path) -> None:
    optional = ("triton", "sklearn", "matplotlib", "pybind11", "ninja", "hypothesis")
    run(
        f"import sys; sys.modules.update(dict.fromkeys({optional})); "
        "import torch, parnet_kernels as p, parnet_kernels.app.cli; "
        "p.ParNet(p.ParNetConfig((4, 4, 4), (2, 2))).deploy()(torch.zeros(1, 3, 32, 32))",
        tmp_path,
    )


def test_import_is_fast(tmp_path: Path) -> None:
    """Less than 100 ms of processor time on top of `import torch`: the best of several runs, of compiled modules."""
    code = "import torch, time; t = time.process_time(); import parnet_kernels; print(time.process_time() - t)"
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    assert min(float(run(code, tmp_path, **compiled)) for _ in range(6)) < 0.1
