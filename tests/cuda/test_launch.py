"""The launcher (csrc/cuda/launch.cu) against a runtime that writes down what it is asked: no GPU, no driver."""

import ctypes
import subprocess
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
    command = [nvcc, "-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", source, *hopper, "-o", library]
    subprocess.run(command, check=True)
    stub = ctypes.CDLL(str(library))
    stub.stub_launch.restype = stub.stub_log.restype = ctypes.c_char_p
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
    assert launch(runtime, ENTER_F16, grid=3, stream=0) == (None, ["launch 0.2 3x128 shared 0 stream 0 first 7"])

    # sm_80 knows no dependent launches; the stem waits for all blocks.
    assert launch(runtime, LEVEL_F16, shared=70000, flags=DEPENDENT) == (None, [plain])
    assert launch(runtime, STEM_F16, flags=COOPERATIVE)[1][-1].endswith("first 7 cooperative")

    # Another device has its own state.
    runtime.stub_set(1, 90, 0, 0)
    error, log = launch(runtime, LEVEL_F16, shared=70000, flags=DEPENDENT)
    assert (error, log) == (None, [line.replace("on 0", "on 1") for line in allow] + [plain + " dependent"])

    # tf32 and fp32 share the kernels that only move maps.
    assert launch(runtime, LEVEL_TF32)[1][-1].startswith("launch 2.0 ")
    assert launch(runtime, ENTER_TF32)[1][-1].startswith("launch 3.2 ")

    # Levels for wgmma are there if they were built, and in two arithmetics.
    for kernel, name in ((HOPPER_F16, "0.4"), (HOPPER_BF16, "1.4")):
        error, log = launch(runtime, kernel)
        assert (error, len(log)) == ((None, 1) if hopper else ("stub error", 0))
        assert not log or log[-1].startswith(f"launch {name} ")
    assert launch(runtime, HOPPER_TF32) == ("stub error", [])

    # Pairs of blocks are clusters, also in a dependent launch.
    pairs = "launch 0.4 10x128 shared 0 stream 5 first 7{} clusters of 2x1x1"
    for flags, dependent in ((PAIRS, ""), (PAIRS | DEPENDENT, " dependent")):
        assert not hopper or launch(runtime, HOPPER_F16, flags=flags) == (None, [pairs.format(dependent)])

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
