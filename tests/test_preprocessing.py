"""Preprocessing and class names: checked, kept by every way from a network to a file and back, used by `predict`."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, load_checkpoint, load_deployed, load_model, save
from parnet_kernels.app.cli import app
from parnet_kernels.app.images import load_image
from parnet_kernels.checkpoint import CheckpointError

CONFIG = ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)
SAID = Preprocessing(40, 0.8, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bgr")
NAMES = ("chat tigré", "", "[red] \U0001f98a")


def described() -> ParNet:
    torch.manual_seed(0)
    model = ParNet(CONFIG).eval()
    model.preprocessing, model.class_names = SAID, NAMES
    return model


def says(model: object) -> tuple[object, object]:
    return model.preprocessing, model.class_names


def test_kept_on_every_way(tmp_path: Path) -> None:
    model = described()
    network = model.deploy()
    save(model, tmp_path / "training.safetensors")
    save(network, tmp_path / "deployed.safetensors")
    torch.save({"state_dict": model.state_dict(), **model.description()}, tmp_path / "model.pth")
    for found in (
        network,
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        network.double(),
        load_checkpoint(tmp_path / "training.safetensors"),
        load_checkpoint(tmp_path / "model.pth"),
        load_checkpoint({"state_dict": model.state_dict(), **model.description()}),
        load_deployed(tmp_path / "deployed.safetensors"),
        *(load_model(tmp_path / f) for f in ("training.safetensors", "deployed.safetensors", "model.pth")),
    ):
        assert says(found) == (SAID, NAMES)
    assert says(load_checkpoint(model.state_dict())) == (None, None)
    model.reset_classifier(5)
    assert says(model) == (SAID, None)
    assert says(network) == (SAID, NAMES)


def test_saying_it_does_not_pack_weights_anew() -> None:
    network = ParNet(CONFIG).eval().deploy()
    known = network.whole()
    network.preprocessing, network.class_names = SAID, NAMES
    assert network.whole() is known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, r"`size` must be an integer in 1…8192, or two of them, \(height, width\), got 0"),
        ({"size": True}, "`size`"),
        ({"size": 224.0}, "`size`"),
        ({"size": 10**400}, "`size`"),
        ({"crop": 0}, "`crop` must be a number in 0.01…1"),
        ({"crop": float("nan")}, "`crop`"),
        ({"size": 8000, "crop": 0.1}, "`crop` must leave size / crop ≤ 16384"),
        ({"interpolation": "linear"}, "`interpolation` must be one of nearest, box"),
        ({"interpolation": []}, "`interpolation`"),
        ({"color": "grb"}, "`color` must be one of rgb, bgr, gray"),
        ({"color": ["rgb"]}, "`color`"),
        ({"mean": (0.5,)}, "`mean` must be 3 numbers in -1e[+]06…1e[+]06 for colour order rgb"),
        ({"mean": 0.5}, "`mean`"),
        ({"mean": ("0", "0", "0")}, "`mean`"),
        ({"std": (1, 1, 0)}, "`std` must be 3 numbers in 1e-06…"),
        ({"std": (1, 1, float("inf"))}, "`std`"),
        ({"color": "gray"}, "`mean` must be 1 numbers"),
    ],
    ids=str,
)
def test_wrong_values(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Preprocessing: {message}"):
        Preprocessing(**changes)


def test_a_network_takes_what_fits_it() -> None:
    model = ParNet(CONFIG)
    with pytest.raises(ValueError, match="must make 3 channels, as the network takes, got colour order gray"):
        model.preprocessing = Preprocessing.assumed(1)
    with pytest.raises(TypeError, match="must be a Preprocessing or None, got a dict"):
        model.preprocessing = asdict(SAID)
    for names, error in (
        (["a", "b"], "must be 3, one a class, got 2"),
        ("abc", "must be strings"),
        ([1, 2, 3], "must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            model.class_names = names
    with pytest.raises(ValueError, match="at most 4096 characters"):
        model.class_names = ["a", "b", "c" * 4097]
    with pytest.raises(ValueError, match="pictures have 1 or 3 channels, the network takes 4"):
        Preprocessing.assumed(4)
    assert says(model) == (None, None)


BAD = {
    "parnet_preprocessing": ("", "{", "[]", "3", '{"size": 1e9}', '{"depth": 3}', "[" * 10**5, '{"color": "gray"}'),
    "parnet_class_names": ("", '"abc"', "{}", '["a"]', '["a", "b", 3]', "[" * 10**5, '["a", "b", "%s"]' % ("c" * 5000)),
}


@pytest.mark.parametrize("key", BAD)
def test_wrong_files(tmp_path: Path, key: str) -> None:
    path = tmp_path / "net.safetensors"
    model = described()
    for form in (model, model.deploy()):
        save(form, path)
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        for text in BAD[key]:
            save_file(state, path, {**metadata, key: text})
            with pytest.raises(CheckpointError, match=rf"net\.safetensors: `{key}` must be JSON as"):
                load_model(path)
    for value in (*BAD[key], 3, ["a"], torch.zeros(1)):
        with pytest.raises(CheckpointError, match=f"the given dict: `{key}` must be JSON as"):
            load_checkpoint({"state_dict": model.state_dict(), key: value})


def test_pictures_as_said(tmp_path: Path) -> None:
    """Against the same steps by hand; every filter, and the channels' order."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        image = Image.fromarray(pixels).resize((70, 50), getattr(Image.Resampling, name.upper()))
        cut = np.asarray(image)[5:45, 15:55, ::-1].astype(np.float64) / 255
        expected = ((cut - SAID.mean) / SAID.std).transpose(2, 0, 1)[None]
        found = load_image(tmp_path / "a.png", SAID.replace(interpolation=name))
        assert np.abs(found.numpy() - expected).max() < 1e-5


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def test_predict_uses_them_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save("a.png")
    network = described().deploy()
    save(network, "net.safetensors")
    with torch.inference_mode():
        expected = network(load_image("a.png", SAID))[0].softmax(0)
    call = ("predict", "a.png", "--checkpoint", "net.safetensors", "--json")
    out, err = run(*call)
    top = json.loads(out)[0]["top"]
    assert {t["label"]: t["probability"] for t in top} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True))
    )
    assert f"preprocessing: {SAID} (as net.safetensors says)" in err
    out, err = run(*call, "--size", "32", "--color", "rgb", "--mean", "0.1,0.2,0.3")
    assert json.loads(out)[0]["top"] != top
    assert "size 32 asked for, not 40; mean (0.1, 0.2, 0.3) asked for, not (0.4, 0.5, 0.6); color rgb asked" in err
    Path("labels.txt").write_text("a\nb\nc\n")
    out, err = run(*call, "--labels", "labels.txt")
    assert {t["label"] for t in json.loads(out)[0]["top"]} == {"a", "b", "c"}
    assert "class names: those of labels.txt, not the network's own" in err
    save(ParNet(CONFIG).deploy(), "silent.safetensors")
    _, err = run("predict", "a.png", "--checkpoint", "silent.safetensors")
    assert f"preprocessing: {Preprocessing()} (assumed, silent.safetensors does not say)" in err
    for wrong in (("--size", "0"), ("--mean", "0.1"), ("--mean", "a,b,c"), ("--color", "gray"), ("--std", "0,0,0")):
        run(*call, *wrong, code=2)


def test_convert_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": ParNet(CONFIG).state_dict()}, "model.pth")
    _, err = run("convert", "model.pth", "plain.safetensors")
    assert "plain.safetensors does not say how pictures become inputs" in err
    assert says(load_checkpoint("plain.safetensors")) == (None, None)
    Path("labels.txt").write_text("a\nb\nc\n")
    options = ("--size", 64, "--crop", 1, "--labels", "labels.txt", "--std", ".5,.5,.5", "--interpolation", "lanczos")
    expected = Preprocessing(64, 1, "lanczos", std=(0.5, 0.5, 0.5)), ("a", "b", "c")
    run("convert", "model.pth", "net.safetensors", "--deployed", *options)
    assert says(load_deployed("net.safetensors")) == expected
    run("convert", "net.safetensors", "again.safetensors", "--deployed")
    assert says(load_deployed("again.safetensors")) == expected
