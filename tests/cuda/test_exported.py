"""Packages for GPUs, as far as that goes without one: the package, made for the CPU, calls the operator of the CUDA
library, compiled for tensors on the CPU, which launches what Python's path launches. A GPU, AOTInductor's own code for
one and the kernels are not in these tests.
"""

from __future__ import annotations

import ctypes
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from single import MATHS
from torch import Tensor
from typer.testing import CliRunner

from parnet_kernels import ParNetConfig, _native, export, save
from parnet_kernels.app.cli import app
from parnet_kernels.cuda import network as cuda_network
from parnet_kernels.cuda.plan import A100, H100, Gpu
from parnet_kernels.cuda.program import Record, Relocation
from parnet_kernels.export import pt2_cuda, pt2_file

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
SHAPE = (2, 3, 40, 33)
CPU_LIBRARY = Path(_native.__file__).parent / "_C.so"

ALONE = """
import ctypes, pickle, struct, sys, torch
library, stub, package, log, image, expected, result = sys.argv[1:]
torch.ops.load_library(library)
ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL).stub_set(log.encode(), int(image))
run = torch._inductor.aoti_load_package(package)
assert "parnet_kernels" not in sys.modules
expected = pickle.load(open(expected, "rb"))
x = torch.randn(expected["size"]).to(expected["dtype"])
found = {"errors": [], "launches": []}

def call(given):
    try:
        y = run(given)
    except RuntimeError as error:
        found["errors"].append(str(error))
    else:
        if y is None:  # torch 2.11 prints an operator's error and goes on
            found["errors"].append("")
        return y

with torch.inference_mode():
    wrong = [x[:1], x.transpose(2, 3).contiguous().transpose(2, 3), x.double()]
    for given in wrong:
        call(given)
    y = call(x)
    if y is not None:
        found |= {"shape": [*y.shape], "dtype": y.dtype}
        bases = {1: y.data_ptr(), 2: x.data_ptr()}
        for line, (_, relocations) in zip(open(log).read().splitlines(), expected["launches"], strict=True):
            *numbers, arguments, label = line.split(" ", 6)
            arguments = bytearray.fromhex(arguments)
            for at, buffer, offset in relocations:  # every address is that of one buffer, wherever it is
                base = struct.unpack_from("<Q", arguments, at)[0] - offset
                assert bases.setdefault(buffer, base) == base, (label, at, buffer)
                arguments[at : at + 8] = bytes(8)
            found["launches"].append((*map(int, numbers), label, bytes(arguments)))
        found["constants"] = {
            buffer - 3: ctypes.string_at(base, expected["bytes"][buffer - 3])
            for buffer, base in bases.items() if buffer >= 3
        }
pickle.dump(found, open(result, "wb"))
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library's binding for tensors on the CPU, with a launcher that writes a log."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = tmp_path_factory.mktemp("stub") / "stub.so"
    flags = ["-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", '-DPARNET_CUDA_ARCHS="stub"']
    include = [flag for path in include_paths() for flag in ("-isystem", path)]
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10", "-ldl"]
    source = Path(__file__).with_name("host_exported.cpp")
    subprocess.run(["g++", *flags, *include, source, "-o", library, *link], check=True)
    return library


def records(program: Tensor) -> list[tuple[tuple[Any, ...], list[tuple[int, int, int]]]]:
    """Of each launch: (kernel, grid, shared, flags, label, arguments without addresses), and (at, buffer, offset) of
    each address.
    """
    data, at, found = bytes(program.tolist()), 0, []
    while at < len(data):
        r = Record.from_buffer_copy(data, at)
        start = at + ctypes.sizeof(Record)
        arguments = bytearray(data[start : start + r.argument_bytes])
        start += -(-r.argument_bytes // 8) * 8
        size = ctypes.sizeof(Relocation)
        each = [Relocation.from_buffer_copy(data, start + i * size) for i in range(r.relocations)]
        for one in each:
            arguments[one.at : one.at + 8] = bytes(8)
        start += r.relocations * size
        label = data[start : start + r.label_bytes].decode()
        found.append(
            ((r.kernel, r.grid, r.shared, r.flags, label, bytes(arguments)), [(o.at, o.buffer, o.offset) for o in each])
        )
        at += r.record_bytes
    return found


@pytest.mark.parametrize(
    ("math", "gpu", "classes"),
    [("f16", A100, 10), pytest.param("f32", H100, 0, marks=pytest.mark.slow)],
    ids=["float16, A100", "float32, H100, no classifier"],
)
def test_a_package_launches_what_the_network_does(
    math: str, gpu: Gpu, classes: int, stub: Path, tmp_path: Path
) -> None:
    dtype, precision, _ = MATHS[math]
    network = networks.tiny(networks.TINY.replace(num_classes=classes)).to(dtype)
    whole, result = network.whole(), "logits" if classes else "pooled"
    assert not isinstance(whole, str)
    example = torch.zeros(SHAPE, dtype=dtype)
    with torch.no_grad():
        pt2_file.write(pt2_cuda.CudaExported(whole, SHAPE, precision, gpu), example, None, {}, tmp_path / "net.pt2")
    weights = cuda_network.pack_network(whole, precision)
    lowered = cuda_network.lower(
        network.config, weights, SHAPE, example.stride(), dtype, precision, gpu, result, aligned=False
    )
    launches = records(lowered.program)
    assert [label for (*_, label, _), _ in launches] == lowered.labels
    constants = [bytes(t.reshape(-1).view(torch.uint8).tolist()) if t.numel() else b"" for t in weights.tensors]
    told = {"launches": launches, "bytes": [*map(len, constants)], "size": SHAPE, "dtype": dtype}
    (tmp_path / "expected").write_bytes(pickle.dumps(told))

    def run(image: int) -> dict[str, Any]:
        files = CPU_LIBRARY, stub, tmp_path / "net.pt2", tmp_path / "log", image, tmp_path / "expected"
        command = [sys.executable, "-P", "-c", ALONE, *map(str, (*files, tmp_path / "found"))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = pickle.loads((tmp_path / "found").read_bytes())
        printed = iter(re.findall("Exception in aoti_torch: (.*)", done.stderr))
        found["errors"] = [error or next(printed) for error in found["errors"]]
        return found

    found = run(gpu.image)
    assert (found["shape"], found["dtype"]) == ([*lowered.shape], dtype)
    stream = 5
    assert found["launches"] == [(*head[:4], stream, *head[4:]) for head, _ in launches]
    used = {buffer - 3 for _, relocations in launches for _, buffer, _ in relocations if buffer >= 3}
    assert found["constants"] == {i: constants[i] for i in used}
    assert len(used) > 10
    for error, text in zip(found["errors"], ("got [1, 3, 40, 33]", "not contiguous", "another dtype"), strict=True):
        assert "the package takes contiguous images [2, 3, 40, 33] of the network's dtype" in error
        assert text in error
    *_, elsewhere = run(86)["errors"]
    assert f"made where kernels for sm_{gpu.image} run, here those for sm_86 do: export the network" in elsewhere


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    network = networks.tiny().float()
    with pytest.raises(ValueError, match="`size` and `batch` are for a GPU: a package for the CPU takes any images"):
        export.package(network, tmp_path / "net.pt2", size=(224, 224))
    save(network, tmp_path / "net.safetensors")
    for options, text in {
        ("net.pt2", "--device", "cuda"): "--device cuda needs --size",
        ("net.pt2", "--size", "64"): "a .pt2 takes any images",
        ("net.pt2", "--device", "cuda", "--size", "64", "--opset", "17"): "--opset is for .onnx",
        ("net.onnx", "--device", "cuda"): "--device is for .pt2",
        ("net.pt2", "--device", "cuda", "--size", "64"): "needs a GPU",
    }.items():
        if text == "needs a GPU" and torch.cuda.is_available():
            continue
        files = str(tmp_path / "net.safetensors"), str(tmp_path / options[0])
        told = CliRunner().invoke(app, ["export", *files, *options[1:]])
        assert told.exit_code == 2, told.output
        assert text in " ".join(told.output.replace("│", " ").split())
    cifar = networks.tiny(ParNetConfig((8, 12, 16, 24), (3, 3, 3), pointwise_head=True)).float().whole()
    assert pt2_cuda.why_not(cifar) == "the last layer of the CIFAR form is none of its kernels"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """In Python; the C++ loader takes the same package."""
    network = networks.tiny().to("cuda", dtype)
    with pytest.raises(ValueError, match="for a GPU `size` must be"):
        export.package(network, tmp_path / "net.pt2")
    export.package(network, tmp_path / "net.pt2", size=SHAPE[2:], batch=2)
    run = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    x = torch.randn(SHAPE, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(run(x), network(x))
