"""ONNX files of int8 networks: the same bytes and scales; engines compute the same function from them.

Run where `onnx`, and `onnxruntime` or `openvino`, are installed: `make test-integrations`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import error
from torch import Tensor, nn
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, export, save
from parnet_kernels.app.cli import app
from parnet_kernels.config import cifar_config
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export.graph import int8_graph_of
from parnet_kernels.export.lowering import Lowering
from parnet_kernels.quantized import QuantizedParNet

CONFIGS = {
    "even": ParNetConfig((16, 32, 48, 64), (2, 2, 2), num_classes=10),
    "odd channels, relu": ParNetConfig((12, 34, 50, 30), (2, 3, 2), num_classes=7, activation="relu"),
    "wide, no classifier": ParNetConfig((92, 130, 12, 70), (2, 2, 2), num_classes=0, in_chans=1),
    "one image channel more": ParNetConfig((3, 8, 70), (2, 2), num_classes=3, in_chans=4),
    "cifar": cifar_config(12),
}
Engine = Callable[[Tensor], list[Tensor]]


def network_of(config: ParNetConfig, size: int = 32) -> DeployedParNet:
    """With BatchNorms that have seen data, so that maps keep their size."""
    torch.manual_seed(0)
    model = ParNet(config).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, config.in_chans, size, size))
    return model.eval().deploy()


@functools.cache
def _quantized(name: str) -> QuantizedParNet:
    config = CONFIGS[name]
    return network_of(config).quantize(torch.randn(8, config.in_chans, 40, 40))


def quantized_of(name: str) -> QuantizedParNet:
    """One of its own, which a test may change."""
    return copy.deepcopy(_quantized(name))


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def quantized(request: pytest.FixtureRequest) -> QuantizedParNet:
    return quantized_of(request.param)


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("onnx")


def onnxruntime(path: Path) -> Engine:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]


def openvino(path: Path) -> Engine:
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [torch.from_numpy(np.array(y)) for y in compiled(x.numpy()).values()]


engines = pytest.mark.parametrize("engine", [onnxruntime, openvino], ids=lambda e: e.__name__)


def orders(quantized: QuantizedParNet) -> dict[str, Tensor]:
    """Of each map in the file: which true channel each stored one is."""
    return Lowering(int8_graph_of(quantized), [("batch", quantized.config.in_chans, "height", "width")]).order


def with_maps(path: Path, names: list[str], library: Any) -> Path:
    """The file with the maps of these names as further outputs."""
    model = library.load(path)
    for name in names:
        model.graph.output.append(library.helper.make_tensor_value_info(name, library.TensorProto.FLOAT, None))
    target = path.with_name("maps.onnx")
    library.save(model, target)
    return target


@pytest.mark.parametrize("shape", [(2, 40, 40), (1, 33, 47), (3, 1, 1)], ids=str)
def test_each_layer_makes_the_same_bytes(
    quantized: QuantizedParNet, shape: tuple[int, ...], library: Any, tmp_path: Path
) -> None:
    """Every layer on the very bytes that the engine gave it: at most one value in 200 differs, by one step."""
    export.onnx(quantized, tmp_path / "net.onnx")
    stored, nodes, program = orders(quantized), int8_graph_of(quantized).nodes, quantized._quantized()
    names = [node.name for node in nodes]
    run = onnxruntime(with_maps(tmp_path / "net.onnx", names, library))
    x = torch.randn(shape[0], quantized.config.in_chans, *shape[1:])
    true = {}
    for name, y in zip(names, run(x)[1:], strict=True):
        true[name] = torch.empty_like(y)
        true[name][:, stored[name]] = y
    assert nodes[0].range is not None
    made = {"first": to_bytes(true[names[0]], *nodes[0].range)}
    for layer, m in program:
        a = m.plain()
        expected = m(*(made[name] for name in layer.inputs))
        if a.last:
            assert error(true[layer.name], expected) < 1e-5
        else:
            made[layer.name] = to_bytes(true[layer.name], a.scale_out, a.zero_out)
            off = (made[layer.name].int() - expected.int()).abs()
            assert off.max() <= 1, layer.name
            assert (off > 0).float().mean() <= 1 / 200 + 2 / off.numel(), layer.name


def to_bytes(values: Tensor, scale: float, zero: int) -> Tensor:
    """Values that stand for bytes → these bytes."""
    q = (values.double() / scale + zero).round()
    assert torch.allclose((q - zero) * scale, values.double(), rtol=1e-6, atol=0)
    assert q.min() >= 0
    assert q.max() <= 255
    return q.to(torch.uint8)


@engines
def test_engines_agree_with_the_network(quantized: QuantizedParNet, engine: Any, library: Any, tmp_path: Path) -> None:
    """A value that rounds the other way spreads: results differ by less than 1 %, a third of what int8 costs."""
    export.onnx(quantized, tmp_path / "net.onnx")
    run = engine(tmp_path / "net.onnx")
    for shape in ((1, 40, 40), (3, 33, 47)):
        x = torch.randn(shape[0], quantized.config.in_chans, *shape[1:])
        (y,) = run(x)
        assert error(y, quantized(x)) < 0.01
        assert error(y, quantized.emulate(x)) < 0.01


def test_the_file_holds_the_same_numbers(quantized: QuantizedParNet, library: Any, tmp_path: Path) -> None:
    export.onnx(quantized, tmp_path / "net.onnx")
    model = library.load(tmp_path / "net.onnx")
    library.checker.check_model(model, full_check=True)
    constants = {t.name: library.numpy_helper.to_array(t) for t in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    plain, stored = quantized.plain_layers(), orders(quantized)
    for name, a in plain.items():
        for part, weight, weight_scale, inputs in (
            ("conv", a.weight, a.weight_scale * (1 if a.kind == "repvgg_sse" else 2), 9),
            ("gate", a.gate_weight, a.gate_scale, 1),
        ):
            node = made_by[f"{name}/{part}"]
            node = node if node.op_type == "Conv" else made_by[node.input[0]]
            dequantize = made_by[node.input[1]]
            assert dequantize.op_type == "DequantizeLinear"
            found, scale, zero = (constants[i] for i in dequantize.input)
            assert found.dtype == np.int8
            assert not zero.any()
            # Rows and columns may stand in another order.
            rows = stored[name] if a.kind == "repvgg_sse" else torch.arange(len(scale))
            assert np.array_equal(scale, weight_scale[rows].numpy())
            assert found.size == weight.numel() == len(scale) * weight.shape[1] * inputs
            assert np.array_equal(np.sort(found.reshape(len(scale), -1)), weight[rows].flatten(1).sort().values)
        if not a.last:
            dequantize = made_by[name]
            quantize = made_by[dequantize.input[0]]
            assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
            for node in (quantize, dequantize):
                assert constants[node.input[1]] == np.float32(a.scale_out)
                assert constants[node.input[2]] == np.uint8(a.zero_out)


def test_options_and_metadata(library: Any, tmp_path: Path) -> None:
    quantized = quantized_of("even")
    quantized.class_names = tuple("abcdefghij")
    x = torch.randn(1, 3, 33, 40)
    for options in ({"size": (33, 40), "dynamic": ()}, {"opset": 13}, {"dynamic": ("size",)}):
        export.onnx(quantized, tmp_path / "net.onnx", **options)
        assert error(onnxruntime(tmp_path / "net.onnx")(x)[0], quantized(x)) < 0.01
    told = {p.key: p.value for p in library.load(tmp_path / "net.onnx").metadata_props}
    assert '"a", "b"' in told["parnet_class_names"]


def hooked(network: QuantizedParNet) -> None:
    network.layers["combine_2"].register_forward_hook(lambda *_: None)


def replaced(network: QuantizedParNet) -> None:
    network.layers["combine_2"] = nn.Identity()


def first_replaced(network: QuantizedParNet) -> None:
    network.first = nn.Identity()


def first_removed(network: QuantizedParNet) -> None:
    network.first = None


def head_added(network: QuantizedParNet) -> None:
    network.pointwise = nn.Identity()


def removed(network: QuantizedParNet) -> None:
    del network.layers["combine_2"]


def patched(network: QuantizedParNet) -> None:
    network.forward_head = lambda x: x  # type: ignore[method-assign]


def infinite(network: QuantizedParNet) -> None:
    network.layers["combine_2"].bias.fill_(float("inf"))


def no_scale(network: QuantizedParNet) -> None:
    network.layers["combine_2"].scale_out.zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, r"layers\.combine_2 has hooks"),
        (replaced, r"layers\.combine_2: is a Identity"),
        (first_replaced, "first: is a Identity"),
        (first_removed, "first was removed"),
        (head_added, "pointwise was added"),
        (removed, "layers were added, removed or reordered"),
        (patched, "it has a `forward_head` of its own"),
        (infinite, r"layers\.combine_2: bias holds NaN or infinity"),
        (no_scale, r"layers\.combine_2: scales must be positive"),
    ],
)
def test_networks_that_a_file_would_not_hold(change: Any, message: str, library: Any, tmp_path: Path) -> None:
    quantized = quantized_of("even")
    change(quantized)
    with pytest.raises(ValueError, match=message):
        export.onnx(quantized, tmp_path / "net.onnx")
    assert not [*tmp_path.iterdir()]


def test_command(library: Any, tmp_path: Path) -> None:
    quantized = quantized_of("even")
    source, target = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    save(quantized, source)
    told = CliRunner().invoke(app, ["export", str(source), str(target)])
    assert told.exit_code == 0, told.output
    assert told.output.endswith("net.onnx: ONNX, opset 18, int8 (QDQ), any number of images of any size\n")
    x = torch.randn(2, 3, 40, 33)
    assert error(onnxruntime(target)(x)[0], quantized(x)) < 0.01
    told = CliRunner().invoke(app, ["export", str(source), str(target), "--dtype", "float16"])
    assert told.exit_code == 2
    assert "--dtype must be float32 for an int8 network" in " ".join(told.output.replace("│", " ").split())
