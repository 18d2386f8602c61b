"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import pretend_device  # before the first backward pass, when PyTorch starts a thread for each device

assert pretend_device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device; what the machine lacks is skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
