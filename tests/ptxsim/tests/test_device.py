"""The `device` fixture, on the simulator and with a driver that only records."""

import ctypes

import pytest
import torch
import triton
import triton.language as tl
from ptxsim import PtxError, PtxSanitizerError, Unavailable
from ptxsim.cuda_driver import CudaDriver, LaunchAttribute, LaunchConfig
from ptxsim.device import Gpu, Simulator, open_device, triton_signature

from .helpers import KERNELS

FLAGS = ("-std=c++17",)


def test_cuda_kernel(device):
    x, y = device.tensor(torch.randn(1000)), device.empty(1000)
    module = device.cuda(KERNELS / "ordering.cu", flags=FLAGS)
    run = device.launch(module, "scale", 8, 128, [x, y, 2.0, 1000])
    assert torch.equal(y, 2 * x)
    if device.simulated:
        assert run.global_load["bytes"] == run.global_store["bytes"] == 4000


@triton.jit
def axpy(x, y, out, n, a, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, a * tl.load(x + i, mask=mask, other=0.0) + tl.load(y + i, mask=mask, other=0.0), mask=mask)


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_kernel(device, dtype, offset):
    n = 1000
    x, y = (device.tensor(torch.randn(n + offset).to(dtype))[offset:] for _ in range(2))
    out = device.empty(n, dtype=dtype)
    args = {"x": x, "y": y, "out": out, "n": n, "a": 3.0}
    run = device.triton(axpy, -(-n // 256), args, {"BLOCK": 256}, num_warps=2)
    rounding = 4 * torch.finfo(dtype).eps  # the compiler may fuse multiplication and addition
    torch.testing.assert_close(out, 3 * x + y, rtol=rounding, atol=4 * rounding)
    if device.simulated:
        assert run.block == (64, 1, 1)
        assert run.unique_read == 2 * n * x.element_size()


def test_what_is_empty_must_not_be_read():
    device = Simulator()
    x, y = device.empty(128), device.empty(128)
    module = device.cuda(KERNELS / "ordering.cu", flags=FLAGS)
    with pytest.raises(PtxSanitizerError, match="uninitialised global memory at buffer #0"):
        device.launch(module, "scale", 1, 128, [x, y, 2.0, 128])
    assert x.isnan().all()
    device.launch(module, "scale", 1, 128, [torch.ones(128), x, 2.0, 128])
    device.launch(module, "scale", 1, 128, [x, y, 2.0, 128])  # now it has been written
    assert (y == 4).all()


def test_simulator_options():
    device = Simulator()
    d = torch.arange(256, dtype=torch.int32)
    run = device.launch(device.cuda(KERNELS / "basic.cu"), "rev_race", 1, 256, [d], check="collect", seed=2)
    assert run.by_kind("race")


def test_triton_signature():
    x = torch.zeros(32, dtype=torch.bfloat16)
    args = {"x": x, "y": x[1:], "out": x[8:], "n": 1 << 40, "a": 1.5}
    signature, attributes = triton_signature(axpy, args, {"BLOCK": 16})
    assert signature == {"x": "*bf16", "y": "*bf16", "out": "*bf16", "n": "i64", "a": "fp32", "BLOCK": "constexpr"}
    assert set(attributes) == {(0,), (2,), (3,)}
    with pytest.raises(PtxError, match="axpy takes"):
        triton_signature(axpy, {"x": x}, {})


class RecordingDriver:
    """libcuda that does nothing but note what it was asked for."""

    def __init__(self, status=0):
        self.calls, self.params, self.status = [], [], status

    def cuModuleLoadData(self, handle, image):
        self.calls.append(("load", b".entry scale(" in image.value))
        return self.status

    def cuModuleGetFunction(self, handle, module, name):
        self.calls.append(("function", name.value))
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append(("attribute", attribute, value))
        return 0

    def cuLaunchKernelEx(self, config, function, params, extra):
        c = config._obj
        clusters = [(c.attributes[i].id, *c.attributes[i].value[:3]) for i in range(c.count)]
        self.calls.append(("launch", tuple(c.grid), tuple(c.block), c.shared_bytes, *clusters))
        self.params = [ctypes.string_at(p, size) for p, size in zip(params, (8, 8, 4, 4), strict=True)]
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"the reason"
        return 0


def test_gpu_launch():
    library = RecordingDriver()
    device = Gpu(CudaDriver(library), capability=(8, 6))
    x, y = device.tensor(torch.zeros(8)), device.empty(8)
    module = device.cuda(KERNELS / "ordering.cu", flags=FLAGS)
    assert device.launch(module, "scale", (2, 3), 64, [x, y, 2.5, 7], shared_bytes=70000, seed=3) is None
    assert library.calls == [
        ("load", True),
        ("function", b"scale"),
        ("attribute", 8, 70000),
        ("launch", (2, 3, 1), (64, 1, 1), 70000),
    ]
    pointers = [int.from_bytes(p, "little") for p in library.params[:2]]
    assert pointers == [x.data_ptr(), y.data_ptr()]
    assert ctypes.c_float.from_buffer_copy(library.params[2]).value == 2.5
    assert int.from_bytes(library.params[3], "little") == 7
    for args, message in (([x], "takes 4 arguments"), ([x, y, 2.5, 0.5], "cannot pass a float")):
        with pytest.raises(PtxError, match=message):
            device.launch(module, "scale", 1, 64, args)
    with pytest.raises(PtxError, match="no kernel named nothing"):
        device.launch(module, "nothing", 1, 64, [])
    device.launch(module, "scale", 4, 64, [x, y, 2.5, 7], cluster=2)
    assert library.calls[-1] == ("launch", (4, 1, 1), (64, 1, 1), 0, (4, 2, 1, 1))


def test_structures_of_the_driver():
    """Their sizes and the attribute's number, as in CUDA 13's cuda.h."""
    assert (ctypes.sizeof(LaunchAttribute), LaunchAttribute.value.offset) == (72, 8)
    assert (ctypes.sizeof(LaunchConfig), LaunchConfig.stream.offset, LaunchConfig.count.offset) == (56, 32, 48)


def test_gpu_errors_and_architectures():
    device = Gpu(CudaDriver(RecordingDriver(status=218)), capability=(9, 0))
    with pytest.raises(PtxError, match=r"cuModuleLoadData: the reason \(218\)"):
        device.cuda(KERNELS / "ordering.cu", flags=FLAGS)
    for arch in ("compute_100", "compute_80a"):
        with pytest.raises(pytest.skip.Exception, match="this GPU is sm_90"):
            device.cuda(KERNELS / "ordering.cu", arch)


def test_choice(monkeypatch):
    assert isinstance(open_device("simulator"), Simulator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device("auto"), Simulator)
    with pytest.raises(Unavailable, match="no CUDA device"):
        open_device("gpu")


def test_marker(request, device):
    marker = request.node.get_closest_marker("ptxsim" if device.simulated else "gpu")
    assert marker is not None
