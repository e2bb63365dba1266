"""The GPU benchmark without a GPU: order, checks, reports, errors, on a device whose clock the tests drive.

With a GPU, `test_engines_are_right` measures on it; elsewhere its engines run on the CPU, timed by the host's clock.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, HostDevice, engine_of, task_of

from bench.gpu.engines import ENGINES, Built, GpuEngine
from bench.gpu.measure import GpuPlan, GpuRow, cell
from bench.gpu.tasks import GpuTask, error_of, products_in
from bench.gpu.timing import MAX_CALLS, CudaDevice, calls_in_a_sample, sample

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
