"""`parnet predict` on many pictures: where they come from, how results are written, resuming, several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, save
from parnet_kernels.app import decoding
from parnet_kernels.app.cli import app
from parnet_kernels.app.sources import Share, pictures

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "from parnet_kernels.app.cli import main; main()", "predict"]
NAMES = ("a", 'b "x", y', "c\nd")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network, and photos/ with 11 pictures of several sizes, two of them broken, one elsewhere below."""
    torch.manual_seed(0)
    network = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)).eval().deploy()
    network.preprocessing, network.class_names = Preprocessing(32), NAMES
    save(network, tmp_path / "net.safetensors")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    (tmp_path / "photos" / ".hidden").mkdir()
    generator = np.random.default_rng(0)
    for i in range(9):
        name = "more/8, last.JPEG" if i == 8 else f"{i}.png"
        pixels = generator.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "photos" / "readme.txt").write_text("no picture")
    (tmp_path / "photos" / "broken1.png").write_bytes(b"no picture")
    whole = (tmp_path / "photos" / "0.png").read_bytes()
    (tmp_path / "photos" / "broken2.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


GOOD = sorted([*(f"photos/{i}.png" for i in range(8)), "photos/more/8, last.JPEG"])


def predict(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["predict", "--checkpoint", "net.safetensors", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def json_lines(text: str) -> dict[str, list]:
    return {entry["image"]: entry["top"] for entry in map(json.loads, text.splitlines())}


def one_by_one() -> dict[str, list]:
    """Each picture in a call of its own: what batches must give."""
    return {path: json.loads(predict(path, "--json").stdout)[0]["top"] for path in GOOD}


def same(found: dict[str, list], expected: dict[str, list]) -> bool:
    return found.keys() == expected.keys() and all(
        [e["label"] for e in found[k]] == [e["label"] for e in expected[k]]
        and np.allclose([e["probability"] for e in found[k]], [e["probability"] for e in expected[k]], atol=1e-6)
        for k in found
    )


def test_sources(folder: Path) -> None:
    everything = sorted([*GOOD, "photos/broken1.png", "photos/broken2.png"])
    assert pictures(["photos"], []) == everything
    assert pictures(["photos/*.png"], []) == [p for p in everything if "more" not in p]
    assert pictures(["photos/**/*.JPEG", "photos/3.png", "photos/3.png"], []) == [GOOD[-1], *["photos/3.png"] * 2]
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/1.png\r\n\n photos/2.png\n\xff.png\n\n")
    assert pictures([], [Path("list.txt")]) == ["photos/1.png", " photos/2.png", "\udcff.png"]
    (folder / "a[1].png").touch()
    (folder / "a1.png").touch()
    assert pictures(["a[1].png"], []) == ["a[1].png"]
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("\n\n")
    os.mkfifo(folder / "pipe.txt")
    for arguments, message in (
        ((), "no pictures: name files, folders or patterns"),
        (("empty",), "the folder empty holds no pictures"),
        (("photos/*.gif",), "matches no file"),
        (("--list", "empty.txt"), "lists no pictures"),
        (("--list", "none.txt"), "cannot read none.txt"),
        (("--list", "pipe.txt"), "must be a text file"),
    ):
        assert message in " ".join(predict(*arguments, code=2).stderr.replace("│", " ").split())


@pytest.mark.parametrize("workers", [0, 2])
def test_formats(folder: Path, workers: int) -> None:
    expected = one_by_one()
    options = ("photos", "--batch", 4, "--workers", workers)
    done = predict(*options, "--format", "jsonl", code=1)
    assert same(json_lines(done.stdout), expected)
    assert list(json_lines(done.stdout)) == GOOD
    assert "broken1.png is not an image" in done.stderr
    assert "cannot read the image photos/broken2.png" in done.stderr
    assert "2 of 11 images could not be classified" in done.stderr
    rows = [*csv.DictReader(predict(*options, "--format", "csv", code=1).stdout.splitlines(keepends=True))]
    assert len(rows) == 3 * len(GOOD)
    for row in rows:
        entry = expected[row["image"]][int(row["rank"]) - 1]
        assert (row["label"], int(row["class"])) == (entry["label"], entry["class"])
        assert float(row["probability"]) == pytest.approx(entry["probability"], abs=1e-6)
    assert same({e["image"]: e["top"] for e in json.loads(predict(*options, "--json", code=1).stdout)}, expected)
    for ending, length in (("csv", 3 * len(GOOD) + 1 + len(GOOD)), ("jsonl", len(GOOD)), ("txt", 3 * len(GOOD) + 1)):
        done = predict(*options, "--out", f"out.{ending}", code=1)
        assert done.stdout == ""
        assert len(Path(f"out.{ending}").read_text().splitlines()) == length  # in CSV one label has two lines
        assert "exists: --resume" in predict(*options, "--out", f"out.{ending}", code=2).stderr.replace("\n", " ")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_resume_at_every_byte(folder: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of the file a kill left, resuming gives the whole file."""
    asked: list[str] = []
    opened = decoding.open_image
    monkeypatch.setattr(decoding, "open_image", lambda path, color: asked.append(path) or opened(path, color))
    out = Path(f"out.{ending}")
    options = ("photos/[0-3].png", "photos/more", "--batch", 1, "--out", out)
    predict(*options)
    whole = out.read_bytes()
    assert len(asked) == 5
    for end in [0, 1, *range(5, len(whole), max(1, len(whole) // 25)), len(whole) - 1, len(whole)]:
        out.write_bytes(whole[:end])
        asked.clear()
        predict(*options, "--resume")
        assert out.read_bytes() == whole
        assert (len(asked) == 0) == (end == len(whole))
    predict(*options, "photos/broken1.png", "--resume", code=1)
    asked.clear()
    predict(*options, "photos/broken1.png", "photos/7.png", "--resume", code=1)
    assert asked == ["photos/broken1.png", "photos/7.png"]  # what failed is tried again
    assert out.read_bytes().startswith(whole)


def test_resume_refuses_what_others_made(folder: Path) -> None:
    options = ("photos/1.png", "--out", "out.csv")
    predict(*options)

    def refused(*arguments: object) -> str:
        return " ".join(predict(*arguments, "--resume", code=2).stderr.replace("│", " ").split())

    assert "made with another preprocessing" in refused(*options, "--size", 40)
    assert "made with another top" in refused(*options, "--top", 2)
    (folder / "labels.txt").write_text("x\ny\nz\n")
    assert "made with another class names" in refused(*options, "--labels", "labels.txt")
    network = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)).eval().deploy()
    network.preprocessing, network.class_names = Preprocessing(32), NAMES
    save(network, folder / "other.safetensors")
    assert "made with another network" in refused(*options, "--checkpoint", "other.safetensors")
    assert "--resume needs --out with format jsonl or csv" in refused("photos/1.png")
    assert "--resume needs --out with format jsonl or csv" in refused("photos/1.png", "--out", "out.json")
    (folder / "foreign.csv").write_text("name,age\n")
    assert "foreign.csv.run.json, which says what made" in refused("photos/1.png", "--out", "foreign.csv")
    assert (folder / "foreign.csv").read_text() == "name,age\n"
    assert "cannot write" in str(predict("photos/1.png", "--out", "none/out.csv", code=1).exception)


def test_a_killed_run_goes_on(folder: Path) -> None:
    """SIGKILL while results are written: no process stays, and resuming gives each picture once."""
    for i in range(400):
        (folder / "photos" / f"copy{i}.png").symlink_to("1.png")
    options = ["photos/copy*.png", "--checkpoint", "net.safetensors", "--out", "out.jsonl", "--batch", "2"]
    options += ["--workers", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([*PROGRAM, *options], env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    out, end = folder / "out.jsonl", time.monotonic() + 60
    while (not out.exists() or out.stat().st_size < 2000) and time.monotonic() < end:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    part = len(out.read_text().splitlines())
    assert 0 < part < 400
    predict(*options[0:1], *options[3:], "--resume", "--workers", 0)
    assert sorted(json_lines(out.read_text())) == sorted(f"photos/copy{i}.png" for i in range(400))
    assert len(out.read_text().splitlines()) == 400
    end = time.monotonic() + 60
    while _exists(run.pid):  # workers look for their parent every few seconds
        assert time.monotonic() < end, "a process of the killed run is still there"
        time.sleep(0.1)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_reader_that_has_enough(folder: Path) -> None:
    """`parnet predict … | head -1` ends quietly."""
    call = f"{' '.join(map(repr, PROGRAM))} photos --checkpoint net.safetensors --format jsonl --batch 1 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", call], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_share_of_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # nobody waits for others that torchrun has not started
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Share.of_environment() == Share(0, 1)
    for rank, world in (("2", "2"), ("-1", "2"), ("a", "2"), ("0", ""), ("²", "3")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert "RANK and WORLD_SIZE must be" in predict("photos/1.png", code=2).stderr
    found: dict[str, list] = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        predict("photos/[0-7].png", "photos/more", "--out", "out.jsonl")
        part = json_lines(Path(f"out.{rank}-of-3.jsonl").read_text())
        assert not found.keys() & part.keys()
        found |= part
    assert same(found, {k: v for k, v in found.items() if k in GOOD})
    assert sorted(found) == GOOD
    assert "several processes need --out" in predict("photos", code=2).stderr.replace("\n", " ")


def test_others_that_do_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**environment, "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("parnet_kernels.app.predict.START", timedelta(seconds=2))
    done = predict("photos", "--out", "out.jsonl", code=1)
    assert isinstance(done.exception, OSError)
    assert "not all 2 processes of torchrun started within 0:00:02" in str(done.exception)


@pytest.mark.slow
def test_torchrun(folder: Path) -> None:
    """One broken picture in the share of one process: the other's results are all there, and the status is 1."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["photos", "--checkpoint", "net.safetensors", "--out", "out.jsonl", "--batch", "1"]
    done = subprocess.run(
        [*call, *PROGRAM, *options], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr
    found = [line for rank in (0, 1) for line in Path(f"out.{rank}-of-2.jsonl").read_text().splitlines()]
    assert sorted(json_lines("\n".join(found))) == GOOD
