"""`Classifier`: every kind of picture gives what the file of the same picture gives."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parnet_kernels import Classifier, ParNet, ParNetConfig, Preprocessing, save
from parnet_kernels.app.images import load_image

CONFIG = ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)
NAMES = ("a", "b", "c")
SAID = Preprocessing(40, 0.8)


def network(said: Preprocessing = SAID) -> ParNet:
    torch.manual_seed(0)
    model = ParNet(CONFIG.replace(in_chans=said.channels)).eval()
    model.preprocessing, model.class_names = said, NAMES
    return model


def frame(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


GRAY = Preprocessing(40, 0.8, mean=(0.0,), std=(1.0,), color="gray")
SAYINGS = {
    "rgb": SAID,
    "bgr": SAID.replace(color="bgr"),
    "gray": GRAY,
    "lanczos": SAID.replace(interpolation="lanczos"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("said", SAYINGS.values(), ids=SAYINGS)
def test_every_kind_of_picture(tmp_path: Path, said: Preprocessing) -> None:
    pixels = frame()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    classifier = Classifier(network(said))
    expected = load_image(tmp_path / "a.png", said)
    padded = np.zeros((60, 80, 4), dtype=np.uint8)
    padded[5:55, 6:76, :3] = pixels
    kinds = {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "image": image,
        "array": pixels,
        "read-only": np.asarray(image),
        "tensor": torch.from_numpy(pixels),
        "sliced, four channels": padded[5:55, 6:76],
        "reversed": np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1],
        "channels first in memory": torch.from_numpy(pixels).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for kind, picture in kinds.items():
        assert torch.equal(classifier.inputs(picture), expected), kind
    assert torch.equal(Classifier(network(said), frame_color="bgr").inputs(pixels[:, :, ::-1]), expected)
    many = classifier.inputs([*kinds.values()])
    assert torch.equal(many, expected.expand(len(kinds), -1, -1, -1))
    assert torch.equal(classifier.inputs(np.stack([pixels, pixels])), expected.expand(2, -1, -1, -1))
    guesses = classifier(pixels)
    with torch.inference_mode():
        probabilities = network(said).deploy()(expected)[0].softmax(0)
    assert [g.label for g in guesses] == [NAMES[i] for i in probabilities.argsort(descending=True)]
    assert {g.id: g.probability for g in guesses} == pytest.approx(dict(enumerate(probabilities.tolist())))
    assert [[g.label for g in row] for row in classifier([pixels, image], top=1)] == [[guesses[0].label]] * 2
    assert (pixels == frame()).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_pictures(tmp_path: Path, channels: int) -> None:
    said = GRAY if channels == 1 else SAID
    pixels = frame()[:, :, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    classifier, expected = Classifier(network(said)), load_image(tmp_path / "a.png", said)
    for picture in (pixels, pixels[:, :, None], torch.from_numpy(pixels), Image.fromarray(pixels)):
        assert torch.equal(classifier.inputs(picture), expected)


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 40), (50, 50), (37, 90), (480, 640), (3, 200)], ids=str)
def test_filters_are_those_of_pillow(name: str, shape: tuple[int, int]) -> None:
    """To one level of 255; of the whole picture, resized by Pillow, then cut."""
    said = Preprocessing(40, 0.8, name, (0, 0, 0), (1, 1, 1))
    pixels = frame(*shape)
    scale = 50 / min(shape)
    height, width = max(40, round(shape[0] * scale)), max(40, round(shape[1] * scale))
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling[name.upper()])).astype(float)
    top, left = (height - 40) // 2, (width - 40) // 2
    found = Classifier(network(said)).inputs(pixels)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - whole[top : top + 40, left : left + 40]).max() < 1.01


def test_features() -> None:
    model = network()
    classifier = Classifier(model)
    pictures = [frame(seed=i) for i in range(3)]
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(classifier.inputs(pictures)), pre_logits=True)
    assert torch.allclose(classifier.features(pictures), expected, rtol=1e-4, atol=1e-5)
    assert classifier.features(pictures[0]).shape == (8,)
    assert classifier.features([]).shape == (0, 8)
    assert classifier([]) == []
    model.reset_classifier(0)
    assert torch.allclose(Classifier(model).features(pictures), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no classifier: `features`"):
        Classifier(model)(pictures)


def test_warmup_and_files(tmp_path: Path) -> None:
    save(network(), tmp_path / "net.safetensors")
    classifier = Classifier(tmp_path / "net.safetensors").warmup().warmup(4)
    assert classifier(frame()) == Classifier(network())(frame())
    half = Classifier(network().deploy().bfloat16())
    assert half.inputs(frame()).dtype == torch.bfloat16
    assert half(frame())[0].label in NAMES
    with pytest.warns(UserWarning, match="does not say its preprocessing; assumed: size 224"):
        silent = Classifier(ParNet(CONFIG))
    assert silent.preprocessing == Preprocessing()
    assert {g.label for g in silent(frame())} == {"0", "1", "2"}


def test_what_is_asked_for_leaves_the_network_as_it_is() -> None:
    deployed = network().deploy()
    other = SAID.replace(size=32)
    classifier = Classifier(deployed, preprocessing=other, class_names=["x", "y", "z"])
    assert classifier.inputs(frame()).shape[2] == 32
    assert {g.label for g in classifier(frame())} == {"x", "y", "z"}
    assert (deployed.preprocessing, deployed.class_names) == (SAID, NAMES)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (frame().astype(np.float32), r"picture 0 must be uint8 \[H, W, 3\], got float32 \[50, 70, 3\]$"),
        (frame().transpose(2, 0, 1), r"got uint8 \[3, 50, 70\]: it looks channels-first"),
        (torch.zeros(3, 50, 70), r"got float32 \[3, 50, 70\]: it looks channels-first"),
        (np.zeros((5, 5, 2), np.uint8), r"got uint8 \[5, 5, 2\]$"),
        (np.zeros((0, 5, 3), np.uint8), "picture 0 has no pixels: 5×0"),
        (np.zeros((1, 100_000, 3), np.uint8), "picture 0 is too elongated: its 100000×1 pixels become"),
        (3, "picture 0 must be an array, an image or a path, got int"),
        ([frame(), None], "picture 1 must be an array, an image or a path, got NoneType"),
        ([frame(), "none.png"], "no image file none.png"),
        (Image.fromarray(np.zeros((5, 5), np.float32)), "picture 0 has pixels of mode F without a known range"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_picture(picture: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        Classifier(network())(picture)


def test_wrong_arguments() -> None:
    for arguments, message in (
        ({"frame_color": "grb"}, "`frame_color` must be 'rgb' or 'bgr'"),
        ({"class_names": ["a"]}, "`class_names` must be 3"),
        ({"preprocessing": GRAY}, "must make 3 channels"),
        ({"preprocessing": 224}, "must be a Preprocessing"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Classifier(network(), **arguments)
    with pytest.raises(TypeError, match="must be a path or a network, got a Linear"):
        Classifier(torch.nn.Linear(2, 2))
    for top in (0, 1.5):
        with pytest.raises(ValueError, match="`top` must be an integer ≥ 1"):
            Classifier(network())(frame(), top=top)
    deployed = network().deploy()
    deployed.head_bias[1] = float("nan")
    with pytest.raises(ValueError, match="picture 0: the network's outputs are not finite"):
        Classifier(deployed)(frame())


def test_threads() -> None:
    classifier = Classifier(network())
    pictures = [frame(seed=i) for i in range(4)]
    expected = [classifier(picture) for picture in pictures]
    found: list[bool] = []

    def ask(i: int) -> None:
        found.extend(classifier(pictures[i]) == expected[i] for _ in range(20))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_importing_the_package_does_not_import_pillow() -> None:
    code = "import parnet_kernels as p, sys; assert 'PIL' not in sys.modules; p.Classifier; assert 'PIL' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
