"""bench/train.py: the comparison of training steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer")
from typer.testing import CliRunner

from bench import train
from bench.__main__ import app
from bench.train import Row
from parnet_kernels.cpu import training as cpu
from parnet_kernels.model import parnet_cifar

native = pytest.mark.skipif(cpu.why_not(torch.empty(0)) is not None, reason="no compiled library")


@native
@pytest.mark.parametrize("engines", [["ours"], pytest.param(["eager", "ours"], marks=pytest.mark.slow)], ids=len)
def test_engines_take_turns(engines: list[str]) -> None:
    rows = train.cell("cifar", 8, 32, 1, engines, 2)
    for row in rows:
        assert row.status == "ok"
        assert 0 < row.seconds < 60  # type: ignore[operator]
        assert 0 < row.processor < 60  # type: ignore[operator]
        assert row.error < 1e-5  # type: ignore[operator]
        assert 8 << 20 < row.memory < 1 << 30  # type: ignore[operator]
    if len(rows) == 2:
        assert rows[1].memory < rows[0].memory  # type: ignore[operator]
        assert "x the best other" in [*train.lines(rows)][1]


def _fails(engine: train._Engine) -> dict[str, float]:
    raise RuntimeError("ended with code 1")


ANSWERS = {
    "wrong gradients: 1.0e+00": lambda engine: {"error": 1.0},
    "wrong gradients: nan": lambda engine: {"error": float("nan")},
    "ended with code 1": _fails,
}


@pytest.mark.parametrize("status", ANSWERS)
def test_no_time_for_wrong_gradients(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train._Engine, "__init__", lambda engine, *where: None)
    monkeypatch.setattr(train._Engine, "answer", ANSWERS[status])
    monkeypatch.setattr(train._Engine, "close", lambda engine: None)
    rows = train.cell("cifar", 2, 32, 1, ["ours"], 1)
    assert rows == [Row("cifar", 2, 1, "ours", None, None, None, None, status)]
    assert next(train.lines(rows)).endswith(status)


def test_wrong_gradients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "parnet_cifar", lambda width: parnet_cifar(8))
    assert train.gradient_error("channels_last", "cifar", 16) < 1e-5
    right = train.Step.loss
    monkeypatch.setattr(train.Step, "loss", lambda s, x, t: right(s, x, t) * (1.001 if x.dtype == torch.float32 else 1))
    assert train.gradient_error("eager", "cifar", 16) > train.MAX_ERROR


def test_ratios() -> None:
    rows = [
        Row("s", 8, 1, "eager", 4.0, 4.0, 1000.0 * 2**20, 1e-6, "ok"),
        Row("s", 8, 1, "compile", 3.0, 5.0, 900.0 * 2**20, 1e-6, "ok"),
        Row("s", 8, 1, "ours", 2.0, 2.5, 500.0 * 2**20, 1e-6, "ok"),
    ]
    *_, ours = train.lines(rows)
    assert ours.endswith("1.50x the best other (1.60x of processors), 0.50 of eager's memory")
    (alone,) = train.lines(rows[2:])
    assert "x the best" not in alone


@pytest.mark.parametrize("option", ["--nets", "--engines"])
def test_the_command_refuses_what_it_does_not_know(option: str) -> None:
    done = CliRunner().invoke(app, ["train", option, "nonsense"])
    assert done.exit_code == 2
    assert "nonsense" in done.output
