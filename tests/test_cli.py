"""The `parnet` command through its installed entry point."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import randomize
from PIL import Image
from typer.testing import CliRunner

from parnet_kernels import (
    CheckpointError,
    ParNetConfig,
    __version__,
    load_checkpoint,
    load_deployed,
    parnet_cifar,
    save,
)
from parnet_kernels.app.cli import app
from parnet_kernels.cpu import direct
from parnet_kernels.model import ParNet

PARNET = Path(sys.executable).with_name("parnet")


def parnet(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PARNET, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def refused(*arguments: object) -> str:
    """In this process: the error that the command gives; `main` prints it where it is no usage error of Typer's."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if not isinstance(result.exception, SystemExit):  # `main` prints these
        assert isinstance(result.exception, (CheckpointError, OSError, ValueError)), result.exception
        return str(result.exception)
    assert result.exit_code != 0
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an RGB photograph, a grey one."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = randomize(ParNet(ParNetConfig((5, 7, 6, 9), (2, 3, 2), num_classes=4)))
    torch.save({"state_dict": model.state_dict()}, folder / "model.pth")
    save(parnet_cifar(width=4, num_classes=3, in_chans=1).deploy(), folder / "grey.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    return folder


def test_info() -> None:
    result = parnet("info", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["parnet_kernels"] == __version__
    assert found["torch"] == torch.__version__
    assert found["backends"]["reference"] == "available"
    assert found["backends"]["cpu"] == "available"
    assert found["cpu"]["isa"] in ("portable", "avx2", "avx512", "avx512_intel")
    assert found["cpu_products"]["int8"] in direct.supported() or "no instructions" in found["cpu_products"]["int8"]
    in_tiles = "prepare(products='bfloat16')" in found["cpu_products"]["float16, bfloat16"]
    assert in_tiles == ("bf16_amx" in direct.supported(torch.bfloat16))
    table = parnet("info")
    assert table.returncode == 0
    assert __version__ in table.stdout


def test_info_why() -> None:
    result = parnet("info", "--json", "--why", "repvgg_sse,1x8x5x5,float64,cpu")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["runs on"] == "reference"
    assert "float64" in found["cpu"]
    assert parnet("info", "--why", "repvgg,1x8x5x5,float32,cpu").returncode != 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_selftest_without_a_gpu() -> None:
    result = parnet("info", "--selftest")
    assert (result.returncode, result.stdout.strip()) == (0, "no GPU: nothing to test")


def test_bench_is_reachable() -> None:
    result = parnet("bench", "cpu", "--help")
    assert result.returncode == 0, result.stderr
    assert "--engines" in result.stdout
    assert parnet("bench", "cpu", "--batch", "0").returncode == 2


def test_predict(folder: Path) -> None:
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    common = ("--checkpoint", folder / "model.pth", "--labels", folder / "labels.txt", "--size", 64)
    result = parnet("predict", folder / "photo.png", folder / "grey.png", *common, "--top", 2, "--json")
    assert result.returncode == 0, result.stderr
    photo, grey = json.loads(result.stdout)
    assert (photo["image"], grey["image"]) == (str(folder / "photo.png"), str(folder / "grey.png"))
    assert len(photo["top"]) == 2
    assert photo["top"][0]["probability"] >= photo["top"][1]["probability"]
    assert photo["top"][0]["label"] == ("ant", "bee", "cat", "dog")[photo["top"][0]["class"]]
    table = parnet("predict", folder / "photo.png", *common)
    assert table.returncode == 0
    assert photo["top"][0]["label"] in table.stdout


def test_predict_grey(folder: Path) -> None:
    result = parnet(
        "predict", folder / "photo.png", "--checkpoint", folder / "grey.safetensors", "--size", 32, "--json"
    )
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)[0]["top"]) == 3


def test_convert(folder: Path) -> None:
    for flags, load in (((), load_checkpoint), (("--deployed",), load_deployed)):
        result = parnet("convert", folder / "model.pth", folder / "out.safetensors", *flags)
        assert result.returncode == 0, result.stderr
        assert load(folder / "out.safetensors").config.planes == (5, 7, 6, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "none.png", "--checkpoint", "model.pth"), "none.png"),
        (("predict", "model.pth", "--checkpoint", "model.pth"), "model.pth is not an image"),
        (("predict", "photo.png", "--checkpoint", "photo.png"), "cannot read"),
        (("predict", "photo.png", "--checkpoint", "none.pth"), "no checkpoint file"),
        (("convert", "none.pth", "out.safetensors"), "no checkpoint file"),
        (("convert", "model.pth", "out.pth"), "must end in .safetensors"),
        (("convert", "model.pth", "out.safetensors", "--ema"), "holds no EMA weights"),
        (("predict", "photo.png", "--checkpoint", "model.pth", "--labels", "photo_labels.txt"), "the network has 4"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_errors_are_one_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "photo_labels.txt").write_text("only one\n")
    names = {"none.png", "photo.png", "model.pth", "none.pth", "out.safetensors", "out.pth", "photo_labels.txt"}
    assert message in refused(*(folder / a if a in names else a for a in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "--why", "repvgg_sse,1x8x5x5,float32,foo"), "no tensor for"),
        (("info", "--why", "repvgg_sse,1x8x99999999x99999999,float32,cpu"), "no tensor for"),
        (("info", "--why", "repvgg_sse,1x8x5x5,complex64,cpu"), "`x` must be a float64,"),
        (("info", "--why", "repvgg_sse,1x8x5x5,float8_e4m3fn,cpu"), "`x` must be a float64,"),
        (("predict", "half.png", "--checkpoint", "grey.safetensors"), "half.png"),
        (("predict", "line.png", "--checkpoint", "grey.safetensors"), "too elongated: its 20000×2 pixels become"),
        (
            ("predict", "photo.png", "--checkpoint", "grey.safetensors", "--size", "99999"),
            "`size` must be an integer in 1…8192",
        ),
        (("predict", "photo.png", "--checkpoint", "grey.safetensors", "--ema"), "which has no EMA weights"),
        (("predict", "photo.png", "--checkpoint", "grey.safetensors", "--activation", "relu"), "saved with activation"),
        (("convert", "model.pth", "none/out.safetensors"), "cannot write"),
        (("demo", "--out", "photo.png"), "File exists"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_more_errors_are_one_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    whole = (folder / "photo.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (20000, 2)).save(folder / "line.png")
    files = (folder / a if a.endswith((".png", ".pth", ".safetensors")) else a for a in arguments)
    assert message in refused(*files)


def test_an_error_is_one_line(folder: Path) -> None:
    """Through the entry point; the others are tried without."""
    result = parnet("convert", folder / "none.pth", folder / "out.safetensors")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("parnet: ")
    assert "no checkpoint file" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bad_instruction_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARNET_CPU_ISA", "sse9")
    for arguments in (("info",), ("predict", folder / "photo.png", "--checkpoint", folder / "grey.safetensors")):
        result = parnet(*arguments)
        assert result.returncode == 1
        *told, error = result.stderr.splitlines()
        assert error.startswith("parnet: PARNET_CPU_ISA must be one of ")
        assert all(line.startswith("parnet: preprocessing: ") for line in told)


def test_demo_checks_itself(tmp_path: Path) -> None:
    """One epoch is not enough for the accuracy: the demo's parts run, its other checks hold, and it says so."""
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from parnet_kernels.app.demo import run; "
        f"sys.exit(0 if run(Path({str(tmp_path)!r}), Console(width=150), epochs=1) else 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("FAILED") == 1
    assert result.stdout.count("passed") == 2
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert load_deployed(tmp_path / "digits.safetensors").num_classes == 10
