"""The benchmark: every engine's form of the network is right, a wrong one gets no time, reports are complete."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import calls, report, tables
from bench import profile as profiles
from bench.__main__ import app
from bench.engines import ENGINES, Task
from bench.engines.torch_eager import Eager, TorchProgram, TorchRunner
from bench.limits import costs, gflop, multiplications
from bench.machine import CannotHideError, Ceilings, avx512_hidden, describe, measure_ceilings
from bench.measure import COLUMNS, Bench, Plan, Row
from bench.process import Handle, WorkerError
from bench.worker import Worker, norm_error
from bench.workloads import Workload, random_network, reference_result, select
from parnet_kernels import _native
from parnet_kernels.config import VARIANTS, ParNetConfig, cifar_config
from parnet_kernels.export.graph import graph_of
from parnet_kernels.export.lowering import lower

TINY = ParNetConfig((8, 12, 16, 24), (3, 3, 3), num_classes=10)
TINY_RELU = TINY.replace(activation="relu")
TINY_CIFAR = cifar_config(8)
LAYERS = ["inits.0.0", "inits.1", "streams.0.0", "streams.1.0", "downsamples_2.1.2", "combine.2", "combine.3"]
COLD = 1 << 12  # bytes: a few copies of tiny layers


def tiny(layer: str | None = None, batch: int = 1, config: ParNetConfig = TINY, size: int = 32) -> Workload:
    return Workload("tiny", config, layer, batch, size)


def printed(show: Callable[[Console], None]) -> str:
    """What is shown on a terminal of 80 columns, all of which it must fit."""
    console = Console(width=80, record=True, force_terminal=True, file=io.StringIO())
    show(console)
    told = console.export_text()
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told
    return told


def piped(show: Callable[[Console], None]) -> list[list[str]]:
    """The cells of what is written to a pipe; the other lines begin with #."""
    file = io.StringIO()
    show(Console(file=file))
    return [line.split("\t") for line in file.getvalue().splitlines() if not line.startswith("#")]


# ------------------------------------------------------------------ what is run


@pytest.mark.parametrize("config", [TINY, TINY_RELU, TINY_CIFAR], ids=["silu", "relu", "cifar"])
def test_lowered_network_equals_its_definition(config: ParNetConfig) -> None:
    network = random_network(config)
    graph, image = graph_of(network), torch.randn(2, 3, 32, 32)
    expected = reference_result(graph, [image])
    assert norm_error(network.double()(image.double()).numpy(), expected.numpy()) < 1e-12
    program = lower(graph_of(network), [tuple(image.shape)])
    module = TorchProgram(program, torch.contiguous_format).double()
    assert norm_error(module(image.double()).numpy(), expected.numpy()) < 1e-6  # gates are folded to float32


@pytest.mark.parametrize("layer", LAYERS)
def test_lowered_layer_equals_its_definition(layer: str, tmp_path: Path) -> None:
    workload = tiny(layer, batch=2)
    (graph,) = workload.graphs(1, tmp_path)
    inputs = workload.inputs()
    program = lower(graph, [tuple(x.shape) for x in inputs])
    result = program.restore(TorchProgram(program, torch.channels_last)(*inputs))
    assert norm_error(result.numpy(), reference_result(graph, inputs).numpy()) < 1e-6


def test_copies_differ_and_fill_the_cache() -> None:
    (workload,) = [w for w in select(["ops"], ["s"], [1]) if w.layer == "streams.1.0"]
    copies = workload.copies(56 << 20)
    assert (copies - 1) * workload.weight_bytes < 56 << 20 <= copies * workload.weight_bytes
    first, second = tiny("streams.0.0").graphs(2, Path())
    assert not torch.equal(first.nodes[0].parameters["weight"], second.nodes[0].parameters["weight"])


def test_the_default_is_networks_and_a_block_of_each_stream() -> None:
    chosen = select(["net", "blocks"], ["s", "m"], [1, 8])
    assert [w.title for w in chosen if w.batch == 8][:3] == ["ParNet-S", "ParNet-M", "S block 92@56"]
    assert len(chosen) == 2 * (2 + 2 * 3)
    assert all(w.kind == "repvgg_sse" for w in chosen if w.layer)


def test_selection_has_every_stream_and_each_shape_once() -> None:
    chosen = select(["net", "ops"], list(VARIANTS), [1, 8])
    titles = [w.title for w in chosen if w.batch == 1]
    assert len(titles) == len(set(titles)) == 4 + 4 * 9 + 1
    assert sum(w.kind == "repvgg_sse" for w in chosen) == 2 * 4 * 3
    assert {w.title for w in chosen if w.layer == "streams.2.0"} >= {"S block 384@14", "XL block 800@14"}
    assert sum(w.kind == "stem" for w in chosen) == 2


@pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
def test_profile_names_every_layer(tmp_path: Path) -> None:
    workload = tiny()
    times, whole = profiles.profile(workload, threads=1, folder=tmp_path, rounds=2)
    assert [t.name for t in times] == ["input and head", *(layer.name for layer in workload.graph_layers)]
    assert all(t.seconds > 0 for t in times)
    assert sum(t.seconds + t.waiting for t in times) < 2 * whole
    told = printed(lambda console: profiles.show(console, workload, 1, times, whole, Ceilings(100.0, 10.0)))
    assert "streams.0.0 " in told
    network = workload.network(tmp_path)
    with pytest.raises(RuntimeError, match="no profile without"):
        network.profile(workload.inputs()[0].double())


@pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
def test_public_operators_against_packed_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in LAYERS:
        workload = tiny(layer)
        time = calls.measure(workload, threads=1, cold_bytes=COLD, folder=tmp_path, rounds=2)
        assert 0 < time.packed < 1
        assert 0 < time.public < 1
        assert time.copies == workload.copies(COLD)
    rows = [(workload, 2, calls.CallTime(1.2e-3, 1e-3, 3))]
    assert "20.0 %" in printed(lambda console: calls.show(console, rows))
    # No time for different results.
    monkeypatch.setattr(calls.Ours, "build", lambda *_: wrong_runner(workload))
    with pytest.raises(RuntimeError, match="disagree"):
        calls.measure(workload, threads=1, cold_bytes=COLD, folder=tmp_path, rounds=2)


def wrong_runner(workload: Workload) -> SimpleNamespace:
    return SimpleNamespace(inputs=workload.inputs(), run=lambda copy: torch.zeros(1))


def test_limits_count_the_network() -> None:
    network = Workload("m", VARIANTS["m"], None, 1)
    assert gflop(network) / 2 == pytest.approx(8.582, abs=1e-3)  # PARNET.md, table of totals
    assert multiplications(56, 1) == 76
    assert multiplications(14, 1) == 20
    assert multiplications(28, 2) == 63
    assert all(cost.winograd_macs <= cost.macs for cost in costs(network))


# ------------------------------------------------------------------ engines


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "compile-max"])
def test_engine_is_right(engine: str, folder: Path) -> None:
    """On a network and on every kind of layer: through the worker, which compares with float64."""
    try:
        worker = Worker(engine, 1, folder)
        assert worker.version()
    except ImportError as error:
        pytest.skip(f"{ENGINES[engine].title} is not installed: {error}")
    workloads = [tiny(batch=2), *(tiny(layer) for layer in LAYERS)]
    cold = COLD
    if engine == "compile":  # seconds a workload
        workloads, cold = [tiny("streams.1.0")], 1
    for workload in workloads:
        built = worker.build(workload, cold)
        assert not built.wrong, (workload.title, built.wrong)
        assert built.error < (2e-3 if engine == "mnn" else 1e-5), workload.title
        assert len(worker.time(1, 2)) == 2
        worker.drop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks and references, for all engines."""
    return tmp_path_factory.mktemp("bench")


class _WrongRunner(TorchRunner):
    def run(self, copy: int) -> torch.Tensor:
        return super().run(copy) * 1.01


class _Wrong(Eager):
    def build(self, task: Task, form: str) -> TorchRunner:
        right = super().build(task, form)
        return _WrongRunner(task, right.calls, right.inputs)


class _MixedUp(Eager):
    """Answers every copy with the first one's result."""

    def build(self, task: Task, form: str) -> TorchRunner:
        right = super().build(task, form)
        return TorchRunner(task, right.calls[:1] * len(right.calls), right.inputs)


class _Broken(Eager):
    def build(self, task: Task, form: str) -> TorchRunner:
        raise ValueError("no such layer")


class _InProcess:
    """A Handle without a process, whose engines may be replaced."""

    replaced: ClassVar[dict[str, Any]] = {"eager": _Wrong, "eager-cl": _MixedUp, "openvino": _Broken}
    alive = True

    def __init__(self, name: str, threads: int, folder: Path) -> None:
        if name == "ncnn":
            raise WorkerError("ModuleNotFoundError: No module named 'ncnn'")
        engine = self.replaced.get(name, Eager)()
        self.worker = Worker(name, threads, folder, engine)
        self.version = self.worker.version()

    def call(self, method: str, *arguments: object, timeout: float) -> Any:
        try:
            return getattr(self.worker, method)(*arguments)
        except ValueError as error:
            raise WorkerError(str(error)) from None

    def close(self) -> None:
        pass


@pytest.fixture
def rows(folder: Path) -> list[Row]:
    """Of a block: a right "onnxruntime" and "ours" (eager in their place), the others wrong, missing or failing."""
    engines = ["eager", "eager-cl", "onnxruntime", "openvino", "ncnn", "ours"]
    machine = describe()
    machine.ceilings[1] = Ceilings(100, 10)
    bench = Bench(engines, machine, Plan(rounds=2, burst_s=1e-3, cold_bytes=COLD), folder, _InProcess)  # type: ignore[arg-type]
    return list(bench.cell(tiny("streams.0.0"), 1, lambda what: None))


def test_no_time_for_a_wrong_result(rows: list[Row], tmp_path: Path) -> None:
    status = {row.engine: row.status for row in rows}
    assert status == {
        "eager": "wrong",
        "eager-cl": "wrong",
        "onnxruntime": "ok",
        "openvino": "failed",
        "ncnn": "missing",
        "ours": "ok",
    }
    for row in rows:
        times = np.array([row.median_ms, row.p10_ms, row.p90_ms, row.gflops, row.of_winograd_limit])
        assert np.isfinite(times).all() if row.status == "ok" else np.isnan(times).all()
        assert row.reason or row.status == "ok"
    assert "error 1.0e-02 > 2e-03" in rows[0].reason
    lines = report.markdown(rows, describe()).splitlines()
    (line,) = [text for text in lines if text.startswith("| TINY block")]
    assert [cell.strip() for cell in line.split("|")][4:9] == [
        "wrong",
        "wrong",
        report.number(rows[2].median_ms),
        "failed",
        "missing",
    ]
    against, best, compiled = report.speedups({row.engine: row for row in rows})
    assert best == "onnxruntime"
    assert against > 0
    assert np.isnan(compiled)


def test_reports_are_complete(rows: list[Row], tmp_path: Path) -> None:
    paths = report.write(rows, describe(), tmp_path / "out")
    assert [path.name for path in paths] == ["results.csv", "results.json", "results.md", "ops-tiny.png"]
    with paths[0].open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == COLUMNS
    assert [r["engine"] for r in read] == [row.engine for row in rows]
    data = json.loads(paths[1].read_text())
    assert set(data) == {"machine", "rows"}
    assert data["rows"][0]["median_ms"] is None
    assert data["rows"][2]["median_ms"] == pytest.approx(rows[2].median_ms)
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_tables_fit_a_terminal_and_are_plain_in_a_pipe(rows: list[Row]) -> None:
    told = printed(lambda console: report.show(console, rows, describe()))
    assert told.count("engine ") == 1
    assert next(line for line in told.splitlines() if line.strip().startswith("ONNX")).strip().endswith("×")
    header, *lines = piped(lambda console: report.show(console, rows, describe()))
    assert all(len(line) == len(header) for line in lines)
    assert [line[header.index("status")] for line in lines] == [row.status for row in rows]
    assert float(lines[2][header.index("median_ms")]) == pytest.approx(rows[2].median_ms, rel=1e-5)


def test_tables_of_long_names_are_folded() -> None:
    rows = [("a launch of many layers " * 4, *("123.4",) * 5), ("sum", *("1234",) * 5)]
    header = ("launch", "roofline µs modelled", "µs modelled", "µs warm", "µs cold", "cold / modelled")
    told = printed(lambda console: tables.show(console, "title", header, rows, total=1))
    assert "".join(line[:20].strip() for line in told.splitlines()).count("launch") == 5
    assert piped(lambda console: tables.show(console, "title", header, rows)) == [[*header], *map(list, rows)]


def test_rounds_are_bounded() -> None:
    plan = Plan(rounds=7, cell_s=60)
    assert plan.rounds_for([0.001] * 9) == 7
    assert plan.rounds_for([5.0] * 9) == 3
    assert plan.runs(0.001) == 50
    assert plan.runs(5.0) == 1


# ------------------------------------------------------------------ processes and command line


def test_worker_process_reports_and_survives(tmp_path: Path) -> None:
    handle = Handle("eager", 1, tmp_path)
    try:
        assert handle.version == torch.__version__
        with pytest.raises(WorkerError, match="nothing right was built"):
            handle.call("time", 1, 1, timeout=30)
        assert not handle.call("build", tiny("streams.0.0"), COLD, timeout=60).wrong
        with pytest.raises(WorkerError, match="no answer within"):
            handle.call("time", 0, 10**9, timeout=0.2)
        assert not handle.alive
    finally:
        handle.close()


def test_command_line(tmp_path: Path) -> None:
    """The real entry point on a small image: our engine and eager in processes of their own."""
    arguments = "cpu --suite net --variants s --batch 1 --threads 1 --size 32 --rounds 1 --engines eager,ours"
    told = CliRunner().invoke(app, [*arguments.split(), "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.json", "results.md", "net.png"}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["engine"], r["status"]) for r in rows] == [("eager", "ok"), ("ours", "ok")]
    assert all(r["error"] < 5e-6 and r["median_ms"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cpu --suite all,net", "--suite"),
        ("cpu --variants s,q", "--variants"),
        ("cpu --batch 0", "--batch"),
        ("cpu --engines tvm", "--engines"),
        ("profile --variants t", "--variants"),
        ("profile --quick", "--quick"),
        ("calls --suite net", "--suite"),
        ("tpu", "tpu"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: str, message: str) -> None:
    told = CliRunner().invoke(app, arguments.split())
    assert told.exit_code == 2
    assert message in told.output


def test_ceilings_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    machine = describe()
    measure_ceilings(machine, [1])
    assert not machine.ceilings
    assert "no C++ compiler" in machine.ceilings_line()


def test_engines_do_not_see_hidden_instruction_sets() -> None:
    """In processes started meanwhile, compilers included, whose own handlers of faults must not interfere."""
    before = os.environ.get("LD_PRELOAD")
    try:
        with avx512_hidden():
            told = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
            sees = subprocess.run(told, capture_output=True, text=True, check=True).stdout
            compiler = ["gcc", "-march=native", "-O2", "-x", "c", "-S", "-o", "-", "-"]
            program = "float sum(float *x) { float s = 0; for (int i = 0; i < 64; i++) s += x[i] * x[i]; return s; }"
            assembly = subprocess.run(compiler, input=program, capture_output=True, text=True, check=True).stdout
    except CannotHideError as error:
        pytest.skip(str(error))
    assert "AVX512" not in sees
    assert "zmm" not in assembly
    assert os.environ.get("LD_PRELOAD") == before
    assert "hidden" in describe(hidden=True).line()
    assert "avx512" not in describe(hidden=True).line()


def test_cold_weights_fit_into_memory() -> None:
    """Twenty workers with forms of up to seven times the size, also where the last cache is a server's."""
    machine = dataclasses.replace(describe(), cache_mb=260.0, memory_gb=24.0)
    assert 56 << 20 <= machine.cold_bytes <= (24 << 30) / 256
    assert dataclasses.replace(machine, cache_mb=32.0).cold_bytes == 56 << 20
