"""`parnet latency`: what it says is what it measured, in 80 columns and in a pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, save
from parnet_kernels.app.cli import app
from parnet_kernels.app.console import print_table
from parnet_kernels.app.latency import histogram, measure, quantiles


@pytest.fixture
def net(tmp_path: Path) -> Path:
    network = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)).eval().deploy()
    network.preprocessing = Preprocessing(32)
    save(network, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_command(net: Path) -> None:
    arguments = ["latency", str(net), "--threads", "1", "--seconds", "0.2", "--batch", "2", "--frame", "64x48"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["input"], found["frame"], found["threads"]) == ([2, 3, 32, 32], [64, 48], 1)
    assert found["runs as"] == "one call of the native kernels"
    assert {*found["ms"]} == {"network", "preprocessing", "frame to result"}
    for summary in found["ms"].values():
        assert 0 < summary["min"] <= summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["max"]
        assert summary["calls"] >= 20
    piped = CliRunner().invoke(app, [*arguments, "--size", "48"])
    assert piped.exit_code == 0, piped.output
    assert "size 48 asked for, not 32" in piped.stderr
    lines = [line.split("\t") for line in piped.stdout.splitlines()]
    assert ["input", "2×3×48×48"] in lines
    assert ["ms", "min", "p50", "p90", "p99", "max", "calls"] in lines


@pytest.mark.parametrize(
    "wrong", [("--frame", "640"), ("--frame", "0x4"), ("--threads", "0"), ("--size", "0"), ("--seconds", "0")], ids=str
)
def test_wrong_options(net: Path, wrong: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["latency", str(net), *wrong])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_histogram_counts_every_call() -> None:
    generator = np.random.default_rng(0)
    for values in (generator.gamma(3, size=1000) + 15, np.full(50, 3.25), np.array([1.0, 2.0])):
        rows = histogram([*values])
        assert sum(count for _, count, _ in rows) == len(values)
        assert max(len(bar) for *_, bar in rows) == 40
        file = io.StringIO()
        print_table(Console(file=file, width=80, force_terminal=True, color_system=None), ("ms", "calls", ""), rows)
        assert all(len(line) <= 80 for line in file.getvalue().splitlines())
        assert "…" not in [line[-1] for line in file.getvalue().splitlines()]
    assert quantiles([3.0, 1.0, 2.0]) == {"min": 1.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = measure({name: lambda name=name: order.append(name) for name in "ab"}, 0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20}
    assert order[6:] == ["a", "b"] * 20
