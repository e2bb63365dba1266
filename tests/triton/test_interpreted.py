"""Runs the kernels' test bodies under Triton's interpreter, which must be on before triton loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent / "kernels"


@pytest.mark.parametrize("module", sorted(p.stem for p in KERNELS.glob("test_*.py")))
def test_under_the_interpreter(module: str, request: pytest.FixtureRequest) -> None:
    selection = request.config.getoption("markexpr") or ""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        KERNELS / f"{module}.py",
    ]
    done = subprocess.run(
        [*command, "-m", selection],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
    )
    # 5: the selection left nothing to run, as when only slow tests are asked for.
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]
