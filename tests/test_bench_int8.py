"""`bench int8`: every engine's form of the network is right within its group, groups are never mixed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench import COLD, printed, tiny
from typer.testing import CliRunner

from bench import report
from bench.__main__ import app
from bench.engines import ENGINES, LOW_PRECISION, ROUNDED, Task
from bench.engines.int8 import Ours
from bench.machine import describe
from bench.measure import Bench, Plan, Row
from bench.worker import Worker
from parnet_kernels import _native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("engine", [name for name in LOW_PRECISION if name != "compile-bf16"])
def test_engine_is_right(engine: str, folder: Path) -> None:
    try:
        worker = Worker(engine, 1, folder)
        assert worker.version()
    except ImportError as error:
        pytest.skip(f"{LOW_PRECISION[engine].title} is not installed: {error}")
    built = worker.build(tiny(batch=2), COLD)
    assert not built.wrong
    assert built.error < {"float32": 5e-6, "int8": 0.15, "bf16": 0.03}[LOW_PRECISION[engine].group]
    # Not the float32 network by another name.
    assert LOW_PRECISION[engine].group == "float32" or built.error > 1e-4
    ((wall, cpu),) = worker.time(1, 1)
    assert wall > 0
    assert cpu >= 0


@pytest.mark.slow
def test_compiled_bf16_is_right(folder: Path) -> None:
    test_engine_is_right("compile-bf16", folder)


class _OneWayFails(Ours):
    def forms(self, task: Task) -> list[str]:
        return ["another library", *super().forms(task)]

    def build(self, task: Task, form: str) -> Any:
        if form == "another library":
            raise OSError("it is broken\nin many ways")
        return super().build(task, form)


class _EveryWayFails(_OneWayFails):
    def forms(self, task: Task) -> list[str]:
        return ["another library"]


def test_a_way_that_fails_leaves_the_others(folder: Path) -> None:
    built = Worker("ours-int8", 1, folder, _OneWayFails()).build(tiny(batch=2), COLD)
    assert built.form == "int8"
    assert not built.wrong
    assert "without another library: OSError: it is broken" in built.note
    assert "\n" not in built.note
    with pytest.raises(OSError, match="it is broken"):
        Worker("ours-int8", 1, folder, _EveryWayFails()).build(tiny(batch=2), COLD)


def test_engines_have_groups() -> None:
    assert {kind.group for kind in ENGINES.values()} == {"float32"}
    assert {kind.group for kind in LOW_PRECISION.values()} == {"float32", *ROUNDED}
    for name, kind in LOW_PRECISION.items():
        assert kind.group == name.rpartition("-")[2] or name == "ours"


def row(engine: str, ms: float) -> Row:
    made = Row("net", "ParNet-S", "s", "network", "", 1, 224, 2, engine, "ok", group=LOW_PRECISION[engine].group)
    made.median_ms = made.p10_ms = made.p90_ms = ms
    made.cpu_ms, made.error = 2 * ms, 0.01
    return made


def test_groups_are_never_mixed(tmp_path: Path) -> None:
    """A ratio compares engines of one group only; each line has its error and processor time."""
    rows = [
        row("ours", 1),
        row("openvino-int8", 30),
        row("ours-int8", 20),
        row("ours-bf16", 8),
        row("openvino-bf16", 4),
    ]
    told = printed(lambda console: report.show(console, rows, describe(), report.LOW))
    assert told.count("engine ") == 3
    ratios = [word for line in told.splitlines() for word in line.split() if word.endswith("×")]
    assert ratios == ["1.50×", "0.50×"]
    assert "60.0" in told
    lines = report.markdown(rows, describe(), report.LOW).splitlines()
    (line,) = [text for text in lines if "OpenVINO int8" in text]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["ParNet-S", "1", "int8", "2", "OpenVINO int8", "30.0", "30.0–30.0", "60.0", "1e-02", "1.50×"]
    names = {path.name for path in report.write(rows, describe(), tmp_path, report.LOW)}
    assert names >= {"results.csv", "results.json", "results.md", "net-int8.png", "net-bf16.png", "net-float32.png"}
    with (tmp_path / "results.csv").open() as file:
        assert [r["group"] for r in csv.DictReader(file)] == ["float32", "int8", "int8", "bf16", "bf16"]


@pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
def test_command_line(tmp_path: Path) -> None:
    """The real entry point on a small image; of what is not installed the reason is told."""
    engines = "onnxruntime-int8,ours-int8,ours-bf16"
    arguments = f"int8 --variants s --batch 1 --threads 1 --size 32 --rounds 1 --engines {engines}"
    told = CliRunner().invoke(app, [*arguments.split(), "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["engine"], r["group"]) for r in rows] == [
        ("onnxruntime-int8", "int8"),
        ("ours-int8", "int8"),
        ("ours-bf16", "bf16"),
    ]
    for r in rows:
        assert r["status"] == "ok" or (r["engine"].startswith("onnx") and r["status"] == "missing")
        assert r["status"] != "ok" or (r["median_ms"] > 0 and r["cpu_ms"] > 0 and 1e-4 < r["error"] < 0.2)
    assert rows[0]["status"] == "ok" or "ONNX Runtime int8 is missing: ModuleNotFoundError" in told.output
    told = CliRunner().invoke(app, ["int8", "--engines", "onnxruntime"])
    assert told.exit_code == 2
    assert "--engines" in told.output


def test_a_missing_engine_costs_its_row_only(folder: Path) -> None:
    class Missing:
        alive = True

        def __init__(self, name: str, threads: int, folder: Path) -> None:
            from bench.process import WorkerError

            raise WorkerError(f"ModuleNotFoundError: No module named {name!r}")

    bench = Bench([*LOW_PRECISION], describe(), Plan(rounds=1), folder, Missing)  # type: ignore[arg-type]
    rows = list(bench.cell(tiny(), 1, lambda what: None))
    assert {r.status for r in rows} == {"missing"}
    assert [r.group for r in rows] == [kind.group for kind in LOW_PRECISION.values()]
    assert all(np.isnan(r.median_ms) for r in rows)
