"""AOTInductor packages of whole networks: right without this package's Python code, in Python and in C++."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomize
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, _native, export, parnet_cifar, save
from parnet_kernels.app.cli import app
from parnet_kernels.app.images import load_image
from parnet_kernels.deployed import DeployedParNet

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
ROOT = Path(__file__).parents[1]
LIBRARY = Path(_native.__file__).parent / "_C.so"
TINY = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=10)
SIZES = ((1, 3, 1, 1), (3, 3, 33, 40), (2, 3, 64, 64))

ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
run = torch._inductor.aoti_load_package(sys.argv[2])
assert "parnet_kernels" not in sys.modules
saved = torch.load(sys.argv[3])
with torch.inference_mode():
    found = [run(x) for x in saved]
assert all(y is not None for y in found)  # torch 2.11 prints an operator's error and goes on
torch.save(found, sys.argv[4])
"""


def tiny() -> DeployedParNet:
    torch.manual_seed(0)
    network = randomize(ParNet(TINY)).eval().deploy()
    network.class_names = [f"Name {i}" for i in range(10)]
    network.preprocessing = Preprocessing(size=40, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return network


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "net.pt2"
    export.package(tiny(), path)
    assert [p.name for p in path.parent.iterdir()] == ["net.pt2"]
    return path


def run_alone(package: Path, images: list[torch.Tensor], folder: Path, **environment: str) -> Any:
    """In a process that loads `_C.so` and the package, and nothing of this package's Python code."""
    torch.save(images, folder / "images.pt")
    files = map(str, (LIBRARY, package, folder / "images.pt", folder / "found.pt"))
    told = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, *files],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return torch.load(folder / "found.pt") if told.returncode == 0 else told.stderr


def test_same_bits_without_our_python(package: Path, tmp_path: Path) -> None:
    images = [torch.randn(size) for size in SIZES]
    found, network = run_alone(package, images, tmp_path), tiny()
    assert not isinstance(found, str), found[-3000:]
    for x, y in zip(images, found, strict=True):
        assert torch.equal(y, network(x))


def test_metadata(package: Path) -> None:
    told = torch._inductor.aoti_load_package(str(package)).get_metadata()
    assert told["parnet_isa"] == _native.cpu_info()["isa"]
    assert '"Name 9"' in told["parnet_class_names"]
    assert Preprocessing(**json.loads(told["parnet_preprocessing"])) == tiny().preprocessing


def of_another_size(package: Path, path: Path, size: int | tuple[int, int]) -> Preprocessing:
    """Writes a copy of the package of `tiny()`, which says `size`; returns what it says."""
    said = tiny().preprocessing
    assert said is not None
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".json"):
                content = content.replace(b'{\\"size\\": 40,', b'{\\"size\\": %s,' % json.dumps(size).encode())
            new.writestr(item, content)
    made = said.replace(size=size)
    told = torch._inductor.aoti_load_package(str(path)).get_metadata()
    assert Preprocessing(**json.loads(told["parnet_preprocessing"])) == made
    return made


def test_another_length_of_vectors(package: Path, tmp_path: Path) -> None:
    """The error says what the package is for, what runs here, and what to do."""
    other = "portable" if "avx512" in _native.cpu_info()["isa"] else "portable16"
    told = run_alone(package, [torch.randn(SIZES[1])], tmp_path, PARNET_CPU_ISA=other)
    assert isinstance(told, str)
    assert f"this process runs {other} kernels" in told
    assert "export, again here" in told


def test_two_packages_are_not_mixed_up() -> None:
    """The kernels' copies go by contents, not by place."""
    x = torch.randn(1, 3, 33, 40)
    network = tiny()
    packed = network._native.prepare(network.whole())
    assert packed is not None
    place, classifier = packed.weights.clone(), packed.classifier.clone()
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        other = randomize(ParNet(TINY), seed).eval().deploy()
        made = other._native.prepare(other.whole())
        place.copy_(made.weights)
        classifier.copy_(made.classifier)
        run = torch.ops.parnet._cpu_exported
        assert torch.equal(run(x, place, made.steps, classifier, True, 10, 32, seed), other(x))
        with pytest.raises(RuntimeError, match="`outputs` and `reduction` must be those of the network, got 11"):
            run(x, place, made.steps, classifier, True, 11, 32, seed)


def test_int8_networks_are_refused(tmp_path: Path) -> None:
    quantized = tiny().quantize(torch.randn(2, 3, 32, 32))
    with pytest.raises(TypeError, match="a package holds no int8 network"):
        export.package(quantized, tmp_path / "net.pt2")
    save(quantized, tmp_path / "net.safetensors")
    told = CliRunner().invoke(app, ["export", str(tmp_path / "net.safetensors"), str(tmp_path / "net.pt2")])
    assert told.exit_code == 2
    assert "a .pt2 holds no int8 network" in " ".join(told.output.replace("│", " ").split())
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.slow
def test_cifar_form_and_float16(tmp_path: Path) -> None:
    for name, network in (
        ("cifar", randomize(parnet_cifar(8)).eval().deploy()),
        ("half", randomize(ParNet(TINY.replace(num_classes=0))).eval().deploy().half()),
    ):
        export.package(network, tmp_path / f"{name}.pt2")
        x = torch.randn(3, 3, 33, 40, dtype=network.head_weight.dtype)
        found = run_alone(tmp_path / f"{name}.pt2", [x], tmp_path)
        assert not isinstance(found, str), found[-3000:]
        expected = network(x)
        assert torch.equal(found[0], expected) if name == "half" else torch.allclose(found[0], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.skipif(not list(Path("/usr").glob("**/nlohmann/json.hpp")), reason="no nlohmann-json3-dev")
def test_cpp_program(package: Path, tmp_path: Path) -> None:
    """It reads the preprocessing and the names of classes from the package; its logits are Python's, bit for bit."""
    where = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path, where], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    assert len((ROOT / "examples" / "cpp" / "main.cpp").read_text().splitlines()) <= 80
    network = tiny()
    sizes: tuple[int | tuple[int, int], ...] = (40, (40, 56), (33, 9))
    packages = [(of_another_size(package, tmp_path / f"{i}.pt2", sizes[i]), tmp_path / f"{i}.pt2") for i in range(3)]
    for size, (preprocessing, named) in itertools.product(((90, 61), (33, 47), (40, 40)), packages):
        picture = tmp_path / "picture.ppm"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(picture)
        call = [tmp_path / "classify", named, LIBRARY, picture, tmp_path / "logits.bin"]
        told = subprocess.run(call, capture_output=True, text=True, check=True)
        expected = network(load_image(picture, preprocessing))
        assert torch.equal(torch.from_numpy(np.fromfile(tmp_path / "logits.bin", np.float32)).view(1, 10), expected)
        best = expected[0].softmax(0).max()
        assert told.stdout.splitlines()[0] == f"{100 * best:5.1f} %  Name {expected.argmax()}"
        assert f"{_native.cpu_info()['isa']}, " in told.stdout
    (tmp_path / "short.ppm").write_bytes(b"P6 9 9 255 few")
    for bad, message in (
        ([tmp_path / "none.so", picture], "none.so"),
        ([LIBRARY, tmp_path / "short.ppm"], "ends early"),
    ):
        told = subprocess.run([*call[:2], *bad], capture_output=True, text=True)
        assert (told.returncode, message in told.stderr) == (1, True)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.double(), "cannot run this network: x is torch.float64"),
        (lambda n: n.head_weight.fill_(float("nan")) is None or n, "a weight is not finite"),
        (lambda n: DeployedParNet(TINY.replace(num_blocks=(1, 1, 1))), "a stream without blocks feeds a fusion"),
    ],
    ids=["float64", "not finite", "no blocks"],
)
def test_networks_that_the_kernels_cannot_run(change: Any, message: str, tmp_path: Path) -> None:
    network = tiny()
    with torch.no_grad():
        network = change(network)
    with pytest.raises(RuntimeError, match=message):
        export.package(network, tmp_path / "net.pt2")
    assert not [*tmp_path.iterdir()]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export.package(tiny(), tmp_path / "net.so")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export.package(tiny(), tmp_path / "none" / "net.pt2")
    with pytest.raises(TypeError, match="must be a ParNet or DeployedParNet, got a Linear"):
        export.package(nn.Linear(1, 1), tmp_path / "net.pt2")  # type: ignore[arg-type]
    hooked = tiny()
    hooked.layers["combine_2"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.combine_2 has hooks"):
        export.package(hooked, tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="`storage` must be one of"):
        export.package(tiny(), tmp_path / "net.pt2", storage="small")
