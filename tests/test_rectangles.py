"""Networks that see a rectangle: the geometry, every file that says it, and every command that uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from parnet_kernels import (
    Classifier,
    DeployedParNet,
    ParNet,
    ParNetConfig,
    Preprocessing,
    export,
    load_checkpoint,
    load_deployed,
    load_network,
    save,
)
from parnet_kernels.app.cli import app
from parnet_kernels.app.images import fitted, load_image
from parnet_kernels.checkpoint import CheckpointError

CONFIG = ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)
WIDE = Preprocessing((36, 48), 0.9)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def network(said: Preprocessing = WIDE) -> ParNet:
    torch.manual_seed(0)
    model = ParNet(CONFIG.replace(in_chans=said.channels)).eval()
    model.preprocessing, model.class_names = said, ("a", "b", "c")
    return model


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(pixels: np.ndarray, target: tuple[int, int], crop: float, name: str) -> np.ndarray:
    """As timm's ResizeKeepRatio and CenterCrop: divided by the smaller of the two ratios, then the centre."""
    ratio = min(pixels.shape[i] / (target[i] / crop) for i in (0, 1))
    sides = [max(target[i], round(pixels.shape[i] / ratio)) for i in (0, 1)]
    whole = np.asarray(Image.fromarray(pixels).resize(sides[::-1], Image.Resampling[name.upper()]))
    top, left = ((sides[i] - target[i]) // 2 for i in (0, 1))
    return whole[top : top + target[0], left : left + target[1]]


# ------------------------------------------------------------------ the field


def test_what_size_may_be() -> None:
    wide = Preprocessing([480, 640])
    assert (wide.size, wide.height, wide.width) == ((480, 640), 480, 640)
    assert wide == Preprocessing((480, 640)) == Preprocessing(torch.Size((480, 640)))
    assert type(Preprocessing(torch.Size((480, 640))).size) is tuple
    assert hash(wide) == hash(Preprocessing((480, 640)))
    assert wide != Preprocessing((640, 480))
    assert str(wide).startswith("size 480x640, crop 0.875")
    square = Preprocessing(64)
    assert (square.size, square.height, square.width) == (64, 64, 64)
    assert str(square).startswith("size 64, crop")
    assert square == Preprocessing((64, 64)) == wide.replace(size=[64, 64])
    assert type(Preprocessing((64, 64)).size) is int  # what older versions read, too
    assert Preprocessing((1, 8192)).width == 8192


@pytest.mark.parametrize(
    "size",
    [0, -1, True, 2.0, "64", None, (), (64,), (0, 64), (64, -3), (True, 64), (64.0, 64), (64, 64, 3), (3, 480, 640),
     [[64], 64], (8193, 64), (64, 10**400), {"height": 64}, ("64", "64"), (float("nan"), 64)],
    ids=str,
)  # fmt: skip
def test_what_size_may_not_be(size: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`size` must be an integer in 1…8192, or two of them, \(height, width\), got"
    ):
        Preprocessing(size)


def test_crop_leaves_both_sides_within_bounds() -> None:
    for size in ((8000, 10), (10, 8000)):
        with pytest.raises(ValueError, match=rf"`crop` must leave size / crop ≤ 16384 \(size {size[0]}x{size[1]}\)"):
            Preprocessing(size, 0.1)


# ------------------------------------------------------------------ the geometry


@pytest.mark.parametrize("name", FILTERS)
def test_squares_are_as_before(name: str) -> None:
    """Bit for bit what the code made that knew squares only, of which this is a copy."""

    def before(pixels: torch.Tensor, size: int, crop: float) -> torch.Tensor:
        sides = pixels.shape[:2]
        scale = size / crop / min(sides)
        height, width = (max(size, round(side * scale)) for side in sides)
        top, left = (height - size) // 2, (width - size) // 2
        if (height, width) != tuple(sides):
            if name in ("bilinear", "bicubic"):
                planes = pixels.permute(2, 0, 1)[None]
                planes = torch.nn.functional.interpolate(planes, (height, width), mode=name, antialias=True)
                pixels = planes[0].permute(1, 2, 0)
            else:
                image = Image.fromarray(pixels.numpy())
                pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling[name.upper()])))
        return pixels[top : top + size, left : left + size]

    for shape in ((1, 1), (40, 40), (37, 90), (90, 37), (50, 51), (120, 160)):
        for size, crop in ((40, 0.8), (31, 0.875), (32, 1.0), (1, 0.3)):
            pixels = torch.from_numpy(frame(*shape))
            for said in (Preprocessing(size, crop, name), Preprocessing((size, size), crop, name)):
                assert torch.equal(fitted(pixels, said, "x"), before(pixels, size, crop)), (shape, size, crop)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("target", [(36, 48), (48, 36), (1, 50), (64, 5)], ids=str)
def test_rectangles_against_pillow(name: str, target: tuple[int, int]) -> None:
    for shape in ((36, 48), (120, 160), (160, 120), (100, 100), (7, 9), (1, 1), (33, 200)):
        for crop in (1.0, 0.9):
            found = fitted(torch.from_numpy(frame(*shape)), Preprocessing(target, crop, name), "x").numpy()
            expected = by_pillow(frame(*shape), target, crop, name)
            assert found.shape == (*target, 3)
            largest = np.abs(found.astype(int) - expected).max()
            assert largest <= (1 if name in ("bilinear", "bicubic") else 0), (shape, crop)


def test_a_frame_of_the_networks_shape_is_only_scaled() -> None:
    """640×480 for 480x640: nothing is cut, nothing resized; at half the size nothing is cut."""
    pixels = torch.from_numpy(frame(480, 640))
    assert torch.equal(fitted(pixels, Preprocessing((480, 640), 1.0), "x"), pixels)
    half = fitted(pixels, Preprocessing((240, 320), 1.0, "box"), "x").numpy()
    assert np.array_equal(half, np.asarray(Image.fromarray(pixels.numpy()).resize((320, 240), Image.Resampling.BOX)))
    # Height before width: the marked corner stays where it is.
    marked = torch.zeros(480, 640, 3, dtype=torch.uint8)
    marked[:, 600:] = 255
    wide = fitted(marked, Preprocessing((24, 32), 1.0, "nearest"), "x")
    assert (wide[:, 30:] == 255).all()
    assert (wide[:, :30] == 0).all()


def test_too_elongated_for_a_rectangle() -> None:
    with pytest.raises(ValueError, match="x is too elongated: its 10×4000 pixels become 8192×3276800"):
        fitted(torch.zeros(4000, 10, 3, dtype=torch.uint8), Preprocessing((1, 8192), 1.0), "x")


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_classifier(tmp_path: Path, color: str) -> None:
    said = WIDE.replace(color=color) if color != "gray" else WIDE.replace(color=color, mean=(0.1,), std=(0.3,))
    classifier = Classifier(network(said)).warmup(2)
    pixels = frame(60, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = load_image(tmp_path / "a.png", said)
    assert expected.shape == (1, said.channels, 36, 48)
    for picture in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels), tmp_path / "a.png"):
        assert torch.equal(classifier.inputs(picture), expected)
    many = [pixels, frame(48, 36), frame(5, 200)]
    assert classifier.inputs(many).shape == (3, said.channels, 36, 48)
    assert [row[0].id for row in classifier(many)] == [classifier(picture)[0].id for picture in many]


# ------------------------------------------------------------------ files


def test_kept_in_files(tmp_path: Path) -> None:
    model = network()
    deployed = model.deploy()
    save(model, tmp_path / "training.safetensors")
    save(deployed, tmp_path / "deployed.safetensors")
    torch.save({"state_dict": model.state_dict(), **model.description()}, tmp_path / "model.pth")
    model.save_pretrained(tmp_path / "folder")
    deployed.save_pretrained(tmp_path / "folder of the deployed")
    quantized = deployed.quantize([torch.randn(2, 3, 36, 48)])
    save(quantized, tmp_path / "int8.safetensors")
    for found in (
        deployed,
        quantized,
        load_checkpoint(tmp_path / "training.safetensors"),
        load_checkpoint(tmp_path / "model.pth"),
        load_deployed(tmp_path / "deployed.safetensors"),
        load_network(tmp_path / "int8.safetensors"),
        ParNet.from_pretrained(tmp_path / "folder"),
        DeployedParNet.from_pretrained(tmp_path / "folder"),
        DeployedParNet.from_pretrained(tmp_path / "folder of the deployed"),
    ):
        assert found.preprocessing == WIDE
        assert type(found.preprocessing.size) is tuple
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["parnet_preprocessing"]["size"] == [36, 48]
    assert "size 36x48, crop 0.9" in (tmp_path / "folder" / "README.md").read_text()


def test_squares_are_written_as_before(tmp_path: Path) -> None:
    """One number, which older versions read."""
    for size in (36, (36, 36), [36, 36]):
        save(network(Preprocessing(size)), tmp_path / "net.safetensors")
        with safe_open(tmp_path / "net.safetensors", "pt") as file:
            said = json.loads(file.metadata()["parnet_preprocessing"])
        assert said["size"] == 36
        assert [*said] == ["size", "crop", "interpolation", "mean", "std", "color"]


def test_files_that_say_another_size(tmp_path: Path) -> None:
    save(network(), tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        metadata, state = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["parnet_preprocessing"])["size"] == [36, 48]

    def read(size: str) -> Preprocessing | None:
        save_file(state, tmp_path / "net.safetensors", {**metadata, "parnet_preprocessing": f'{{"size": {size}}}'})
        return load_checkpoint(tmp_path / "net.safetensors").preprocessing

    assert read("[64, 64]") == Preprocessing(64)
    for size in ("[64]", "[3, 36, 48]", "[36, 0]", "[true, 48]", "[36, null]", "[36.0, 48]", '"36x48"', "[[36, 48]]"):
        with pytest.raises(CheckpointError, match=r"net\.safetensors: `parnet_preprocessing` must be JSON as"):
            read(size)


def test_onnx_metadata(tmp_path: Path) -> None:
    library = pytest.importorskip("onnx")
    export.onnx(network(), tmp_path / "net.onnx")
    told = {p.key: json.loads(p.value) for p in library.load(tmp_path / "net.onnx").metadata_props}
    assert Preprocessing(**told["parnet_preprocessing"]) == WIDE


# ------------------------------------------------------------------ commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(network().deploy(), "net.safetensors")
    save(network(Preprocessing(40)).deploy(), "square.safetensors")
    for class_name in ("a", "b"):
        Path("photos", class_name).mkdir(parents=True)
    for i, shape in enumerate(((50, 70), (70, 50), (36, 48), (5, 90), (48, 64))):
        Image.fromarray(frame(*shape, seed=i)).save(f"photos/{'ab'[i % 2]}/{i}.png")
    return tmp_path


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_a_folder(folder: Path, workers: int) -> None:
    out, err = run("predict", "photos", "--checkpoint", "net.safetensors", "--json", "--batch", 3, "--workers", workers)
    assert "preprocessing: size 36x48, crop 0.9" in err
    deployed, found = network().deploy(), json.loads(out)
    assert len(found) == 5
    for entry in found:
        with torch.inference_mode():
            expected = deployed(load_image(entry["image"], WIDE))[0].softmax(0).tolist()
        assert {top["class"]: top["probability"] for top in entry["top"]} == pytest.approx(dict(enumerate(expected)))


def test_predict_with_another_size(folder: Path) -> None:
    call = ("predict", "photos", "--json", "--checkpoint")
    expected, _ = run(*call, "net.safetensors")
    out, err = run(*call, "square.safetensors", "--size", "36x48", "--crop", 0.9)
    assert out == expected
    assert "size (36, 48) asked for, not 40; crop 0.9 asked for, not 0.875" in err
    out, err = run(*call, "net.safetensors", "--size", "40", "--crop", 0.875)
    assert out == run(*call, "square.safetensors")[0] == run(*call, "square.safetensors", "--size", "40x40")[0]
    assert "size 40 asked for, not (36, 48)" in err
    run("predict", "photos", "--checkpoint", "net.safetensors", "--out", "out.jsonl")
    call = ("predict", "photos", "--checkpoint", "net.safetensors", "--out", "out.jsonl", "--resume")
    run(*call, "--size", "36x48")
    assert "made with another preprocessing" in run(*call, "--size", "48x36", code=2)[1]


@pytest.mark.parametrize("command", ["predict", "convert", "latency"])
def test_wrong_sizes_on_the_command_line(folder: Path, command: str) -> None:
    words = {
        "predict": ("photos", "--checkpoint", "net.safetensors"),
        "convert": ("net.safetensors", "new.safetensors", "--deployed"),
        "latency": ("net.safetensors", "--seconds", "0.1"),
    }[command]
    for size in ("0", "-4", "36x", "x48", "36x0", "36x48x3", "36,48", "36X48", "36 x 48", "٣٦x48", "3e1", ""):
        assert "--size must be pixels such as 224" in run(command, *words, "--size", size, code=2)[1]
    for size in ("9000", "36x9000"):
        assert "`size` must be an integer in 1…8192" in run(command, *words, "--size", size, code=2)[1]
    assert not Path("new.safetensors").exists()


def test_convert(folder: Path) -> None:
    for words, size in (("24x56", (24, 56)), ("56", 56), ("56x56", 56)):
        run("convert", "net.safetensors", "new.safetensors", "--deployed", "--size", words)
        assert load_deployed("new.safetensors").preprocessing == WIDE.replace(size=size)
        Path("new.safetensors").unlink()


def test_latency(folder: Path) -> None:
    call = ("latency", "net.safetensors", "--seconds", "0.1", "--batch", 2, "--frame", "64x48", "--json")
    assert json.loads(run(*call)[0])["input"] == [2, 3, 36, 48]
    assert json.loads(run(*call, "--size", "24x56")[0])["input"] == [2, 3, 24, 56]


def test_quantize(folder: Path) -> None:
    _, err = run("quantize", "net.safetensors", "photos", "int8.safetensors", "--images", 4)
    assert "preprocessing: size 36x48" in err
    quantized = load_network("int8.safetensors")
    assert quantized.preprocessing == WIDE
    assert Classifier(quantized).inputs(frame(60, 60)).shape == (1, 3, 36, 48)
