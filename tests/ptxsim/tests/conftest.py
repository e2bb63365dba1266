import pytest
from ptxsim import Unavailable
from ptxsim.native import core
from ptxsim.toolchain import why_no_nvcc


def pytest_collection_modifyitems(items):
    for item in items:
        if "ptxsim/tests" in str(item.path):
            item.add_marker(pytest.mark.ptxsim)


@pytest.fixture(scope="session", autouse=True)
def _native_core():
    """Without a compiler for the native core there is nothing to test."""
    try:
        core()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def nvcc():
    if reason := why_no_nvcc():
        pytest.skip(reason)
