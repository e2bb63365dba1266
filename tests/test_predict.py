"""`parnet predict`: every picture as it is, one bad picture costs that picture, names as the user wrote them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, save
from parnet_kernels.app.images import load_image

NAMES = ["cat [tabby]", "[red] fox", ":smile:", "  dog [/small]", "naïve\u2028owl\x0c\x85\x1b[31m"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=5)).eval().deploy()
    save(network, tmp_path / "net.safetensors")
    network.head_bias[0] = float("inf")
    save(network, tmp_path / "broken.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a[bold].png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf" + ("\r\n".join(NAMES) + "  \n\n \n").encode())
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1"))
    return tmp_path


def predict(folder: Path, *arguments: str, network: str = "net") -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from parnet_kernels.app.cli import main; main()", "predict"]
    call = [*program, *arguments, "--checkpoint", f"{network}.safetensors", "--size", "32"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "150"}
    return subprocess.run(
        call, cwd=folder, capture_output=True, encoding="utf-8", timeout=120, check=False, env=environment
    )


def test_one_unreadable_picture_costs_that_picture(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    done = predict(folder, "a[bold].png", "broken.png", "pipe.png", "none.png", "a[bold].png", "--json")
    assert done.returncode == 1
    assert [entry["image"] for entry in json.loads(done.stdout)] == ["a[bold].png"] * 2
    for name in ("broken.png is not an image", "pipe.png is not a file", "no image file none.png"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_outputs_that_are_not_finite_are_an_error(folder: Path) -> None:
    done = predict(folder, "a[bold].png", "--json", network="broken")
    assert done.returncode == 1
    assert json.loads(done.stdout) == []
    assert "not finite" in done.stderr


def test_names_are_printed_as_they_are(folder: Path) -> None:
    done = predict(folder, "a[bold].png", "--labels", "names.txt")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]  # in a pipe: nothing is cut or drawn
    assert lines[0] == ["image", "class", "probability"]
    shown = {*NAMES[:4], "naïve\\u2028owl\\f\\u0085\\u001b[31m"}
    assert {(image, label) for image, label, _ in lines[1:]} == {("a[bold].png", label) for label in shown}
    done = predict(folder, "a[bold].png", "--labels", "names.txt", "--json")
    assert {entry["label"] for entry in json.loads(done.stdout)[0]["top"]} == set(NAMES)
    done = predict(folder, "a[bold].png", "--labels", "latin.txt")
    assert done.returncode != 0
    assert "latin.txt" in done.stderr
    os.mkfifo(folder / "pipe.txt")
    done = predict(folder, "a[bold].png", "--labels", "pipe.txt")
    assert done.returncode != 0
    assert "must be a text file" in done.stderr


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path: Path, ending: str, channels: int) -> None:
    narrow = np.random.default_rng(1).integers(0, 256, (24, 24), dtype=np.uint8)
    Image.fromarray(narrow).save(tmp_path / "narrow.png")
    Image.fromarray(narrow.astype(np.uint16) * 257).save(tmp_path / f"wide.{ending}")
    preprocessing = Preprocessing.assumed(channels).replace(size=24, crop=1.0)
    expected = load_image(tmp_path / "narrow.png", preprocessing)
    assert torch.equal(load_image(tmp_path / f"wide.{ending}", preprocessing), expected)


@pytest.mark.parametrize("value", [1, 200, 70000])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_known_range_are_refused(tmp_path: Path, dtype: type, value: int) -> None:
    Image.fromarray(np.full((24, 24), value, dtype=dtype)).save(tmp_path / "x.tiff")
    with pytest.raises(OSError, match=r"x\.tiff has pixels of mode [IF] without a known range"):
        load_image(tmp_path / "x.tiff", Preprocessing(24, 1.0))


def test_texts_of_a_terminal() -> None:
    """On a terminal names are no markup either, and cannot send it commands."""
    import io

    from rich.console import Console

    from parnet_kernels.app.console import print_table, shown

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    print_table(
        console, ("name", "x"), [("[red] fox :smile: [/small]", "\x1b[31m\udcff"), ("passed", 1)], {"passed": "green"}
    )
    assert "[red] fox :smile: [/small]" in file.getvalue()
    assert "\\u001b[31m\\udcff" in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert shown("naïve 猫 🐈") == "naïve 猫 🐈"


def test_why_of_sizes_that_no_tensor_has() -> None:
    call = "repvgg_sse,1x8x99999999999999999999999x5,float32,cpu"
    program = [sys.executable, "-c", "from parnet_kernels.app.cli import main; main()", "info", "--why", call]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
