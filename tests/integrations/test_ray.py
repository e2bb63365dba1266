"""examples/ray_predict.py with the real Ray gives what `parnet predict` gives."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, save
from parnet_kernels.app.cli import app

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_ray_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)).eval().deploy()
    network.preprocessing, network.class_names = Preprocessing(32), ("a", "b, c", "d")
    save(network, "net.safetensors")
    Path("photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(generator.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)).save(f"photos/{i}.png")
    Path("photos/broken.png").write_bytes(b"no picture")
    program = [sys.executable, str(ROOT / "examples" / "ray_predict.py")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*program, "photos", "net.safetensors", "results"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = {
        os.path.relpath(row["image"], tmp_path): row
        for path in Path("results").glob("*.csv")
        for row in csv.DictReader(path.open(newline=""))
    }
    predicted = CliRunner().invoke(
        app, ["predict", "photos", "--checkpoint", "net.safetensors", "--json", "--top", "1"]
    )
    expected = {entry["image"]: entry["top"][0] for entry in json.loads(predicted.stdout)}
    assert rows.keys() == {*expected, "photos/broken.png"}
    for image, top in expected.items():
        assert rows[image]["label"] == top["label"]
        assert float(rows[image]["probability"]) == pytest.approx(top["probability"], abs=1e-5)
        assert rows[image]["error"] == ""
    assert "is not an image" in rows["photos/broken.png"]["error"]
    assert rows["photos/broken.png"]["label"] == ""
