"""Fixtures and options that all tests share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptxsim.device import add_option as pytest_addoption  # noqa: F401
from ptxsim.device import (
    device,  # noqa: F401
    mark_items,
)

ROOT = Path(__file__).parents[1]
found = importlib.util.find_spec("parnet_kernels")
if found is None or Path(str(found.origin)).is_relative_to(ROOT / "parnet_kernels"):
    # Built in place, not installed: the processes that tests start must find it too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Processes side by side share the cores: threads that wait for each other would wait for other processes too.
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


class FailuresAtOnce:
    """Prints what failed when it failed: a run that is stopped from outside has no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.nodeid} ({report.when}, {report.duration:.1f} s)")
            reporter.write_line(report.longreprtext[-3000:])


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_items(config, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where torch.compile cannot even compile plain PyTorch: that says nothing about this package."""
    code = "import torch; torch.compile(lambda x: (x * 2).sin().sum())(torch.ones(8, 64))"
    try:
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        pytest.skip("torch.compile does not end within 150 s for a function of PyTorch's own operators")
    if told.returncode != 0:
        pytest.skip(f"torch.compile fails for a function of PyTorch's own operators: {told.stderr.strip()[-500:]}")


@pytest.fixture
def inductor(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI set, as on build servers: TorchInductor asserts more about operators then."""
    monkeypatch.setenv("CI", "true")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that passes once passes again: no random weights that are ill-conditioned one time in a hundred."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """What a test does to the number of threads ends with it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
