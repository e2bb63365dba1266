"""The pooling path of the CUDA backend (channel sums of a map, logits of their means) and a Triton gate.

On a GPU, or in the PTX simulator and there with their memory traffic.
"""

import math
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from ptxsim.device import Device

from parnet_kernels.cuda.program import ClassifierCall, EnterCall, Strided

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
THREADS, ENTER_PIXELS, CHANNEL_PAD = 128, 64, 32
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def kernels(device: Device, name: str):
    return device.cuda(CUDA / f"level_{name}.cu", flags=["-std=c++20"])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", DTYPES)
def test_enter(device, name, channels_last):
    dtype, (n, c, h, w) = DTYPES[name], (2, 37, 9, 11)
    wider = torch.randn(n, c + 3, h, w).to(dtype)
    x = device.tensor(wider.to(memory_format=torch.channels_last) if channels_last else wider)[:, 2 : 2 + c]
    pitch, tiles = -(-c // CHANNEL_PAD) * CHANNEL_PAD, -(-h * w // ENTER_PIXELS)
    out, sums = device.empty(n, h, w, pitch, dtype=dtype), device.empty(n, tiles, pitch)
    image = Strided(device.pointer(x), x.stride(), n, c, h, w)
    call = EnterCall(image, device.pointer(out), device.pointer(sums), pitch, tiles)
    run = device.launch(kernels(device, name), f"parnet_enter_{name}", n * tiles, THREADS, [bytes(call)])

    expected = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, pitch - c))
    assert torch.equal(out, expected)
    pixels = torch.nn.functional.pad(expected.reshape(n, h * w, pitch).float(), (0, 0, 0, tiles * ENTER_PIXELS - h * w))
    torch.testing.assert_close(sums, pixels.reshape(n, tiles, ENTER_PIXELS, pitch).sum(2), rtol=1e-5, atol=1e-4)
    if device.simulated:
        assert run.global_load["bytes"] == run.unique_read == x.numel() * x.element_size()  # read once
        stored = out.numel() * out.element_size() + 4 * sums.numel()
        assert run.global_store["bytes"] == run.unique_written == stored
        assert run.shared_load["bank_conflict"] == 1.0


@pytest.mark.parametrize(("features", "classes"), [(64, 10), (45, 7)], ids=["vectors", "scalars"])
@pytest.mark.parametrize("name", DTYPES)
def test_classifier(device, name, features, classes):
    dtype, n, tiles, area = DTYPES[name], 3, 2, 49
    pitch = -(-features // CHANNEL_PAD) * CHANNEL_PAD
    sums = device.tensor(torch.randn(n, tiles, pitch) * area)
    weight = device.tensor((torch.randn(classes, features) / math.sqrt(features)).to(dtype))
    bias, y = device.tensor(torch.randn(classes).to(dtype)), device.empty(n, classes, dtype=dtype)
    pointers = [device.pointer(t) for t in (sums, weight, bias, y)]
    call = ClassifierCall(*pointers, n, tiles, pitch, features, classes, 1 / area)
    blocks = -(-n * classes // (THREADS // 32))
    run = device.launch(kernels(device, name), f"parnet_classifier_{name}", blocks, THREADS, [bytes(call)])

    mean = sums.sum(1)[:, :features].double() / area
    expected = mean @ weight.double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    if device.simulated:
        assert run.unique_read == 4 * n * tiles * features + weight.nbytes + bias.nbytes
        assert run.unique_written == y.nbytes
        outputs, lanes = n * classes, 32
        assert run.thread_mix["shfl.sync.bfly.b32"] == 5 * lanes * outputs  # a warp an output
        vector_loads = run.thread_mix.get("ld.global.nc.v4.u32", 0)
        whole_vectors = features * weight.element_size() % 16 == 0
        assert vector_loads == (outputs * weight[0].nbytes // 16 if whole_vectors else 0)


@triton.jit
def gate_kernel(x, y, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * sigmoid(mean of x), for maps [N, pixels, C]: a program an image, two passes over it"""
    base = tl.program_id(0).to(tl.int64) * pixels * C
    c, p = tl.arange(0, C), tl.arange(0, BLOCK)
    total = tl.zeros((C,), tl.float32)
    for start in range(0, pixels, BLOCK):
        mask = (start + p < pixels)[:, None]
        tile = tl.load(x + base + (start + p)[:, None] * C + c[None, :], mask=mask, other=0.0)  # [BLOCK, C]
        total += tl.sum(tile.to(tl.float32), 0)
    gate = tl.sigmoid(total / pixels)
    for start in range(0, pixels, BLOCK):
        mask = (start + p < pixels)[:, None]
        offset = base + (start + p)[:, None] * C + c[None, :]
        tile = tl.load(x + offset, mask=mask, other=0.0)
        tl.store(y + offset, (tile * gate[None, :]).to(y.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["f32", "f16"])
def test_triton_gate(device, name, arch):
    dtype, (n, pixels, c) = DTYPES[name], (3, 49, 64)
    x, y = device.tensor(torch.randn(n, pixels, c).to(dtype)), device.empty(n, pixels, c, dtype=dtype)
    arguments = {"x": x, "y": y, "pixels": pixels}
    run = device.triton(gate_kernel, n, arguments, {"C": c, "BLOCK": 16}, arch=arch, num_warps=4)
    expected = x.double() * x.double().mean(1, keepdim=True).sigmoid()
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    if device.simulated:
        assert run.global_load["bytes"] == 2 * x.nbytes  # two passes
        assert run.unique_read == x.nbytes
        assert run.global_store["bytes"] == run.unique_written == y.nbytes
        assert run.global_load["efficiency"] == run.global_store["efficiency"] == 1.0
        assert run.blocks == n
