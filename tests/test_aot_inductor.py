"""Ahead of time: torch.export, then AOTInductor, of networks and layers made of torch.ops.parnet.*.

The public operators are registered from Python, so a package runs in a Python process that has imported parnet_kernels;
`test_a_package_needs_the_import` says what happens in another.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPERATORS, arguments
from torch import Tensor, nn

from parnet_kernels import ParNetConfig, ops
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet

pytestmark = pytest.mark.usefixtures("inductor")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
where = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def package(folder: Path, module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Path:
    """Exports, compiles and writes `module`."""
    with torch.no_grad():
        program = torch.export.export(module, inputs, **options)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return Path(path)


class Layers(nn.Module):
    """One call of each operator; arguments are buffers, which AOTInductor stores in the package."""

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, dict[str, Any]] = {}
        self.names: dict[str, list[str]] = {}
        for op in OPERATORS:
            positional, options = arguments(op, 1, 6, 6, (5, 7), stride=1)
            parameters = positional[2 if op == "fusion_se" else 1 :]
            for i, t in enumerate(parameters):
                self.register_buffer(f"{op}_{i}", t)
            self.names[op] = [f"{op}_{i}" for i in range(len(parameters))]
            for name in ("out_scale", "out_shift"):
                self.register_buffer(f"{op}_{name}", options.pop(name))
            self.options[op] = options

    def call(self, op: str, *x: Tensor) -> Tensor:
        affine = {name: getattr(self, f"{op}_{name}") for name in ("out_scale", "out_shift")}
        return getattr(ops, op)(*x, *(getattr(self, n) for n in self.names[op]), **self.options[op], **affine)

    def forward(self, x: Tensor) -> Tensor:
        y = self.call("repvgg_sse", x)
        z = self.call("downsample_se", x)
        return self.call("fusion_se", y, z).relu() + 1


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-6 * expected.norm()


Packaged = Callable[[str], tuple[nn.Module, Path]]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """The layers on a device, and their package for any batch and size; made once."""

    @functools.cache
    def build(device: str) -> tuple[nn.Module, Path]:
        module, x = Layers().to(device), torch.randn(2, 6, 5, 7, device=device)
        dim = torch.export.Dim
        shapes = {"x": {0: dim("n", min=1, max=64), 2: dim("h", min=2, max=512), 3: dim("w", min=2, max=512)}}
        return module, package(tmp_path_factory.mktemp("layers"), module, (x,), dynamic_shapes=shapes)

    return build


@where
def test_every_operator_for_any_batch_and_size(device: str, packaged: Packaged) -> None:
    module, path = packaged(device)
    loaded = torch._inductor.aoti_load_package(str(path))
    for size in ((2, 6, 5, 7), (3, 6, 8, 4)):
        x = torch.randn(size, device=device)
        close(loaded(x), module(x))


def tiny() -> DeployedParNet:
    torch.manual_seed(0)
    return ParNet(ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=10)).eval().deploy()


@where
def test_a_deployed_network(device: str, tmp_path: Path) -> None:
    network, x = tiny().to(device), torch.randn(2, 3, 32, 32, device=device)
    loaded = torch._inductor.aoti_load_package(str(package(tmp_path, network, (x,))))
    with torch.no_grad():
        close(loaded(x), network(x))


def test_a_package_needs_the_import(packaged: Packaged, tmp_path: Path) -> None:
    """In a process of its own: right with parnet_kernels imported; without it an error that names the operator."""
    (module, path), x = packaged("cpu"), torch.randn(2, 6, 5, 7)
    torch.save({"x": x, "y": module(x)}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
if sys.argv[1] == "with": import parnet_kernels
model = torch._inductor.aoti_load_package({str(path)!r})
saved = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.allclose(model(saved["x"]), saved["y"], rtol=1e-5, atol=1e-6)
print("same")
"""

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)

    told = run("with")
    assert told.stdout.strip() == "same", told.stderr[-3000:]
    told = run("without")
    assert told.returncode != 0
    assert "parnet" in told.stderr
