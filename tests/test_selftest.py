"""The self-test: what it measures, what kernels that hang or end their process do to it, and the verdict it leaves."""

from __future__ import annotations

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from parnet_kernels import verdict
from parnet_kernels.app import selftest
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.cuda.plan import Gpu
from parnet_kernels.triton import backend as triton


def test_measures_errors():
    call, exact = selftest._layer("fusion_se", 2, torch.float32, torch.device("cpu"))
    assert selftest._row("cpu", "fusion", call, exact, 1e-5).passed
    assert not selftest._row("cpu", "fusion", lambda: call() * 1.01, exact, 1e-5).passed
    assert not selftest._row("cpu", "fusion", lambda: call() * float("nan"), exact, 1e-5).passed
    call, exact = selftest._network(1, torch.float32, torch.device("cpu"))
    assert selftest._row("cpu", "network", call, exact, 1e-4).passed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("launch failed\ndetails"), "launch failed"),
        (ValueError("input_precision must be one of"), "input_precision must be one of"),  # Triton's compiler
        (ImportError("no module"), "no module"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_any_error_is_a_failed_row(error, message):
    def fails():
        raise error

    row = selftest._row("triton", "fusion", fails, torch.ones(1), 1e-5)
    assert not row.passed
    assert row.message == message


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


ROW = 'print(\'["cuda", "fusion_se", 0.0, 0.5, ""]\', flush=True)'


def test_a_group_that_ends_well():
    rows = selftest.run_group("cuda", python(f"print('noise'); {ROW}; {ROW}"), 60)
    assert rows == [selftest.Row("cuda", "fusion_se", 0.0, 0.5, "")] * 2


def test_a_group_that_hangs():
    """With a process that it has started, as Triton starts assemblers."""
    code = f"import subprocess; {ROW}; subprocess.run(['sleep', '600'])"
    start = time.monotonic()
    rows = selftest.run_group("cuda", python(code), 3)
    assert time.monotonic() - start < 60
    assert [row.passed for row in rows] == [True, False]
    assert rows[1].what == "cuda kernels after fusion_se"
    assert rows[1].message == "no end within 3 s"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "the process ended with SIGABRT: nothing on standard error"),
        ("raise SystemExit('illegal memory access')", "the process ended with status 1: illegal memory access"),
    ],
)
def test_a_group_that_ends_badly(code, message):
    (row,) = selftest.run_group("triton", python(code), 60)
    assert (row.backend, row.what, row.message) == ("triton", "triton kernels after none", message)
    assert math.isinf(row.error)
    assert not row.passed


def test_the_process_of_a_group_without_a_gpu():
    """The real command: it must at least find the package, and fail for want of a device."""
    if torch.cuda.is_available():
        pytest.skip("the real thing is tested on a GPU")
    (row,) = selftest.run_group("triton", [sys.executable, "-m", "parnet_kernels.app.selftest", "triton", "0"], 300)
    assert "CUDA" in row.message or "NVIDIA" in row.message


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selftest.selftest() == []


# ------------------------------------------------------------------ the verdict


class OnGpu:
    """As much of a CUDA tensor as the predicates look at."""

    device = torch.device("cuda", 0)
    dtype, shape, requires_grad = torch.float16, torch.Size((1, 32, 8, 8)), False


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that every backend could use, and a cache of its own."""
    identity = ["H200, driver 580"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdict, "_found", {})
    monkeypatch.setattr(verdict, "_ignored", False)
    monkeypatch.setattr(verdict, "identity", lambda _: identity[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda._native, "cuda_error", None)
    monkeypatch.setattr(cuda, "device_missing", lambda _: None)
    monkeypatch.setattr(cuda, "policy", lambda _: SimpleNamespace(max_batch=8))
    monkeypatch.setattr(triton, "_device_missing", lambda _: None)
    monkeypatch.setattr(Gpu, "_of", classmethod(lambda cls, index, wgmma: wgmma))
    monkeypatch.setattr("parnet_kernels.cuda.plan._built_for", lambda: ["90", "90a"])
    verdict.stored.cache_clear()
    yield identity
    verdict.stored.cache_clear()


def reasons():
    return {
        "cuda": cuda.why_not("repvgg_sse", OnGpu),
        "wgmma": Gpu.of(torch.device("cuda")),
        "triton": triton.why_not("repvgg_sse", OnGpu),
    }


def another_process():
    verdict._found.clear()
    verdict.stored.cache_clear()


def test_what_has_no_verdict_is_trusted(gpu):
    assert reasons() == {"cuda": None, "wgmma": "planned", "triton": None}


@pytest.mark.parametrize(
    ("failing", "off"),
    [
        ("wgmma fusion_se", "wgmma"),
        ("wgmma in pairs fusion_se", "wgmma"),
        ("fusion_se", "cuda"),
        ("repvgg_sse", "triton"),
    ],
)
def test_what_failed_is_off_here_and_in_later_processes(gpu, monkeypatch, failing, off):
    rows = {
        "cuda": ["fusion_se"],
        "wgmma": ["wgmma fusion_se"],
        "pairs": ["wgmma in pairs fusion_se"],
        "triton": ["repvgg_sse"],
    }

    def run_group(group, command, seconds):
        return [selftest.Row(group, what, float(what == failing), 0.5, "") for what in rows[group]]

    monkeypatch.setattr(selftest, "run_group", run_group)
    assert [row.what for row in selftest.selftest() if not row.passed] == [failing]
    for fresh in (False, True):
        if fresh:
            another_process()
        found = reasons()
        assert (found["wgmma"] == "never") == (off == "wgmma")
        for part in ("cuda", "triton"):
            expected = f"the self-test failed on this GPU: {failing}" if off == part else None
            assert found[part] == expected
    # Another driver, GPU or build: the question is open again.
    gpu[0] = "H200, driver 590"
    another_process()
    assert reasons() == {"cuda": None, "wgmma": "planned", "triton": None}
    # A self-test that passes takes its own verdict back, and nobody else's.
    gpu[0] = "H200, driver 580"
    failing = "none"
    monkeypatch.setattr(selftest, "run_group", lambda *_: [])
    selftest.selftest()
    another_process()
    assert reasons() == {"cuda": None, "wgmma": "planned", "triton": None}
    assert set(json.loads(verdict.path().read_text())) == {"H200, driver 580"}


def test_many_failures_are_told_in_a_line(gpu, monkeypatch):
    rows = [selftest.Row("cuda", f"kernel {i}", 1.0, 0.5, "why\tever") for i in range(9)]
    monkeypatch.setattr(selftest, "run_group", lambda group, *_: rows if group == "cuda" else [])
    selftest.selftest()
    assert str(reasons()["cuda"]).endswith("kernel 2 (why\tever) and 6 others")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"H200, driver 580": 3}', '{"H200, driver 580": {"cuda": null}}'])
def test_a_damaged_file_is_ignored(gpu, text):
    verdict.path().parent.mkdir(parents=True)
    verdict.path().write_text(text)
    if "null" not in text:
        with pytest.warns(UserWarning, match="ignoring the self-test's verdicts"):
            assert verdict.failure("cuda", 0) is None
    assert verdict.failure("cuda", 0) is None
    verdict.remember(0, {"cuda": "wrong"})
    another_process()
    assert verdict.failure("cuda", 0) == "wrong"


def test_a_cache_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    """It holds for this process all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not kept"):
        verdict.remember(0, {"triton": "wrong"})
    assert verdict.failure("triton", 0) == "wrong"


def test_the_process_that_makes_the_verdict_does_not_heed_it(gpu, monkeypatch):
    verdict.remember(0, {"cuda": "wrong"})
    verdict.ignore()
    assert reasons()["cuda"] is None
