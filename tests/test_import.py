"""Importing never fails for lack of a compiled library or an optional package, and is fast."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import parnet_kernels
from parnet_kernels import _native

PACKAGE = Path(parnet_kernels.__file__).parent


cuda_library = pytest.mark.skipif(_native.cuda_error is not None, reason=f"no CUDA library: {_native.cuda_error}")


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


def copied(tmp_path: Path, library: str = "") -> Path:
    """The package, with this other CUDA library: the file's path, or its own."""
    package = tmp_path / "parnet_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if library:
        shutil.copy2(library, package / "_C_cuda.so")
    return package


SAY = "from parnet_kernels import _native; print(_native.cuda_error); print(_native.cpu_error)"


@cuda_library
@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("FORMAT = 1", "FORMAT = 0", "kFormat"),  # programs and packed tensors mean something else
        ('"tile_cols"', '"tile_columns"', "LayerCall.tile_cols"),
        ('c_int32) for n in ("kernel"', 'c_int64) for n in ("kernel"', "Record"),
    ],
    ids=["meaning", "name", "offset"],
)
def test_with_a_cuda_library_for_other_structures(tmp_path: Path, old: str, new: str, what: str) -> None:
    """It would launch kernels with arguments that are not what they take them for."""
    program = copied(tmp_path) / "cuda" / "program.py"
    assert program.read_text().count(old) == 1
    program.write_text(program.read_text().replace(old, new))
    cuda, cpu = run(SAY, tmp_path).splitlines()
    assert cuda == f"_C_cuda.so is of another version, its {what} is missing or another: build or install it again"
    assert cpu == "None"


@cuda_library
@pytest.mark.parametrize("schema", ["_cuda_newer(Tensor x) -> Tensor", "_cuda_play(Tensor[] buffers) -> ()"])
def test_with_a_cuda_library_for_other_operators(schema: str) -> None:
    name = schema.split("(")[0]
    reason = _native._why_cuda_stale({**_native._schemas(), name: schema})
    assert reason is not None
    assert f"_C_cuda.so is of another version, its operator {name} is missing" in reason
    assert _native._why_cuda_stale(_native._schemas()) is None


@pytest.mark.skipif(_native.cpu_error is not None, reason="the CUDA library needs the CPU library")
def test_with_a_library_of_something_else(tmp_path: Path) -> None:
    """One that implements none of our operators."""
    (tmp_path / "other.cpp").write_text("int nothing;\n")
    other = tmp_path / "other.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", other], check=True)
    copied(tmp_path, str(other))
    cuda, cpu = run(SAY, tmp_path).splitlines()
    assert cuda.startswith("_C_cuda.so is of another version, its ")
    assert cpu == "None"


def test_without_optional_packages(tmp_path: Path) -> None:
    optional = ("triton", "sklearn", "matplotlib", "pybind11", "ninja", "hypothesis")
    run(
        f"import sys; sys.modules.update(dict.fromkeys({optional})); "
        "import torch, parnet_kernels as p, parnet_kernels.app.cli; "
        "p.ParNet(p.ParNetConfig((4, 4, 4), (2, 2))).deploy()(torch.zeros(1, 3, 32, 32))",
        tmp_path,
    )


def test_import_is_fast(tmp_path: Path) -> None:
    """Less than 100 ms of processor time on top of `import torch`: the best of several runs, of compiled modules.

    Without a collection of torch's objects, which takes as long and falls into our import with Python 3.13.
    """
    code = (
        "import torch, gc, time; gc.disable(); "
        "t = time.process_time(); import parnet_kernels; print(time.process_time() - t)"
    )
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    assert min(float(run(code, tmp_path, **compiled)) for _ in range(6)) < 0.1
