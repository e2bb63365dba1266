"""Runs the kernels' test bodies under Triton's interpreter, which must be on before triton loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent / "kernels"
MODULES = sorted(
    (p.stem for p in KERNELS.glob("test_*.py")), key=lambda name: name != "test_operators"
)  # longest first

pytestmark = pytest.mark.timeout(7200)  # of whole modules; each of their tests has its own limit

Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Every module, two at a time."""
    selection = request.config.getoption("markexpr") or ""

    def run(module: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", KERNELS / f"{module}.py"]
        return subprocess.run(
            [*command, "-m", selection],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            cwd=request.config.rootpath,
        )

    with ThreadPoolExecutor(2) as pool:
        yield {module: pool.submit(run, module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_under_the_interpreter(module: str, runs: Runs) -> None:
    done = runs[module].result()
    # 5: the selection left nothing to run, as when only slow tests are asked for.
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]
