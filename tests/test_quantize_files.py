"""int8 networks in files, from the command line, and the accuracy of a trained one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from test_quantize import CONFIGS, deployed
from typer.testing import CliRunner

from parnet_kernels import _native
from parnet_kernels.app.cli import app
from parnet_kernels.app.demo import load_digits, train
from parnet_kernels.checkpoint import CheckpointError, load_deployed, load_model, load_network, load_quantized, save
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.quantized import QuantizedParNet

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))


def test_files_keep_everything(tmp_path: Path) -> None:
    network = deployed(CONFIGS["two streams"])
    network.class_names = ("a", "b", "c")
    x = torch.randn(2, 3, 32, 32)
    quantized = network.quantize(x)
    path = tmp_path / "net.safetensors"
    save(quantized, path)
    loaded = load_network(path)
    assert isinstance(loaded, QuantizedParNet)
    assert loaded.class_names == ("a", "b", "c")
    assert torch.equal(loaded(x), quantized(x))
    for load in (load_deployed, load_model):
        with pytest.raises(CheckpointError, match="int8 form"):
            load(path)
    save(network, path)
    with pytest.raises(CheckpointError, match="deployed form"):
        load_quantized(path)
    assert torch.equal(load_network(path)(x), network(x))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    quantized = deployed(CONFIGS["two streams"]).quantize(torch.randn(2, 3, 32, 32))
    path = tmp_path / "net.safetensors"
    save(quantized, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weight = "layers.combine_3.weight"
    for changed in (
        state | {weight: state[weight].float()},
        state | {weight: state[weight][:1]},
        {key: value for key, value in state.items() if key != weight},
    ):
        save_file({key: value.contiguous() for key, value in changed.items()}, path, metadata)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            load_quantized(path)


def test_command_line(tmp_path: Path) -> None:
    network = deployed(CONFIGS["two streams"])
    network.class_names = ("a", "b", "c")
    network.preprocessing = Preprocessing(size=32)
    save(network, tmp_path / "net.safetensors")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        folder = tmp_path / "pictures" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (tmp_path / "pictures" / "a" / "broken.png").write_bytes(b"no picture")
    arguments = [str(tmp_path / name) for name in ("net.safetensors", "pictures", "int8.safetensors")]
    done = CliRunner().invoke(app, ["quantize", *arguments])
    assert done.exit_code == 0, done.output
    assert "combine.3" in done.output
    assert "accuracy on 6 pictures" in done.output
    assert "broken.png" in done.output
    done = CliRunner().invoke(app, ["predict", "--checkpoint", arguments[2], str(tmp_path / "pictures" / "b")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["quantize", arguments[2], arguments[1], arguments[0]])
    assert "int8 form" in str(done.exception)


@pytest.mark.slow
def test_trained_network_keeps_its_accuracy() -> None:
    """Handwritten digits, each in nine places: int8 costs at most half a point, bfloat16 a tenth, either product."""
    pytest.importorskip("sklearn")
    data, before = load_digits(), torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights everywhere
    try:
        network = train(data, Console(quiet=True), epochs=4).deploy()
    finally:
        torch.set_num_threads(before)
    quantized = network.quantize(data.train_x[:256])
    half = copy.deepcopy(network).to(torch.bfloat16)
    moved = [data.test_x.roll((dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    x, y = torch.cat(moved), data.test_y.repeat(len(moved))

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == y).double().mean())

    with torch.no_grad():
        exact, rounded, narrow = (accuracy(n(i)) for n, i in ((network, x), (quantized, x), (half, x.bfloat16())))
        products = accuracy(half.prepare(products="bfloat16")(x.bfloat16()))
    print(f"{len(y)} images: float32 {exact:.4f}, int8 {rounded:.4f}, bfloat16 {narrow:.4f} and {products:.4f}")
    assert exact > 0.9
    assert rounded >= exact - 0.005
    assert min(narrow, products) >= exact - 0.001
