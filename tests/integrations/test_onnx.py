"""ONNX files: other engines compute the network's function from them, for any batch and size; bad input is refused.

Run where `onnx`, and `onnxruntime` or `openvino`, are installed: `make test-integrations`.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import error, randomize
from torch import Tensor, nn
from typer.testing import CliRunner

import parnet_kernels
from parnet_kernels import ParNet, ParNetConfig, Preprocessing, export, parnet_cifar, save
from parnet_kernels.app.cli import app
from parnet_kernels.config import VARIANTS, cifar_config
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export.graph import graph_of

TINY = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=10)
CONFIGS = {
    "S": VARIANTS["s"].replace(num_classes=10),
    "S relu": VARIANTS["s"].replace(num_classes=10, activation="relu"),
    "cifar": cifar_config(12),
    "cifar relu": cifar_config(12).replace(activation="relu"),
    "streams without blocks": TINY.replace(num_blocks=(1, 1, 2), num_classes=0),
    "one stream": ParNetConfig((7, 9), (3,), num_classes=3),
    "four streams, one channel": ParNetConfig((6, 8, 12, 16, 20), (2, 1, 2, 2), in_chans=1, num_classes=3),
}
#: A half network's maps are rounded to 11 bits in between.
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3}

Engine = Callable[[Tensor], Tensor]


def onnxruntime(path: Path) -> Engine:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def openvino(path: Path) -> Engine:
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))


engines = pytest.mark.parametrize("engine", [onnxruntime, openvino], ids=lambda e: e.__name__)


def deployed(config: ParNetConfig) -> DeployedParNet:
    return randomize(ParNet(config)).eval().deploy()


def reference(network: DeployedParNet, x: Tensor) -> Tensor:
    """In float64, straight from the definitions."""
    return graph_of(network).run(x.double())


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("onnx")


@functools.cache
def exported(name: str, dtype: torch.dtype) -> tuple[bytes, list[tuple[Tensor, Tensor]]]:
    """The file of a network, and images with what it makes of them in float64; the network itself agrees."""
    network = deployed(CONFIGS[name]).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        export.onnx(network, Path(folder) / "net.onnx")
        content = (Path(folder) / "net.onnx").read_bytes()
    c, pairs = network.config.in_chans, []
    for shape in ((1, c, 64, 64), (3, c, 33, 47), (2, c, 1, 1)):
        x = torch.randn(shape).to(dtype)
        pairs.append((x, reference(network, x)))
        assert error(network(x), pairs[-1][1]) <= LARGEST_ERROR[dtype]
    return content, pairs


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_engines_agree(name: str, dtype: torch.dtype, engine: Any, library: Any, tmp_path: Path) -> None:
    content, pairs = exported(name, dtype)
    (tmp_path / "net.onnx").write_bytes(content)
    run = engine(tmp_path / "net.onnx")
    for x, expected in pairs:
        assert error(run(x), expected) <= LARGEST_ERROR[dtype]


@engines
def test_fixed_batch_and_size_and_oldest_opset(engine: Any, library: Any, tmp_path: Path) -> None:
    network = deployed(TINY)
    for i, options in enumerate(({"size": (33, 40), "dynamic": ()}, {"opset": 13}, {"dynamic": ("size",)})):
        export.onnx(network, tmp_path / f"{i}.onnx", **options)
        x = torch.randn(1, 3, 33, 40)
        assert error(engine(tmp_path / f"{i}.onnx")(x), reference(network, x)) <= 1e-5


def test_shapes_and_metadata(library: Any, tmp_path: Path) -> None:
    network = deployed(TINY)
    network.preprocessing = Preprocessing(size=40, color="bgr")
    network.class_names = [f"ein Name {i}: ä" for i in range(10)]
    for options, expected in (
        ({}, ["batch", 3, "height", "width"]),
        ({"size": (33, 40)}, ["batch", 3, 33, 40]),
        ({"size": (33, 40), "dynamic": ()}, [1, 3, 33, 40]),
        ({"dynamic": ("size",)}, [1, 3, "height", "width"]),
    ):
        export.onnx(network, tmp_path / "net.onnx", **options)
        model = library.load(tmp_path / "net.onnx")
        library.checker.check_model(model, full_check=True)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == expected
        assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [
            expected[0],
            10,
        ]
    told = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert ParNetConfig(**told["parnet_config"]) == network.config
    assert told["parnet_class_names"] == list(network.class_names)
    assert Preprocessing(**told["parnet_preprocessing"]) == network.preprocessing
    assert model.opset_import[0].version == 18
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_training_form_is_folded(library: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = parnet_cifar(8)
    model(torch.randn(8, 3, 32, 32))  # running statistics; it stays in training mode
    export.onnx(model, tmp_path / "a.onnx")
    export.onnx(model.deploy(), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["module", "program"])
@pytest.mark.parametrize("name", ["cifar", "streams without blocks"])
def test_torch_onnx_export(name: str, before: bool, library: Any, tmp_path: Path) -> None:
    """PyTorch's own exporter finds what the operators are made of, for a module and for a program of torch.export."""
    pytest.importorskip("onnxscript")
    network, x = deployed(CONFIGS[name]), torch.randn(2, 3, 40, 48)
    dim = torch.export.Dim
    shapes = {"x": {0: dim("n"), 2: dim("h", min=33), 3: dim("w", min=33)}}  # with fewer a map may have one pixel
    if before:
        program = torch.onnx.export(torch.export.export(network, (x,), dynamic_shapes=shapes), dynamo=True)
    else:
        program = torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=shapes)
    program.save(tmp_path / "net.onnx")
    x = torch.randn(3, 3, 37, 51)
    assert error(onnxruntime(tmp_path / "net.onnx")(x), reference(network, x)) <= 1e-5


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_exported_programs_become_pytorchs_operators(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without onnx: what PyTorch's exporter does with a program that was exported before."""
    network, x = deployed(TINY), torch.randn(1, 3, 33, 40)
    program = torch.export.export(network, (x,))
    assert any(node.target in PUBLIC for node in program.run_decompositions().graph.nodes)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with mode():
        decomposed = program.run_decompositions()
    assert not any("parnet" in str(node.target) for node in decomposed.graph.nodes)
    assert error(decomposed.module()(x), reference(network, x)) <= 1e-5


PUBLIC = [getattr(torch.ops.parnet, name).default for name in ("repvgg_sse", "downsample_se", "fusion_se")]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, "`opset` must be from 13 to"),
        ({"opset": 10_000}, "`opset` must be from 13 to"),
        ({"opset": "18"}, "`opset` must be from 13 to"),
        ({"size": 224}, r"`size` must be \(height, width\)"),
        ({"size": (0, 224)}, r"`size` must be \(height, width\), both ≥ 1"),
        ({"dynamic": ("batch",)}, '`size` must be given where `dynamic` has no "size"'),
        ({"dynamic": "size"}, "`dynamic` must be a subset"),
        ({"dynamic": ("channels",)}, "`dynamic` must be a subset"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str, library: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export.onnx(deployed(TINY), tmp_path / "net.onnx", **options)
    assert not [*tmp_path.iterdir()]


def hooked(network: DeployedParNet) -> DeployedParNet:
    network.layers["combine_2"].register_forward_hook(lambda *_: None)
    return network


def replaced(network: DeployedParNet) -> DeployedParNet:
    network.layers["combine_2"] = nn.Identity()
    return network


def patched(network: DeployedParNet) -> DeployedParNet:
    network.forward = lambda x: x  # type: ignore[method-assign]
    return network


class Subclass(DeployedParNet):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x, pre_logits) * 2


def subclassed(network: DeployedParNet) -> DeployedParNet:
    other = Subclass(network.config)
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, r"layers\.combine_2 has hooks"),
        (replaced, r"layers\.combine_2: is a Identity"),
        (patched, "it has a `forward` of its own"),
        (subclassed, "it has a `forward_head` of its own"),
        (lambda n: n.double(), "must be float32 or float16"),
        (lambda n: n.bfloat16(), "must be float32 or float16"),
    ],
    ids=["hooked", "replaced", "patched", "subclass", "float64", "bfloat16"],
)
def test_networks_that_a_file_would_not_hold(change: Any, message: str, library: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export.onnx(change(deployed(TINY)), tmp_path / "net.onnx")
    with pytest.raises(TypeError, match="must be a ParNet, DeployedParNet or QuantizedParNet, got a Linear"):
        export.onnx(nn.Linear(1, 1), tmp_path / "net.onnx")  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_places_that_cannot_be_written(library: Any, tmp_path: Path) -> None:
    network = deployed(TINY)
    with pytest.raises(OSError, match="no folder"):
        export.onnx(network, tmp_path / "none" / "net.onnx")
    with pytest.raises(OSError, match="got the folder"):
        export.onnx(network, tmp_path)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install parnet-kernels\[onnx\]"):
        export.onnx(deployed(TINY), tmp_path / "net.onnx")
    told = CliRunner().invoke(app, ["export", str(tmp_path / "absent.safetensors"), str(tmp_path / "net.onnx")])
    assert told.exit_code == 2
    assert "parnet-kernels[onnx]" in " ".join(told.output.replace("│", " ").split())


# ------------------------------------------------------------------ the command


def test_command(library: Any, tmp_path: Path) -> None:
    network = deployed(TINY)
    save(network, tmp_path / "net.safetensors")
    source, target = str(tmp_path / "net.safetensors"), tmp_path / "net.onnx"
    told = CliRunner().invoke(app, ["export", source, str(target)])
    assert told.exit_code == 0, told.output
    assert "any number of images of any size" in told.output
    x = torch.randn(2, 3, 40, 33)
    assert error(onnxruntime(target)(x), reference(network, x)) <= 1e-5
    options = ["--size", "33x40", "--one-image", "--dtype", "float16", "--opset", "17"]
    told = CliRunner().invoke(app, ["export", source, str(target), *options])
    assert told.output.endswith("net.onnx: ONNX, opset 17, float16, one image of 33 x 40 pixels\n")
    dims = library.load(target).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [1, 3, 33, 40]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.safetensors", "net.tflite"], "must end in .onnx or .pt2"),
        (["net.safetensors", "net.onnx", "--size", "224x"], "--size must be pixels"),
        (["net.safetensors", "net.onnx", "--size", "0"], "--size must be pixels"),
        (["net.safetensors", "net.pt2", "--size", "224"], "are for .onnx: a .pt2 takes any images"),
    ],
    ids=["ending", "half a size", "no pixels", "size of a package"],
)
def test_command_with_bad_arguments(arguments: list[str], message: str, library: Any) -> None:
    told = CliRunner().invoke(app, ["export", *arguments])
    assert told.exit_code == 2
    assert message in " ".join(told.output.replace("│", " ").split())


def test_importing_needs_no_optional_package() -> None:
    assert parnet_kernels.export.onnx is export.onnx
