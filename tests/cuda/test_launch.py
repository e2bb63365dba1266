"""The launcher (csrc/cuda/launch.cu) against a runtime that writes down what it is asked: no GPU, no driver."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from ptxsim import Unavailable
from ptxsim.toolchain import find_tool

from parnet_kernels.cuda.program import COOPERATIVE, DEPENDENT, PAIRS

LEVEL_F16, STEM_F16, ENTER_F16, LEVEL_BF16, LEVEL_TF32, ENTER_TF32 = 0, 4, 8, 1, 2, 10
HOPPER_F16, HOPPER_BF16, HOPPER_TF32 = 16, 17, 18
MAX_SHARED, CARVEOUT = 8, 9  # cudaFuncAttribute


@pytest.fixture(params=[["-DPARNET_HOPPER"], []], ids=["with sm_90a", "without"])
def hopper(request):
    return request.param


@pytest.fixture
def runtime(tmp_path, hopper):
    """A fresh launcher: it remembers what it has told each device."""
    try:
        nvcc = find_tool("nvcc")
    except Unavailable as reason:
        pytest.skip(str(reason))
    library = tmp_path / "launch.so"
    source = Path(__file__).with_name("host_launch.cpp")
    # Bound within the library: a CUDA torch in this process has another runtime under the same names.
    flags = ["-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic", "-cudart", "none", *hopper]
    command = [nvcc, *flags, source, "-o", library]
    subprocess.run(command, check=True)
    stub = ctypes.CDLL(str(library))
    stub.stub_launch.restype = stub.stub_log.restype = stub.stub_image.restype = ctypes.c_char_p
    stub.stub_launch.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_size_t]
    return stub


def launch(stub, kernel, grid=10, shared=0, flags=0, stream=5):
    """(error or None, lines of the log)"""
    error = stub.stub_launch(kernel, grid, shared, flags, stream)
    return error and error.decode(), stub.stub_log().decode().splitlines()


def test_launcher(runtime, hopper):
    # Shared memory beyond the default is allowed once for each kernel and device, on the device of the launch.
    allow = [f"set 0.0 {MAX_SHARED} 98000 on 0", f"set 0.0 {CARVEOUT} 100 on 0"]
    plain = "launch 0.0 10x128 shared 70000 stream 5 first 7"
    assert launch(runtime, LEVEL_F16, shared=70000) == (None, [*allow, plain])
    assert launch(runtime, LEVEL_F16, shared=70000) == (None, [plain])
    assert launch(runtime, LEVEL_BF16, shared=70000)[1][0] == f"set 1.0 {MAX_SHARED} 98000 on 0"
    # Kernels that need none divide a multiprocessor's memory in the same way.
    enter = [line.replace("0.0", "0.2") for line in allow]
    plain_enter = "launch 0.2 3x128 shared 0 stream 0 first 7"
    assert launch(runtime, ENTER_F16, grid=3, stream=0) == (None, [*enter, plain_enter])
    assert launch(runtime, ENTER_F16, grid=3, stream=0) == (None, [plain_enter])

    # Images for sm_80 know no dependent launches; the stem waits for all blocks.
    assert launch(runtime, LEVEL_F16, shared=70000, flags=DEPENDENT) == (None, [plain])
    assert launch(runtime, STEM_F16, flags=COOPERATIVE)[1][-1].endswith("first 7 cooperative")

    # Another device has its own state.
    runtime.stub_set(1, 90, 0, 0)
    error, log = launch(runtime, LEVEL_F16, shared=70000, flags=DEPENDENT)
    assert (error, log) == (None, [line.replace("on 0", "on 1") for line in allow] + [plain + " dependent"])

    # What counts is what the kernels were compiled for, whatever the device: they would not wait.
    runtime.stub_set(2, 89, 0, 0)
    assert launch(runtime, LEVEL_F16, shared=70000, flags=DEPENDENT)[1][-1] == plain
    runtime.stub_set(1, 90, 0, 0)

    # tf32 and fp32 share the kernels that only move maps.
    assert launch(runtime, LEVEL_TF32)[1][-1].startswith("launch 2.0 ")
    assert launch(runtime, ENTER_TF32)[1][-1].startswith("launch 3.2 ")

    # Levels for wgmma are there if they were built, and in two arithmetics.
    for kernel, name in ((HOPPER_F16, "0.4"), (HOPPER_BF16, "1.4")):
        error, log = launch(runtime, kernel)
        assert (error, len(log)) == ((None, 3) if hopper else ("stub error", 0))
        assert not log or log[-1].startswith(f"launch {name} ")
    assert launch(runtime, HOPPER_TF32) == ("stub error", [])

    # Pairs of blocks are clusters, also in a dependent launch.
    pairs = "launch 0.4 10x128 shared 0 stream 5 first 7{} clusters of 2x1x1"
    for flags, dependent in ((PAIRS, ""), (PAIRS | DEPENDENT, " dependent")):
        assert not hopper or launch(runtime, HOPPER_F16, flags=flags) == (None, [pairs.format(dependent)])

    # The image tells whether the kernels can run, and leaves no error behind.
    architecture = ctypes.c_int()
    assert runtime.stub_image(ctypes.byref(architecture)) is None
    assert architecture.value == 90
    runtime.stub_set(3, 0, 0, 0)
    assert runtime.stub_image(ctypes.byref(architecture)) == b"stub error"
    assert launch(runtime, LEVEL_F16) == ("stub error", [])
    assert runtime.stub_pending() == 0

    # A failure is told, and not left behind; an error that was there before is neither ours nor taken away.
    runtime.stub_set(0, 80, 701, 0)
    assert launch(runtime, LEVEL_F16, shared=70000)[0] == "stub error"
    assert runtime.stub_pending() == 0
    runtime.stub_set(0, 80, 0, 700)
    assert launch(runtime, LEVEL_F16, shared=70000)[0] is None
    assert runtime.stub_pending() == 700

    # What is no kernel, or no device that can be, is refused.
    assert launch(runtime, 20)[0] == "stub error"
    runtime.stub_set(64, 80, 0, 0)
    assert launch(runtime, LEVEL_F16)[0] == "stub error"


def test_beside_another_runtime(runtime, hopper, tmp_path):
    """A CUDA torch loads its own libcudart under global names; the stub's calls must not reach it."""
    other = tmp_path / "other.c"
    other.write_text("int cudaGetDevice(int* d) { return 999; }\nint cudaFuncGetAttributes() { return 999; }\n")
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", other, "-o", tmp_path / "other.so"], check=True)
    script = f"""
import ctypes
ctypes.CDLL({str(tmp_path / "other.so")!r}, mode=ctypes.RTLD_GLOBAL)
stub = ctypes.CDLL({runtime._name!r})
stub.stub_launch.restype = ctypes.c_char_p
stub.stub_launch.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_size_t]
assert stub.stub_launch(0, 1, 0, 0, 0) is None
"""
    subprocess.run([sys.executable, "-c", script], check=True)
