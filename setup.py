"""Builds the two native libraries with ninja; everything else about the package stands in pyproject.toml.

* `parnet_kernels/_C.so`: schemas and CPU kernels; needs a C++20 compiler.
* `parnet_kernels/_C_cuda.so`: CUDA kernels; built where nvcc is found (PARNET_CUDA in parnet_kernels/environment.py).

Both use PyTorch's stable ABI and no Python.h, hence the wheel tag py3-none-<platform>: one wheel serves every Python
and every torch >= 2.11. Neither needs a GPU or a CUDA build of torch to compile, load or register.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # 2.11: the oldest torch the libraries load into
AVX2 = "-mavx2 -mfma -mf16c"
# GCC 12 takes the undefined operand of its own AVX-512 headers for a fault of ours, in 7000 lines.
AVX512 = f"-mavx512f -mavx512dq -mavx512bw -mavx512vl {AVX2} -Wno-maybe-uninitialized"
X86_FLAGS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_intel.cpp": AVX512,
    "int8_avx2.cpp": AVX2,
    "int8_avx_vnni.cpp": f"{AVX2} -mavxvnni",
    "int8_avx512_vnni.cpp": f"{AVX512} -mavx512vnni",
    "int8_amx.cpp": f"{AVX512} -mamx-tile -mamx-int8",
    "bf16_amx.cpp": f"{AVX512} -mamx-tile -mamx-bf16",
}
ALL_ARCHS = "80 86 89 90 90a 100 120"
HOPPER = "90a"  # for hopper_*.cu, and for nothing else


def find_cuda() -> tuple[Path, Path] | None:
    """(nvcc, toolkit root), or None. The nvcc on PATH may be a wrapper, so the root is what nvcc itself reports."""
    candidates = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if "CUDA_HOME" in os.environ else []
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates += [Path(p) / "nvidia" / "cu13" / "bin" / "nvcc" for p in sys.path]  # the `cuda-build` extra
    for nvcc in filter(Path.is_file, candidates):
        told = subprocess.run(
            [nvcc, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
        )
        if found := re.search(r"^#\$ TOP=(.*)$", told.stderr, re.MULTILINE):
            return nvcc, Path(found[1].strip()).resolve()
    return None


def cuda_archs(nvcc: Path) -> list[str]:
    """What PARNET_CUDA_ARCHS says: architectures, "all", or "native" (the default): those of the GPUs that torch sees.

    Without a GPU "native" is sm_80 and its PTX: a minute instead of five, and enough for the tests, which compile what
    they simulate themselves.
    """
    import torch

    wanted = os.environ.get("PARNET_CUDA_ARCHS") or "native"
    if wanted != "native":
        return (ALL_ARCHS if wanted == "all" else wanted).split()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    found = [f"{major}{minor}" for major, minor in capabilities if major >= 8 and knows(nvcc, f"{major}{minor}")]
    return [arch for one in found or ["80"] for arch in ((one, HOPPER) if one == "90" else (one,))]


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries, so that flags are per file and rebuilds are incremental."""

    def run(self) -> None:
        build = ROOT / "build" / "native"  # not pip's temporary folder: rebuilds and wheels share what is compiled
        build.mkdir(parents=True, exist_ok=True)
        libraries: list[str] = []
        (build / "build.ninja").write_text("\n".join(self.rules(libraries)) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        subprocess.run([ninja or "ninja", "-C", build, *jobs, *libraries], check=True)
        target = ROOT if self.inplace else Path(self.build_lib)
        for library in libraries:
            destination = target / "parnet_kernels" / library
            destination.parent.mkdir(parents=True, exist_ok=True)
            # Never write into a library that a running process has mapped.
            shutil.copy2(build / library, destination.with_suffix(".new"))
            destination.with_suffix(".new").replace(destination)

    def rules(self, libraries: list[str]) -> Iterator[str]:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        torch_flags = " ".join(f"-isystem {p}" for p in include_paths()) + f" {TORCH_ABI}"
        # libstdc++ first: libtorch exports a few of its newer symbols too, and another torch may not.
        torch_link = "-lstdc++ " + " ".join(f"-L{p}" for p in library_paths()) + " -ltorch_cpu -lc10"
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        common = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror=return-type"
        yield f"cxx = {os.environ.get('CXX', 'g++')}"
        compiled = "  depfile = $out.d\n  deps = gcc\n  description = compile $out"
        yield f"rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n{compiled}"
        yield "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out"

        objects = []
        for source in [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]:
            binding = source.name == "ops.cpp" or source.name.startswith("bind")
            extra = f"{torch_flags} {abi}" if binding else X86_FLAGS.get(source.name, "") if is_x86() else ""
            if source.name.startswith(("int8_", "bf16_")):  # every instruction set rounds alike
                extra += " -ffp-contract=off -Wno-psabi"
            objects.append(str(source.relative_to(ROOT / "csrc").with_suffix(".o")))
            yield f"build {objects[-1]}: cxx {source}\n  flags = {common} {extra}"
        yield f"build _C.so: link {' '.join(objects)}\n  flags = {torch_link}"
        libraries.append("_C.so")

        wanted = os.environ.get("PARNET_CUDA", "auto")
        cuda = None if wanted == "0" else find_cuda()
        if cuda is None:
            if wanted == "1":
                raise RuntimeError(
                    "PARNET_CUDA=1, but no nvcc: not under CUDA_HOME, on PATH, or from the cuda-build extra"
                )
            print(f"parnet_kernels: no CUDA library ({'PARNET_CUDA=0' if wanted == '0' else 'no nvcc found'})")
            return
        nvcc, toolkit = cuda
        wished = cuda_archs(nvcc)
        archs = [a for a in wished if a != HOPPER]
        if not archs:
            raise RuntimeError(f"PARNET_CUDA_ARCHS must name an architecture besides {HOPPER}")
        hopper = HOPPER in wished and knows(nvcc, HOPPER)
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        define = " -DPARNET_HOPPER" if hopper else ""
        yield f"rule nvcc\n  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out\n{compiled}"
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            targets = gencode
            if source.name.startswith("hopper_"):
                if not hopper:
                    continue
                targets = f"-gencode arch=compute_{HOPPER},code=sm_{HOPPER}"
            objects.append(f"cuda/{source.stem}.o")
            flags = f"-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -cudart static {targets}{define}"
            yield f"build {objects[-1]}: nvcc {source}\n  flags = {flags}"
        objects.append("cuda/bind.o")
        built = " ".join(a for a in wished if a in archs or hopper)
        print(f"parnet_kernels: the CUDA library is built for sm_{built.replace(' ', ', sm_')} (PARNET_CUDA_ARCHS)")
        flags = f"{common} {torch_flags} {abi} -DPARNET_CUDA_ARCHS='\"{built}\"'"
        yield f"build cuda/bind.o: cxx {ROOT / 'csrc/cuda/bind.cpp'}\n  flags = {flags}"
        lib = next(p for p in (toolkit / "lib64", toolkit / "lib", toolkit / "targets/x86_64-linux/lib") if p.is_dir())
        yield f"build _C_cuda.so: link {' '.join(objects)}"
        yield f"  flags = {torch_link} -L{lib} -lcudart_static -ldl -lrt -lpthread"
        libraries.append("_C_cuda.so")

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib) / "parnet_kernels"
        return [str(p) for p in built.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def knows(nvcc: Path, arch: str) -> bool:
    """Whether this nvcc compiles for an architecture; an older one refuses before it does anything."""
    command = [str(nvcc), "-dryrun", f"-arch=sm_{arch}", "-x", "cu", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def is_x86() -> bool:
    return os.uname().machine in ("x86_64", "AMD64", "i686")


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("parnet_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
