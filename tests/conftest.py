"""Fixtures and options that all tests share."""

import pytest
import torch
from ptxsim.device import add_option as pytest_addoption  # noqa: F401
from ptxsim.device import device  # noqa: F401
from ptxsim.device import mark_items as pytest_collection_modifyitems  # noqa: F401


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
