"""The benchmark's Triton engine: right in every suite, through the cell that would time it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_device import TINY, HostDevice

from bench.gpu.engines import ENGINES
from bench.gpu.measure import GpuPlan, cell
from bench.gpu.tasks import GpuTask
from bench.gpu.timing import CudaDevice
from bench.workloads import Workload


@pytest.mark.parametrize(
    ("layer", "training", "dtype"),
    [
        (None, False, "fp16"),
        ("downsamples_2.1.2", False, "bf16"),
        ("streams.1.0", True, "fp32"),
        pytest.param(None, True, "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_engine_is_right(
    layer: str | None, training: bool, dtype: str, where: torch.device, tmp_path: Path
) -> None:
    device = CudaDevice() if where.type == "cuda" else HostDevice()
    task = GpuTask(Workload("tiny", TINY, layer, 2, 32), dtype, device.torch_device, tmp_path, training)
    (row,) = cell(task, {"ours-triton": ENGINES["ours-triton"]}, ["warm"], GpuPlan(1, 1), device, lambda _: None)
    assert row.status == "ok", row.reason
    assert row.median_ms > 0
