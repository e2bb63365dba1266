"""The GPU benchmark's tables, files, exit codes and command line, and each launch beside its model; without a GPU."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import CPU, FakeDevice, engine_of
from rich.console import Console
from typer.testing import CliRunner

from bench import cuda_levels, report
from bench.__main__ import GPU_ENGINES, app
from bench.gpu import levels, main
from bench.gpu.engines import ENGINES, GpuEngine
from bench.gpu.measure import COLUMNS, GpuPlan, GpuRow
from bench.gpu.timing import CudaDevice, why_no_device
from bench.machine import describe


def request(**changes: Any) -> main.Request:
    values: dict[str, Any] = {
        "suites": ["ops"], "variants": ["s"], "batches": [1], "size": 32, "dtypes": ["fp32", "bf16"],
        "modes": ["warm", "graph"], "engines": [], "plan": GpuPlan(2, 2), "minutes": 5.0, "layers": ("streams.0.0",),
    }  # fmt: skip
    return main.Request(**{**values, **changes})


def fake_run(tmp_path: Path, engines: Callable[[FakeDevice], dict[str, GpuEngine]], **changes: Any) -> tuple[int, str]:
    device = FakeDevice()
    made = engines(device)
    console = Console(width=200, record=True, quiet=False, file=open(tmp_path / "log", "w"))  # noqa: SIM115
    machine = main.GpuMachine(**vars(describe()), gpu="a fake GPU")
    code = main.run(request(engines=list(made), **changes), tmp_path / "out", console, device, machine, made)
    return code, console.export_text()


def usual(device: FakeDevice) -> dict[str, GpuEngine]:
    """Under names that the report knows."""
    wrong = engine_of("compile", 0.1, device, lambda count, y: y * 1.01)
    return {"eager-cl": engine_of("eager-cl", 3.0, device), "compile": wrong, "ours": engine_of("ours", 1.5, device)}


def test_reports_are_complete(tmp_path: Path) -> None:
    code, told = fake_run(tmp_path, usual, dtypes=["fp32", "tf32"])
    assert code == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"results.csv", "results.json", "results.md", "ops-s-warm.png", "ops-s-graph.png"}
    with (out / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == COLUMNS
    assert [(r["engine"], r["status"]) for r in read[:3]] == [("eager-cl", "ok"), ("compile", "wrong"), ("ours", "ok")]
    assert float(read[0]["median_ms"]) == 3.0
    assert read[1]["median_ms"] == "nan"
    data = json.loads((out / "results.json").read_text())
    assert data["machine"]["gpu"] == "a fake GPU"
    assert data["rows"][1]["median_ms"] is None
    text = (out / "results.md").read_text()
    assert "a fake GPU" in text
    (line,) = [x for x in text.splitlines() if "| fp32 | warm |" in x]
    assert [x.strip() for x in line.split("|")][5:9] == ["3.00", "wrong", "**1.50**", "2.00×"]
    assert "compile reduce-overhead, S block 92@8, batch 1, fp32 dtype, warm mode: wrong, error 1.0e-02" in told


def test_ours_is_the_faster_of_ours() -> None:
    def row(engine: str, milliseconds: float) -> GpuRow:
        return GpuRow("net", "w", "s", "network", "", 1, 32, 0, engine, "ok", median_ms=milliseconds)

    rows = {name: row(name, t) for name, t in {"eager-cl": 8.0, "ours-triton": 2.0, "ours": 4.0}.items()}
    against, best, compiled = report.speedups(rows)  # type: ignore[arg-type]
    assert (against, best) == (4.0, "eager-cl")
    assert math.isnan(compiled)


def test_nothing_right_is_an_error(tmp_path: Path) -> None:
    code, told = fake_run(tmp_path, lambda device: {"compile": usual(device)["compile"]}, dtypes=["fp32"])
    assert code == 1
    assert "wrong" in told


def test_time_is_bounded(tmp_path: Path) -> None:
    code, told = fake_run(tmp_path, usual, minutes=-1.0)
    assert code == 1
    assert "minutes are over: 2 cells left out" in told


def test_what_is_run() -> None:
    found = main.tasks(request(suites=["net", "ops", "train", "levels"], layers=None), CPU, Path())
    assert {(t.suite, t.dtype) for t in found} == {(s, d) for s in ("net", "ops", "train") for d in ("fp32", "bf16")}
    assert {t.workload.layer is None for t in found if t.training} == {True, False}


def test_levels_stand_beside_the_model(tmp_path: Path) -> None:
    device = FakeDevice()
    labels = [row.label for row in cuda_levels.levels("s", cuda_levels.GPUS["A100"], False)]

    def launches(variant: str, on: Any, error: float = 1e-4) -> levels.Launches:
        assert (variant, on) == ("s", device)
        return levels.Launches([*labels[:-1], "another"], [lambda: device.work("level", 0.25)] * len(labels), error)

    rows = levels.measure("s", device, "NVIDIA A100-SXM4-80GB", launches)
    assert {row.warm_us for row in rows} == {250.0}
    assert {row.cold_us for row in rows} == {4250.0}
    assert all(row.modelled_us > 0 for row in rows[:-1])
    assert math.isnan(rows[-1].modelled_us), "a launch that the model divides otherwise"
    unknown = levels.measure("s", device, "an unknown GPU", launches)
    assert all(math.isnan(row.modelled_us) for row in unknown)
    console = Console(width=200, record=True, quiet=True)
    levels.show(console, rows, "A100")
    with levels.write(rows, tmp_path).open() as file:
        assert len(list(csv.DictReader(file))) == len(labels)
    for error in (0.1, math.nan):
        with pytest.raises(RuntimeError, match="wrong result, not timed"):
            levels.measure("s", device, "A100", partial(launches, error=error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_levels_on_a_device() -> None:
    rows = levels.measure("s", CudaDevice(), torch.cuda.get_device_name())
    assert all(row.warm_us > 0 and row.cold_us > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_the_command_line_says_what_it_needs() -> None:
    told = CliRunner().invoke(app, ["gpu", "--quick"])
    assert told.exit_code == 1
    assert "needs a CUDA device, torch.cuda.is_available() is False" in told.output
    assert why_no_device() is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpu --suite nets", "--suite"),
        ("gpu --dtypes fp8", "--dtypes"),
        ("gpu --modes hot", "--modes"),
        ("gpu --engines ncnn", "--engines"),
        ("gpu --threads 2", "--threads"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: str, message: str) -> None:
    told = CliRunner().invoke(app, arguments.split())
    assert told.exit_code == 2
    assert message in told.output


def test_help_names_the_engines() -> None:
    assert GPU_ENGINES.split(",") == list(ENGINES)
