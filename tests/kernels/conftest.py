"""What holds for every test of the kernels."""

import pytest
import torch

from tests.kernels.bounds import check_accesses
from tests.kernels.comparing import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN and large integers, so that nothing rests on what memory happens to hold."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """On a GPU compute-sanitizer does it."""
    if DEVICE == "cpu":
        check_accesses(monkeypatch)
