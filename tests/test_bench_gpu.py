"""The GPU benchmark without a GPU: order, checks, reports, errors, on a device whose clock the tests drive.

With a GPU, `test_engines_are_right` measures on it; elsewhere its engines run on the CPU, timed by the host's clock.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import cuda_levels, report
from bench.__main__ import GPU_ENGINES, app
from bench.gpu import levels, main
from bench.gpu.engines import ENGINES, Built, GpuEngine, _eager
from bench.gpu.measure import COLUMNS, GpuPlan, GpuRow, cell
from bench.gpu.tasks import GpuTask, error_of, products_in
from bench.gpu.timing import MAX_CALLS, Call, CudaDevice, calls_in_a_sample, sample, why_no_device
from bench.machine import describe
from bench.workloads import Workload
from parnet_kernels.config import ParNetConfig

TINY = ParNetConfig((8, 12, 16, 24), (3, 3, 3), num_classes=10)
CPU = torch.device("cpu")


class _Event:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


class FakeDevice:
    """Its clock moves only where a test moves it, in ms; `log` is what happened, in order."""

    torch_device = CPU
    now = 0.0
    cold = False

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self) -> _Event:
        return _Event(self)

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        self.now += 1000
        self.cold = True
        self.log.append("flush")

    def capture(self, call: Call) -> tuple[Call, Any]:
        result = call()
        self.log.append("capture")
        return lambda: self.work("replay", 0.125), result

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds + (4.0 if self.cold else 0.0)
        self.cold = False


class HostDevice(FakeDevice):
    """The CPU itself, by the host's clock; a graph is the call."""

    def event(self) -> Any:
        class Event:
            def record(self) -> None:
                self.at = time.perf_counter()

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def flush(self) -> None:
        pass

    def capture(self, call: Call) -> tuple[Call, Any]:
        return call, call()


def task_of(
    layer: str | None, folder: Path, dtype: str = "fp32", device: torch.device = CPU, **options: Any
) -> GpuTask:
    return GpuTask(Workload("tiny", TINY, layer, 2, 32), dtype, device, folder, **options)


# ------------------------------------------------------------------ timer


def test_a_warm_sample_is_the_mean_of_calls_in_a_row() -> None:
    device = FakeDevice()
    assert sample(device, lambda: device.work("call", 2.0), 5, cold=False) == 2.0
    assert device.log == ["call"] * 5


def test_a_cold_sample_is_one_call_after_a_flush_that_is_not_timed() -> None:
    device = FakeDevice()
    assert sample(device, lambda: device.work("call", 2.0), 5, cold=True) == 6.0
    assert device.log == ["flush", "call"]


@pytest.mark.parametrize(("cost", "calls"), [(0.1, 10), (5.0, 1), (1e-4, MAX_CALLS)])
def test_calls_last_about_a_millisecond(cost: float, calls: int) -> None:
    device = FakeDevice()
    assert calls_in_a_sample(device, lambda: device.work("call", cost)) == calls


# ------------------------------------------------------------------ a cell


def engine_of(
    name: str, cost: float, device: FakeDevice, change: Callable[[int, torch.Tensor], Any] | None = None
) -> GpuEngine:
    """Eager, with a cost on the fake clock; `change` gets the number of the call and its result."""

    def build(task: GpuTask, mode: str) -> Built:
        eager = _eager(task, mode)
        count = 0

        def run() -> Any:
            nonlocal count
            count += 1
            device.work(name, cost)
            y = eager.run()
            return y if change is None else change(count, y)

        return Built(run, eager.results)

    return GpuEngine(name, build, "torch")


def refuses(task: GpuTask, mode: str) -> Built:
    raise ValueError("no such layer\nand more")


def breaks(count: int, y: torch.Tensor) -> torch.Tensor:
    if count > 8:
        raise RuntimeError("device lost")
    return y


def engines_for(device: FakeDevice) -> dict[str, GpuEngine]:
    nan = float("nan")
    return {
        "a": engine_of("a", 2.0, device),
        "b": engine_of("b", 3.0, device),
        "ours": engine_of("ours", 1.0, device),
        "wrong": engine_of("wrong", 0.1, device, lambda count, y: y * 1.01),
        "nan": engine_of("nan", 0.1, device, lambda count, y: y * nan),
        "late": engine_of("late", 0.1, device, lambda count, y: y if count < 9 else y * 1.01),
        "lost": engine_of("lost", 1.0, device, breaks),
        "refuses": GpuEngine("refuses", refuses, "torch"),
        "missing": GpuEngine("missing", refuses, "no-such-package-of-anyone"),
    }


@pytest.fixture
def measured(tmp_path: Path) -> tuple[FakeDevice, list[GpuRow]]:
    device = FakeDevice()
    plan = GpuPlan(rounds=3, samples=2)
    rows = cell(task_of("streams.0.0", tmp_path), engines_for(device), ["warm", "cold"], plan, device, lambda _: None)
    return device, list(rows)


def test_no_time_for_a_wrong_result(measured: tuple[FakeDevice, list[GpuRow]]) -> None:
    for mode, extra in (("warm", 0.0), ("cold", 4.0)):
        rows = {row.engine: row for row in measured[1] if row.mode == mode}
        status = {name: row.status for name, row in rows.items()}
        right = dict.fromkeys(("a", "b", "ours"), "ok")
        others = {"wrong": "wrong", "nan": "wrong", "late": "wrong", "lost": "failed", "refuses": "failed"}
        assert status == {**right, **others, "missing": "missing"}
        for name, row in rows.items():
            times = [row.median_ms, row.p10_ms, row.p90_ms, row.gflops]
            assert all(map(math.isfinite if name in right else math.isnan, times)), name
            assert bool(row.reason) == (name not in right)
        assert [rows[name].median_ms for name in right] == pytest.approx([2 + extra, 3 + extra, 1 + extra])
        assert "error 1.0e-02 > 5e-05" in rows["wrong"].reason
        assert rows["late"].reason.endswith("after the last sample")
        assert rows["lost"].reason == "RuntimeError: device lost"
        assert rows["refuses"].reason == "ValueError: no such layer"
        assert "no-such-package-of-anyone is not installed" in rows["missing"].reason


def test_engines_take_turns(tmp_path: Path) -> None:
    device = FakeDevice()
    engines = {name: e for name, e in engines_for(device).items() if name in ("a", "b", "ours")}
    plan = GpuPlan(rounds=3, samples=2)
    list(cell(task_of("streams.0.0", tmp_path), engines, ["cold"], plan, device, lambda _: None))
    first = device.log.index("flush") - 1  # a warm-up precedes
    burst = ["flush", "{}"] * 2
    expected = [word.format(name) for names in ("a b ours", "b ours a", "ours a b") for name in names.split()
                for word in ("{}", *burst)]  # fmt: skip
    assert device.log[first : first + len(expected)] == expected


def test_a_graph_is_checked_and_timed(tmp_path: Path) -> None:
    """A captured call, a graph of the engine's own, one that fills nothing, one that cannot be captured."""
    device = FakeDevice()
    plain = engine_of("plain", 2.0, device)

    def own(task: GpuTask, mode: str) -> Built:
        built = plain.build(task, mode)
        return Built(built.run, built.results, lambda: (lambda: device.work("own", 0.5), built.run()))

    def empty(task: GpuTask, mode: str) -> Built:
        built = plain.build(task, mode)
        return Built(built.run, built.results, lambda: (lambda: None, torch.zeros_like(built.run())))

    def uncapturable(task: GpuTask, mode: str) -> Built:
        def graph() -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        return Built(plain.build(task, mode).run, graph=graph)

    engines = {"plain": plain} | {f.__name__: GpuEngine(f.__name__, f, "torch") for f in (own, empty, uncapturable)}
    rows = list(cell(task_of(None, tmp_path), engines, ["graph"], GpuPlan(2, 3), device, lambda _: None))
    assert [row.status for row in rows] == ["ok", "ok", "wrong", "failed"]
    assert [row.median_ms for row in rows[:2]] == [0.125, 0.5]
    assert rows[0].runs == 6
    assert "capturing" in rows[3].reason


def test_without_a_reference_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("bench.gpu.tasks.run_layers", too_large)
    device = FakeDevice()
    task = task_of("streams.0.0", tmp_path)
    rows = list(cell(task, engines_for(device), ["warm", "cold"], GpuPlan(), device, lambda _: None))
    assert {(row.status, math.isnan(row.median_ms)) for row in rows} == {("failed", True)}
    assert rows[0].reason == "no float64 reference: OutOfMemoryError: CUDA out of memory."
    assert not device.log


# ------------------------------------------------------------------ engines and formats


def device_here() -> Any:
    return CudaDevice() if torch.cuda.is_available() else HostDevice()


@pytest.mark.parametrize(
    ("layer", "training", "dtype", "names"),
    [
        (None, False, "fp32", "eager-cl ours ours-triton"),
        (None, False, "bf16", "eager-cl ours ours-triton"),
        ("downsamples_2.1.2", False, "fp32", "eager-cl ours ours-triton"),
        ("streams.1.0", False, "tf32", "eager-cl compile ours"),
        (None, True, "fp32", "eager-cl ours-triton"),
        ("downsamples_2.1.2", True, "bf16", "eager-cl ours-triton"),
        ("streams.1.0", True, "fp32", "eager-cl compile ours-triton"),
    ],
)
def test_engines_are_right(layer: str | None, training: bool, dtype: str, names: str, tmp_path: Path) -> None:
    """Through the whole cell. Without a GPU ours say so; Triton's runs in tests/triton/kernels/test_benchmark.py."""
    device = device_here()
    task = task_of(layer, tmp_path, dtype, device.torch_device, training=training)
    engines = {name: ENGINES[name] for name in names.split()}
    modes = ["graph"] if "compile" in engines else ["warm", "graph"]  # compiling takes seconds
    rows = list(cell(task, engines, modes, GpuPlan(1, 2), device, lambda _: None))
    assert len(rows) == len(modes) * sum(task.suite in e.suites for e in engines.values())
    for row in rows:
        if row.engine.startswith("ours") and not torch.cuda.is_available():
            assert row.status == "failed"
            assert "needs a CUDA device" in row.reason or "x is on cpu" in row.reason, row.reason
        else:
            assert row.status == "ok", (row.engine, row.mode, row.reason)
            assert row.median_ms > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_on_a_device_replays_into_its_result() -> None:
    device = CudaDevice()
    x = torch.zeros(1000, device="cuda")
    replay, y = device.capture(lambda: x + 1)
    x.fill_(2)
    replay()
    device.synchronize()
    assert (y == 3).all()
    assert device._buffer.numel() > device.l2_bytes


def test_formats_bind_torch_and_are_undone() -> None:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    for dtype, precision in (("tf32", "tf32"), ("fp32", "ieee"), ("fp16", "ieee")):
        with products_in(dtype):
            assert [place.fp32_precision for place in places] == [precision] * 2
    assert [place.fp32_precision for place in places] == before


def test_errors_are_the_worst_of_all_tensors() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    assert error_of([ones, 1.5 * ones], [ones, ones]) == pytest.approx(0.5)
    assert error_of([ones[:3]], [ones]) == math.inf
    assert error_of([ones], [ones, ones]) == math.inf
    assert error_of([ones * math.nan, ones], [ones, ones]) == math.inf


# ------------------------------------------------------------------ reports and command line


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

    def launches(variant: str) -> tuple[list[str], list[Call]]:
        assert variant == "s"
        return [*labels[:-1], "another"], [lambda: device.work("level", 0.25)] * len(labels)

    rows = levels.measure("s", device, "NVIDIA A100-SXM4-80GB", launches)
    assert {row.warm_us for row in rows} == {250.0}
    assert {row.cold_us for row in rows} == {4250.0}
    assert all(row.modelled_us > 0 for row in rows[:-1])
    assert math.isnan(rows[-1].modelled_us), "a launch that the model divides otherwise"
    unknown = levels.measure("s", device, "an unknown GPU", launches)
    assert all(math.isnan(row.modelled_us) for row in unknown)
    console = Console(width=200, record=True, quiet=True)
    console.print(levels.table(rows, "A100"))
    with levels.write(rows, tmp_path).open() as file:
        assert len(list(csv.DictReader(file))) == len(labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_levels_on_a_device() -> None:
    rows = levels.measure("s", CudaDevice(), torch.cuda.get_device_name())
    assert all(row.warm_us > 0 and row.cold_us > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_the_command_line_says_what_it_needs() -> None:
    told = CliRunner().invoke(app, ["--device", "cuda", "--quick"])
    assert told.exit_code == 1
    assert "needs a CUDA device, torch.cuda.is_available() is False" in told.output
    assert why_no_device() is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda --suite nets", "--suite"),
        ("--device cuda --dtypes fp8", "--dtypes"),
        ("--device cuda --modes hot", "--modes"),
        ("--device cuda --engines ncnn", "--engines"),
        ("--device cuda --profile", "--profile"),
        ("--device tpu", "--device"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: str, message: str) -> None:
    told = CliRunner().invoke(app, arguments.split())
    assert told.exit_code == 2
    assert message in told.output


def test_help_names_the_engines() -> None:
    assert GPU_ENGINES.split(",") == list(ENGINES)
