"""`bench ablation`: the networks differ in what their names say, train alike, and a run that was stopped goes on."""

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import ablation
from bench.__main__ import app
from parnet_kernels.model import Block, ParNet

pytest.importorskip("kornia")
BASE, *_ = ablation.ROWS


def blocks(model: torch.nn.Module) -> list[Block]:
    return [m for m in model.modules() if isinstance(m, Block)]


def test_networks() -> None:
    made = {row: make(8, 3, 10) for row, make in ablation.ROWS.items()}
    x = torch.randn(2, 3, 32, 32)
    for row, model in made.items():
        assert model(x).shape == (2, 10), row
        model(x).sum().backward()
    base = made[BASE]
    assert isinstance(base, ParNet)
    assert base.config.streams == 3
    assert [made[f"{n} streams"].config.streams for n in (2, 4)] == [2, 4]
    assert made["1 stream"].config.streams == 1
    assert made["ReLU"].config == base.config.replace(activation="relu")
    assert made["half the width"].config.planes == (4, 8, 16, 64)
    # Without a gate: of a block with a skip, conv branches plus BatchNorm(x); else the branches.
    for block in blocks(made["RepVGG block alone"].eval()):
        x = torch.randn(1, block.rbr_dense.conv.in_channels, 6, 6)
        t = block.rbr_dense(x) + block.rbr_1x1(x)
        t = t if block.rbr_identity is None else t + block.rbr_identity(x)
        expected = torch.nn.functional.silu(t)
        found = block(x)
        assert torch.allclose(found.sum(1), expected.sum(1), atol=1e-5)  # a shuffle moves channels only
    assert all(isinstance(b.se, ablation.SqueezeExcitation) for b in blocks(made["SE instead of SSE"]))
    ratio = ablation.weights(made["ResNet-20 of as many weights"]) / ablation.weights(base)
    assert 0.85 <= ratio <= 1.15
    folded = base.eval().deploy()
    assert ablation.weights(base) == sum(p.numel() for n, p in folded.named_parameters() if p.ndim > 1)


def test_command(tmp_path: Path) -> None:
    """On digits, in seconds; the second call trains only what is missing."""
    words = ["ablation", "digits", "--rows", "0,9", "--epochs", "1", "--limit", "4", "--size", "8", "--width", "4"]
    words += ["--batch", "8", "--validation", "20", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*words, "--seeds", "1"])
    assert first.exit_code == 0, first.output
    before = [*csv.DictReader((tmp_path / "runs.csv").open())]
    assert [row["row"] for row in before] == [BASE, "ResNet-20 of as many weights"]
    again = CliRunner().invoke(app, [*words, "--seeds", "2"])
    assert again.exit_code == 0, again.output
    rows = [*csv.DictReader((tmp_path / "runs.csv").open())]
    assert rows[:2] == before
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    scores = [100 * float(row["top1"]) for row in rows if row["row"] == BASE]
    line = next(line for line in again.output.splitlines() if line.startswith(BASE))
    mean, spread = torch.tensor(scores).mean().item(), torch.tensor(scores).std().item()
    assert f"\t2\t{mean:.2f} ± {spread:.2f}\t" in line
    other = CliRunner().invoke(app, [*words, "--batch", "10"])
    assert "made with other settings" in str(other.exception)


def test_training_is_repeatable(tmp_path: Path) -> None:
    results = []
    for name in "ab":
        words = [
            "ablation",
            "--rows",
            "0",
            "--epochs",
            "1",
            "--limit",
            "4",
            "--size",
            "8",
            "--width",
            "4",
            "--batch",
            "8",
        ]
        CliRunner().invoke(app, [*words, "--seeds", "1", "--validation", "50", "--out", str(tmp_path / name)])
        results.append([(r["top1"], r["loss"]) for r in csv.DictReader((tmp_path / name / "runs.csv").open())])
    assert results[0] == results[1] != []
